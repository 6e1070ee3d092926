"""Linear layers on a CPU in float32 by oneDNN, which has kernels for the widest vectors of any x86-64 processor.

The BLAS that torch links picks its kernels by the processor's maker and leaves half of an AMD core's speed unused.
oneDNN is part of torch as well; torch itself takes it for bfloat16 only.

Both order their sums by the shape of the whole matrix. Inside `rows_alone` products add up in the order of the columns,
so that a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ubp_fast.kernels.row_product import row_product

# Rows whose part of a weight's gradient is one product: oneDNN is fastest where both factors stay in the cache.
_ROWS_PER_PRODUCT = 1024
# By address, shape and strides of a weight: itself, so that nothing else gets its address, and its transpose.
_Transposed = dict[tuple[int, tuple[int, ...], tuple[int, ...]], tuple[Tensor, np.ndarray]]
_ALONE: ContextVar[_Transposed | None] = ContextVar("rows_alone", default=None)


@contextmanager
def rows_alone() -> Iterator[None]:
    """Inside, float32 products on a CPU give each row what it alone would get: no gradients, constant weights."""
    token = _ALONE.set({})
    try:
        yield
    finally:
        _ALONE.reset(token)


def _product_alone(rows: Tensor, weight: Tensor, bias: Tensor | None, transposed: _Transposed) -> Tensor:
    key = (weight.data_ptr(), tuple(weight.shape), weight.stride())
    if key not in transposed:
        transposed[key] = (weight, weight.detach().t().contiguous().numpy())
    added = None if bias is None else bias.detach().numpy()
    return torch.from_numpy(row_product(rows.detach().numpy(), transposed[key][1], added))


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [T, K] @ weight.t() [K, N] + bias [N]; no gradient flows."""
    transposed = _ALONE.get()
    if transposed is not None and rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32:
        return _product_alone(rows, weight, bias, transposed)
    if not is_accelerated(rows):
        return functional.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def product_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """left [T, N] transposed @ right [T, K]; no gradient flows."""
    if not is_accelerated(left):
        return left.t() @ right
    if left.shape[1] > right.shape[1]:  # oneDNN reads its first factor row by row: the smaller one is turned
        return product_over_rows(right, left).t().contiguous()
    total = left.new_zeros(left.shape[1], right.shape[1])
    for part, other in zip(left.split(_ROWS_PER_PRODUCT), right.split(_ROWS_PER_PRODUCT), strict=True):
        total += product(part.t(), other.t())
    return total


def is_accelerated(rows: Tensor) -> bool:
    """float32 outside autocast, not empty, on a CPU whose torch has oneDNN."""
    return (
        rows.numel() > 0
        and rows.device.type == "cpu"
        and rows.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad_output, weight.t()) if needs_rows else None,
            product_over_rows(grad_output, rows) if needs_weight else None,
            grad_output.sum(dim=0) if needs_bias else None,
        )


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`nn.functional.linear` for [T, K] rows, by oneDNN where it is the faster one.

    Args:
        rows: any float tensor; float32 [T, K] on a CPU goes to oneDNN, except inside autocast.
        weight: [N, K].
        bias: [N].

    Returns:
        [T, N]. Differentiable once; the same for any number of threads.
    """
    if rows.ndim != 2 or weight.dtype != torch.float32 or not is_accelerated(rows):
        return functional.linear(rows, weight, bias)
    return _Linear.apply(rows, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` that computes with `linear`."""

    def forward(self, rows: Tensor) -> Tensor:
        return linear(rows, self.weight, self.bias)
