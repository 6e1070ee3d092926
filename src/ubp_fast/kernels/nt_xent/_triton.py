"""The Triton backend for NVIDIA GPUs from compute capability 8.0: which tiles run, and the launches.

Memory beyond inputs and gradients: a copy of the rows, in backward a float32 matrix of their size, and a few numbers
per row (at most 528 / blocks of rows of them in forward); never a matrix of similarities. "symmetric" looks at its
matrix once from each side in forward and in backward, "simclr" at all of its own: no tile serves its columns, too.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubp_fast.kernels import tiles as tile_table
from ubp_fast.kernels.backends import on_device, triton_unavailable, unsupported_dtype
from ubp_fast.kernels.nt_xent.reference import Problem

TABLE = Path(__file__).with_name("tiles.json")
MAX_ROWS = 2**29  # row numbers of both sides are int32
PROGRAMS = 528  # four for each multiprocessor of the largest GPU of today; small problems split their columns for it


class Tiles(NamedTuple):
    """Rows and columns of a block of similarities, elements taken at a time, and how Triton runs it."""

    block_m: int
    block_n: int
    block_k: int
    block_e: int
    num_warps: int
    num_stages: int


class Prepared(NamedTuple):
    """Rows of both sides [2N, E] in the dtype of the inputs; float64: inverse lengths [2N], similarities [N]."""

    rows: Tensor
    inverse: Tensor
    positive: Tensor


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    if len(problem.left) >= MAX_ROWS:
        return f"it takes fewer than {MAX_ROWS} rows, got {len(problem.left)}"
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


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and the row losses [N] ([2N] for symmetric and simclr), float64; 0 for rows that are not valid."""
    count, device = len(problem.left), problem.left.device
    weight = problem.row_weight.double().repeat(_directions(problem))
    if count == 0:
        return problem.row_weight.sum(), weight
    prepared = _prepare(problem)
    losses = []
    for own, others in _meetings(problem):
        chosen = _tiles_here("statistics", problem)
        blocks = math.ceil(own[1] / chosen.block_m)
        parts = max(1, min(math.ceil(PROGRAMS / blocks), math.ceil(others[1] / chosen.block_n)))
        step = math.ceil(math.ceil(others[1] / parts) / chosen.block_n) * chosen.block_n
        parts = math.ceil(others[1] / step)
        maximum, total = (torch.empty((parts, own[1]), dtype=torch.float64, device=device) for _ in range(2))
        tensors = (*prepared, *_row_facts(problem), maximum, total)
        _launch("statistics_kernel", (blocks, parts), problem, *tensors, count, *own, *others, step, chosen=chosen)
        peak = maximum.amax(dim=0)
        sums = (total * torch.exp2(maximum - peak)).sum(dim=0)
        peak = peak * math.log(2.0)
        losses.append(peak + torch.log1p(torch.expm1(-peak) + sums))
    row_losses = torch.cat(losses)
    if problem.valid is not None:
        row_losses = row_losses.masked_fill(~problem.valid.repeat(_directions(problem)), 0)
    mass = weight.sum()
    loss = (row_losses * weight).sum() / torch.where(mass == 0, 1.0, mass)
    return loss.float(), row_losses


