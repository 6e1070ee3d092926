"""Optimizer steps for the touched rows of an embedding table, equal to the dense optimizer to rounding.

A row without a gradient moves all the same, in a way that depends on the missed steps alone. It is brought to the
present in one go when it is next read: memory traffic and memory are those of the touched rows. Two rules.

ScheduleFree, which is RAdamScheduleFree without weight decay: with R_k the product of (1 - c) over the steps 1..k,

    catch up   y <- z + (y - z) R_now / R_last               v <- v beta2^(now - last)
    update     v <- beta2 v + (1 - beta2) g^2                d  = g / (sqrt(v / bias_correction) + eps)
               y <- z + (y - z) (1 - c) + gradient_weight d  z <- z - learning_rate d

Adam, which is Adam and AdamW: step s only fades the moments and moves the row along them,

    m <- beta1 m    v <- beta2 v    w <- keep_s w - rate_s m / (sqrt(v) root_s + eps)

Where eps is small beside sqrt(v), the denominators are short series in eps / sqrt(v), whose coefficients are sums over
the missed steps, the same for every row: the CPU does no work per missed step there. Elsewhere, and on a GPU, the
missed steps are added up one by one, until beta1^k leaves nothing to add. Rows never touched shrink by weight decay.

`gather` reads rows as of the present and writes nothing, `reduce` adds the gradients of equal ids, `update` catches up
and steps. The state of a row gets the next slot with its first gradient.

On a GPU values are checked by the kernels and no call waits for them: a fault raises in a later call or in
`check_deferred`, and from it on nothing is written.
Source: Defazio et al. 2024 (schedule-free), Kingma and Ba 2015, Loshchilov and Hutter 2019; the closed forms are ours
(`csrc/row_sparse/row_sparse.h`).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ubp_fast.kernels import backends, transforms
from ubp_fast.kernels.checks import require, require_dtype, require_same
from ubp_fast.kernels.row_sparse import _native, _triton, reference
from ubp_fast.kernels.row_sparse.reference import Adam, AdamStep, RowTable, Rule, ScheduleFree, ScheduleFreeStep, Step
from ubp_fast.kernels.transforms import require_constant

OP = "row_sparse"
FLOATS = (torch.float32, torch.float64)
RULES: dict[str, tuple[type[Rule], type[Step]]] = {
    "schedule_free": (ScheduleFree, ScheduleFreeStep),
    "adam": (Adam, AdamStep),
}
IMPLEMENTATIONS: dict[str, ModuleType] = {"native": _native, "triton": _triton, "reference": reference}
# float32 runs natively on the CPU and with Triton on NVIDIA GPUs; the rest takes the reference.
ORDER = ("native", "triton", "reference")


def gather(table: RowTable, rule: Rule, ids: Tensor, *, backend: str = "auto") -> Tensor:
    """The weights of some rows as the dense optimizer would hold them now; nothing is written.

    Args:
        table: float32 or float64.
        rule: `ScheduleFree` or `Adam`; 0 <= beta1 < 1, 0 < beta2 < 1, eps > 0.
        ids: int64 [...], each in 0..N-1, in any order, repeated or not.
        backend: "auto", "native" (compiled, CPU), "triton" (NVIDIA GPU) or "reference".

    Returns:
        [..., D] in the dtype of the table. No gradient flows through it; `RowSparseEmbedding` adds that.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or the rule break what is said above.
        IndexError: an id lies outside the table; on a GPU later, the row is NaN until then.
        BackendUnavailable: the named backend does not exist, or not for these tensors.
    """
    kind = _check(table, rule)
    _check_ids(ids, table.weight)
    return _direct_gather(*table, kind, list(rule), ids.reshape(-1), backend).view(*ids.shape, table.weight.shape[1])


def reduce(ids: Tensor, gradient: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Adds the gradients of equal ids, in the order of the batch. On a GPU it waits: the data give the shape.

    Args:
        ids: int64 [T], none negative.
        gradient: float32 or float64 [T, D], any strides.
        backend: as above.

    Returns:
        Distinct ids, int64 [U] ascending, and the sums [U, D]. The same for any number of threads, bit by bit.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailable: as for `gather`.
    """
    _check_entries(ids, gradient)
    return _direct_reduce(ids, gradient, backend)


