"""The CUDA kernels: `csrc/nt_xent/cuda.cu`. Rows are prepared, and their gradients finished, by PyTorch.

16-bit rows keep their numbers (times a power of two each) and are divided by their length after the products; float32
rows are normalised first. Rows that are not valid are zeros that meet nobody. Backward computes the similarities again,
once per 256 columns. Memory: a few [2N, E] matrices in float32. Results are the same every time, and nothing waits for
the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ubp_fast.kernels import cuda
from ubp_fast.kernels.backends import DTYPES
from ubp_fast.kernels.nt_xent.reference import Problem

POSITIVES, FORWARD, BACKWARD = 0, 1, 2
TILE_ROWS, CHUNK_COLUMNS = 64, 64
# Enough blocks for every device of today; never the device's own number, so that all give the same sums.
WANTED_BLOCKS = 256
LARGEST_EXPONENT = 126  # of a power of two whose reciprocal is a normal float


class _Rows(NamedTuple):
    """Rows of both sides, left then right, as the kernels read them.

    Attributes:
        stored: [2N, E filled to chunks].
        scale: float32 [2N]; scale * stored is the row of the loss.
        inverse_length: float32 [2N, 1], 1 / length of the input row, 0 for zero rows; None: rows are not normalised.
        ids: int32 [N], dense; None: all differ.
        inverse_temperature: float32 [1].
    """

    stored: Tensor
    scale: Tensor
    inverse_length: Tensor | None
    ids: Tensor | None
    inverse_temperature: Tensor


class _Side(NamedTuple):
    """Own rows of a launch, and the rows they meet, as ranges of [left; right]."""

    own: slice
    other: slice


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    return cuda.unsupported(problem.left)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and the row losses [N] ([2N] for symmetric and simclr), float64; 0 for rows that are not valid."""
    rows, directions, count = _rows(problem), _directions(problem), len(problem.left)
    row_losses = torch.zeros(directions, count, dtype=torch.float64, device=problem.left.device)
    if count:
        positives, losses = _positives(problem, rows), []
        for side in _sides(problem)[:directions]:
            splits, own = _splits(side), side.own.stop - side.own.start
            largest, sums = (_empty(rows, splits, own) for _ in range(2))
            _launch(FORWARD, problem, rows, side, positives=positives, largest=largest, sums=sums)
            peak = largest.double().amax(dim=0)
            total = (sums * torch.exp(largest.double() - peak)).sum(dim=0)
            losses.append(peak + torch.log1p(torch.expm1(-peak) + total))
        row_losses = _of_valid(problem, torch.cat(losses).view(directions, -1))
    weight = problem.row_weight.double()
    total_weight = weight.sum() * directions
    loss = (row_losses * weight).sum() / torch.where(total_weight == 0, 1.0, total_weight)
    return loss.float(), row_losses.flatten()


