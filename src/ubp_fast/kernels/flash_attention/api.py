"""Attention inside packed sequences (FlashAttention): no padding, and no matrix of scores in memory.

For each sequence and head, with S = scale * Q K^T:

    forward    lse_i = log sum_j exp(S_ij)    P_ij = exp(S_ij - lse_i)    O = P V
    backward   delta_i = <dO_i, O_i>          dS_ij = scale * P_ij (<dO_i, V_j> - delta_i)
               dQ = dS K                      dK = dS^T Q                 dV = P^T dO

Memory beyond inputs and outputs: one float per query and head (lse) and, on the CPU, some rows per thread. The
reference stores the scores of one sequence at a time.
Source: Dao et al. 2022 and 2023 (FlashAttention, FlashAttention-2); Milakov and Gimelshein 2018 (online softmax).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from ubp_fast.kernels import backends
from ubp_fast.kernels.checks import require, require_dtype, require_same
from ubp_fast.kernels.flash_attention import _native, reference
from ubp_fast.kernels.flash_attention.reference import Problem, lse_dtype

OP = "flash_attention"
MAX_WIDTH = 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS: dict[str, ModuleType] = {"native": _native, "reference": reference}
# float32, bfloat16 and float16 on the CPU run natively; float64 and other devices take the reference.
ORDER = ("native", "reference")


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_key: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every query over the keys of its own sequence.

    For one sequence it equals `F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)` on [H, T, D],
    except that a row which sees no key gives 0. With fewer queries than keys, `causal` aligns the ends: query i of q
    sees keys j <= i + k - q.

    Args:
        query: [T, H, D], float32, bfloat16, float16 or float64, 1 <= D <= 256; any strides.
        key: [S, H, D], dtype and device of query.
        value: [S, H, D], dtype and device of query.
        cu_seqlens: integer [B + 1]: query rows of sequence b are cu_seqlens[b] .. cu_seqlens[b + 1] - 1. Starts at 0,
            never decreases, ends at T; sequences may be empty.
        cu_seqlens_key: integer [B + 1] for key and value, ends at S. None: the same as cu_seqlens (self attention).
        causal: hide keys that come after the query.
        scale: factor of the scores, 1 / sqrt(D) when None.
        backend: "auto", "native" (compiled, CPU) or "reference".

    Returns:
        [T, H, D] in the dtype of query. The same for any number of threads, bit by bit.

    Raises:
        ValueError: shapes, devices, offsets or scale break the rules above.
        TypeError: a dtype breaks them.
        BackendUnavailable: the named backend does not exist, or not for these tensors.
    """
    cu_seqlens_key = cu_seqlens if cu_seqlens_key is None else cu_seqlens_key
    _check(query, key, value, cu_seqlens, cu_seqlens_key)
    scale = 1.0 / math.sqrt(query.shape[2]) if scale is None else float(scale)
    require(abs(scale) <= torch.finfo(torch.float32).max, OP, "scale", "be finite in float32", scale)
    output, _ = _forward_op(query, key, value, cu_seqlens, cu_seqlens_key, causal, scale, backend)
    return output


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, cu_seqlens_key: Tensor) -> None:
    require(query.ndim == 3, OP, "query", "have shape [T, H, D]", list(query.shape))
    heads, width = query.shape[1:]
    require(1 <= width <= MAX_WIDTH, OP, "query", f"have a width D in 1..{MAX_WIDTH}", width)
    require_dtype(OP, "query", query, FLOATS)
    require(
        key.ndim == 3 and key.shape[1:] == query.shape[1:],
        OP,
        "key",
        f"have shape [S, H, D] = [S, {heads}, {width}] like query",
        list(key.shape),
    )
    require(value.shape == key.shape, OP, "value", f"have shape {list(key.shape)} like key", list(value.shape))
    require_same(OP, "query", query, key=key, value=value)
    for name, offsets in (("cu_seqlens", cu_seqlens), ("cu_seqlens_key", cu_seqlens_key)):
        require_dtype(OP, name, offsets, (torch.int32, torch.int64))
        require(offsets.ndim == 1 and len(offsets) >= 1, OP, name, "have shape [B + 1]", list(offsets.shape))
        require(offsets.device == query.device, OP, name, f"be on the device of query, {query.device}", offsets.device)
    # The message is formatted only when it is raised: formatting a size makes torch.compile specialise on it.
    if len(cu_seqlens) != len(cu_seqlens_key):
        rule = f"have {len(cu_seqlens)} entries like cu_seqlens"
        require(False, OP, "cu_seqlens_key", rule, len(cu_seqlens_key))


def _check_offsets(name: str, offsets: Tensor, tokens: int) -> None:
    """Rules about values; inside the op, where reading them cannot break a graph, and before int64 becomes int32."""
    values = offsets.tolist()
    require(tokens < 2**31, OP, name, "count fewer than 2^31 rows", tokens)
    require(values[0] == 0, OP, name, "start at 0", values[0])
    require(values[-1] == tokens, OP, name, f"end at the number of rows {tokens}", values[-1])
    for at in range(1, len(values)):
        if values[at] < values[at - 1]:
            raise ValueError(f"{OP}: {name} must not decrease, got {values[at - 1]} then {values[at]} at entry {at}")


@torch.library.custom_op("ubp_fast::flash_attention", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_key: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_offsets("cu_seqlens", cu_seqlens, query.shape[0])
    _check_offsets("cu_seqlens_key", cu_seqlens_key, key.shape[0])
    problem = Problem(query, key, value, cu_seqlens.int(), cu_seqlens_key.int(), causal, scale)
    return _implementation(backend, problem).forward(problem)


@torch.library.custom_op("ubp_fast::flash_attention_backward", mutates_args=())
def _backward_op(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_key: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(query, key, value, cu_seqlens.int(), cu_seqlens_key.int(), causal, scale)
    return _implementation(backend, problem).backward(problem, output, lse, grad_output)


def _implementation(backend: str, problem: Problem) -> ModuleType:
    return IMPLEMENTATIONS[backends.resolve(OP, backend, IMPLEMENTATIONS, ORDER, problem)]


@_forward_op.register_fake
def _fake_forward(query, key, value, cu_seqlens, cu_seqlens_key, causal, scale, backend):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=lse_dtype(query.dtype))


@_backward_op.register_fake
def _fake_backward(grad_output, query, key, value, output, lse, cu_seqlens, cu_seqlens_key, causal, scale, backend):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):
    query, key, value, cu_seqlens, cu_seqlens_key, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, cu_seqlens_key)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp


def _backward(ctx, grad_output, _):
    if grad_output is None:
        return (None,) * 8
    gradients = _backward_op(grad_output, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.backend)
    wanted = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*wanted, None, None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
