"""Plain attention of each sequence by itself: the definition that every other backend is tested against.

It computes in the dtype of its inputs and stores the scores of one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

UNBOUNDED = -1
LOW_WORD = 0xFFFFFFFF


class Problem(NamedTuple):
    """Checked arguments of one call.

    Attributes:
        query: [T, H, D].
        key: [S, K, D], H a multiple of K: query head h sees key head h // (H / K).
        value: [S, K, D].
        cu_seqlens: int32 [B + 1], first query row of each sequence.
        cu_seqlens_key: int32 [B + 1], first key row of each sequence.
        left: keys that a query sees before the one at its own place, -1 for all; ends aligned.
        right: the same after it; causal is 0.
        scale: factor of the scores.
        time_bias: float [H, buckets], added to the scaled scores by the time between query and key; or None.
        timestamp_s: int64 [T], of the queries; or None.
        timestamp_key_s: int64 [S], of the keys; or None.
        dropout_p: share of the weights that become 0.
        seed: int64 [1] on any device, decides which ones; None where nothing is dropped.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens: Tensor
    cu_seqlens_key: Tensor
    left: int
    right: int
    scale: float
    time_bias: Tensor | None = None
    timestamp_s: Tensor | None = None
    timestamp_key_s: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]
LSE_UNIT = 1.0  # of the log-sum-exp that forward gives and backward takes


def unsupported(problem: Problem) -> str | None:
    """Everything is supported."""
    return None


def with_all_heads(problem: Problem) -> Problem:
    """The same problem with a head of key and value for each head of the query: repeated in memory."""
    times = problem.query.shape[1] // max(1, problem.key.shape[1])
    if times == 1:
        return problem
    key, value = (part.repeat_interleave(times, dim=1) for part in (problem.key, problem.value))
    return problem._replace(key=key, value=value)


