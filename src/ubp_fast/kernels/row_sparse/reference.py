"""Plain row-sparse updates: the definition that the compiled kernels are tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ScheduleFreeRows(NamedTuple):
    """An embedding table that RAdamScheduleFree trains, each row as it was after its last step.

    Attributes:
        weight: [N, D], y of a touched row, the initial weight of any other.
        state: [C, 2, D], z and exp_avg_sq of the row that has the slot; unused slots are neither read nor written.
        slot: int32 [N], slot of a touched row; other entries mean nothing.
        used: int64 [1], slots in use; they are the first ones.
        last_step: int32 [N], the step each row is up to date with; -1: never touched (y = z = weight, exp_avg_sq = 0).
        retained: float64 [S + 1], entry k is the product of (1 - c) over the steps 1..k; the last entry is the present.
    """

    weight: Tensor
    state: Tensor
    slot: Tensor
    used: Tensor
    last_step: Tensor
    retained: Tensor


class ScheduleFreeStep(NamedTuple):
    """The numbers of one step, the same for all rows.

    Attributes:
        learning_rate: how far z goes.
        average_weight: c, the share of z in the average.
        gradient_weight: how far y goes along the normalised gradient, learning_rate * (beta1 * (1 - c) - 1).
        beta2: decay of exp_avg_sq per step.
        bias_correction: 1 - beta2 ** step.
        eps: added to the root.
        is_adaptive: divide the gradient by the root; not yet in RAdam's first steps.
    """

    learning_rate: float
    average_weight: float
    gradient_weight: float
    beta2: float
    bias_correction: float
    eps: float
    is_adaptive: bool


def unsupported(table: Tensor) -> str | None:
    """Everything is supported."""
    return None


def gather(rows: ScheduleFreeRows, ids: Tensor) -> Tensor:
    """y of the rows `ids` at the present, [T, D]; writes nothing."""
    return _present(rows, ids)[0]


def reduce(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids [U] and the sums of their gradients [U, D], added in the order of the batch."""
    unique, place = ids.unique(return_inverse=True)
    sums = torch.zeros((len(unique), gradient.shape[1]), dtype=gradient.dtype, device=gradient.device)
    return unique, sums.index_add_(0, place, gradient)


def update(rows: ScheduleFreeRows, ids: Tensor, gradient: Tensor, step: ScheduleFreeStep) -> None:
    """Brings the distinct rows `ids` to the present and takes one step with `gradient` [U, D]."""
    y, z, exp_avg_sq = _present(rows, ids, step.beta2)
    exp_avg_sq = exp_avg_sq * step.beta2 + (1 - step.beta2) * gradient * gradient
    if step.is_adaptive:
        gradient = gradient / ((exp_avg_sq / step.bias_correction).sqrt() + step.eps)
    fresh = ids[rows.last_step[ids] < 0]
    rows.slot[fresh] = (rows.used + torch.arange(len(fresh), device=ids.device)).int()
    rows.used.add_(len(fresh))
    rows.weight[ids] = z + (y - z) * (1 - step.average_weight) + gradient * step.gradient_weight
    rows.state[rows.slot[ids].long()] = torch.stack([z - gradient * step.learning_rate, exp_avg_sq], dim=1)
    rows.last_step[ids] = len(rows.retained)


def catch_up(rows: ScheduleFreeRows, beta2: float, toward_z: float) -> None:
    """Brings all touched rows to the present (step 0 from then on) and moves y towards z by the share `toward_z`."""
    ids = (rows.last_step >= 0).nonzero()[:, 0]
    y, z, exp_avg_sq = _present(rows, ids, beta2)
    rows.weight[ids] = y + (z - y) * toward_z
    rows.state[rows.slot[ids].long(), 1] = exp_avg_sq
    rows.last_step[ids] = 0


def _present(rows: ScheduleFreeRows, ids: Tensor, beta2: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """y, z and exp_avg_sq of some rows at the present, [n, D] each."""
    is_touched = rows.last_step[ids] >= 0
    last = rows.last_step[ids].long().clamp(min=0)
    weight = rows.weight[ids]
    z, exp_avg_sq = weight.clone(), torch.zeros_like(weight)
    z[is_touched], exp_avg_sq[is_touched] = rows.state[rows.slot[ids[is_touched]].long()].unbind(1)
    kept = (rows.retained[-1] / rows.retained[last])[:, None].to(weight.dtype)
    # A dense optimizer multiplies by beta2 in the dtype of the table; the power of any other number drifts away.
    factor = torch.tensor(beta2, dtype=weight.dtype).item()
    decay = (factor ** (len(rows.retained) - 1 - last).double())[:, None].to(weight.dtype)
    return z + (weight - z) * kept, z, exp_avg_sq * decay
