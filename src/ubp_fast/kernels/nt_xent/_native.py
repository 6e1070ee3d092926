"""The compiled CPU kernels: `csrc/nt_xent/cpu.cpp`, in the instruction set that suits the machine.

Rows that are not valid are left out before, normalised rows are float32 whatever the dtype of the inputs. Memory: a
few [2N, E] float32 tensors. Deterministic, and the same for every number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels.nt_xent.reference import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = {"cross": 0, "symmetric": 1, "simclr": 2}


class _Packed(NamedTuple):
    """Valid rows as the kernel wants them: left above right, each row padded with zeros."""

    rows: Tensor  # float32 [2K, stride], of length 1 when normalised
    length: Tensor | None  # float64 [2K, 1]: row = input / length
    ids: Tensor  # int32 [K], counted from 0
    kept: Tensor | None  # int64 [K] numbers of the valid rows, None: all


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    if problem.left.device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {problem.left.device}"
    if problem.left.dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, the tensors are {problem.left.dtype}"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and the row losses [N] ([2N] for symmetric and simclr), float64; 0 for rows that are not valid."""
    directions, count = 1 if problem.negatives == "cross" else 2, len(problem.left)
    packed = _pack(problem)
    row_losses = torch.zeros(directions, count, dtype=torch.float64)
    if len(packed.ids):
        losses = torch.empty(directions, len(packed.ids), dtype=torch.float64)
        _core.nt_xent_forward(*_arguments(problem, packed, losses))
        row_losses = losses if packed.kept is None else row_losses.index_copy_(1, packed.kept, losses)
    weight = problem.row_weight.double()
    total = weight.sum() * directions
    loss = (row_losses * weight).sum() / torch.where(total == 0, 1.0, total)
    return loss.float(), row_losses.flatten()


def backward(problem: Problem, grad: Tensor, row_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, right and temperature; the similarities are computed again."""
    directions, (count, width) = 1 if problem.negatives == "cross" else 2, problem.left.shape
    packed = _pack(problem)
    pairs = len(packed.ids)
    losses, weight = row_losses.view(directions, count), problem.row_weight
    if packed.kept is not None:
        losses, weight = losses[:, packed.kept], weight[packed.kept]
    losses, weight = losses.contiguous(), weight.contiguous()
    total = float(weight.double().sum()) * directions
    if not pairs or total == 0:
        nothing = (torch.zeros_like(problem.left), torch.zeros_like(problem.right))
        return *nothing, torch.zeros_like(problem.temperature)
    slopes = torch.empty(packed.rows.shape)
    moment = _core.nt_xent_backward(*_arguments(problem, packed, losses), weight.data_ptr(), slopes.data_ptr())
    factor = float(grad) / (total * float(problem.temperature))
    gradient = _towards_inputs(slopes, packed).mul_(factor)[:, :width].to(problem.left.dtype)
    sides = [_spread(side, count, packed.kept) for side in (gradient[:pairs], gradient[pairs:])]
    return sides[0], sides[1], torch.full_like(problem.temperature, -moment * factor)


def _arguments(problem: Problem, packed: _Packed, losses: Tensor) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any]:
    sizes = [len(packed.ids), problem.left.shape[1], packed.rows.shape[1]]
    return (
        packed.rows.data_ptr(),
        packed.ids.data_ptr(),
        sizes,
        FORMS[problem.negatives],
        problem.ids is not None,
        float(problem.temperature),
        torch.get_num_threads(),
        losses.data_ptr(),
    )


def _pack(problem: Problem) -> _Packed:
    kept = None if problem.valid is None else problem.valid.nonzero().flatten()
    count = len(problem.left) if kept is None else len(kept)
    width = problem.left.shape[1]
    # 16 numbers more than needed: rows a power of two apart would share few sets of the cache.
    rows = torch.zeros(2 * count, (width + 15) // 16 * 16 + 16)
    for at, side in ((0, problem.left), (count, problem.right)):
        rows[at : at + count, :width] = side if kept is None else side[kept]
    length = None
    if problem.normalize and count:
        # In float64: no overflow, and no common error of a row, which the temperature would enlarge.
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        length.masked_fill_(length == 0, 1)
        for part, by in zip(rows.split(1024), length.split(1024), strict=True):
            part.copy_(part.double() / by)
    if problem.ids is None:
        ids = torch.arange(count, dtype=torch.int32)
    else:
        ids = torch.unique(problem.ids if kept is None else problem.ids[kept], return_inverse=True)[1].int()
    return _Packed(rows, length, ids, kept)


def _towards_inputs(slopes: Tensor, packed: _Packed) -> Tensor:
    """Gradient of the rows -> gradient of the inputs, in place; rows that are zero get none."""
    if packed.length is None:
        return slopes
    along = torch.linalg.vecdot(slopes, packed.rows).unsqueeze(1)
    slopes.addcmul_(packed.rows, along, value=-1)
    is_zero = torch.linalg.vector_norm(packed.rows, ord=float("inf"), dim=1, keepdim=True) == 0
    return slopes.mul_(packed.length.reciprocal().float()).masked_fill_(is_zero, 0)


def _spread(rows: Tensor, count: int, kept: Tensor | None) -> Tensor:
    if kept is None:
        return rows.clone(memory_format=torch.contiguous_format)
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, kept, rows)
