"""The compiled CPU kernels: `csrc/flash_attention/cpu.cpp`, in the instruction set that suits the machine."""

from __future__ import annotations

from typing import Any

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
    output = torch.empty_like(problem.query, memory_format=torch.contiguous_format)
    lse = torch.empty(output.shape[:2], dtype=torch.float32)
    _core.flash_attention_forward(_compiled(problem, **inputs, output=output, lse=lse))
    return output, lse


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> Gradients:
    """Gradients of query, key, value and time_bias from the saved output and log-sum-exp; scores are computed again."""
    inputs = _inputs(problem)
    saved = {"output": output.contiguous(), "lse": lse.contiguous(), "grad_output": grad_output.contiguous()}
    query, key, value = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in problem[:3])
    bias = None if problem.time_bias is None else torch.empty(problem.time_bias.shape, dtype=torch.float32)
    found = {"grad_query": query, "grad_key": key, "grad_value": value, "grad_time_bias": bias}
    _core.flash_attention_backward(_compiled(problem, **inputs, **saved, **found))
    return query, key, value, bias


def _inputs(problem: Problem) -> dict[str, Tensor]:
    """By the names of the compiled struct; they must live until the call returns."""
    inputs = {
        "query": problem.query.contiguous(),
        "key": problem.key.contiguous(),
        "value": problem.value.contiguous(),
        "cu_query": problem.cu_seqlens.contiguous(),
        "cu_key": problem.cu_seqlens_key.contiguous(),
    }
    if problem.time_bias is not None and problem.timestamp_s is not None and problem.timestamp_key_s is not None:
        inputs["time_bias"] = problem.time_bias.contiguous()
        inputs["query_time_s"] = problem.timestamp_s.contiguous()
        inputs["key_time_s"] = problem.timestamp_key_s.contiguous()
    return inputs


def _compiled(problem: Problem, **tensors: Tensor | None) -> _core.FlashAttentionProblem:
    """Fields that are not named are 0."""
    tokens, heads, width = problem.query.shape
    options: dict[str, Any] = {}
    if problem.time_bias is not None:
        options["buckets"] = problem.time_bias.shape[1]
    if problem.seed is not None:
        seed, first_query_row, first_key_row = problem.seed.tolist()
        options |= {"seed": seed % 2**64, "first_query_row": first_query_row, "first_key_row": first_key_row}
        options |= {"threshold": int(problem.dropout_p * 2**32), "keep_factor": 1 / (1 - problem.dropout_p)}
    return _core.FlashAttentionProblem(
        **tensors,
        **options,
        query_tokens=tokens,
        key_tokens=problem.key.shape[0],
        sequences=problem.cu_seqlens.shape[0] - 1,
        heads=heads,
        width=width,
        dtype=DTYPES[problem.query.dtype],
        left=problem.left,
        right=problem.right,
        scale=problem.scale,
        threads=torch.get_num_threads(),
    )
