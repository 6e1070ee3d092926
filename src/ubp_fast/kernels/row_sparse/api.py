"""RAdamScheduleFree for the touched rows of an embedding table, equal to the dense optimizer without weight decay.

A row without a gradient only moves from y towards z, and its second moment decays. With R_k the product of (1 - c) over
the steps 1..k, a row that is up to date with step `last` is brought to the present `now` in one go:

    catch up   y <- z + (y - z) R_now / R_last               v <- v beta2^(now - last)
    update     v <- beta2 v + (1 - beta2) g^2                d  = g / (sqrt(v / bias_correction) + eps)
               y <- z + (y - z) (1 - c) + gradient_weight d  z <- z - learning_rate d

`gather` reads rows as of the present and writes nothing, `reduce` adds the gradients of equal ids, `update` catches up
and steps. Memory traffic and memory are those of the touched rows: z and exp_avg_sq of a row get the next slot with
its first gradient. Source: Defazio et al. 2024 (schedule-free); the closed forms are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ubp_fast.kernels import backends
from ubp_fast.kernels.checks import require, require_dtype, require_same
from ubp_fast.kernels.row_sparse import _native, _triton, reference
from ubp_fast.kernels.row_sparse.reference import ScheduleFreeRows, ScheduleFreeStep

OP = "row_sparse"
FLOATS = (torch.float32, torch.float64)
IMPLEMENTATIONS: dict[str, ModuleType] = {"native": _native, "triton": _triton, "reference": reference}
# float32 runs natively on the CPU and with Triton on NVIDIA GPUs; the rest takes the reference.
ORDER = ("native", "triton", "reference")


def gather(rows: ScheduleFreeRows, ids: Tensor, *, backend: str = "auto") -> Tensor:
    """The weights of some rows as the dense optimizer would hold them now; nothing is written.

    Args:
        rows: the table, float32 or float64.
        ids: int64 [...], each in 0..N-1, in any order, repeated or not.
        backend: "auto", "native" (compiled, CPU), "triton" (NVIDIA GPU) or "reference".

    Returns:
        [..., D] in the dtype of the table. No gradient flows through it; `RowSparseEmbedding` adds that.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices break the rules above.
        IndexError: an id lies outside the table.
        BackendUnavailable: the named backend does not exist, or not for these tensors.
    """
    _check_rows(rows)
    _check_ids(ids, rows.weight)
    return _gather_op(*rows, ids.reshape(-1), backend).view(*ids.shape, rows.weight.shape[1])


def reduce(ids: Tensor, gradient: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Adds the gradients of equal ids, in the order of the batch.

    Args:
        ids: int64 [T], none negative.
        gradient: float32 or float64 [T, D], any strides.
        backend: as above.

    Returns:
        Distinct ids, int64 [U] ascending, and the sums [U, D]. The same for any number of threads, bit by bit.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailable: as for `gather`.
    """
    require_dtype(OP, "gradient", gradient, FLOATS)
    _check_ids(ids, gradient)
    require(
        gradient.ndim == 2 and ids.ndim == 1 and len(gradient) == len(ids),
        OP,
        "gradient",
        "have shape [T, D] for ids [T]",
        f"{list(gradient.shape)} for {list(ids.shape)}",
    )
    return _reduce_op(ids, gradient, backend)


def update(
    rows: ScheduleFreeRows, ids: Tensor, gradient: Tensor, step: ScheduleFreeStep, *, backend: str = "auto"
) -> None:
    """Brings the rows `ids` to the present and takes step S + 1 with their gradient; other rows are not touched.

    Args:
        rows: the table, changed in place (`last_step` of the rows becomes S + 1; the caller extends `retained`).
        ids: int64 [U], strictly ascending, as `reduce` returns them.
        gradient: [U, D] in the dtype of the table.
        step: the numbers of this step.
        backend: as above.

    Raises:
        ValueError, TypeError, IndexError, BackendUnavailable: as for `gather`.
    """
    _check_rows(rows)
    _check_ids(ids, rows.weight)
    shape = [*ids.shape, rows.weight.shape[1]]
    require(
        ids.ndim == 1 and list(gradient.shape) == shape, OP, "gradient", f"have shape {shape}", list(gradient.shape)
    )
    require_same(OP, "weight", rows.weight, gradient=gradient)
    _update_op(*rows, ids, gradient, list(step[:6]), step.is_adaptive, backend)


