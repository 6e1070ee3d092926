"""Linear layers for the training loop of the network: the same result as `nn.Linear`, without its memory traffic.

`nn.Linear` gets a fresh gradient matrix in every step. The matrices of the downstream network are 32 MiB each, which
the allocator takes from and gives back to the operating system each time: clearing those pages costs more than the
optimizer. Here the gradient is computed straight into a buffer that stays.

In low precision the rows of a batch are centred first: with m their mean,

    x W^T = bf16(x - m) bf16(W)^T + m W^T,      dW = bf16(dy)^T bf16(x - m) + (sum dy)^T m

and the terms with m, one row each, keep float32's digits. Profiles may have a large part that all clients share (raw
counts have); bf16 has three digits, and without this step the differences between clients would be gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ubp_fast.models.layers.linear import product


class _ExactLinear(torch.autograd.Function):
    """x W^T + b; writes dW and db into `.grad` of the parameters, replacing what is there."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: NetworkLinear, parameter: torch.Tensor) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(inputs, parameter)
        return product(inputs, parameter, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        inputs, weight = ctx.saved_tensors
        torch.mm(gradient.t(), inputs, out=_kept(ctx.layer.weight))
        torch.sum(gradient, dim=0, out=_kept(ctx.layer.bias))
        return (product(gradient, weight.t()) if ctx.needs_input_grad[0] else None), None, None


class _RoundedLinear(torch.autograd.Function):
    """The same with products in bf16."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: NetworkLinear, parameter: torch.Tensor) -> torch.Tensor:
        output, centred, mean = layer.rounded(inputs)
        ctx.layer = layer
        ctx.save_for_backward(centred, mean)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        layer: NetworkLinear = ctx.layer
        centred, mean = ctx.saved_tensors
        total = torch.sum(gradient, dim=0, out=_kept(layer.bias))
        # (sum dy)^T m as three more rows of the same product: each factor is split into a bf16 number and its rest.
        (total_high, total_low), (mean_high, mean_low) = _split(total), _split(mean)
        rounded = gradient.bfloat16()
        rows = torch.cat([rounded, torch.stack([total_high, total_high, total_low])])
        columns = torch.cat([centred, torch.stack([mean_high, mean_low, mean_high])])
        _kept(layer.weight).copy_(torch.mm(rows.t(), columns, out=layer.low_gradient))
        return (torch.mm(rounded, layer.low_weight).float() if ctx.needs_input_grad[0] else None), None, None


def _kept(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient buffer of a parameter."""
    if parameter.grad is None:
        raise RuntimeError("NetworkLinear: prepare() must be called before the first backward pass")
    return parameter.grad


def _split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bf16 tensors whose sum is nearly `values`."""
    high = values.bfloat16()
    return high, (values - high).bfloat16()


class NetworkLinear(nn.Linear):
    """`nn.Linear` with kept gradient buffers and, if asked for, products in bf16.

    Call `prepare` first. Gradients replace, they do not add up: one forward and backward pass per step. Inputs, outputs
    and parameters are float32.
    """

    low_precision = False
    low_weight: torch.Tensor
    low_gradient: torch.Tensor

    def prepare(self, low_precision: bool) -> None:
        """Allocates the buffers, once the parameters are on their device."""
        self.weight.grad = torch.zeros_like(self.weight)
        self.bias.grad = torch.zeros_like(self.bias)
        self.low_precision = low_precision
        if low_precision:
            self.low_weight = torch.empty_like(self.weight, dtype=torch.bfloat16, requires_grad=False)
            self.low_gradient = torch.empty_like(self.low_weight)
            self.refresh()

    def refresh(self) -> None:
        """Rounds the weight again after the optimizer has changed it."""
        if self.low_precision:
            self.low_weight.copy_(self.weight.detach())

    def rounded(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output float32 [B, outputs] by products in bf16, the centred inputs bf16 [B, inputs] and their mean."""
        mean = inputs.mean(dim=0)
        centred = (inputs - mean).bfloat16()
        shared = functional.linear(mean, self.weight, self.bias)
        return functional.linear(centred, self.low_weight).float().add_(shared), centred, mean

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Float32 [B, inputs] -> float32 [B, outputs]; parameters get their gradients in the buffers of `prepare`."""
        if not torch.is_grad_enabled():
            return self.rounded(inputs)[0] if self.low_precision else product(inputs, self.weight, self.bias)
        # The weight goes in so that autograd visits this layer even when its inputs need no gradient.
        return (_RoundedLinear if self.low_precision else _ExactLinear).apply(inputs, self, self.weight)