def reduce_padded(ids: Tensor, gradient: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """`reduce` with results in the shapes of the inputs, for `update` with a count: on a GPU nothing waits.

    Args:
        ids, gradient, backend: as for `reduce`; ids that are negative are for `update` to refuse.

    Returns:
        Distinct ids, int64 [T], ascending, -1 from U on; the sums [T, D], 0 from U on; U, int64 [1].

    Raises:
        ValueError, TypeError, BackendUnavailable: as for `reduce`.
    """
    _check_entries(ids, gradient)
    return _reduce_padded_op(ids, gradient, backend)


def update(
    table: RowTable,
    rule: Rule,
    ids: Tensor,
    gradient: Tensor,
    step: Step,
    *,
    count: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Brings the rows `ids` to the present and takes step S + 1 with their gradient; other rows are not touched.

    Args:
        table: changed in place (`last_step` of the rows becomes S + 1; the caller extends `history`).
        rule: as above.
        ids: int64 [U], strictly ascending, as `reduce` returns them.
        gradient: [U, D] in the dtype of the table.
        step: the numbers of this step, those of the rule.
        count: int64 [1], entries of `ids` and `gradient` that are no padding, as `reduce_padded` returns it; None: all.
        backend: as above.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailable: as for `gather`; with a fault nothing is written.
    """
    kind = _check(table, rule)
    _check_ids(ids, table.weight)
    shape = (*ids.shape, table.weight.shape[1])
    if ids.ndim != 1 or gradient.shape != shape:
        require(False, OP, "gradient", f"have shape {list(shape)}", list(gradient.shape))
    require_same(OP, "weight", table.weight, gradient=gradient)
    require_constant(OP, "gradient", gradient, "use .detach()")
    wanted = RULES[kind][1]
    require(isinstance(step, wanted), OP, "step", f"be of {wanted.__name__} like the rule", type(step).__name__)
    if count is not None:
        require_dtype(OP, "count", count, (torch.int64,))
        if count.shape != (1,) or count.device != ids.device:
            require(False, OP, "count", f"have shape [1] on {ids.device}", f"{list(count.shape)} on {count.device}")
    _update_op(*table, kind, list(rule), ids, gradient, [float(number) for number in step], count, backend)


def catch_up(table: RowTable, rule: Rule, *, toward_z: float = 0.0, backend: str = "auto") -> None:
    """Brings every row to the present and sets the step of touched ones to 0; the caller starts `history` anew.

    Args:
        table: changed in place.
        rule: as above.
        toward_z: of ScheduleFree: y moves by this share of z - y afterwards. 1 - 1 / beta1 turns y into x, the weights
            for evaluation, 1 - beta1 turns x into y again.
        backend: as above.

    Raises:
        ValueError, TypeError, BackendUnavailable: as for `gather`.
    """
    kind = _check(table, rule)
    require(toward_z == 0.0 or kind == "schedule_free", OP, "toward_z", "be 0 for Adam", toward_z)
    _catch_up_op(*table, kind, list(rule), toward_z, backend)


def _check(table: RowTable, rule: Rule) -> str:
    """Returns the rule's name. Runs with every lookup and step: what a message needs is made when it is raised."""
    weight, state, history = table.weight, table.state, table.history
    is_adam = isinstance(rule, Adam)
    if weight.ndim != 2:
        require(False, OP, "weight", "have shape [N, D]", list(weight.shape))
    require_dtype(OP, "weight", weight, FLOATS)
    rows, width = weight.shape
    if state.ndim != 3 or state.shape[1:] != (2, width):
        require(False, OP, "state", f"have shape [C, 2, {width}]", list(state.shape))
    require_same(OP, "weight", weight, state=state)
    require_dtype(OP, "history", history, (torch.float64,))
    columns = (3,) if is_adam else ()
    if history.ndim != 1 + len(columns) or len(history) < 1 or history.shape[1:] != columns:
        require(False, OP, "history", f"have shape [S + 1{', 3' if is_adam else ''}]", list(history.shape))
    for name, tensor in (("slot", table.slot), ("last_step", table.last_step)):
        require_dtype(OP, name, tensor, (torch.int32,))
        if tensor.shape != (rows,):
            require(False, OP, name, "have shape [N]", list(tensor.shape))
    require_dtype(OP, "used", table.used, (torch.int64,))
    if table.used.shape != (1,):
        require(False, OP, "used", "have shape [1]", list(table.used.shape))
    device = weight.device
    for at, tensor in enumerate(table):
        if tensor.device != device:
            require(False, OP, table._fields[at], f"be on {device} like weight", tensor.device)
        if not tensor.is_contiguous():
            require(False, OP, table._fields[at], "be contiguous", list(tensor.stride()))
    require_constant(OP, "weight", weight, "take RowSparseEmbedding")
    is_rule = 0 < rule.beta2 < 1 and rule.eps > 0 and (not isinstance(rule, Adam) or 0 <= rule.beta1 < 1)
    if not is_rule:
        require(False, OP, "rule", "have 0 <= beta1 < 1, 0 < beta2 < 1 and eps > 0", tuple(rule))
    return "adam" if is_adam else "schedule_free"


def _check_ids(ids: Tensor, like: Tensor) -> None:
    require_dtype(OP, "ids", ids, (torch.int64,))
    if ids.device != like.device:
        require(False, OP, "ids", f"be on {like.device}", ids.device)


def _check_entries(ids: Tensor, gradient: Tensor) -> None:
    require_dtype(OP, "gradient", gradient, FLOATS)
    require_constant(OP, "gradient", gradient, "use .detach()")
    _check_ids(ids, gradient)
    if gradient.ndim != 2 or ids.ndim != 1 or gradient.shape[0] != ids.shape[0]:
        shapes = f"{list(gradient.shape)} for {list(ids.shape)}"
        require(False, OP, "gradient", "have shape [T, D] for ids [T]", shapes)


def _implementation(backend: str, tensor: Tensor) -> ModuleType:
    return IMPLEMENTATIONS[backends.resolve(OP, backend, IMPLEMENTATIONS, ORDER, tensor)]


TABLE = "Tensor{} weight, Tensor{} state, Tensor{} slot, Tensor{} used, Tensor{} last_step, Tensor history"
READ = TABLE.format(*[""] * 5)
RULE = "str kind, float[] rule"


@torch.library.custom_op(
    "ubp_fast::row_sparse_gather", mutates_args=(), schema=f"({READ}, {RULE}, Tensor ids, str backend) -> Tensor"
)
def _gather_op(weight, state, slot, used, last_step, history, kind, rule, ids, backend):
    table = RowTable(weight, state, slot, used, last_step, history)
    return _implementation(backend, weight).gather(table, RULES[kind][0](*rule), ids)


@_gather_op.register_fake
def _(weight, state, slot, used, last_step, history, kind, rule, ids, backend):
    return weight.new_empty((ids.shape[0], weight.shape[1]))


@torch.library.custom_op("ubp_fast::row_sparse_reduce", mutates_args=())
def _reduce_op(ids: Tensor, gradient: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _implementation(backend, gradient).reduce(ids, gradient)


@_reduce_op.register_fake
def _(ids, gradient, backend):
    groups = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty((groups,)), gradient.new_empty((groups, gradient.shape[1]))


@torch.library.custom_op("ubp_fast::row_sparse_reduce_padded", mutates_args=())
def _reduce_padded_op(ids: Tensor, gradient: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _implementation(backend, gradient)
    if implementation is _triton:
        return _triton.reduce_padded(ids, gradient)
    distinct, sums = implementation.reduce(ids, gradient)
    padded, padded_sums = torch.full_like(ids, -1), torch.zeros(gradient.shape, dtype=gradient.dtype, device=ids.device)
    padded[: len(distinct)], padded_sums[: len(distinct)] = distinct, sums
    return padded, padded_sums, torch.full((1,), len(distinct), dtype=torch.int64, device=ids.device)


@_reduce_padded_op.register_fake
def _(ids, gradient, backend):
    return ids.new_empty(ids.shape), gradient.new_empty(gradient.shape), ids.new_empty((1,))


_direct_gather, _direct_reduce = transforms.direct(_gather_op), transforms.direct(_reduce_op)
UPDATED = TABLE.format(*(f"(a{at}!)" for at in range(5)))


@torch.library.custom_op(
    "ubp_fast::row_sparse_update",
    mutates_args=("weight", "state", "slot", "used", "last_step"),
    schema=f"({UPDATED}, {RULE}, Tensor ids, Tensor gradient, float[] step, Tensor? count, str backend) -> ()",
)
def _update_op(weight, state, slot, used, last_step, history, kind, rule, ids, gradient, step, count, backend):
    table = RowTable(weight, state, slot, used, last_step, history)
    known, implementation = RULES[kind][0](*rule), _implementation(backend, weight)
    numbers = AdamStep(*step) if kind == "adam" else ScheduleFreeStep._make([*step[:4], step[4] != 0.0])
    if implementation is _triton:
        _triton.update(table, known, ids, gradient, numbers, count)
        return
    if count is not None:
        ids, gradient = ids[: int(count)], gradient[: int(count)]
    implementation.update(table, known, ids, gradient, numbers)


@torch.library.custom_op(
    "ubp_fast::row_sparse_catch_up",
    mutates_args=("weight", "state", "last_step"),
    schema=f"({TABLE.format('(a0!)', '(a1!)', '', '', '(a2!)')}, {RULE}, float toward_z, str backend) -> ()",
)
def _catch_up_op(weight, state, slot, used, last_step, history, kind, rule, toward_z, backend):
    table = RowTable(weight, state, slot, used, last_step, history)
    _implementation(backend, weight).catch_up(table, RULES[kind][0](*rule), toward_z)
