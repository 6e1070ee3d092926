"""Adam and AdamW for the touched rows of an embedding table, equal to the dense optimizer to rounding.

Without a gradient, step s only fades the moments and moves the row along them:

    m <- beta1 m    v <- beta2 v    w <- keep_s w - rate_s m / (sqrt(v) root_s + eps)

A row that is up to date with step `last` is brought to the present in one go. Where eps is small beside sqrt(v), the
denominators are short series in eps / sqrt(v), whose coefficients are sums over the missed steps, the same for every
row: no work per missed step. Elsewhere the missed steps are added up one by one, until beta1^k leaves nothing to add.
Rows never touched shrink by the weight decay only.

`gather` reads rows as of the present and writes nothing, `update` brings rows to the present and steps. Gradients of
equal ids are added by `row_sparse.reduce` before. Memory traffic and memory are those of the touched rows.
Source: Kingma and Ba 2015, Loshchilov and Hutter 2019; the sums are ours (`csrc/row_sparse_adam/row_sparse_adam.h`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ubp_fast.kernels import backends
from ubp_fast.kernels.checks import require, require_dtype, require_same
from ubp_fast.kernels.row_sparse_adam import _native, reference
from ubp_fast.kernels.row_sparse_adam.reference import AdamRows, AdamRule

OP = "row_sparse_adam"
FLOATS = (torch.float32, torch.float64)
IMPLEMENTATIONS: dict[str, ModuleType] = {"native": _native, "reference": reference}
# float32 on the CPU runs natively; float64 and other devices take the reference.
ORDER = ("native", "reference")


def gather(rows: AdamRows, rule: AdamRule, ids: Tensor, *, backend: str = "auto") -> Tensor:
    """The weights of some rows as the dense optimizer would hold them now; nothing is written.

    Args:
        rows: the table, float32 or float64.
        rule: 0 <= beta1 < 1, 0 < beta2 < 1, eps > 0.
        ids: int64 [...], each in 0..N-1, in any order, repeated or not.
        backend: "auto", "native" (compiled, CPU) or "reference".

    Returns:
        [..., D] in the dtype of the table. No gradient flows through it; `RowSparseEmbedding` adds that.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or the rule break what is said above.
        IndexError: an id lies outside the table.
        BackendUnavailable: the named backend does not exist, or not for these tensors.
    """
    _check(rows, rule)
    _check_ids(ids, rows.weight)
    return _gather_op(*rows, list(rule), ids.reshape(-1), backend).view(*ids.shape, rows.weight.shape[1])


def update(
    rows: AdamRows,
    rule: AdamRule,
    ids: Tensor,
    gradient: Tensor,
    step: tuple[float, float, float],
    *,
    backend: str = "auto",
) -> None:
    """Brings the rows `ids` to the present and takes step S + 1 with their gradient; other rows are not touched.

    Args:
        rows: the table, changed in place (`last_step` of the rows becomes S + 1; the caller extends `history`).
        rule: as above.
        ids: int64 [U], strictly ascending, as `row_sparse.reduce` returns them.
        gradient: [U, D] in the dtype of the table.
        step: rate, root and keep of this step, see `AdamRows.history`.
        backend: as above.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailable: as for `gather`.
    """
    _check(rows, rule)
    _check_ids(ids, rows.weight)
    shape = [*ids.shape, rows.weight.shape[1]]
    require(
        ids.ndim == 1 and list(gradient.shape) == shape, OP, "gradient", f"have shape {shape}", list(gradient.shape)
    )
    require_same(OP, "weight", rows.weight, gradient=gradient)
    _update_op(*rows, list(rule), ids, gradient, list(step), backend)


def catch_up(rows: AdamRows, rule: AdamRule, *, backend: str = "auto") -> None:
    """Brings every row to the present; the step of touched rows is 0 then, the caller starts `history` anew.

    Raises:
        ValueError, TypeError, BackendUnavailable: as for `gather`.
    """
    _check(rows, rule)
    _catch_up_op(*rows, list(rule), backend)


def _check(rows: AdamRows, rule: AdamRule) -> None:
    weight, state, history = rows.weight, rows.state, rows.history
    require(weight.ndim == 2, OP, "weight", "have shape [N, D]", list(weight.shape))
    require_dtype(OP, "weight", weight, FLOATS)
    is_state = state.ndim == 3 and state.shape[1:] == (2, weight.shape[1])
    require(is_state, OP, "state", f"have shape [C, 2, {weight.shape[1]}]", list(state.shape))
    require_same(OP, "weight", weight, state=state)
    require_dtype(OP, "history", history, (torch.float64,))
    is_history = history.ndim == 2 and len(history) >= 1 and history.shape[1] == 3
    require(is_history, OP, "history", "have shape [S + 1, 3]", list(history.shape))
    for name, tensor in (("slot", rows.slot), ("last_step", rows.last_step)):
        require_dtype(OP, name, tensor, (torch.int32,))
        require(tensor.shape == weight.shape[:1], OP, name, "have shape [N]", list(tensor.shape))
    require_dtype(OP, "used", rows.used, (torch.int64,))
    require(rows.used.shape == (1,), OP, "used", "have shape [1]", list(rows.used.shape))
    for name, tensor in rows._asdict().items():
        require(tensor.device == weight.device, OP, name, f"be on {weight.device} like weight", tensor.device)
        require(tensor.is_contiguous(), OP, name, "be contiguous", list(tensor.stride()))
    is_rule = 0 <= rule.beta1 < 1 and 0 < rule.beta2 < 1 and rule.eps > 0
    require(is_rule, OP, "rule", "have 0 <= beta1 < 1, 0 < beta2 < 1 and eps > 0", tuple(rule))


def _check_ids(ids: Tensor, like: Tensor) -> None:
    require_dtype(OP, "ids", ids, (torch.int64,))
    require(ids.device == like.device, OP, "ids", f"be on {like.device}", ids.device)


def _implementation(backend: str, tensor: Tensor) -> ModuleType:
    return IMPLEMENTATIONS[backends.resolve(OP, backend, IMPLEMENTATIONS, ORDER, tensor)]


@torch.library.custom_op("ubp_fast::row_sparse_adam_gather", mutates_args=())
def _gather_op(
    weight: Tensor,
    state: Tensor,
    slot: Tensor,
    used: Tensor,
    last_step: Tensor,
    history: Tensor,
    rule: Sequence[float],
    ids: Tensor,
    backend: str,
) -> Tensor:
    rows = AdamRows(weight, state, slot, used, last_step, history)
    return _implementation(backend, weight).gather(rows, AdamRule._make(rule), ids)


@_gather_op.register_fake
def _(weight, state, slot, used, last_step, history, rule, ids, backend):
    return weight.new_empty((ids.shape[0], weight.shape[1]))


@torch.library.custom_op(
    "ubp_fast::row_sparse_adam_update", mutates_args=("weight", "state", "slot", "used", "last_step")
)
def _update_op(
    weight: Tensor,
    state: Tensor,
    slot: Tensor,
    used: Tensor,
    last_step: Tensor,
    history: Tensor,
    rule: Sequence[float],
    ids: Tensor,
    gradient: Tensor,
    step: Sequence[float],
    backend: str,
) -> None:
    rows = AdamRows(weight, state, slot, used, last_step, history)
    _implementation(backend, weight).update(rows, AdamRule._make(rule), ids, gradient, tuple(step))


@torch.library.custom_op("ubp_fast::row_sparse_adam_catch_up", mutates_args=("weight", "state", "last_step"))
def _catch_up_op(
    weight: Tensor,
    state: Tensor,
    slot: Tensor,
    used: Tensor,
    last_step: Tensor,
    history: Tensor,
    rule: Sequence[float],
    backend: str,
) -> None:
    rows = AdamRows(weight, state, slot, used, last_step, history)
    _implementation(backend, weight).catch_up(rows, AdamRule._make(rule))
