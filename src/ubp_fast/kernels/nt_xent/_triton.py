"""The Triton backend for NVIDIA GPUs from compute capability 8.0: which tiles run, and the launches.

Memory beyond inputs and gradients: a copy of the rows, in backward a float32 matrix of their size, and a few numbers
per row (at most 528 / blocks of rows of them in forward); never a matrix of similarities. "symmetric" looks at its
matrix once from each side in forward and in backward, "simclr" at all of its own: no tile serves its columns, too.

Many wide rows of 16 bits take another way (`is_chunked`): the BLAS multiplies, a chunk of similarities at a time, and
kernels of single similarities stand between its products. They are four for "cross" instead of five, for one look at a
similarity serves both of its rows. That takes three chunks of memory more.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubp_fast.kernels import tiles as tile_table
from ubp_fast.kernels.backends import on_device, triton_unavailable, unsupported_dtype
from ubp_fast.kernels.nt_xent.reference import Problem, each_row, groups

TABLE = Path(__file__).with_name("tiles.json")
MAX_ROWS = 2**29  # row numbers of both sides are int32
CHUNK = (4096, 2048)  # rows and columns: large enough for the BLAS, small enough to stay in an L2 cache of 50 MB
LEAST_CHUNKED = (257, 2**24)  # width, and similarities
PULL_BLOCK = (32, 64)
LIFT = 16384.0  # of what `pull_kernel` writes
PROGRAMS = 528  # four for each multiprocessor of the largest GPU of today; small problems split their columns for it


class Tiles(NamedTuple):
    """Rows and columns of a block of similarities, elements taken at a time, and how Triton runs it."""

    block_m: int
    block_n: int
    block_k: int
    block_e: int
    num_warps: int
    num_stages: int


class Rows(NamedTuple):
    """All rows of a problem, one behind the other, and what belongs to them.

    Attributes:
        rows: [R, E] in the dtype of the inputs: left, then right; or left, positive, right.
        inverse: float64 [R], inverse lengths.
        positive: float64, similarities of queries to their positives, from the first row on.
        group: int32 [R]; rows of one group are no negatives of each other.
        ids: int64 [R] or None.
        valid: bool [R] or None.
        bias: float64 [R] in units of log 2, of queries that of their positives, or None.
        temperature: float64, 0-d.
    """

    rows: Tensor
    inverse: Tensor
    positive: Tensor
    group: Tensor
    ids: Tensor | None
    valid: Tensor | None
    bias: Tensor | None
    temperature: Tensor


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    most = max(len(problem.left), len(problem.right))
    if most >= MAX_ROWS:
        return f"it takes fewer than {MAX_ROWS} rows, got {most}"
    return unsupported_dtype(problem.left) or triton_unavailable(problem.left.device)


def tiles(kernel: str, dtype: torch.dtype, width: int, device: tuple[str, ...]) -> Tiles:
    """The tiles of a kernel.

    Up to 256 elements a block of rows is loaded whole, once; each block of columns once, for the similarities and, in
    the gradient, for the sum. Wider rows are multiplied a part at a time, and the gradient is summed in parts, for each
    of which the similarities are computed again. float32 multiplies in float64, in small blocks.
    """
    kind = "float32" if dtype == torch.float32 else "half"
    whole = max(16, 1 << (width - 1).bit_length())
    m, n, k, e, warps, stages = tile_table.choose(TABLE, device, kernel, kind, width)
    return Tiles(m, n, whole if k is None else k, whole if e is None else e, warps, stages)


def forward(problem: Problem) -> Tensor:
    """Row losses [N] ([2N] for symmetric and simclr), float64; 0 for rows that are not valid."""
    device = problem.left.device
    if not len(problem.left) or not len(problem.right):
        return torch.zeros(len(problem.left) * problem.directions, dtype=torch.float64, device=device)
    rows, losses, is_apart = _prepare(problem), [], is_chunked(problem)
    for own, others in _meetings(problem):
        for here in _chunks(own, CHUNK[0]) if is_apart else [own]:
            if is_apart:
                columns = _chunks(others, CHUNK[1])
                parts = [_statistics(problem, rows, here, there, _products(rows, here, there)) for there in columns]
            else:
                parts = [_statistics(problem, rows, here, others)]
            maximum, total = (torch.cat(part) for part in zip(*parts, strict=True))
            peak = maximum.amax(dim=0)
            sums = (total * torch.exp2(maximum - peak)).sum(dim=0)
            peak = peak * math.log(2.0)
            losses.append(peak + torch.log1p(torch.expm1(-peak) + sums))
    row_losses = torch.cat(losses)
    return row_losses if problem.valid is None else row_losses.masked_fill(~problem.valid.repeat(problem.directions), 0)


def backward(
    problem: Problem, weight: Tensor, factor: Tensor, row_losses: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of left, right, positive and temperature; the similarities are computed again."""
    given = (problem.left, problem.right, problem.positive)
    left, right, positive = (
        None if part is None else torch.zeros_like(part, memory_format=torch.contiguous_format) for part in given
    )
    if not len(problem.left) or not len(problem.right):
        return left, right, positive, torch.zeros_like(problem.temperature)  # type: ignore[return-value]
    rows = _prepare(problem)
    make = _chunked_slope if is_chunked(problem) else _slope
    slope, moment = make(problem, rows, row_losses / math.log(2.0), weight.float())
    factor = factor / rows.temperature
    pull = (shares * weight).view(problem.directions, -1).sum(dim=0)  # the positive gains what its negatives lose
    _finish(problem, slope, pull, factor, left, right, positive)
    to_temperature = (-moment * math.log(2.0) * factor).to(problem.temperature)
    return left, right, positive, to_temperature  # type: ignore[return-value]


