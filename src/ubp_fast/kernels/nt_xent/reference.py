"""The plain NT-Xent every backend is measured against: N x N matrices, no tricks, no hidden upcast.

Every matrix is computed in the dtype of the inputs; only the weighted mean over rows runs in the dtype of the loss
(float32, float64 for float64 inputs). Truth in the tests is this file at float64. The equations are in `api.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Checked arguments of one call, the same for every backend.

    Attributes:
        left, right: [N, E]; rows that are not valid may hold anything, NaN included.
        temperature: 0-d floating tensor, finite and > 0.
        negatives: "cross", "symmetric" or "simclr".
        row_weight: [N] in the dtype of the loss, 0 for rows that are not valid, largest 1 (all 0 if nothing counts).
        valid: [N] bool or None.
        ids: [N] int64 or None.
        normalize: rows are divided by their length first.
    """

    left: Tensor
    right: Tensor
    temperature: Tensor
    negatives: str
    row_weight: Tensor
    valid: Tensor | None
    ids: Tensor | None
    normalize: bool


class _Direction(NamedTuple):
    """Rows `queries` [R, E] against rows `keys` [C, E]; `excluded` [R, C]: no negatives, the positives included."""

    queries: Tensor
    keys: Tensor
    positive: Tensor  # [R] column of the positive
    excluded: Tensor


class _Rows(NamedTuple):
    """Prepared rows and what their gradient needs: unit = (x / scale) / length."""

    rows: Tensor  # [N, E]
    scale: Tensor | None  # [N, 1] largest magnitude, None: rows were left as they are
    length: Tensor | None  # [N, 1] length of x / scale, in [1, sqrt(E)]


def unsupported(problem: Problem) -> str | None:
    """Nothing is: the reference runs everywhere."""
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and the row losses [N] ([2N] for symmetric and simclr), in the dtype of the loss and in float64.

    Differentiable as often as is wanted.
    """
    left, right = (_prepare(rows, problem) for rows in (problem.left, problem.right))
    losses = []
    for direction in _directions(left.rows, right.rows, problem):
        gap = _gaps(direction, problem.temperature)
        # The loss does not depend on the peak, so none of its derivatives does.
        peak = gap.detach().amax(dim=1).clamp_min(0) if gap.numel() else gap.sum(dim=1)
        inner = torch.expm1(-peak) + torch.exp(gap - peak[:, None]).sum(dim=1)
        losses.append((peak + torch.log1p(inner)).to(problem.row_weight.dtype))
    row_losses = torch.cat(losses)
    weight = _weight_per_row_loss(problem, row_losses)
    return (weight * row_losses).sum() / _or_one(weight.sum()), row_losses.double()


def backward(problem: Problem, grad: Tensor, row_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, right and temperature from the row losses that `forward` returned."""
    row_losses = row_losses.to(problem.row_weight.dtype)
    left, right = (_prepare(rows, problem) for rows in (problem.left, problem.right))
    grad_left, grad_right = torch.zeros_like(left.rows), torch.zeros_like(right.rows)
    weight = _weight_per_row_loss(problem, row_losses)
    factor = grad / (_or_one(weight.sum()) * problem.temperature)
    towards_temperature = row_losses.new_zeros(())
    start = 0
    for index, direction in enumerate(_directions(left.rows, right.rows, problem)):
        here = slice(start, start := start + len(direction.queries))
        to_queries, to_keys, moment = _direction_gradients(
            direction, problem.temperature, row_losses[here], weight[here]
        )
        towards_temperature = towards_temperature + moment
        if problem.negatives == "simclr":
            grad_left, grad_right = (to_queries + to_keys).chunk(2)
        elif index == 0:
            grad_left, grad_right = grad_left + to_queries, grad_right + to_keys
        else:
            grad_left, grad_right = grad_left + to_keys, grad_right + to_queries
    return (
        _prepare_backward(grad_left, left, problem.valid) * factor.to(left.rows.dtype),
        _prepare_backward(grad_right, right, problem.valid) * factor.to(right.rows.dtype),
        (-towards_temperature * factor).to(problem.temperature.dtype),
    )


