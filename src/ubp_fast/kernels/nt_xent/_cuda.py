"""The CUDA kernels: `csrc/nt_xent/cuda.cu`. Rows are prepared, and their gradients finished, by PyTorch.

Rows that are not valid are left out. 16-bit rows keep their numbers (times a power of two each) and are divided by
their length after the products; float32 rows are normalised first. Backward computes the similarities again, once per
256 columns. Memory: a few [2N, E] matrices in float32. Results are the same every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ubp_fast.kernels import cuda
from ubp_fast.kernels.nt_xent.reference import Problem

POSITIVES, FORWARD, BACKWARD = 0, 1, 2
TILE_ROWS, CHUNK_COLUMNS = 64, 64
# Enough blocks for every device of today; never the device's own number, so that all give the same sums.
WANTED_BLOCKS = 256
LARGEST_EXPONENT = 126  # of a power of two whose reciprocal is a normal float


class _Rows(NamedTuple):
    """The rows that take part, left then right, as the kernels read them.

    Attributes:
        kept: int64 [K], which rows they are; None for all.
        stored: [2K, E filled to chunks].
        scale: float32 [2K]; scale * stored is the row of the loss.
        inverse_length: float32 [2K, 1], 1 / length of the input row, 0 for zero rows; None: rows are not normalised.
        ids: int32 [K].
    """

    kept: Tensor | None
    stored: Tensor
    scale: Tensor
    inverse_length: Tensor | None
    ids: Tensor


class _Side(NamedTuple):
    """Own rows of a launch, and the rows they meet, as ranges of [left; right]."""

    own: slice
    other: slice


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    return cuda.unsupported(problem.left)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and the row losses [N] ([2N] for symmetric and simclr), float64; 0 for rows that are not valid."""
    rows, directions = _rows(problem), _directions(problem)
    row_losses = torch.zeros(directions, len(problem.left), dtype=torch.float64, device=problem.left.device)
    if len(rows.ids):
        positives, losses = _positives(problem, rows), []
        for side in _sides(problem, len(rows.ids))[:directions]:
            splits, count = _splits(side), side.own.stop - side.own.start
            largest, sums = (_empty(rows, splits, count) for _ in range(2))
            _launch(FORWARD, problem, rows, side, positives, largest, sums)
            peak = largest.double().amax(dim=0)
            total = (sums * torch.exp(largest.double() - peak)).sum(dim=0)
            losses.append(peak + torch.log1p(torch.expm1(-peak) + total))
        found = torch.cat(losses).view(directions, -1)
        row_losses = found if rows.kept is None else row_losses.index_copy_(1, rows.kept, found)
    weight = problem.row_weight.double()
    total_weight = weight.sum() * directions
    loss = (row_losses * weight).sum() / torch.where(total_weight == 0, 1.0, total_weight)
    return loss.float(), row_losses.flatten()


