"""The CUDA kernels: `csrc/flash_attention/forward.cu` and `backward.cu`.

Blocks of up to 64 rows of one sequence and head, fewer where the sequences are short. Nothing waits for the device;
results are the same every time. Backward computes the scores twice, for the queries and for the keys, and holds one
float per query and head, with a time_bias also one table per block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ubp_fast.kernels import cuda
from ubp_fast.kernels.backends import DTYPES
from ubp_fast.kernels.flash_attention.reference import LSE_UNIT as LSE_UNIT
from ubp_fast.kernels.flash_attention.reference import Gradients, Problem

FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS = 0, 1, 2
FARTHEST = 2**32  # as good as unbounded, and no sum with a row overflows
MAX_HEADS = 65_535
WARP_ROWS = 16


class _Inputs(NamedTuple):
    """The tensors of a problem as the kernels want them: contiguous, rows of whole multiples of 16 bytes."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_query: Tensor
    cu_key: Tensor
    time_bias: Tensor | None
    query_time_s: Tensor | None
    key_time_s: Tensor | None


class _Results(NamedTuple):
    output: Tensor
    lse: Tensor
    grad_output: Tensor | None = None
    delta: Tensor | None = None
    grad_query: Tensor | None = None
    grad_key: Tensor | None = None
    grad_value: Tensor | None = None


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    if problem.query.shape[1] > MAX_HEADS:
        return f"it takes at most {MAX_HEADS} heads, got {problem.query.shape[1]}"
    return cuda.unsupported(problem.query)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of the inputs, and the log-sum-exp float32 [T, H]."""
    inputs = _inputs(problem)
    output = torch.empty_like(inputs.query)
    lse = torch.empty(output.shape[:2], dtype=torch.float32, device=output.device)
    _run(FORWARD, problem, inputs, _Results(output, lse))
    return _as_wide_as(problem.query, output), lse


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> Gradients:
    """Gradients of query, key, value and time_bias from the saved output and log-sum-exp; scores are computed again."""
    inputs = _inputs(problem)
    found = [torch.empty_like(tensor) for tensor in inputs[:3]]
    saved = (cuda.aligned(output), lse.contiguous(), cuda.aligned(grad_output))
    results = _Results(*saved, torch.empty_like(saved[1]), *found)
    grad_bias = _run(BACKWARD_QUERIES, problem, inputs, results)
    _run(BACKWARD_KEYS, problem, inputs, results)
    query, key, value = (_as_wide_as(problem.query, tensor) for tensor in found)
    return query, key, value, grad_bias


def _inputs(problem: Problem) -> _Inputs:
    rows = [cuda.aligned(tensor) for tensor in problem[:3]]
    offsets = (problem.cu_seqlens.contiguous(), problem.cu_seqlens_key.contiguous())
    times = (problem.time_bias, problem.timestamp_s, problem.timestamp_key_s)
    bias, queries_s, keys_s = (None if tensor is None else tensor.contiguous() for tensor in times)
    return _Inputs(rows[0], rows[1], rows[2], *offsets, bias, queries_s, keys_s)


def _as_wide_as(query: Tensor, rows: Tensor) -> Tensor:
    return rows if rows.shape[2] == query.shape[2] else rows[:, :, : query.shape[2]].contiguous()


def _run(which: int, problem: Problem, inputs: _Inputs, results: _Results) -> Tensor | None:
    """One pass. The queries' backward pass returns the gradient of time_bias."""
    offsets, rows = inputs.cu_query, inputs.query
    if which == BACKWARD_KEYS:
        offsets, rows = inputs.cu_key, inputs.key
    tokens, heads, width = rows.shape
    sequences, buckets = len(offsets) - 1, 0 if inputs.time_bias is None else inputs.time_bias.shape[1]
    parts = None
    if tokens * heads == 0:
        return None if inputs.time_bias is None else torch.zeros_like(inputs.time_bias)
    dtype, kernels = DTYPES[rows.dtype], cuda.kernels()
    warps = kernels.flash_attention_warps(which, dtype, width, buckets, tokens // sequences)
    order, first_tile = _tiles(offsets, warps * WARP_ROWS)
    bound = tokens // (warps * WARP_ROWS) + sequences
    if which == BACKWARD_QUERIES and buckets:
        parts = torch.zeros(bound, heads, buckets, dtype=torch.float32, device=rows.device)
    launched = kernels.FlashAttentionProblem(
        **inputs._asdict(),
        **results._asdict(),
        bias_parts=parts,
        order=order,
        first_tile=first_tile,
        bound=bound,
        warps=warps,
        sequences=sequences,
        heads=heads,
        width=width,
        dtype=dtype,
        left=min(problem.left, FARTHEST),
        right=min(problem.right, FARTHEST),
        scale=problem.scale,
        buckets=buckets,
        threshold=int(problem.dropout_p * 2**32),
        keep_factor=1.0 / (1.0 - problem.dropout_p),
        seed=problem.seed,
    )
    cuda.launch(kernels.flash_attention, rows, which, launched)
    return None if parts is None else parts.sum(dim=0, dtype=torch.float64).float()


def _tiles(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sequences by falling length, int32 [B], and the first tile of each, int32 [B + 1]; computed on the device."""
    lengths, order = offsets.diff().sort(descending=True, stable=True)
    counts = (lengths + (rows - 1)).div(rows, rounding_mode="floor")
    return order.int(), functional.pad(counts.cumsum(0), (1, 0)).int()
