"""The CUDA kernels: `csrc/nt_xent/cuda.cu`. Rows are prepared, and their gradients finished, by PyTorch.

16-bit rows keep their numbers (times a power of two each) and are divided by their length after the products; float32
rows are normalised first. Rows that are not valid are zeros that meet nobody. Backward computes the similarities again,
once per 256 columns. Memory: a few float32 matrices of the inputs' size. Results are the same every time, and nothing
waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ubp_fast.kernels import cuda
from ubp_fast.kernels.backends import DTYPES
from ubp_fast.kernels.nt_xent.reference import Problem, each_row, groups

POSITIVES, FORWARD, BACKWARD = 0, 1, 2
TILE_ROWS, CHUNK_COLUMNS = 64, 64
# Enough blocks for every device of today; never the device's own number, so that all give the same sums.
WANTED_BLOCKS = 256
LARGEST_EXPONENT = 126  # of a power of two whose reciprocal is a normal float


class _Rows(NamedTuple):
    """All rows, left then right, or left, positive, right, as the kernels read them.

    Attributes:
        stored: [R, E filled to chunks].
        scale: float32 [R]; scale * stored is the row of the loss.
        inverse_length: float32 [R, 1], 1 / length of the input row, 0 for zero rows; None: rows are not normalised.
        valid: bool [R] or None.
        group: int32 [R]; rows of one group are no negatives of each other.
        ids: int32 [R], dense; None: all differ.
        bias: float32 [R], of queries that of their positives; None: 0.
        inverse_temperature: float32 [1].
    """

    stored: Tensor
    scale: Tensor
    inverse_length: Tensor | None
    valid: Tensor | None
    group: Tensor
    ids: Tensor | None
    bias: Tensor | None
    inverse_temperature: Tensor


class _Side(NamedTuple):
    """Own rows of a launch, and the rows they meet, as ranges of all rows."""

    own: slice
    other: slice


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    return cuda.unsupported(problem.left)


def forward(problem: Problem) -> Tensor:
    """Row losses [N] ([2N] for symmetric and simclr), float64; 0 for rows that are not valid."""
    count, device = len(problem.left), problem.left.device
    if not count or not len(problem.right):
        return torch.zeros(problem.directions * count, dtype=torch.float64, device=device)
    rows = _rows(problem)
    positives, losses = _positives(problem, rows), []
    for side in _sides(problem)[: problem.directions]:
        splits, own = _splits(side), side.own.stop - side.own.start
        largest, sums = (_empty(rows, splits, own) for _ in range(2))
        _launch(FORWARD, rows, side, positives=positives, largest=largest, sums=sums)
        peak = largest.double().amax(dim=0)
        total = (sums * torch.exp(largest.double() - peak)).sum(dim=0)
        losses.append(peak + torch.log1p(torch.expm1(-peak) + total))
    row_losses = torch.cat(losses)
    return row_losses if problem.valid is None else row_losses.masked_fill(~problem.valid.repeat(problem.directions), 0)


def backward(
    problem: Problem, weight: Tensor, factor: Tensor, row_losses: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of left, right, positive and temperature; the similarities are computed again."""
    count = len(problem.left)
    if not count or not len(problem.right):
        given = (problem.left, problem.right, problem.positive, problem.temperature)
        return tuple(None if part is None else torch.zeros_like(part) for part in given)  # type: ignore[return-value]
    rows, directions = _rows(problem), problem.directions
    factor = factor / _temperature(problem)
    pull = -(shares * weight).view(directions, -1).sum(dim=0).float()
    share = functional.pad(pull.repeat(2), (0, len(rows.stored) - 2 * count))  # slope of each row at its partner
    unasked = (0, len(rows.stored) - directions * count)
    asked, weights = (functional.pad(part.float(), unasked) for part in (row_losses, weight))
    positives, moment = _positives(problem, rows), factor.new_zeros(())
    slopes = torch.zeros_like(rows.stored, dtype=torch.float32)
    for side in _sides(problem):
        splits, own = _splits(side), side.own.stop - side.own.start
        parts, moments = _empty(rows, splits, own, rows.stored.shape[1]), _empty(rows, splits, own)
        sums = {"grad": parts, "moments": moments}
        _launch(BACKWARD, rows, side, positives=positives, losses=asked, weights=weights, **sums)
        slopes[side.own] = parts[0] if splits == 1 else parts.sum(dim=0)
        # The kernels write nothing where a row is not valid.
        kept = moments if rows.valid is None else moments.masked_fill(~rows.valid[side.own], 0)
        moment = moment + kept.sum(dtype=torch.float64)
    left, right, positive = _finish(problem, rows, slopes, share, factor.float())
    return left, right, positive, (-moment * factor).to(problem.temperature)


def _temperature(problem: Problem) -> Tensor:
    return problem.temperature.to(problem.left.device, torch.float64, non_blocking=True)


