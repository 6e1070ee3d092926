"""Linear layers for the probe's training loop: the same result as `nn.Linear`, without its memory traffic.

`nn.Linear` gets a fresh gradient matrix in every step. The matrices of the downstream network are 32 MiB each, which
the allocator takes from and gives back to the operating system each time: clearing those pages costs more than the
optimizer. Here the gradient is computed straight into a buffer that stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class _LinearInto(torch.autograd.Function):
    """x W^T + b in the dtype of `weight`; writes dW and db into `.grad` of the parameters, replacing what is there."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, layer: ProbeLinear, _parameter: torch.Tensor
    ) -> torch.Tensor:
        rounded = inputs.to(weight.dtype)
        ctx.save_for_backward(rounded, weight)
        ctx.layer = layer
        return layer.apply_weight(rounded, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        inputs, weight = ctx.saved_tensors
        layer: ProbeLinear = ctx.layer
        rounded = gradient.to(weight.dtype)
        if weight.dtype == torch.float32:
            torch.mm(rounded.t(), inputs, out=layer.weight.grad)
        else:
            layer.weight.grad.copy_(torch.mm(rounded.t(), inputs, out=layer.low_gradient))  # type: ignore[union-attr]
        torch.sum(gradient, dim=0, out=layer.bias.grad)
        to_inputs = torch.mm(rounded, weight).float() if ctx.needs_input_grad[0] else None
        return to_inputs, None, None, None


class ProbeLinear(nn.Linear):
    """`nn.Linear` with kept gradient buffers and, after `use_low_precision`, bf16 products.

    Call it once per forward and backward pass: gradients replace, they do not add up. Inputs and outputs are float32.
    """

    low_weight: torch.Tensor | None = None
    low_gradient: torch.Tensor | None = None

    def prepare(self, low_precision: bool) -> None:
        """Allocates the buffers, once the parameters are on their device."""
        self.weight.grad = torch.zeros_like(self.weight)
        self.bias.grad = torch.zeros_like(self.bias)
        if low_precision:
            self.low_weight = torch.empty_like(self.weight, dtype=torch.bfloat16, requires_grad=False)
            self.low_gradient = torch.empty_like(self.low_weight)
            self.refresh()

    def refresh(self) -> None:
        """Rounds the weight again after the optimizer has changed it."""
        if self.low_weight is not None:
            self.low_weight.copy_(self.weight.detach())

    def apply_weight(self, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The product in the dtype of `weight`, bias added in float32."""
        if weight.dtype == torch.float32:
            return functional.linear(inputs, weight, self.bias)
        return functional.linear(inputs, weight).float().add_(self.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Float32 [B, inputs] -> float32 [B, outputs]; parameters get their gradients in the buffers of `prepare`."""
        weight = self.weight if self.low_weight is None else self.low_weight
        if not torch.is_grad_enabled():
            return self.apply_weight(inputs.to(weight.dtype), weight)
        # The parameter goes in so that autograd visits this layer even when its inputs need no gradient.
        return _LinearInto.apply(inputs, weight.detach(), self, self.weight)
