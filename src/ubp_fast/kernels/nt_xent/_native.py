"""The compiled CPU kernels: `csrc/nt_xent/cpu.cpp`, in the instruction set that suits the machine.

Rows that are not valid are left out; the others are read, normalised and written where they lie. Small problems are
computed in float64, large ones in float32, or, for bfloat16 rows where the processor has the instruction, in bfloat16
products of the rows as they are. Memory: a few [2N, E] matrices. The same for every number of threads, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels.backends import DTYPES, unsupported_on_cpu
from ubp_fast.kernels.nt_xent.reference import Problem

FORMS = {"cross": 0, "symmetric": 1, "simclr": 2}


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    return unsupported_on_cpu(problem.left)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and the row losses [N] ([2N] for symmetric and simclr), float64; 0 for rows that are not valid."""
    directions, count = _directions(problem), len(problem.left)
    row_losses = torch.zeros(directions, count, dtype=torch.float64)
    kept = _kept(problem)
    if len(kept):
        losses = torch.empty(directions, len(kept), dtype=torch.float64)
        _call(_core.nt_xent_forward, problem, kept, losses)
        row_losses = losses if len(kept) == count else row_losses.index_copy_(1, kept, losses)
    weight = problem.row_weight.double()
    total = weight.sum() * directions
    loss = (row_losses * weight).sum() / torch.where(total == 0, 1.0, total)
    return loss.float(), row_losses.flatten()


def backward(problem: Problem, grad: Tensor, row_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, right and temperature; the similarities are computed again."""
    kept, total = _kept(problem), float(problem.row_weight.double().sum()) * _directions(problem)
    make = torch.empty if len(kept) == len(problem.left) else torch.zeros
    grad_left, grad_right = (make(problem.left.shape, dtype=problem.left.dtype) for _ in range(2))
    if not len(kept) or total == 0:
        return grad_left.zero_(), grad_right.zero_(), torch.zeros_like(problem.temperature)
    losses = row_losses.view(_directions(problem), -1)[:, kept].contiguous()
    weight = problem.row_weight[kept].contiguous()
    factor = float(grad) / (total * float(problem.temperature))
    found = {"weight": weight, "factor": factor, "grad_left": grad_left, "grad_right": grad_right}
    moment = _call(_core.nt_xent_backward, problem, kept, losses, **found)
    return grad_left, grad_right, torch.full_like(problem.temperature, -moment * factor)


def _directions(problem: Problem) -> int:
    return 1 if problem.negatives == "cross" else 2


def _kept(problem: Problem) -> Tensor:
    """Numbers of the rows that take part, int64 [K]."""
    return torch.arange(len(problem.left)) if problem.valid is None else problem.valid.nonzero().flatten()


def _call(
    function: Callable[[_core.NTXentProblem], float], problem: Problem, kept: Tensor, losses: Tensor, **more: Any
) -> float:
    left, right = problem.left.contiguous(), problem.right.contiguous()
    if problem.ids is None:
        ids = torch.arange(len(kept), dtype=torch.int32)
    else:
        ids = torch.unique(problem.ids[kept], return_inverse=True)[1].int()
    compiled = _core.NTXentProblem(
        left=left,
        right=right,
        dtype=DTYPES[left.dtype],
        kept=kept,
        ids=ids,
        rows=len(left),
        pairs=len(kept),
        width=left.shape[1],
        form=FORMS[problem.negatives],
        has_ids=problem.ids is not None,
        is_normalized=problem.normalize,
        temperature=float(problem.temperature),
        threads=torch.get_num_threads(),
        losses=losses,
        **more,
    )
    return function(compiled)
