"""The plain NT-Xent every backend is measured against: N x M matrices, no tricks, no hidden upcast.

Every matrix is computed in the dtype of the inputs; only row losses and their weights have the dtype of the loss
(float32, float64 for float64 inputs). Truth in the tests is this file at float64. The equations are in `api.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Checked arguments of one call, the same for every backend.

    Pairs: without `positive` row i of right is the positive of row i of left, and the right side has the left's `valid`
    and `ids`. With it rows of left are queries, rows of right candidates, in the form "cross"; only then are there
    `places` and `bias`.

    Attributes:
        left: [N, E]; rows that are not valid may hold anything, NaN included.
        right: [M, E], N = M for pairs.
        positive: [N, E], the row that belongs to each query, valid where the query is; None for pairs.
        temperature: 0-d floating tensor, finite and > 0.
        negatives: "cross", "symmetric" or "simclr".
        valid, right_valid: [N], [M] bool or None.
        ids, right_ids: [N], [M] int64, or both None.
        places: [N] int64, the candidate that is no negative of the query, -1: there is none.
        bias: [M] float64, added to similarity / temperature, or None.
        positive_bias: [N] float64, of the positives, or None; both or none.
        normalize: rows are divided by their length first.
    """

    left: Tensor
    right: Tensor
    positive: Tensor | None
    temperature: Tensor
    negatives: str
    valid: Tensor | None
    right_valid: Tensor | None
    ids: Tensor | None
    right_ids: Tensor | None
    places: Tensor | None
    bias: Tensor | None
    positive_bias: Tensor | None
    normalize: bool

    @property
    def directions(self) -> int:
        """Row losses of each pair."""
        return 1 if self.negatives == "cross" else 2


def each_row(problem: Problem, left: Tensor | None, right: Tensor | None, positive: Tensor | None) -> Tensor | None:
    """What belongs to the rows of all sides in one tensor, left, positive if there is one, right; None without any.

    A side without numbers has 0, or True where the others are bool.
    """
    sides = [(left, problem.left), (right, problem.right)]
    if problem.positive is not None:
        sides.insert(1, (positive, problem.positive))
    given = [part for part, _ in sides if part is not None]
    if not given:
        return None
    absent = given[0].dtype == torch.bool
    return torch.cat([given[0].new_full((len(rows),), absent) if part is None else part for part, rows in sides])


def groups(problem: Problem) -> Tensor:
    """int32, in the order of `each_row`: rows with the same number are no negatives of each other."""
    own = torch.arange(len(problem.right), dtype=torch.int32, device=problem.right.device)
    if problem.positive is None or problem.places is None:
        return own.repeat(2)
    return torch.cat((problem.places.int(), own.new_full((len(problem.positive),), -2), own))


class _Direction(NamedTuple):
    """Rows `queries` [R, E] against rows `keys` [C, E]; `excluded` [R, C]: no negatives, the positives included."""

    queries: Tensor
    keys: Tensor
    positive: Tensor  # [R] column of the positive, or the positives themselves [R, E]
    excluded: Tensor
    bias: Tensor | None = None  # [C]
    positive_bias: Tensor | None = None  # [R]


class _Rows(NamedTuple):
    """Prepared rows and what their gradient needs: unit = (x / scale) / length."""

    rows: Tensor  # [N, E]
    scale: Tensor | None  # [N, 1] largest magnitude, None: rows were left as they are
    length: Tensor | None  # [N, 1] length of x / scale, in [1, sqrt(E)]


def unsupported(problem: Problem) -> str | None:
    """Nothing is: the reference runs everywhere."""
    return None


def forward(problem: Problem) -> Tensor:
    """Row losses [N], in both directions [2N] for symmetric and simclr, in the dtype of the loss.

    Differentiable as often as is wanted.
    """
    losses = []
    for direction in _directions(*_rows_of(_sides(problem)), problem):
        gap, _ = _gaps(direction, problem.temperature)
        if not gap.shape[1]:
            losses.append(gap.sum(dim=1))
            continue
        # The loss does not depend on the peak, so none of its derivatives does.
        peak = gap.detach().amax(dim=1).clamp_min(0)
        inner = torch.expm1(-peak) + torch.exp(gap - peak[:, None]).sum(dim=1)
        losses.append(peak + torch.log1p(inner))
    row_losses = torch.cat(losses)
    return row_losses.to(torch.promote_types(row_losses.dtype, torch.float32))


