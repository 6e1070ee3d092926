"""Plain row-sparse updates: the definition that the compiled kernels are tested against."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class RowTable(NamedTuple):
    """An embedding table in training, each row as it was after its last step.

    Attributes:
        weight: [N, D]; rows never touched as they were at step 0.
        state: [C, 2, D], of the row that has the slot: z and exp_avg_sq (ScheduleFree) or exp_avg and exp_avg_sq
            (Adam); unused slots are neither read nor written.
        slot: int32 [N], slot of a touched row; other entries mean nothing.
        used: int64 [1], slots in use; they are the first ones.
        last_step: int32 [N], the step each row is up to date with; -1: never touched (z = weight, moments 0).
        history: float64. ScheduleFree: [S + 1], entry k is the product of (1 - c) over the steps 1..k. Adam:
            [S + 1, 3], entry k is the `AdamStep` of step k, entry 0 means nothing. The last entry is the present.
    """

    weight: Tensor
    state: Tensor
    slot: Tensor
    used: Tensor
    last_step: Tensor
    history: Tensor


class ScheduleFree(NamedTuple):
    """RAdamScheduleFree without weight decay: the decay of exp_avg_sq per step, and what is added to the root."""

    beta2: float
    eps: float


class ScheduleFreeStep(NamedTuple):
    """The numbers of one step, the same for all rows.

    Attributes:
        learning_rate: how far z goes.
        average_weight: c, the share of z in the average.
        gradient_weight: how far y goes along the normalised gradient, learning_rate * (beta1 * (1 - c) - 1).
        bias_correction: 1 - beta2 ** step.
        is_adaptive: divide the gradient by the root; not yet in RAdam's first steps.
    """

    learning_rate: float
    average_weight: float
    gradient_weight: float
    bias_correction: float
    is_adaptive: bool


class Adam(NamedTuple):
    """Adam and AdamW: decays of the moments per step, and what is added to the root."""

    beta1: float
    beta2: float
    eps: float


class AdamStep(NamedTuple):
    """The numbers of one step, the same for all rows.

    Attributes:
        rate: learning rate / (1 - beta1^n), with n the steps of the table ever.
        root: 1 / sqrt(1 - beta2^n).
        keep: 1 - learning rate * weight decay.
    """

    rate: float
    root: float
    keep: float


Rule: TypeAlias = ScheduleFree | Adam
Step: TypeAlias = ScheduleFreeStep | AdamStep
State: TypeAlias = tuple[Tensor, Tensor, Tensor]  # weight and both state vectors of some rows, [n, D] each


def unsupported(table: Tensor) -> str | None:
    """Everything is supported."""
    return None


def gather(table: RowTable, rule: Rule, ids: Tensor) -> Tensor:
    """The weights of the rows `ids` at the present, [T, D]; writes nothing."""
    return _present(table, rule, ids)[0]


def reduce(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids [U] and the sums of their gradients [U, D], added in the order of the batch."""
    unique, place = ids.unique(return_inverse=True)
    sums = torch.zeros((len(unique), gradient.shape[1]), dtype=gradient.dtype, device=gradient.device)
    return unique, sums.index_add_(0, place, gradient)


def update(table: RowTable, rule: Rule, ids: Tensor, gradient: Tensor, step: Step) -> None:
    """Brings the distinct rows `ids` to the present and takes one step with `gradient` [U, D]."""
    weight, *state = _moved(_present(table, rule, ids), gradient, rule, step)
    fresh = ids[table.last_step[ids] < 0]
    table.slot[fresh] = (table.used + torch.arange(len(fresh), device=ids.device)).int()
    table.used.add_(len(fresh))
    table.weight[ids] = weight
    table.state[table.slot[ids].long()] = torch.stack(state, dim=1)
    table.last_step[ids] = len(table.history)


def catch_up(table: RowTable, rule: Rule, toward_z: float) -> None:
    """Brings all rows to the present (touched ones are at step 0 then); y moves towards z by the share `toward_z`."""
    touched = (table.last_step >= 0).nonzero()[:, 0]
    # Weight decay moves rows that were never touched as well.
    ids = torch.arange(len(table.weight), device=touched.device) if isinstance(rule, Adam) else touched
    weight, first, second = _present(table, rule, ids)
    table.weight[ids] = weight + (first - weight) * toward_z if toward_z else weight
    is_touched = table.last_step[ids] >= 0
    table.state[table.slot[touched].long()] = torch.stack([first[is_touched], second[is_touched]], dim=1)
    table.last_step[touched] = 0


def _present(table: RowTable, rule: Rule, ids: Tensor) -> State:
    """Weights and state of some rows at the present."""
    last, weight = table.last_step[ids], table.weight[ids]
    is_touched = last >= 0
    first = torch.zeros_like(weight) if isinstance(rule, Adam) else weight.clone()
    second = torch.zeros_like(weight)
    first[is_touched], second[is_touched] = table.state[table.slot[ids[is_touched]].long()].unbind(1)
    if isinstance(rule, Adam):
        for number in range(1, len(table.history)):
            is_behind = last < number
            parts = (weight[is_behind], first[is_behind], second[is_behind])
            moved = _moved(parts, torch.zeros_like(parts[0]), rule, AdamStep(*table.history[number].tolist()))
            weight[is_behind], first[is_behind], second[is_behind] = moved
        return weight, first, second
    last = last.long().clamp(min=0)
    kept = (table.history[-1] / table.history[last])[:, None].to(weight.dtype)
    # A dense optimizer multiplies by beta2 in the dtype of the table; the power of any other number drifts away.
    factor = torch.tensor(rule.beta2, dtype=weight.dtype).item()
    decay = (factor ** (len(table.history) - 1 - last).double())[:, None].to(weight.dtype)
    return first + (weight - first) * kept, first, second * decay


def _moved(state: State, gradient: Tensor, rule: Rule, step: Step) -> State:
    """Weights and state after one step."""
    weight, first, second = state
    second = second * rule.beta2 + (1 - rule.beta2) * gradient * gradient
    if isinstance(rule, Adam):
        assert isinstance(step, AdamStep)
        first = first + (1 - rule.beta1) * (gradient - first)
        return weight * step.keep - step.rate * first / (second.sqrt() * step.root + rule.eps), first, second
    assert isinstance(step, ScheduleFreeStep)
    if step.is_adaptive:
        gradient = gradient / ((second / step.bias_correction).sqrt() + rule.eps)
    weight = first + (weight - first) * (1 - step.average_weight) + gradient * step.gradient_weight
    return weight, first - gradient * step.learning_rate, second
