"""Plain attention of each sequence by itself: the definition that every other backend is tested against.

It computes in the dtype of its inputs and stores the scores of one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """Checked arguments of one call.

    Attributes:
        query: [T, H, D].
        key: [S, H, D].
        value: [S, H, D].
        cu_seqlens: int32 [B + 1], first query row of each sequence.
        cu_seqlens_key: int32 [B + 1], first key row of each sequence.
        is_causal: hide keys that lie after a query, ends aligned.
        scale: factor of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens: Tensor
    cu_seqlens_key: Tensor
    is_causal: bool
    scale: float


def unsupported(problem: Problem) -> str | None:
    """Everything is supported."""
    return None


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Differentiable attention: output [T, H, D] and log-sum-exp of the scores [T, H], in the dtype of the inputs."""
    outputs, lses = [problem.query[:0]], [problem.query[:0, :, 0]]
    for rows, key_rows in _sequences(problem):
        scores = _scores(problem, rows, key_rows)
        lse = scores.logsumexp(dim=2)
        outputs.append((_weights(scores, lse) @ problem.value[key_rows].transpose(0, 1)).transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return torch.cat(outputs), torch.cat(lses)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of the inputs, and the log-sum-exp as float32 (float64 for float64)."""
    output, lse = attention(problem)
    return output, lse.to(lse_dtype(lse.dtype))


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by the formulas of `api.py`, in the dtype of the inputs."""
    grad_query, grad_key, grad_value = (
        torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in problem[:3]
    )
    for rows, key_rows in _sequences(problem):
        query, grad, result = (part[rows].transpose(0, 1) for part in (problem.query, grad_output, output))
        key, value = (part[key_rows].transpose(0, 1) for part in (problem.key, problem.value))
        weights = _weights(_scores(problem, rows, key_rows), lse[rows].transpose(0, 1).to(query.dtype))
        delta = (grad * result).sum(dim=2, keepdim=True)
        grad_scores = weights * (grad @ value.transpose(1, 2) - delta) * problem.scale
        grad_query[rows] = (grad_scores @ key).transpose(0, 1)
        grad_key[key_rows] = (grad_scores.transpose(1, 2) @ query).transpose(0, 1)
        grad_value[key_rows] = (weights.transpose(1, 2) @ grad).transpose(0, 1)
    return grad_query, grad_key, grad_value


def _sequences(problem: Problem) -> Iterator[tuple[slice, slice]]:
    starts, key_starts = problem.cu_seqlens.tolist(), problem.cu_seqlens_key.tolist()
    for b in range(len(starts) - 1):
        yield slice(starts[b], starts[b + 1]), slice(key_starts[b], key_starts[b + 1])


def _scores(problem: Problem, rows: slice, key_rows: slice) -> Tensor:
    query, key = problem.query[rows].transpose(0, 1), problem.key[key_rows].transpose(0, 1)  # [H, T_b, D], [H, S_b, D]
    scores = query @ key.transpose(1, 2) * problem.scale  # [H, T_b, S_b]
    if not problem.is_causal:
        return scores
    queries, keys = scores.shape[1:]
    row = torch.arange(queries, device=scores.device)[:, None]
    is_hidden = torch.arange(keys, device=scores.device)[None, :] > row + keys - queries
    return scores.masked_fill(is_hidden, float("-inf"))


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """A row that sees no key has lse -infinity; 0 in its place makes its weights exp(-inf) = 0 instead of NaN."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[:, :, None])


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the saved statistics for inputs of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