def backward(
    problem: Problem, weight: Tensor, factor: Tensor, row_losses: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of left, right, positive and temperature.

    Args:
        weight: float64, the derivative by every row loss of `forward` without `factor`, largest magnitude 1.
        factor: float64, 0-d.
        row_losses: float64, as `forward` returned them; where right holds a part of the candidates, of all of them.
        shares: float64, sum of p over the negatives of a row in right; 1 - exp(-loss) where it has them all. Taken by
            backends that do not see all p of a row at once.
    """
    dtype = torch.promote_types(problem.left.dtype, torch.float32)
    weight, row_losses, factor = weight.to(dtype), row_losses.to(dtype), (factor / problem.temperature).to(dtype)
    left, right, _ = sides = _sides(problem)
    grad_left, grad_right = torch.zeros_like(left.rows), torch.zeros_like(right.rows)
    grad_positive, towards_temperature, start = None, row_losses.new_zeros(()), 0
    for index, direction in enumerate(_directions(*_rows_of(sides), problem)):
        here = slice(start, start := start + len(direction.queries))
        to_queries, to_keys, grad_positive, moment = _direction_gradients(
            direction, problem.temperature, row_losses[here], weight[here]
        )
        towards_temperature = towards_temperature + moment
        if problem.negatives == "simclr":
            grad_left, grad_right = (to_queries + to_keys).chunk(2)
        elif index == 0:
            grad_left, grad_right = grad_left + to_queries, grad_right + to_keys
        else:
            grad_left, grad_right = grad_left + to_keys, grad_right + to_queries
    valid = (problem.valid, problem.right_valid, problem.valid)
    found = [
        _prepare_backward(grad, side, kept) * factor.to(grad.dtype)
        for grad, side, kept in zip((grad_left, grad_right, grad_positive), sides, valid, strict=True)
        if side is not None and grad is not None
    ]
    return (
        found[0],
        found[1],
        found[2] if len(found) > 2 else None,
        (-towards_temperature * factor).to(problem.temperature.dtype),
    )


def _direction_gradients(
    direction: _Direction, temperature: Tensor, row_losses: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """d/d queries, d/d keys, d/d positives that are no keys (all times temperature), sum_ij weight_i p_ij gap_ij."""
    gap, distance = _gaps(direction, temperature)
    row_weight = weight.to(gap.dtype)[:, None]
    probability = torch.exp(gap - row_losses.to(gap.dtype)[:, None])  # 0 where excluded
    moment = ((probability * distance.masked_fill(direction.excluded, 0)).sum(dim=1).to(weight.dtype) * weight).sum()
    # The positive's entry is minus the sum of the others, not p_ii - 1: no cancellation when the loss is near zero.
    pull = -probability.sum(dim=1)
    if direction.positive.ndim == 2:
        to_queries = row_weight * (probability @ direction.keys + pull[:, None] * direction.positive)
        to_positives = row_weight * pull[:, None] * direction.queries
        return to_queries, probability.T @ (row_weight * direction.queries), to_positives, moment
    rows = torch.arange(len(gap), device=gap.device)
    slope = probability.index_put((rows, direction.positive), pull)
    return row_weight * (slope @ direction.keys), slope.T @ (row_weight * direction.queries), None, moment


def _gaps(direction: _Direction, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C]: s_ij minus the positive's s, -inf where the pair is no negative; the same without biases and mask."""
    similarity = direction.queries @ direction.keys.T / temperature
    if direction.positive.ndim == 2:
        positive = (direction.queries * direction.positive).sum(dim=1, keepdim=True) / temperature
    else:
        positive = similarity.gather(1, direction.positive[:, None])
    gap = distance = similarity - positive
    if direction.bias is not None and direction.positive_bias is not None:
        gap = distance + (direction.bias[None, :] - direction.positive_bias[:, None]).to(distance.dtype)
    return gap.masked_fill(direction.excluded, float("-inf")), distance


def _directions(left: Tensor, right: Tensor, positive: Tensor | None, problem: Problem) -> list[_Direction]:
    excluded = _excluded(problem)
    if positive is not None:
        return [_Direction(left, right, positive, excluded, problem.bias, problem.positive_bias)]
    count = len(left)
    own = torch.arange(count, device=left.device)
    if problem.negatives == "simclr":
        # Row i of left meets itself in the same half and its positive in the other: the diagonals of all four blocks.
        both, partner = torch.cat((left, right)), torch.cat((own + count, own))
        return [_Direction(both, both, partner, excluded.repeat(2, 2))]
    forth = _Direction(left, right, own, excluded)
    return [forth] if problem.negatives == "cross" else [forth, _Direction(right, left, own, excluded)]


def _excluded(problem: Problem) -> Tensor:
    """[N, M], by places, ids and `right_valid`."""
    columns = torch.arange(len(problem.right), device=problem.right.device)
    places = columns if problem.places is None else problem.places
    excluded = places[:, None] == columns[None, :]
    if problem.ids is not None and problem.right_ids is not None:
        excluded = excluded | (problem.ids[:, None] == problem.right_ids[None, :])
    return excluded if problem.right_valid is None else excluded | ~problem.right_valid[None, :]


def _sides(problem: Problem) -> tuple[_Rows, _Rows, _Rows | None]:
    left = _prepare(problem.left, problem.valid, problem.normalize)
    right = _prepare(problem.right, problem.right_valid, problem.normalize)
    if problem.positive is None:
        return left, right, None
    return left, right, _prepare(problem.positive, problem.valid, problem.normalize)


def _rows_of(sides: tuple[_Rows, _Rows, _Rows | None]) -> tuple[Tensor, Tensor, Tensor | None]:
    left, right, positive = sides
    return left.rows, right.rows, None if positive is None else positive.rows


def _prepare(rows: Tensor, valid: Tensor | None, normalize: bool) -> _Rows:
    """Rows that are not valid become 0; the others are divided by their length (zero rows stay 0)."""
    if valid is not None:
        rows = rows.masked_fill(~valid[:, None], 0)
    if not normalize:
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


def _or_one(value: Tensor) -> Tensor:
    """Zeros replaced by one: the quotient of an empty sum is then 0."""
    return torch.where(value == 0, torch.ones_like(value), value)