def _sides(problem: Problem) -> list[_Side]:
    """The launches of a backward pass; the first ones are those of forward."""
    count, first = len(problem.left), len(problem.left) * (1 if problem.positive is None else 2)
    left, right, both = slice(0, count), slice(first, first + len(problem.right)), slice(0, 2 * count)
    return [_Side(both, both)] if problem.negatives == "simclr" else [_Side(left, right), _Side(right, left)]


def _splits(side: _Side) -> int:
    tiles, others = (-(-(rows.stop - rows.start) // TILE_ROWS) for rows in side)
    return min(others, -(-WANTED_BLOCKS // tiles))


def _rows(problem: Problem) -> _Rows:
    sides = (problem.left, problem.positive, problem.right)
    rows = torch.cat([side for side in sides if side is not None])
    valid = each_row(problem, problem.valid, problem.right_valid, problem.valid)
    if valid is not None:
        rows = rows.masked_fill(~valid[:, None], 0)
    scale, inverse_length = torch.ones(len(rows), dtype=torch.float32, device=rows.device), None
    if problem.normalize:
        largest = rows.abs().amax(dim=1, keepdim=True).float()
        is_zero = largest == 0
        divisor = largest.masked_fill(is_zero, 1.0)
        if rows.dtype != torch.float32:
            exponent = torch.frexp(divisor)[1].clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
            divisor = torch.ldexp(torch.ones_like(divisor), exponent)
        scaled = rows / divisor if rows.dtype == torch.float32 else (rows.float() / divisor).to(rows.dtype)
        length = scaled.float().square().sum(dim=1, keepdim=True).sqrt().masked_fill_(is_zero, 1.0)
        inverse_length = (1 / length / divisor).masked_fill_(is_zero, 0.0)
        rows = scaled / length if rows.dtype == torch.float32 else scaled
        scale = scale if rows.dtype == torch.float32 else (1 / length).flatten()
    missing = -rows.shape[1] % CHUNK_COLUMNS
    inverse_temperature = (1.0 / _temperature(problem)).float().reshape(1)
    stored = cuda.aligned(functional.pad(rows, (0, missing)))
    ids = _dense(each_row(problem, problem.ids, problem.right_ids, None))
    bias = each_row(problem, problem.positive_bias, problem.bias, None)
    bias = None if bias is None else bias.float()
    return _Rows(stored, scale, inverse_length, valid, groups(problem), ids, bias, inverse_temperature)


def _dense(ids: Tensor | None) -> Tensor | None:
    """The ids numbered from 0 in their order, int32: `torch.unique` would wait to know how many there are."""
    if ids is None:
        return None
    ordered, order = ids.sort()
    rank = functional.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
    return torch.empty_like(rank).scatter_(0, order, rank).int()


def _empty(rows: _Rows, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=rows.stored.device)


def _positives(problem: Problem, rows: _Rows) -> Tensor:
    """Similarities of queries to their positives, float32 [R]: equal rows have a gap of 0, by the sums of the tiles."""
    count = len(problem.left)
    positives = torch.zeros(len(rows.stored), dtype=torch.float32, device=rows.stored.device)
    _launch(POSITIVES, rows, _Side(slice(0, count), slice(count, 2 * count)), positives=positives)
    positives[count : 2 * count] = positives[:count]
    return positives


def _launch(which: int, rows: _Rows, side: _Side, **tensors: Tensor) -> None:
    kernels = cuda.kernels()
    launched = kernels.NTXentProblem(
        own=rows.stored[side.own],
        other=rows.stored[side.other],
        dtype=DTYPES[rows.stored.dtype],
        own_rows=side.own.stop - side.own.start,
        other_rows=side.other.stop - side.other.start,
        own_first=side.own.start,
        other_first=side.other.start,
        width=rows.stored.shape[1],
        scales=rows.scale,
        valid=rows.valid,
        group=rows.group,
        ids=rows.ids,
        bias=rows.bias,
        inverse_temperature=rows.inverse_temperature,
        splits=_splits(side),
        **tensors,
    )
    cuda.launch(kernels.nt_xent, rows.stored, which, launched)


def _finish(
    problem: Problem, rows: _Rows, slopes: Tensor, share: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the inputs from those of the rows of the loss by their negatives; adds what the positives give."""
    width, count = problem.left.shape[1], len(problem.left)
    unit = rows.stored[:, :width].float() * rows.scale[:, None]
    partner = torch.cat((unit[count : 2 * count], unit[:count], unit[2 * count :]))  # the last ones have share 0
    slopes = slopes[:, :width] + share[:, None] * partner
    if rows.inverse_length is not None:
        along = (slopes * unit).sum(dim=1, keepdim=True)
        slopes = (slopes - unit * along) * rows.inverse_length
    if rows.valid is not None:
        slopes = slopes.masked_fill(~rows.valid[:, None], 0)
    left, *others = (slopes * factor).to(problem.left.dtype).split([count, count, len(slopes) - 2 * count])
    # Each owns its memory.
    if problem.positive is None:
        return left.clone(), others[0].clone(), None
    return left.clone(), others[1].clone(), others[0].clone()
