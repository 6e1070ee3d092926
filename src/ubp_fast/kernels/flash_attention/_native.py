"""The compiled CPU kernels: `csrc/flash_attention/cpu.cpp`, in the instruction set that suits the machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels.flash_attention.reference import Gradients, Problem

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    if problem.query.device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {problem.query.device}"
    if problem.query.dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, the tensors are {problem.query.dtype}"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of the inputs, and the log-sum-exp float32 [T, H]."""
    tensors = _contiguous(problem)
    output = torch.empty(problem.query.shape, dtype=problem.query.dtype)
    lse = torch.empty(problem.query.shape[:2], dtype=torch.float32)
    _core.flash_attention_forward(*_arguments(problem, tensors, output, lse))
    return output, lse


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> Gradients:
    """Gradients of query, key, value and time_bias from the saved output and log-sum-exp; scores are computed again."""
    tensors = _contiguous(problem)
    saved = [tensor.contiguous() for tensor in (output, lse, grad_output)]
    query, key, value = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in problem[:3])
    bias = None if problem.time_bias is None else torch.empty(problem.time_bias.shape, dtype=torch.float32)
    _core.flash_attention_backward(*_arguments(problem, tensors, *saved, query, key, value, bias))
    return query, key, value, bias


def _contiguous(problem: Problem) -> list[Tensor | None]:
    """In the order of the compiled call; they must live until it returns."""
    times = (problem.time_bias, problem.timestamp_s, problem.timestamp_key_s)
    return [None if tensor is None else tensor.contiguous() for tensor in (*problem[:5], *times)]


def _arguments(problem: Problem, tensors: list[Tensor | None], *results: Tensor | None) -> tuple[Any, ...]:
    tokens, heads, width = problem.query.shape
    buckets = 0 if problem.time_bias is None else problem.time_bias.shape[1]
    sizes = [tokens, problem.key.shape[0], len(problem.cu_seqlens) - 1, heads, width, buckets]
    numbers = (DTYPES[problem.query.dtype], problem.left, problem.right, problem.scale)
    seed = 0 if problem.seed is None else int(problem.seed) % 2**64
    options = (*numbers, problem.dropout_p, seed, torch.get_num_threads())
    return (_addresses(*tensors), sizes, *options, _addresses(*results))


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