def is_chunked(problem: Problem) -> bool:
    """Whether the BLAS multiplies.

    By count (`docs/gpu_model.md`) kernels that multiply themselves are as fast up to 256 columns, where a tile holds
    whole rows. Wider ones load their rows again for every few similarities, and the L2 cache limits them to a fifth of
    the peak. Chunks want enough similarities for their launches.
    """
    width, similarities = LEAST_CHUNKED
    is_large = problem.left.shape[1] >= width and len(problem.left) * len(problem.right) >= similarities
    return is_large and problem.left.dtype != torch.float32


def _chunks(side: tuple[int, int], most: int) -> list[tuple[int, int]]:
    """(first row, rows) of parts of at most `most` rows."""
    first, count = side
    return [(first + at, min(most, count - at)) for at in range(0, count, most)]


def _part(rows: Tensor, side: tuple[int, int]) -> Tensor:
    return rows[side[0] : side[0] + side[1]]


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """16-bit matrices, added up and given in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _products(rows: Rows, here: tuple[int, int], there: tuple[int, int]) -> Tensor:
    return _multiply(_part(rows.rows, here), _part(rows.rows, there).t())


def _statistics(
    problem: Problem, rows: Rows, own: tuple[int, int], others: tuple[int, int], products: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Largest gap and sum of exp2(gap - largest) of each own row, float64 [parts, rows]."""
    chosen = _tiles_here("statistics", problem)
    if products is not None:
        chosen = of_chunks(chosen)
    blocks = math.ceil(own[1] / chosen.block_m)
    parts = max(1, min(math.ceil(PROGRAMS / blocks), math.ceil(others[1] / chosen.block_n)))
    step = math.ceil(math.ceil(others[1] / parts) / chosen.block_n) * chosen.block_n
    parts = math.ceil(others[1] / step)
    maximum, total = (torch.empty((parts, own[1]), dtype=torch.float64, device=rows.rows.device) for _ in range(2))
    tensors = (*rows, products, maximum, total)
    has = {"HAS_PRODUCTS": products is not None}
    _launch("statistics_kernel", (blocks, parts), problem, *tensors, *own, *others, step, chosen=chosen, **has)
    return maximum, total


def of_chunks(tiles: Tiles) -> Tiles:
    """The tiles where products come from memory: nothing is multiplied, and each thread has a few similarities."""
    return tiles._replace(block_m=PULL_BLOCK[0], block_n=PULL_BLOCK[1], num_warps=8, num_stages=1)


