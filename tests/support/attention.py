"""One way to run flash_attention, its reference and the truth on a case: every backend, on the device it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.cases import PackedCase, case_options, packed_inputs
from torch import Tensor

from ubp_fast.kernels import flash_attention
from ubp_fast.kernels.flash_attention.api import _bounds
from ubp_fast.kernels.flash_attention.reference import Problem, attention

NAMES = ("output", "grad_query", "grad_key", "grad_value", "grad_time_bias")


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same values and strides, as leaves that want gradients."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


def noise_like(output: Tensor, dtype: torch.dtype) -> Tensor:
    """A fixed gradient of the output, rounded to dtype."""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return noise.to(dtype).to(output)


def with_gradients(case: PackedCase, tensors: list[Tensor], backend: str, **change: Any) -> list[Tensor]:
    """Output and the gradients of query, key, value and time_bias for a fixed gradient of the output."""
    device = tensors[0].device
    options = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in {**case_options(case), **change}.items()
    }
    inputs = leaves(*tensors[:3])
    if case.buckets:
        options["time_bias"] = options["time_bias"].detach().requires_grad_()
        inputs.append(options["time_bias"])
    output = flash_attention(*inputs[:3], *tensors[3:], backend=backend, **options)
    return [output, *torch.autograd.grad(output, inputs, noise_like(output, output.dtype))]


def with_lse_gradients(case: PackedCase, tensors: list[Tensor], backend: str) -> list[Tensor]:
    """Log-sum-exp, and the gradients of query, key, value and time_bias through it and the output."""
    device = tensors[0].device
    given = case_options(case).items()
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given}
    inputs = leaves(*tensors[:3])
    if case.buckets:
        options["time_bias"] = options["time_bias"].to(torch.promote_types(tensors[0].dtype, torch.float32))
        options["time_bias"].requires_grad_()
        inputs.append(options["time_bias"])
    output, lse = flash_attention(*inputs[:3], *tensors[3:], backend=backend, return_lse=True, **options)
    grads = [noise_like(part, tensors[0].dtype) for part in (output, lse)]
    return [lse, *torch.autograd.grad((output, lse), inputs, grads)]


def attention_of_pytorch(call: Callable[[], object]) -> set[str]:
    """Which of PyTorch's own attentions ran in a call, at whatever depth."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.name for event in profile.events() if event.name.startswith("aten::")}
    assert names  # else nothing was recorded
    return {name for name in names if "attention" in name}


def truth_of(case: PackedCase, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients by autograd through the reference at float64, on the values the kernel saw."""
    inputs, options = leaves(*(tensor.double() for tensor in tensors[:3])), case_options(case)
    arguments: list[Any] = [*inputs, *tensors[3:], *_bounds(case.window, case.is_causal), case.width**-0.5]
    if case.buckets:
        inputs.append(options["time_bias"].double().requires_grad_())
        arguments += [inputs[3], options["timestamp_s"], options.get("timestamp_key_s", options["timestamp_s"])]
    seed = torch.tensor([options["seed"], *options["first_rows"]]) if case.dropout_p else None
    problem = Problem(*arguments)._replace(dropout_p=case.dropout_p, seed=seed)
    output, _ = attention(problem)
    noise = noise_like(output, tensors[0].dtype)
    return [output, *torch.autograd.grad(output, inputs, noise, materialize_grads=True)]


EXPECTED: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}


def expected(case: PackedCase, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Reference and truth on the CPU, computed once for all backends and instruction sets."""
    if (case, dtype) not in EXPECTED:
        tensors = list(packed_inputs(case, dtype))
        EXPECTED[case, dtype] = with_gradients(case, tensors, "reference"), truth_of(case, tensors)
    return EXPECTED[case, dtype]
