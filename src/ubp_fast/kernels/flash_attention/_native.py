"""The compiled CPU kernels: `csrc/flash_attention/cpu.cpp`, in the instruction set that suits the machine."""

from __future__ import annotations

import torch
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels.backends import DTYPES, unsupported_on_cpu
from ubp_fast.kernels.flash_attention.reference import LSE_UNIT as LSE_UNIT
from ubp_fast.kernels.flash_attention.reference import Gradients, Problem


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    return unsupported_on_cpu(problem.query)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of the inputs, and the log-sum-exp float32 [T, H]."""
    inputs = _inputs(problem)
    output = torch.empty(problem.query.shape, dtype=problem.query.dtype)
    lse = torch.empty(problem.query.shape[:2], dtype=torch.float32)
    _core.flash_attention_forward(_compiled(problem, **inputs, output=output, lse=lse))
    return output, lse


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> Gradients:
    """Gradients of query, key, value and time_bias from the saved output and log-sum-exp; scores are computed again."""
    inputs = _inputs(problem)
    saved = {"output": output.contiguous(), "lse": lse.contiguous(), "grad_output": grad_output.contiguous()}
    query, key, value = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in problem[:3])
    bias = None if problem.time_bias is None else torch.empty(problem.time_bias.shape, dtype=torch.float32)
    found = {"grad_query": query, "grad_key": key, "grad_value": value, "grad_time_bias": bias}
    _core.flash_attention_backward(_compiled(problem, **inputs, **saved, **found))
    return query, key, value, bias


def _inputs(problem: Problem) -> dict[str, Tensor | None]:
    """By the names of the compiled struct; they must live until the call returns."""
    inputs = {
        "query": problem.query,
        "key": problem.key,
        "value": problem.value,
        "cu_query": problem.cu_seqlens,
        "cu_key": problem.cu_seqlens_key,
        "time_bias": problem.time_bias,
        "query_time_s": problem.timestamp_s,
        "key_time_s": problem.timestamp_key_s,
    }
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in inputs.items()}


def _compiled(problem: Problem, **tensors: Tensor | None) -> _core.FlashAttentionProblem:
    tokens, heads, width = problem.query.shape
    seed, first_query_row, first_key_row = (0, 0, 0) if problem.seed is None else problem.seed.tolist()
    return _core.FlashAttentionProblem(
        **tensors,
        query_tokens=tokens,
        key_tokens=problem.key.shape[0],
        sequences=problem.cu_seqlens.shape[0] - 1,
        heads=heads,
        width=width,
        buckets=0 if problem.time_bias is None else problem.time_bias.shape[1],
        dtype=DTYPES[problem.query.dtype],
        left=problem.left,
        right=problem.right,
        scale=problem.scale,
        threshold=int(problem.dropout_p * 2**32),
        keep_factor=1 / (1 - problem.dropout_p),
        seed=seed % 2**64,
        first_query_row=first_query_row,
        first_key_row=first_key_row,
        threads=torch.get_num_threads(),
    )