def backward(problem: Problem, grad: Tensor, row_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, right and temperature; the similarities are computed again."""
    rows, directions = _rows(problem), _directions(problem)
    total = problem.row_weight.double().sum() * directions
    factor = grad.double() / (torch.where(total == 0, 1.0, total) * problem.temperature.to(total))
    if not len(rows.ids):
        nothing = torch.zeros_like(problem.left), torch.zeros_like(problem.right)
        return *nothing, torch.zeros_like(problem.temperature)
    losses, weight = row_losses.view(directions, -1), problem.row_weight
    if rows.kept is not None:
        losses, weight = losses[:, rows.kept], weight[rows.kept]
    share = (torch.expm1(-losses).sum(dim=0) * weight).repeat(2)  # slope of each row at its positive
    asked = functional.pad(losses.flatten().float(), (0, (2 - directions) * len(weight)))
    weights = functional.pad(weight.float().repeat(directions), (0, (2 - directions) * len(weight)))
    positives, slopes, moment = _positives(problem, rows), [], torch.zeros_like(total)
    for side in _sides(problem, len(rows.ids)):
        splits, count = _splits(side), side.own.stop - side.own.start
        parts, moments = _empty(rows, splits, count, rows.stored.shape[1]), _empty(rows, splits, count)
        _launch(BACKWARD, problem, rows, side, positives, None, None, asked, weights, parts, moments)
        slopes.append(parts[0] if splits == 1 else parts.sum(dim=0))
        moment = moment + moments.sum(dtype=torch.float64)
    left, right = _finish(problem, rows, torch.cat(slopes), share.float(), factor.float())
    return left, right, (-moment * factor).to(problem.temperature)


def _directions(problem: Problem) -> int:
    return 1 if problem.negatives == "cross" else 2


def _sides(problem: Problem, pairs: int) -> list[_Side]:
    """The launches of a backward pass; the first ones are those of forward."""
    left, right, both = slice(0, pairs), slice(pairs, 2 * pairs), slice(0, 2 * pairs)
    return [_Side(both, both)] if problem.negatives == "simclr" else [_Side(left, right), _Side(right, left)]


def _splits(side: _Side) -> int:
    tiles, others = (-(-(rows.stop - rows.start) // TILE_ROWS) for rows in side)
    return min(others, -(-WANTED_BLOCKS // tiles))


def _rows(problem: Problem) -> _Rows:
    kept = None if problem.valid is None else problem.valid.nonzero().flatten()
    sides = [rows if kept is None else rows[kept] for rows in (problem.left, problem.right)]
    rows = torch.cat(sides)
    count = len(sides[0])
    if problem.ids is None:
        ids = torch.arange(count, dtype=torch.int32, device=rows.device)
    else:
        ids = torch.unique(problem.ids if kept is None else problem.ids[kept], return_inverse=True)[1].int()
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
    return _Rows(kept, cuda.aligned(functional.pad(rows, (0, missing))), scale, inverse_length, ids)


def _empty(rows: _Rows, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=rows.stored.device)


def _positives(problem: Problem, rows: _Rows) -> Tensor:
    """Similarities of the pairs float32 [K], computed as in the tiles: equal rows then have a gap of exactly 0."""
    pairs = len(rows.ids)
    positives = _empty(rows, pairs)
    _launch(POSITIVES, problem, rows, _Side(slice(0, pairs), slice(pairs, 2 * pairs)), positives)
    return positives


def _launch(which: int, problem: Problem, rows: _Rows, side: _Side, positives: Tensor, *more: Tensor | None) -> None:
    tensors = (rows.stored[side.own], rows.stored[side.other], rows.scale, rows.ids, positives, *more)
    tensors = (*tensors, *[None] * (11 - len(tensors)))
    starts = [side.own.start, side.other.start]
    counts = [side.own.stop - side.own.start, side.other.stop - side.other.start]
    sizes = [*counts, *starts, len(rows.ids), rows.stored.shape[1], _splits(side)]
    numbers = (cuda.DTYPES[rows.stored.dtype], 1.0 / float(problem.temperature))
    cuda.launch(cuda.kernels().nt_xent, rows.stored, which, [cuda.address(part) for part in tensors], sizes, *numbers)


def _finish(problem: Problem, rows: _Rows, slopes: Tensor, share: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs from those of the rows of the loss by their negatives; adds what the positives give."""
    width, pairs = problem.left.shape[1], len(rows.ids)
    unit = rows.stored[:, :width].float() * rows.scale[:, None]
    slopes = slopes[:, :width] + share[:, None] * unit.roll(pairs, 0)
    if rows.inverse_length is not None:
        along = (slopes * unit).sum(dim=1, keepdim=True)
        slopes = (slopes - unit * along) * rows.inverse_length
    left, right = (part.to(problem.left.dtype, copy=True) for part in (slopes * factor).split(pairs))
    if rows.kept is None:
        return left, right
    whole = (torch.zeros(problem.left.shape, dtype=left.dtype, device=left.device) for _ in range(2))
    left, right = (into.index_copy_(0, rows.kept, part) for into, part in zip(whole, (left, right), strict=True))
    return left, right