def _direction_gradients(
    direction: _Direction, temperature: Tensor, row_losses: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d/d queries, d/d keys (both times temperature and total weight) and sum_i weight_i sum_j p_ij gap_ij."""
    gap = _gaps(direction, temperature)
    row_weight = weight.to(gap.dtype)[:, None]
    probability = torch.exp(gap - row_losses.to(gap.dtype)[:, None])  # 0 where excluded
    moment = ((probability * gap.masked_fill(direction.excluded, 0)).sum(dim=1).to(weight.dtype) * weight).sum()
    # The positive's entry is minus the sum of the others, not p_ii - 1: no cancellation when the loss is near zero.
    rows = torch.arange(len(gap), device=gap.device)
    slope = probability.index_put((rows, direction.positive), -probability.sum(dim=1))
    return row_weight * (slope @ direction.keys), slope.T @ (row_weight * direction.queries), moment


def _gaps(direction: _Direction, temperature: Tensor) -> Tensor:
    """[R, C]: s_ij minus the positive's s, -inf where the pair is no negative."""
    similarity = direction.queries @ direction.keys.T / temperature
    positive = similarity.gather(1, direction.positive[:, None])
    return (similarity - positive).masked_fill(direction.excluded, float("-inf"))


def _directions(left: Tensor, right: Tensor, problem: Problem) -> list[_Direction]:
    count, device = len(left), left.device
    own = torch.arange(count, device=device)
    never = torch.zeros(count, dtype=torch.bool, device=device) if problem.valid is None else ~problem.valid
    same = never.new_zeros(count, count) if problem.ids is None else problem.ids[:, None] == problem.ids[None, :]
    excluded = same | never[None, :] | torch.eye(count, dtype=torch.bool, device=device)
    if problem.negatives == "simclr":
        # Row i of left meets itself in the same half and its positive in the other: the diagonals of all four blocks.
        both, partner = torch.cat((left, right)), torch.cat((own + count, own))
        return [_Direction(both, both, partner, excluded.repeat(2, 2))]
    forth = _Direction(left, right, own, excluded)
    return [forth] if problem.negatives == "cross" else [forth, _Direction(right, left, own, excluded)]


def _prepare(rows: Tensor, problem: Problem) -> _Rows:
    """Rows that are not valid become 0; the others are divided by their length (zero rows stay 0)."""
    if problem.valid is not None:
        rows = rows.masked_fill(~problem.valid[:, None], 0)
    if not problem.normalize:
        return _Rows(rows, None, None)
    rows = rows.masked_fill((rows == 0).all(dim=1, keepdim=True), 0)  # they have no derivatives
    # Dividing by the largest magnitude first keeps the sum of squares inside the range of every dtype; the unit row
    # does not depend on it.
    scale = _or_one(rows.detach().abs().amax(dim=1, keepdim=True))
    scaled = rows / scale
    length = _or_one(scaled.square().sum(dim=1, keepdim=True)).sqrt()
    return _Rows(scaled / length, scale, length)


def _prepare_backward(grad: Tensor, prepared: _Rows, valid: Tensor | None) -> Tensor:
    if prepared.scale is not None and prepared.length is not None:
        along = (grad * prepared.rows).sum(dim=1, keepdim=True)
        grad = (grad - prepared.rows * along) / prepared.length / prepared.scale
        grad = grad.masked_fill((prepared.rows == 0).all(dim=1, keepdim=True), 0)
    return grad if valid is None else grad.masked_fill(~valid[:, None], 0)


def _weight_per_row_loss(problem: Problem, row_losses: Tensor) -> Tensor:
    """One weight per row loss: both rows of a pair carry the pair's weight."""
    return problem.row_weight if problem.negatives == "cross" else problem.row_weight.repeat(2)


def _or_one(value: Tensor) -> Tensor:
    """Zeros replaced by one: the quotient of an empty sum is then 0."""
    return torch.where(value == 0, torch.ones_like(value), value)