def of_key_heads(gradient: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Gradient [S, H, D] of repeated heads -> [S, heads, D]: summed in float32 or wider."""
    if gradient.shape[1] == heads:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.unflatten(1, (heads, -1)).sum(dim=2, dtype=wide).to(dtype)


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Differentiable attention: output [T, H, D] and log-sum-exp of the scores [T, H], in the dtype of the inputs."""
    problem = with_all_heads(problem)
    outputs, lses = [problem.query[:0]], [problem.query[:0, :, 0]]
    for rows, key_rows in _sequences(problem):
        scores = _scores(problem, rows, key_rows)
        lse = scores.logsumexp(dim=2)
        weights = _weights(scores, lse)
        if problem.seed is not None:
            weights = weights * _dropout_factors(problem, rows, key_rows)
        outputs.append((weights @ problem.value[key_rows].transpose(0, 1)).transpose(0, 1))
        lses.append(lse.transpose(0, 1))
    return torch.cat(outputs), torch.cat(lses)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of the inputs, and the log-sum-exp as float32 (float64 for float64)."""
    output, lse = attention(problem)
    return output, lse.to(lse_dtype(lse.dtype))


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> Gradients:
    """Gradients of query, key, value and time_bias by the formulas of `api.py`, in the dtypes of the inputs."""
    grad_query, grad_key, grad_value = (
        torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in problem[:3]
    )
    grad_bias = None if problem.time_bias is None else torch.zeros_like(problem.time_bias)
    for rows, key_rows in _sequences(problem):
        query, grad, result = (part[rows].transpose(0, 1) for part in (problem.query, grad_output, output))
        key, value = (part[key_rows].transpose(0, 1) for part in (problem.key, problem.value))
        weights = _weights(_scores(problem, rows, key_rows), lse[rows].transpose(0, 1).to(query.dtype))
        delta = (grad * result).sum(dim=2, keepdim=True)
        dropped, grad_weights = weights, grad @ value.transpose(1, 2)
        if problem.seed is not None:
            factors = _dropout_factors(problem, rows, key_rows)
            dropped, grad_weights = weights * factors, grad_weights * factors
        grad_logits = weights * (grad_weights - delta)
        if grad_bias is not None:
            buckets = _buckets(problem, rows, key_rows).flatten()
            grad_bias.index_add_(1, buckets, grad_logits.flatten(1).to(grad_bias.dtype))
        grad_scores = grad_logits * problem.scale
        grad_query[rows] = (grad_scores @ key).transpose(0, 1)
        grad_key[key_rows] = (grad_scores.transpose(1, 2) @ query).transpose(0, 1)
        grad_value[key_rows] = (dropped.transpose(1, 2) @ grad).transpose(0, 1)
    return grad_query, grad_key, grad_value, grad_bias


def _sequences(problem: Problem) -> Iterator[tuple[slice, slice]]:
    starts, key_starts = problem.cu_seqlens.tolist(), problem.cu_seqlens_key.tolist()
    for b in range(len(starts) - 1):
        yield slice(starts[b], starts[b + 1]), slice(key_starts[b], key_starts[b + 1])


def _scores(problem: Problem, rows: slice, key_rows: slice) -> Tensor:
    query, key = problem.query[rows].transpose(0, 1), problem.key[key_rows].transpose(0, 1)  # [H, T_b, D], [H, S_b, D]
    scores = query @ key.transpose(1, 2) * problem.scale  # [H, T_b, S_b]
    if problem.time_bias is not None:
        scores = scores + problem.time_bias.to(scores.dtype)[:, _buckets(problem, rows, key_rows)]
    if problem.left == problem.right == UNBOUNDED:
        return scores
    queries, keys = scores.shape[1:]
    place = torch.arange(queries, device=scores.device)[:, None] + keys - queries
    after = torch.arange(keys, device=scores.device)[None, :] - place
    is_hidden = torch.zeros_like(after, dtype=torch.bool)
    if problem.left != UNBOUNDED:
        is_hidden |= after < -problem.left
    if problem.right != UNBOUNDED:
        is_hidden |= after > problem.right
    return scores.masked_fill(is_hidden, float("-inf"))


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """A row that sees no key has lse -infinity; 0 in its place makes its weights exp(-inf) = 0 instead of NaN."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[:, :, None])


def _buckets(problem: Problem, rows: slice, key_rows: slice) -> Tensor:
    """Bucket of each pair of one sequence, int64 [T_b, S_b]."""
    assert problem.time_bias is not None and problem.timestamp_s is not None and problem.timestamp_key_s is not None
    between = problem.timestamp_s[rows, None] - problem.timestamp_key_s[None, key_rows]
    return time_buckets(between, problem.time_bias.shape[1])


def time_buckets(between_s: Tensor, buckets: int) -> Tensor:
    """Two buckets per octave of x = |seconds| + 1: 2 floor(log2 x), plus 1 in the upper half; at most buckets - 1."""
    mantissa, exponent = torch.frexp((between_s.abs() + 1).double())  # x = mantissa * 2^exponent, mantissa in [1/2, 1)
    bucket = 2 * (exponent.long() - 1) + (mantissa >= 0.75).long()
    return bucket.clamp(0, buckets - 1)


def _dropout_factors(problem: Problem, rows: slice, key_rows: slice) -> Tensor:
    """1 / (1 - p) where a weight stays, else 0; [H, T_b, S_b]."""
    assert problem.seed is not None
    device, heads = problem.query.device, problem.query.shape[1]
    head = torch.arange(heads, device=device)[:, None, None]
    seed, first, first_key = problem.seed.to(device).unbind()
    row = first + torch.arange(rows.start, rows.stop, device=device)[None, :, None]
    key_row = first_key + torch.arange(key_rows.start, key_rows.stop, device=device)[None, None, :]
    word = philox(seed, key_row, row, head)
    is_kept = word >= int(problem.dropout_p * 2**32)
    return is_kept.to(problem.query.dtype) / (1.0 - problem.dropout_p)


def philox(seed: Tensor, *counter: Tensor) -> Tensor:
    """Word 0 of Philox4x32 with 10 rounds as int64 in [0, 2^32), the counter's last word being 0.

    Args:
        seed: int64 [] or [1]; its low and high word are the key.
        counter: three int64 tensors in [0, 2^32) that broadcast.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    a, b, c = torch.broadcast_tensors(*counter)
    d = torch.zeros_like(a)
    low, high = seed & LOW_WORD, (seed >> 32) & LOW_WORD
    for _ in range(10):
        # int64 products wrap around, which keeps all 64 bits.
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((right >> 32) & LOW_WORD) ^ b ^ low, right & LOW_WORD
        c, d = ((left >> 32) & LOW_WORD) ^ d ^ high, left & LOW_WORD
        low, high = (low + 0x9E3779B9) & LOW_WORD, (high + 0xBB67AE85) & LOW_WORD
    return a


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the saved statistics for inputs of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
