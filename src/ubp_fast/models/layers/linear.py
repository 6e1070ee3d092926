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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.kernels.row_product import row_product
from ubp_fast.kernels.transforms import direct, is_transforming

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


@torch.library.custom_op(
    "ubp_fast::linear", mutates_args=(), schema="(Tensor rows, Tensor weight, Tensor? bias) -> Tensor"
)
def _linear_op(rows, weight, bias):
    return product(rows.contiguous(), weight, bias)


@torch.library.custom_op("ubp_fast::product_over_rows", mutates_args=(), schema="(Tensor left, Tensor right) -> Tensor")
def _over_rows_op(left, right):
    return product_over_rows(left.contiguous(), right.contiguous())


@_linear_op.register_fake
def _fake_linear(rows, weight, bias):
    return rows.new_empty(rows.shape[0], weight.shape[0])


@_over_rows_op.register_fake
def _fake_over_rows(left, right):
    return left.new_empty(left.shape[1], right.shape[1])


def _over_rows(left, right):
    return left.t() @ right if is_transforming() else _direct_over_rows(left, right)


def _keep_factors(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _linear_backward(ctx, grad_output):
    rows, weight = ctx.saved_tensors
    needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        linear(grad_output, weight.t()) if needs_rows else None,
        _over_rows(grad_output, rows) if needs_weight else None,
        grad_output.sum(dim=0) if needs_bias else None,
    )


def _over_rows_backward(ctx, grad_output):
    left, right = ctx.saved_tensors
    needs_left, needs_right = ctx.needs_input_grad
    return (
        linear(right, grad_output) if needs_left else None,
        linear(left, grad_output.t()) if needs_right else None,
    )


_linear_op.register_autograd(_linear_backward, setup_context=_keep_factors)
_over_rows_op.register_autograd(_over_rows_backward, setup_context=_keep_factors)
_direct_linear, _direct_over_rows = direct(_linear_op), direct(_over_rows_op)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`nn.functional.linear` for [T, K] rows, by oneDNN where it is the faster one.

    Args:
        rows: any float tensor; float32 [T, K] on a CPU goes to oneDNN, except inside autocast and transforms of
            `torch.func`.
        weight: [N, K].
        bias: [N].

    Returns:
        [T, N]; the same for any number of threads.
    """
    is_own = (
        rows.ndim == 2
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
    if not is_own or is_transforming():
        return functional.linear(rows, weight, bias)
    found: Tensor = _direct_linear(rows, weight, bias)
    return found


class Linear(nn.Linear):
    """`nn.Linear` that computes with `linear`."""

    def forward(self, rows: Tensor) -> Tensor:
        return linear(rows, self.weight, self.bias)