def backward(problem: Problem, grad: Tensor, row_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, right and temperature; the similarities are computed again."""
    rows, directions, weight = _rows(problem), _directions(problem), problem.row_weight
    total = weight.double().sum() * directions
    factor = grad.double() / (torch.where(total == 0, 1.0, total) * _temperature(problem))
    if not len(problem.left):
        nothing = torch.zeros_like(problem.left), torch.zeros_like(problem.right)
        return *nothing, torch.zeros_like(problem.temperature)
    losses = row_losses.view(directions, -1)
    share = (torch.expm1(-losses).sum(dim=0) * weight).repeat(2)  # slope of each row at its positive
    unasked = (0, (2 - directions) * len(weight))
    asked, weights = functional.pad(losses.flatten().float(), unasked), weight.float().repeat(directions)
    weights = functional.pad(weights, unasked)
    positives, slopes, moment = _positives(problem, rows), [], torch.zeros_like(total)
    for side in _sides(problem):
        splits, own = _splits(side), side.own.stop - side.own.start
        parts, moments = _empty(rows, splits, own, rows.stored.shape[1]), _empty(rows, splits, own)
        sums = {"grad": parts, "moments": moments}
        _launch(BACKWARD, problem, rows, side, positives=positives, losses=asked, weights=weights, **sums)
        slopes.append(parts[0] if splits == 1 else parts.sum(dim=0))
        moment = moment + _of_valid(problem, moments).sum(dtype=torch.float64)
    left, right = _finish(problem, rows, torch.cat(slopes), share.float(), factor.float())
    return left, right, (-moment * factor).to(problem.temperature)


def _of_valid(problem: Problem, values: Tensor) -> Tensor:
    """Values [..., N or 2N], 0 where the row is not valid: the kernels write nothing there."""
    if problem.valid is None:
        return values
    return values.masked_fill(~problem.valid.repeat(values.shape[-1] // len(problem.valid)), 0)


def _directions(problem: Problem) -> int:
    return 1 if problem.negatives == "cross" else 2


def _temperature(problem: Problem) -> Tensor:
    return problem.temperature.to(problem.left.device, torch.float64, non_blocking=True)


def _sides(problem: Problem) -> list[_Side]:
    """The launches of a backward pass; the first ones are those of forward."""
    pairs = len(problem.left)
    left, right, both = slice(0, pairs), slice(pairs, 2 * pairs), slice(0, 2 * pairs)
    return [_Side(both, both)] if problem.negatives == "simclr" else [_Side(left, right), _Side(right, left)]


def _splits(side: _Side) -> int:
    tiles, others = (-(-(rows.stop - rows.start) // TILE_ROWS) for rows in side)
    return min(others, -(-WANTED_BLOCKS // tiles))


def _rows(problem: Problem) -> _Rows:
    rows = torch.cat((problem.left, problem.right))
    if problem.valid is not None:
        rows = rows.masked_fill(~problem.valid.repeat(2)[:, None], 0)
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
    return _Rows(stored, scale, inverse_length, _dense(problem.ids), inverse_temperature)


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
    """Similarities of the pairs float32 [N], computed as in the tiles: equal rows then have a gap of exactly 0."""
    pairs = len(problem.left)
    positives = _empty(rows, pairs)
    _launch(POSITIVES, problem, rows, _Side(slice(0, pairs), slice(pairs, 2 * pairs)), positives=positives)
    return positives


def _launch(which: int, problem: Problem, rows: _Rows, side: _Side, **tensors: Tensor) -> None:
    kernels = cuda.kernels()
    valid = None if problem.valid is None else problem.valid.contiguous()  # lives until the launch
    launched = kernels.NTXentProblem(
        own=rows.stored[side.own],
        other=rows.stored[side.other],
        dtype=DTYPES[rows.stored.dtype],
        own_rows=side.own.stop - side.own.start,
        other_rows=side.other.stop - side.other.start,
        own_first=side.own.start,
        other_first=side.other.start,
        pairs=len(problem.left),
        width=rows.stored.shape[1],
        scales=rows.scale,
        valid=valid,
        ids=rows.ids,
        inverse_temperature=rows.inverse_temperature,
        splits=_splits(side),
        **tensors,
    )
    cuda.launch(kernels.nt_xent, rows.stored, which, launched)


def _finish(problem: Problem, rows: _Rows, slopes: Tensor, share: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs from those of the rows of the loss by their negatives; adds what the positives give."""
    width, pairs = problem.left.shape[1], len(problem.left)
    unit = rows.stored[:, :width].float() * rows.scale[:, None]
    slopes = slopes[:, :width] + share[:, None] * unit.roll(pairs, 0)
    if rows.inverse_length is not None:
        along = (slopes * unit).sum(dim=1, keepdim=True)
        slopes = (slopes - unit * along) * rows.inverse_length
    if problem.valid is not None:
        slopes = slopes.masked_fill(~problem.valid.repeat(2)[:, None], 0)
    left, right = (part.to(problem.left.dtype, copy=True) for part in (slopes * factor).split(pairs))
    return left, right