def _chunked_slope(problem: Problem, rows: Rows, losses: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j G_ij u_j of all rows, float32 [R, E], and the sum of p_ij gap_ij; losses in units of log 2."""
    is_simclr, device = problem.negatives == "simclr", rows.rows.device
    own, others = _meetings(problem)[0]
    slope = torch.zeros(rows.rows.shape, dtype=torch.float32, device=device)
    blocks = [math.ceil(most / block) for most, block in zip(CHUNK, PULL_BLOCK, strict=True)]
    moment = torch.zeros(blocks[0] * blocks[1], dtype=torch.float64, device=device)
    for here, there in itertools.product(_chunks(own, CHUNK[0]), _chunks(others, CHUNK[1])):
        products = _products(rows, here, there)
        to_row = torch.empty(products.shape, dtype=rows.rows.dtype, device=device)
        to_column = None if is_simclr else torch.empty_like(to_row)
        blocks = [math.ceil(count / block) for count, block in zip(products.shape, PULL_BLOCK, strict=True)]
        tensors = (products, *rows[1:], losses, weight, to_row, to_column, moment)
        with on_device(device):
            _kernels().pull_kernel[tuple(blocks)](*tensors, *here, *there, **pull_options(problem))
        _part(slope, here).add_(_multiply(to_row, _part(rows.rows, there)))
        if to_column is not None:
            _part(slope, there).add_(_multiply(to_column.t(), _part(rows.rows, here)))
    return slope.div_(LIFT), moment.sum()


def _slope(problem: Problem, rows: Rows, losses: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same by one kernel for each side."""
    width = problem.left.shape[1]
    slope = torch.empty((len(rows.rows), width), dtype=torch.float32, device=problem.left.device)
    if problem.positive is not None:
        slope[len(problem.left) : 2 * len(problem.left)] = 0
    chosen = _tiles_here("gradient", problem)
    moments = []
    for own, others in _meetings(problem, is_backward=True):
        blocks = math.ceil(own[1] / chosen.block_m)
        moment = torch.zeros(blocks, dtype=torch.float64, device=problem.left.device)
        sides = {
            "HAS_ROW_LOSS": own[0] == 0 or problem.negatives != "cross",
            "HAS_COLUMN_LOSS": others[0] == 0 or problem.negatives != "cross",
        }
        tensors = (*rows, losses, weight, slope, moment)
        grid = (blocks, math.ceil(width / chosen.block_e))
        _launch("gradient_kernel", grid, problem, *tensors, *own, *others, chosen=chosen, **sides)
        moments.append(moment.sum())
    return slope, torch.stack(moments).sum()


def _tiles_here(kernel: str, problem: Problem) -> Tiles:
    device = tile_table.device_names(problem.left.device)
    return tiles(kernel, problem.left.dtype, problem.left.shape[1], device)


def _meetings(problem: Problem, is_backward: bool = False) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(first row, rows) of the owners and of the others: who meets whom; in backward both sides own."""
    count, others = len(problem.left), len(problem.right)
    if problem.negatives == "simclr":
        return [((0, 2 * count), (0, 2 * count))]
    left, right = (0, count), (count if problem.positive is None else 2 * count, others)
    return [(left, right), (right, left)] if is_backward or problem.negatives == "symmetric" else [(left, right)]


def _pairs_and_others(problem: Problem) -> list[tuple[Tensor, Tensor | None, Tensor | None, int]]:
    """What the kernels of single rows take: a row, its partner or none, valid, its first place in `Rows`."""
    if problem.positive is None:
        return [(problem.left, problem.right, problem.valid, 0)]
    of_right = (problem.right, None, problem.right_valid, 2 * len(problem.left))
    return [(problem.left, problem.positive, problem.valid, 0), of_right]


def _prepare(problem: Problem) -> Rows:
    (count, width), device = problem.left.shape, problem.left.device
    ids = each_row(problem, problem.ids, problem.right_ids, None)
    valid = each_row(problem, problem.valid, problem.right_valid, problem.valid)
    bias = each_row(problem, problem.positive_bias, problem.bias, None)
    bias = None if bias is None else bias / math.log(2.0)
    total = 2 * count if problem.positive is None else 2 * count + len(problem.right)
    rows = torch.empty((total, width), dtype=problem.left.dtype, device=device)
    inverse = torch.empty(total, dtype=torch.float64, device=device)
    positive = torch.empty(2 * count, dtype=torch.float64, device=device)
    temperature = problem.temperature.to(device, torch.float64, non_blocking=True)
    for one, partner, kept, first in _pairs_and_others(problem):
        _row_launch("prepare_kernel", problem, one, partner, kept, rows[first:], inverse[first:], positive)
    return Rows(rows, inverse, positive, groups(problem), ids, valid, bias, temperature)


def _finish(
    problem: Problem,
    slope: Tensor,
    pull: Tensor,
    factor: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    positive: Tensor | None,
) -> None:
    gradients = [(left, right if positive is None else positive), (right, right)]
    for (one, partner, kept, first), grads in zip(_pairs_and_others(problem), gradients, strict=False):
        _row_launch("finish_kernel", problem, one, partner, kept, slope[first:], pull, factor, *grads)


def _row_launch(
    name: str, problem: Problem, one: Tensor, partner: Tensor | None, valid: Tensor | None, *tensors: Tensor | None
) -> None:
    sides = [side if side.stride(1) == 1 else side.contiguous() for side in (one, one if partner is None else partner)]
    kept = None if valid is None else valid.contiguous()
    arguments = (*sides, *(side.stride(0) for side in sides), kept, *tensors, len(one))
    options = row_options(problem, is_pair=partner is not None, has_valid=valid is not None)
    with on_device(problem.left.device):
        getattr(_kernels(), name)[(len(one),)](*arguments, **options)


def row_options(problem: Problem, is_pair: bool, has_valid: bool) -> dict[str, Any]:
    """What decides the code of a kernel of single rows."""
    width = problem.left.shape[1]
    block = max(16, 1 << (width - 1).bit_length())
    return {
        "IS_PAIR": is_pair,
        "IS_NORMALIZED": problem.normalize,
        "HAS_VALID": has_valid,
        "WIDTH": width,
        "BLOCK_E": block,
        "num_warps": 1 if block <= 256 else 4,
    }


def _launch(name: str, grid: tuple[int, int], problem: Problem, *arguments: Any, chosen: Tiles, **more: bool) -> None:
    with on_device(problem.left.device):
        getattr(_kernels(), name)[grid](*arguments, **more, **constants(name, problem, chosen))


def constants(name: str, problem: Problem, chosen: Tiles) -> dict[str, Any]:
    """What decides the code of a kernel beside the forms."""
    found: dict[str, Any] = {
        **_given(problem),
        "IS_WIDE": problem.left.dtype == torch.float32,
        "IS_WHOLE": chosen.block_k == chosen.block_e and chosen.block_k >= problem.left.shape[1],
        "WIDTH": problem.left.shape[1],
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        # All that a block of this size may have; left alone, ptxas may settle for fewer registers and spill.
        "maxnreg": min(255, 65536 // (32 * chosen.num_warps)),
    }
    if name == "gradient_kernel":
        found["BLOCK_E"] = chosen.block_e
    return found


def pull_options(problem: Problem) -> dict[str, Any]:
    """What decides the code of the kernel between the BLAS's products."""
    return {
        **_given(problem),
        "HAS_COLUMN_LOSS": problem.negatives != "cross",
        "IS_FOR_COLUMNS": problem.negatives != "simclr",
        "BLOCK_M": PULL_BLOCK[0],
        "BLOCK_N": PULL_BLOCK[1],
        "num_warps": 4,
    }


def _given(problem: Problem) -> dict[str, bool]:
    return {
        "HAS_IDS": problem.ids is not None,
        "HAS_VALID": problem.valid is not None or problem.right_valid is not None,
        "HAS_BIAS": problem.bias is not None,
    }


def _kernels() -> ModuleType:
    """Imported with the first launch: Triton costs a second, and is not there on every machine."""
    from ubp_fast.kernels.nt_xent import _triton_kernels

    return _triton_kernels
