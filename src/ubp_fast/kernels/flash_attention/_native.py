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
    if problem.left >= 0 or problem.right > 0:
        return "it has no window yet"
    if problem.time_bias is not None or problem.seed is not None:
        return "it has no time_bias and no dropout yet"
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of the inputs, and the log-sum-exp float32 [T, H]."""
    problem = _contiguous(problem)
    output = torch.empty(problem.query.shape, dtype=problem.query.dtype)
    lse = torch.empty(problem.query.shape[:2], dtype=torch.float32)
    _core.flash_attention_forward(*_arguments(problem), *(tensor.data_ptr() for tensor in (output, lse)))
    return output, lse


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> Gradients:
    """Gradients of query, key and value from the saved output and log-sum-exp; the scores are computed again."""
    problem = _contiguous(problem)
    output, lse, grad_output = output.contiguous(), lse.contiguous(), grad_output.contiguous()
    gradients = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in problem[:3])
    addresses = (tensor.data_ptr() for tensor in (output, lse, grad_output, *gradients))
    _core.flash_attention_backward(*_arguments(problem), *addresses)
    return gradients[0], gradients[1], gradients[2], None


def _contiguous(problem: Problem) -> Problem:
    names = ("query", "key", "value", "cu_seqlens", "cu_seqlens_key")
    return problem._replace(**{name: getattr(problem, name).contiguous() for name in names})


def _arguments(problem: Problem) -> tuple[Any, ...]:
    tokens, heads, width = problem.query.shape
    sizes = [tokens, problem.key.shape[0], len(problem.cu_seqlens) - 1, heads, width]
    addresses = (tensor.data_ptr() for tensor in problem[:5])
    threads = torch.get_num_threads()
    return (*addresses, sizes, DTYPES[problem.query.dtype], problem.right == 0, problem.scale, threads)