def backward(problem: Problem, grad: Tensor, row_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, right and temperature; the similarities are computed again."""
    (count, width), device = problem.left.shape, problem.left.device
    grad_left, grad_right = (torch.empty((count, width), dtype=problem.left.dtype, device=device) for _ in range(2))
    if count == 0:
        return grad_left, grad_right, torch.zeros_like(problem.temperature)
    prepared, weight = _prepare(problem), problem.row_weight.float()
    slope = torch.empty((2 * count, width), dtype=torch.float32, device=device)
    chosen = _tiles_here("gradient", problem)
    moments = []
    for own, others in _meetings(problem, is_backward=True):
        blocks = math.ceil(own[1] / chosen.block_m)
        moment = torch.zeros(blocks, dtype=torch.float64, device=device)
        tensors = (*prepared, *_row_facts(problem), row_losses / math.log(2.0), weight, slope, moment)
        sides = {
            "HAS_ROW_LOSS": own[0] == 0 or problem.negatives != "cross",
            "HAS_COLUMN_LOSS": others[0] == 0 or problem.negatives != "cross",
        }
        grid = (blocks, math.ceil(width / chosen.block_e))
        _launch("gradient_kernel", grid, problem, *tensors, count, *own, *others, chosen=chosen, **sides)
        moments.append(moment.sum() * math.log(2.0))
    mass = problem.row_weight.double().sum() * _directions(problem)
    factor = grad.double() / (torch.where(mass == 0, 1.0, mass) * _temperature(problem))
    # What the positive gains is what its negatives lose: sum of p over them = 1 - exp(-loss).
    pull = -(torch.expm1(-row_losses).view(-1, count).sum(dim=0) * problem.row_weight.double())
    _finish(problem, slope, pull, factor, grad_left, grad_right)
    return grad_left, grad_right, (-torch.stack(moments).sum() * factor).to(problem.temperature)


def _tiles_here(kernel: str, problem: Problem) -> Tiles:
    device = tile_table.device_names(problem.left.device)
    return tiles(kernel, problem.left.dtype, problem.left.shape[1], device)


def _directions(problem: Problem) -> int:
    return 1 if problem.negatives == "cross" else 2


def _meetings(problem: Problem, is_backward: bool = False) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(first row, rows) of the owners and of the others: who meets whom; in backward both sides own."""
    count = len(problem.left)
    if problem.negatives == "simclr":
        return [((0, 2 * count), (0, 2 * count))]
    left, right = (0, count), (count, count)
    return [(left, right), (right, left)] if is_backward or problem.negatives == "symmetric" else [(left, right)]


def _temperature(problem: Problem) -> Tensor:
    return problem.temperature.to(problem.left.device, torch.float64, non_blocking=True)


def _row_facts(problem: Problem) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Ids, valid and temperature, as the kernels read them."""
    ids, valid = (None if part is None else part.contiguous() for part in (problem.ids, problem.valid))
    return ids, valid, _temperature(problem)


def _sides(problem: Problem) -> tuple[Any, ...]:
    """Left and right, each row's elements neighbours, and their strides."""
    sides = [side if side.stride(1) == 1 else side.contiguous() for side in (problem.left, problem.right)]
    return (*sides, *(side.stride(0) for side in sides))


def _row_options(problem: Problem) -> dict[str, Any]:
    width = problem.left.shape[1]
    block = max(16, 1 << (width - 1).bit_length())
    return {
        "IS_NORMALIZED": problem.normalize,
        "HAS_VALID": problem.valid is not None,
        "WIDTH": width,
        "BLOCK_E": block,
        "num_warps": 1 if block <= 256 else 4,
    }


def _prepare(problem: Problem) -> Prepared:
    (count, width), device = problem.left.shape, problem.left.device
    rows = torch.empty((2 * count, width), dtype=problem.left.dtype, device=device)
    inverse, positive = (torch.empty(size, dtype=torch.float64, device=device) for size in (2 * count, count))
    tensors = (*_sides(problem), _row_facts(problem)[1], rows, inverse, positive)
    with on_device(device):
        _kernels().prepare_kernel[(count,)](*tensors, count, **_row_options(problem))
    return Prepared(rows, inverse, positive)


def _finish(problem: Problem, slope: Tensor, pull: Tensor, factor: Tensor, *gradients: Tensor) -> None:
    count = len(problem.left)
    tensors = (*_sides(problem), _row_facts(problem)[1], slope, pull, factor, *gradients)
    with on_device(problem.left.device):
        _kernels().finish_kernel[(count,)](*tensors, count, **_row_options(problem))


def _launch(name: str, grid: tuple[int, int], problem: Problem, *arguments: Any, chosen: Tiles, **more: bool) -> None:
    with on_device(problem.left.device):
        getattr(_kernels(), name)[grid](*arguments, **more, **constants(name, problem, chosen))


def constants(name: str, problem: Problem, chosen: Tiles) -> dict[str, Any]:
    """What decides the code of a kernel beside the forms."""
    found: dict[str, Any] = {
        "HAS_IDS": problem.ids is not None,
        "HAS_VALID": problem.valid is not None,
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


def _kernels() -> ModuleType:
    """Imported with the first launch: Triton costs a second, and is not there on every machine."""
    from ubp_fast.kernels.nt_xent import _triton_kernels

    return _triton_kernels
