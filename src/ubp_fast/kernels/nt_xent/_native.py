"""The compiled CPU kernels: `csrc/nt_xent/cpu.cpp`, in the instruction set that suits the machine.

Rows that are not valid are left out; the others are read, normalised and written where they lie. Small problems are
computed in float64, large ones in float32, or, for bfloat16 rows where the processor has the instruction, in bfloat16
products of the rows as they are. Memory: a few matrices of the inputs' size. The same for every number of threads, bit
by bit.
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


def forward(problem: Problem) -> Tensor:
    """Row losses [N] ([2N] for symmetric and simclr), float64; 0 for rows that are not valid."""
    row_losses = torch.zeros(problem.directions, len(problem.left), dtype=torch.float64)
    kept, right_kept = _kept(problem)
    if len(kept) and len(right_kept):
        losses = torch.empty(problem.directions, len(kept), dtype=torch.float64)
        _call(_core.nt_xent_forward, problem, kept, right_kept, losses)
        row_losses = losses if len(kept) == len(problem.left) else row_losses.index_copy_(1, kept, losses)
    return row_losses.flatten()


def backward(
    problem: Problem, weight: Tensor, factor: Tensor, row_losses: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of left, right, positive and temperature; the similarities are computed again."""
    kept, right_kept = _kept(problem)
    is_whole = len(kept) == len(problem.left) and len(right_kept) == len(problem.right)
    make = torch.empty_like if is_whole else torch.zeros_like
    form = torch.contiguous_format
    left, right, positive = (
        None if part is None else make(part, memory_format=form)
        for part in (problem.left, problem.right, problem.positive)
    )
    if not len(kept) or not len(right_kept):
        nothing = [None if part is None else part.zero_() for part in (left, right, positive)]
        return *nothing, torch.zeros_like(problem.temperature)  # type: ignore[return-value]
    losses, weights, shares = (
        (part if len(kept) == len(problem.left) else part.view(problem.directions, -1)[:, kept]).contiguous()
        for part in (row_losses, weight, shares)
    )
    scale = float(factor) / float(problem.temperature)
    found = {"weight": weights.float(), "shares": shares, "factor": scale, "grad_left": left, "grad_right": right}
    if positive is not None:
        found["grad_positive"] = positive
    moment = _call(_core.nt_xent_backward, problem, kept, right_kept, losses, **found)
    return left, right, positive, torch.full_like(problem.temperature, -moment * scale)  # type: ignore[return-value]


def _kept(problem: Problem) -> tuple[Tensor, Tensor]:
    """Numbers of the rows of both sides that take part, int64."""
    sides = ((problem.left, problem.valid), (problem.right, problem.right_valid))
    left, right = (torch.arange(len(rows)) if valid is None else valid.nonzero().flatten() for rows, valid in sides)
    return left, right


def _ids(problem: Problem, kept: Tensor, right_kept: Tensor) -> tuple[Tensor, Tensor]:
    """Dense ids int32 of the rows that take part."""
    if problem.ids is None or problem.right_ids is None:
        own = torch.arange(len(kept), dtype=torch.int32)
        # Without pairs only places say who is no negative.
        return (own, own) if problem.positive is None else (own.fill_(1), torch.zeros(len(right_kept)).int())
    given = torch.cat((problem.ids[kept], problem.right_ids[right_kept]))
    dense = torch.unique(given, return_inverse=True)[1].int()
    return dense[: len(kept)], dense[len(kept) :]


def _rectangular(problem: Problem, kept: Tensor, right_kept: Tensor) -> dict[str, Tensor]:
    """What pairs do not have; positions are counted among the rows that take part."""
    if problem.positive is None or problem.places is None:
        return {}
    places = problem.places[kept]
    if problem.right_valid is not None:
        number = torch.full((len(problem.right) + 1,), -1)  # the last entry is for -1
        number[right_kept] = torch.arange(len(right_kept))
        places = number[places]
    found = {"positive": problem.positive.contiguous(), "places": places.int()}
    if problem.bias is not None and problem.positive_bias is not None:
        biases = (problem.bias[right_kept], problem.positive_bias[kept])
        # Only their differences count: small numbers keep more digits of similarities.
        both = torch.cat(biases)
        middle = (both.amax() + both.amin()) / 2
        found |= {"right_bias": biases[0] - middle, "positive_bias": biases[1] - middle}
    return found


def _call(
    function: Callable[[_core.NTXentProblem], float],
    problem: Problem,
    kept: Tensor,
    right_kept: Tensor,
    losses: Tensor,
    **more: Any,
) -> float:
    left, right = problem.left.contiguous(), problem.right.contiguous()
    ids, right_ids = _ids(problem, kept, right_kept)
    rectangular = _rectangular(problem, kept, right_kept)  # lives until the call: the struct holds addresses
    compiled = _core.NTXentProblem(
        left=left,
        right=right,
        dtype=DTYPES[left.dtype],
        left_kept=kept,
        right_kept=right_kept,
        left_ids=ids,
        right_ids=right_ids,
        left_rows=len(left),
        right_rows=len(right),
        left_count=len(kept),
        right_count=len(right_kept),
        width=left.shape[1],
        form=FORMS[problem.negatives],
        has_ids=problem.ids is not None,
        is_normalized=problem.normalize,
        temperature=float(problem.temperature),
        threads=torch.get_num_threads(),
        losses=losses,
        **rectangular,
        **more,
    )
    return function(compiled)