def catch_up(rows: ScheduleFreeRows, beta2: float, *, toward_z: float = 0.0, backend: str = "auto") -> None:
    """Brings every touched row to the present and sets its step to 0; the caller starts `retained` anew with [1].

    Args:
        rows: the table, changed in place.
        beta2: decay of exp_avg_sq per step.
        toward_z: y moves by this share of z - y afterwards: 1 - 1 / beta1 turns y into x, the weights for evaluation,
            1 - beta1 turns x into y again.
        backend: as above.

    Raises:
        ValueError, TypeError, BackendUnavailable: as for `gather`.
    """
    _check_rows(rows)
    _catch_up_op(*rows, beta2, toward_z, backend)


def _check_rows(rows: ScheduleFreeRows) -> None:
    weight, state, retained = rows.weight, rows.state, rows.retained
    require(weight.ndim == 2, OP, "weight", "have shape [N, D]", list(weight.shape))
    require_dtype(OP, "weight", weight, FLOATS)
    is_state = state.ndim == 3 and state.shape[1:] == (2, weight.shape[1])
    require(is_state, OP, "state", f"have shape [C, 2, {weight.shape[1]}]", list(state.shape))
    require_same(OP, "weight", weight, state=state)
    require_dtype(OP, "retained", retained, (torch.float64,))
    require(retained.ndim == 1 and len(retained) >= 1, OP, "retained", "have shape [S + 1]", list(retained.shape))
    for name, tensor in (("slot", rows.slot), ("last_step", rows.last_step)):
        require_dtype(OP, name, tensor, (torch.int32,))
        require(tensor.shape == weight.shape[:1], OP, name, "have shape [N]", list(tensor.shape))
    require_dtype(OP, "used", rows.used, (torch.int64,))
    require(rows.used.shape == (1,), OP, "used", "have shape [1]", list(rows.used.shape))
    for name, tensor in rows._asdict().items():
        require(tensor.device == weight.device, OP, name, f"be on {weight.device} like weight", tensor.device)
        require(tensor.is_contiguous(), OP, name, "be contiguous", list(tensor.stride()))


def _check_ids(ids: Tensor, like: Tensor) -> None:
    require_dtype(OP, "ids", ids, (torch.int64,))
    require(ids.device == like.device, OP, "ids", f"be on {like.device}", ids.device)


def _implementation(backend: str, tensor: Tensor) -> ModuleType:
    return IMPLEMENTATIONS[backends.resolve(OP, backend, IMPLEMENTATIONS, ORDER, tensor)]


@torch.library.custom_op("ubp_fast::row_sparse_gather", mutates_args=())
def _gather_op(
    weight: Tensor,
    state: Tensor,
    slot: Tensor,
    used: Tensor,
    last_step: Tensor,
    retained: Tensor,
    ids: Tensor,
    backend: str,
) -> Tensor:
    rows = ScheduleFreeRows(weight, state, slot, used, last_step, retained)
    return _implementation(backend, weight).gather(rows, ids)


@_gather_op.register_fake
def _(weight, state, slot, used, last_step, retained, ids, backend):
    return weight.new_empty((ids.shape[0], weight.shape[1]))


@torch.library.custom_op("ubp_fast::row_sparse_reduce", mutates_args=())
def _reduce_op(ids: Tensor, gradient: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _implementation(backend, gradient).reduce(ids, gradient)


@_reduce_op.register_fake
def _(ids, gradient, backend):
    groups = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty((groups,)), gradient.new_empty((groups, gradient.shape[1]))


@torch.library.custom_op("ubp_fast::row_sparse_update", mutates_args=("weight", "state", "slot", "used", "last_step"))
def _update_op(
    weight: Tensor,
    state: Tensor,
    slot: Tensor,
    used: Tensor,
    last_step: Tensor,
    retained: Tensor,
    ids: Tensor,
    gradient: Tensor,
    step: Sequence[float],
    is_adaptive: bool,
    backend: str,
) -> None:
    rows = ScheduleFreeRows(weight, state, slot, used, last_step, retained)
    _implementation(backend, weight).update(rows, ids, gradient, ScheduleFreeStep._make([*step, is_adaptive]))


@torch.library.custom_op("ubp_fast::row_sparse_catch_up", mutates_args=("weight", "state", "last_step"))
def _catch_up_op(
    weight: Tensor,
    state: Tensor,
    slot: Tensor,
    used: Tensor,
    last_step: Tensor,
    retained: Tensor,
    beta2: float,
    toward_z: float,
    backend: str,
) -> None:
    rows = ScheduleFreeRows(weight, state, slot, used, last_step, retained)
    _implementation(backend, weight).catch_up(rows, beta2, toward_z)
