"""Plain row-sparse Adam: every missed step is taken again. Compiled kernels are tested against it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AdamRows(NamedTuple):
    """An embedding table that Adam or AdamW trains, each row as it was after its last step.

    Attributes:
        weight: [N, D]; rows never touched as they were at step 0.
        state: [C, 2, D], exp_avg and exp_avg_sq of the row that has the slot; unused ones are neither read nor written.
        slot: int32 [N], slot of a touched row; other entries mean nothing.
        used: int64 [1], slots in use; they are the first ones.
        last_step: int32 [N], the step each row is up to date with; -1: never touched (no moments).
        history: float64 [S + 1, 3], of each step k from 1 on: learning rate / (1 - beta1^n),
            1 / sqrt(1 - beta2^n) with n the steps of the table ever, and 1 - learning rate * weight decay.
    """

    weight: Tensor
    state: Tensor
    slot: Tensor
    used: Tensor
    last_step: Tensor
    history: Tensor


class AdamRule(NamedTuple):
    """What is the same in all steps: decays of the moments, and what is added to the root."""

    beta1: float
    beta2: float
    eps: float


def unsupported(table: Tensor) -> str | None:
    """Everything is supported."""
    return None


def gather(rows: AdamRows, rule: AdamRule, ids: Tensor) -> Tensor:
    """The weights of the rows `ids` at the present, [T, D]; writes nothing."""
    return _present(rows, rule, ids)[0]


def update(rows: AdamRows, rule: AdamRule, ids: Tensor, gradient: Tensor, step: tuple[float, float, float]) -> None:
    """Brings the distinct rows `ids` to the present and takes one step with `gradient` [U, D]."""
    weight, exp_avg, exp_avg_sq = _present(rows, rule, ids)
    weight, exp_avg, exp_avg_sq = _step(weight, exp_avg, exp_avg_sq, gradient, rule, step)
    fresh = ids[rows.last_step[ids] < 0]
    rows.slot[fresh] = (rows.used + torch.arange(len(fresh), device=ids.device)).int()
    rows.used.add_(len(fresh))
    rows.weight[ids] = weight
    rows.state[rows.slot[ids].long()] = torch.stack([exp_avg, exp_avg_sq], dim=1)
    rows.last_step[ids] = len(rows.history)


def catch_up(rows: AdamRows, rule: AdamRule) -> None:
    """Brings all rows to the present; the step of touched ones is 0 from then on."""
    ids = torch.arange(len(rows.weight), device=rows.weight.device)
    weight, exp_avg, exp_avg_sq = _present(rows, rule, ids)
    rows.weight.copy_(weight)
    touched = (rows.last_step >= 0).nonzero()[:, 0]
    rows.state[rows.slot[touched].long()] = torch.stack([exp_avg[touched], exp_avg_sq[touched]], dim=1)
    rows.last_step[touched] = 0


def _present(rows: AdamRows, rule: AdamRule, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, exp_avg and exp_avg_sq of some rows at the present, [n, D] each."""
    last = rows.last_step[ids]
    weight = rows.weight[ids]
    exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
    is_touched = last >= 0
    exp_avg[is_touched], exp_avg_sq[is_touched] = rows.state[rows.slot[ids[is_touched]].long()].unbind(1)
    for number in range(1, len(rows.history)):
        is_behind = last < number
        parts = (weight[is_behind], exp_avg[is_behind], exp_avg_sq[is_behind])
        moved = _step(*parts, torch.zeros_like(parts[0]), rule, tuple(rows.history[number].tolist()))
        weight[is_behind], exp_avg[is_behind], exp_avg_sq[is_behind] = moved
    return weight, exp_avg, exp_avg_sq


def _step(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    rule: AdamRule,
    step: tuple[float, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    rate, root, keep = step
    exp_avg = exp_avg + (1 - rule.beta1) * (gradient - exp_avg)
    exp_avg_sq = exp_avg_sq * rule.beta2 + (1 - rule.beta2) * gradient * gradient
    return weight * keep - rate * exp_avg / (exp_avg_sq.sqrt() * root + rule.eps), exp_avg, exp_avg_sq
