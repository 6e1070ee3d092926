"""Attention inside packed sequences (FlashAttention): no padding, and no matrix of scores in memory.

For each sequence and head, with S = scale * Q K^T + bias, bias_ij = time_bias[head, bucket(|t_i - t_j|)], and the mask
M_ij = 1 / (1 - p) with probability 1 - p, else 0 (1 everywhere without dropout):

    forward    lse_i = log sum_j exp(S_ij)    P_ij = exp(S_ij - lse_i)    O = (P * M) V
    backward   delta_i = <dO_i, O_i>          dS_ij = P_ij (M_ij <dO_i, V_j> - delta_i)
               dQ = scale * dS K              dK = scale * dS^T Q         dV = (P * M)^T dO
               dtime_bias[b] = sum of dS_ij over the pairs in bucket b

The bucket of x = |t_i - t_j| + 1 seconds is 2 floor(log2 x), plus 1 when x is in the upper half of its octave, at most
B - 1. The mask is Philox4x32-10 of (key row, query row, head) under the seed: nothing is stored for it.

Memory beyond inputs and outputs: one float per query and head (lse) and, on the CPU, some rows per thread, on a GPU
one more (delta); with a time_bias B more per sequence and head in backward, on a GPU per tile and head. The reference
stores the scores of one sequence at a time.
Source: Dao et al. 2022 and 2023 (FlashAttention, FlashAttention-2); Milakov and Gimelshein 2018 (online softmax);
Salmon et al. 2011 (Philox).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from ubp_fast import _core
from ubp_fast.kernels import backends, deferred, transforms
from ubp_fast.kernels.checks import integer, number, require, require_dtype, require_same, require_tensors, to_autocast
from ubp_fast.kernels.flash_attention import _native, _triton, reference
from ubp_fast.kernels.flash_attention.reference import UNBOUNDED, Problem, lse_dtype

OP = "flash_attention"
MAX_WIDTH = 256
# x < 2^53 fills 106 buckets; beyond, the bucket would depend on the rounding to float64.
MAX_BUCKETS = 106
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS: dict[str, ModuleType] = {"native": _native, "triton": _triton, "reference": reference}
# float32, bfloat16 and float16 run natively on the CPU and with Triton on NVIDIA GPUs; the rest takes the reference.
ORDER = ("native", "triton", "reference")
_LARGEST = torch.finfo(torch.float32).max
Offsets: TypeAlias = Tensor | Sequence[int] | np.ndarray


@overload
def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Offsets, cu_seqlens_key: Offsets | None = None, *,
    causal: bool = False, window: int | tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None, time_bias: Tensor | None = None, timestamp_s: Tensor | None = None,
    timestamp_key_s: Tensor | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None,
    first_rows: tuple[int, int] = (0, 0), return_lse: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Offsets, cu_seqlens_key: Offsets | None = None, *,
    causal: bool = False, window: int | tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None, time_bias: Tensor | None = None, timestamp_s: Tensor | None = None,
    timestamp_key_s: Tensor | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None,
    first_rows: tuple[int, int] = (0, 0), return_lse: Literal[True], backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Offsets,
    cu_seqlens_key: Offsets | None = None,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None,
    time_bias: Tensor | None = None,
    timestamp_s: Tensor | None = None,
    timestamp_key_s: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    first_rows: tuple[int, int] = (0, 0),
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of its own sequence.

    For one sequence it equals `F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)` on [H, T, D],
    with `enable_gqa=True` where key and value have fewer heads, except that a row which sees no key gives 0. With fewer
    queries than keys, `causal` and `window` align the ends: the place of query i of q among k keys is i + k - q, and
    causal hides the keys after it.

    Args:
        query: [T, H, D], float32, bfloat16, float16 or float64, 1 <= D <= 256; any strides. Under `torch.autocast`
            query, key and value become its dtype, as in `scaled_dot_product_attention` (float64 stays).
        key: [S, K, D], dtype and device of query. K divides H, and query head h sees key head h // (H / K): multi-query
            attention is K = 1, grouped-query attention what lies between 1 and H. Triton reads shared heads where they
            are; other backends repeat them in memory.
        value: [S, K, D], dtype and device of query.
        cu_seqlens: integer [B + 1]: query rows of sequence b are cu_seqlens[b] .. cu_seqlens[b + 1] - 1. Starts at 0,
            never decreases, ends at T; sequences may be empty. A list, an array or a tensor on any device; one of
            int32 or int64 on the device of query is taken without a copy.
        cu_seqlens_key: integer [B + 1] for key and value, ends at S. None: the same as cu_seqlens (self attention).
        causal: hide keys that come after the query.
        window: (left, right): hide keys more than `left` before or `right` after the place of the query; None in a slot
            bounds nothing, one number stands for both.
        scale: factor of the scores, 1 / sqrt(D) when None. A tensor of one element gets its gradient; it is multiplied
            into the query, which rounds to the query's dtype.
        time_bias: float32 [H, buckets] (float64 beside float64), 1 <= buckets <= 106: added to the scaled scores by the
            time between query and key, two buckets per octave of 1 + seconds; 64 buckets tell 68 years apart. Wants
            timestamp_s. Has a gradient.
        timestamp_s: int64 [T], in seconds, in any order, no two further apart than 2^62; of the queries.
        timestamp_key_s: int64 [S], of the keys; None: timestamp_s.
        dropout_p: share of the attention weights set to 0, in [0, 1); the others grow by 1 / (1 - p).
        seed: decides which weights: an integer of 64 bits, or an int64 tensor of one element, which keeps a compiled
            graph whole. The same seed gives the same mask on every device. None: drawn from torch's generator of the
            device.
        first_rows: numbers of the first query row and the first key row in a larger batch of which these sequences are
            a part: dropout draws what it would draw in that batch.
        return_lse: also give the log-sum-exp of the scores of every query, natural logarithm, with which results over
            parts of the keys can be put together. It has a gradient, which costs a second backward pass where it is
            used; dropout does not enter it.
        backend: "auto", "native" (compiled, CPU), "triton" (NVIDIA GPU) or "reference". "auto" takes the first of
            native, triton and reference that computes these tensors.

    Returns:
        [T, H, D] in the dtype of query. The same in every run and for any number of threads, bit by bit. With
        `return_lse` a pair of it and float32 [T, H] (float64 for float64); -infinity where a query sees no key.

    Derivatives beyond a plain backward (second ones, forward mode, transforms of `torch.func`, batched gradients) are
    those of the reference, which "auto" takes for them: in the dtype of the inputs, with the scores of all sequences in
    memory. A backend that is named refuses them. `torch.vmap` cannot map over the offsets.

    Raises:
        ValueError: shapes, devices, offsets or numbers break the rules above. On a CUDA device nothing waits for the
            values of offsets: wrong ones give rows that hold anything, and a later call raises (`check_deferred`).
        TypeError: a dtype breaks them.
        BackendUnavailable: the named backend does not exist, or not for these tensors.
    """
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        require_tensors(OP, query=query, key=key, value=value)
    query, key, value = to_autocast(query, key, value)
    if time_bias is not None and torch.is_autocast_enabled(query.device.type) and time_bias.dtype != torch.float64:
        time_bias = time_bias.float()
    cu_seqlens = _offsets("cu_seqlens", cu_seqlens, query.device)
    is_self = cu_seqlens_key is None
    cu_seqlens_key = cu_seqlens if is_self else _offsets("cu_seqlens_key", cu_seqlens_key, query.device)
    _check(query, key, value, cu_seqlens, cu_seqlens_key)
    left, right = _bounds(window, causal)
    if isinstance(scale, Tensor):
        require(scale.numel() == 1 and scale.is_floating_point(), OP, "scale", "be one floating number", scale)
        query, scale = query * scale.reshape(()), 1.0
    scale = 1.0 / math.sqrt(query.shape[2]) if scale is None else number(OP, "scale", scale)
    require(abs(scale) <= _LARGEST, OP, "scale", "be finite in float32", scale)
    timestamp_key_s = timestamp_s if timestamp_key_s is None else timestamp_key_s
    _check_times(query, key, time_bias, timestamp_s, timestamp_key_s)
    tensors = (query, key, value, cu_seqlens, cu_seqlens_key, time_bias, timestamp_s, timestamp_key_s)
    dropout_p = number(OP, "dropout_p", dropout_p)
    options = (left, right, scale, dropout_p, backend)
    if transforms.is_transforming():
        found = _transformed(*tensors, _seed(dropout_p, seed, first_rows, query.device, is_drawn=False), *options)
        return found if return_lse else found[0]
    output, lse = _direct_forward(*tensors, _seed(dropout_p, seed, first_rows, query.device), *options)
    return (output, _natural_op(lse, query, key, cu_seqlens, backend)) if return_lse else output


def _offsets(name: str, offsets: Any, device: torch.device) -> Tensor:
    """As a tensor of int32 or int64 on the device; values are checked inside of the operator."""
    if not isinstance(offsets, Tensor):
        try:
            offsets = torch.as_tensor(offsets)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{OP}: {name} must be integers, got {type(offsets).__name__}") from None
    if offsets.dtype not in (torch.int32, torch.int64):
        is_integer = not (offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool)
        if not is_integer and offsets.numel():
            raise TypeError(f"{OP}: {name} must be integers, got {offsets.dtype}")
        offsets = offsets.long()
    return offsets if offsets.device == device else offsets.to(device)


@transforms.outside_of_graphs("flash_attention in a transform of torch.func is computed outside of the graph")
def _transformed(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, cu_seqlens_key: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The reference, through which transforms of PyTorch see its operations."""
    *arguments, backend = arguments  # type: ignore[assignment]
    transforms.require_reference(OP, backend)
    offsets = [transforms.untransformed(part) for part in (cu_seqlens, cu_seqlens_key)]
    for name, part, rows in zip(("cu_seqlens", "cu_seqlens_key"), offsets, (query, key), strict=True):
        require(not is_batchedtensor(part), OP, name, "be the same for all that vmap maps over", "mapped ones")
        with transforms.outside_of_transforms():  # inside nobody may look at a value
            _check_offsets(name, part, rows.shape[0])
    return reference.attention(_as_problem(query, key, value, *offsets, *arguments))


def _bounds(window: int | tuple[int | None, int | None] | None, causal: bool) -> tuple[int, int]:
    """Keys seen to the left and right, -1 for all."""
    if window is None:
        return UNBOUNDED, 0 if causal else UNBOUNDED
    both = window if isinstance(window, (tuple, list)) else (window, window)
    sides = [None if side is None else integer(OP, "window", side) for side in both]
    is_sound = len(sides) == 2 and all(side is None or side >= 0 for side in sides)
    require(is_sound, OP, "window", "be (left, right), each a number >= 0 or None", window)
    left, right = (UNBOUNDED if side is None else min(side, 2**31 - 1) for side in sides)
    return left, 0 if causal else right


def _check_times(
    query: Tensor, key: Tensor, time_bias: Tensor | None, timestamp_s: Tensor | None, timestamp_key_s: Tensor | None
) -> None:
    if time_bias is None:
        is_alone = timestamp_s is not None or timestamp_key_s is not None
        require(not is_alone, OP, "time_bias", "be given beside timestamps", None, "leave the timestamps out")
        return
    if timestamp_s is None or timestamp_key_s is None:
        raise ValueError(f"{OP}: timestamp_s must be given beside time_bias, got None")
    require_dtype(OP, "time_bias", time_bias, (torch.float32, torch.promote_types(query.dtype, torch.float32)))
    heads = query.shape[1]
    is_table = time_bias.ndim == 2 and time_bias.shape[0] == heads and 1 <= time_bias.shape[1] <= MAX_BUCKETS
    rule = f"have shape [H, buckets] = [{heads}, 1..{MAX_BUCKETS}]"
    require(is_table, OP, "time_bias", rule, list(time_bias.shape))
    require(time_bias.device == query.device, OP, "time_bias", f"be on the device {query.device}", time_bias.device)
    for name, times, rows in (("timestamp_s", timestamp_s, query), ("timestamp_key_s", timestamp_key_s, key)):
        require_dtype(OP, name, times, (torch.int64,))
        require(times.device == query.device, OP, name, f"be on the device of query, {query.device}", times.device)
        # Formatted only when it is raised, as in _check.
        if times.ndim != 1 or times.shape[0] != rows.shape[0]:
            require(False, OP, name, f"have one entry for each of {len(rows)} rows", list(times.shape))


def _seed(
    dropout_p: float,
    seed: int | Tensor | None,
    first_rows: tuple[int, int],
    device: torch.device,
    is_drawn: bool = True,
) -> Tensor | None:
    """Seed and first rows, int64 [3], where something is dropped, else None; on the device, which nothing waits for."""
    if dropout_p == 0.0 and seed is None and first_rows == (0, 0):
        return None  # nothing else to check
    require(0.0 <= dropout_p < 1.0, OP, "dropout_p", "be in [0, 1)", dropout_p)
    if isinstance(seed, Tensor):
        require_dtype(OP, "seed", seed, (torch.int64,))
        require(seed.numel() == 1, OP, "seed", "have one element", list(seed.shape))
    elif seed is not None:
        seed = integer(OP, "seed", seed)
        require(-(2**63) <= seed < 2**63, OP, "seed", "be an integer of 64 bits", seed)
    for first in first_rows:
        require(0 <= first < 2**31, OP, "first_rows", "be two numbers of rows below 2^31", first_rows)
    if dropout_p == 0.0:
        return None
    if seed is None:
        require(is_drawn, OP, "seed", "be given to dropout inside of a transform", None)
        seed = torch.randint(2**63 - 1, (1,), device=device)
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=device)
    rows = (torch.full((1,), first, dtype=torch.int64, device=seed.device) for first in first_rows)
    return torch.cat((seed.reshape(1), *rows))


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, cu_seqlens_key: Tensor) -> None:
    """Messages are formatted only when they are raised: formatting a size makes torch.compile specialise on it."""
    if query.ndim != 3:
        require(False, OP, "query", "have shape [T, H, D]", list(query.shape))
    _, heads, width = query.shape
    if not 1 <= width <= MAX_WIDTH:
        require(False, OP, "query", f"have a width D in 1..{MAX_WIDTH}", width)
    if query.dtype not in FLOATS:
        require_dtype(OP, "query", query, FLOATS)
    if key.ndim != 3 or key.shape[2] != width:
        require(False, OP, "key", f"have shape [S, K, D] = [S, 1..{heads}, {width}] like query", list(key.shape))
    key_heads = key.shape[1]
    if key_heads != heads and (key_heads == 0 or heads % key_heads != 0):
        require(False, OP, "key", f"have a number of heads that divides those of query, {heads}", key_heads)
    if value.shape != key.shape:
        require(False, OP, "value", f"have shape {list(key.shape)} like key", list(value.shape))
    if not (key.dtype is value.dtype is query.dtype and key.device == value.device == query.device):
        require_same(OP, "query", query, key=key, value=value)
    is_self = cu_seqlens is cu_seqlens_key
    for name, offsets in (("cu_seqlens", cu_seqlens), ("cu_seqlens_key", cu_seqlens_key))[: 1 if is_self else 2]:
        if offsets.ndim != 1 or offsets.shape[0] < 1:
            require(False, OP, name, "have shape [B + 1]", list(offsets.shape))
    if not is_self and cu_seqlens.shape != cu_seqlens_key.shape:
        rule = f"have {len(cu_seqlens)} entries like cu_seqlens"
        require(False, OP, "cu_seqlens_key", rule, len(cu_seqlens_key))


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor cu_seqlens_key, Tensor? time_bias,"
    " Tensor? timestamp_s, Tensor? timestamp_key_s, Tensor? seed, int left, int right, float scale, float dropout_p,"
    " str backend"
)
OFFSETS_RULE = "start at 0, never decrease and end at the number of rows"


def _checked_offsets(name: str, offsets: Tensor, tokens: int, is_backward: bool) -> Tensor:
    """The offsets as int32, after the rules about their values; inside the op, where reading cannot break a graph.

    Where checks are deferred, wrong offsets become zeros: empty sequences, so that no kernel leaves the tensors. They
    are looked at once, by the first layer that gets them. Those of a CPU may share memory with an array, whose writes
    no version counts: every forward looks at them.
    """
    require(tokens < 2**31, OP, name, "count fewer than 2^31 rows", tokens)
    if not deferred.is_deferred(offsets.device):
        if not is_backward:
            _check_offsets(name, offsets, tokens)
        return offsets if offsets.dtype is torch.int32 else offsets.int()
    state = None if offsets.is_inference() else (offsets._version, tokens)
    known = getattr(offsets, "_ubp_fast_checked", None)
    if state is None or known is None or known[0] != state:
        is_bad = (offsets[:1] != 0).any() | (offsets[-1:] != tokens).any() | (offsets.diff() < 0).any()
        fault = deferred.fault(is_bad, ValueError, f"{OP}: {name} must {OFFSETS_RULE}")
        known = (state, offsets.masked_fill(is_bad, 0).int(), fault)
        offsets._ubp_fast_checked = known  # type: ignore[attr-defined]
    _, checked, fault = known
    deferred.report(fault)
    return checked


def _check_offsets(name: str, offsets: Tensor, tokens: int) -> None:
    if not (offsets.is_cpu and offsets.is_contiguous()):
        offsets = offsets.cpu().contiguous()
    if _core.are_offsets(offsets.data_ptr(), offsets.shape[0], offsets.element_size(), tokens):
        return
    values = offsets.numpy()
    require(values[0] == 0, OP, name, "start at 0", values[0])
    require(values[-1] == tokens, OP, name, f"end at the number of rows {tokens}", values[-1])
    is_fall = values[1:] < values[:-1]
    if is_fall.any():
        at = int(is_fall.argmax()) + 1
        raise ValueError(f"{OP}: {name} must not decrease, got {values[at - 1]} then {values[at]} at entry {at}")


@torch.library.custom_op("ubp_fast::flash_attention", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
def _forward_op(query, *arguments):
    """The second result is the log-sum-exp in the backend's unit, which backward takes."""
    deferred.poll(query.device)
    *arguments, backend = arguments
    implementation, problem = _chosen(backend, _problem(query, *arguments))
    return implementation.forward(problem)


@torch.library.custom_op(
    "ubp_fast::flash_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor output, Tensor lse, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(grad_output, output, lse, query, key, *arguments):
    """The last result is empty without a time_bias: an op returns tensors only."""
    *arguments, backend = arguments
    implementation, problem = _chosen(backend, _problem(query, key, *arguments, is_backward=True))
    grad_query, *sides, grad_bias = implementation.backward(problem, output, lse, grad_output)
    sides = [reference.of_key_heads(part, key.shape[1], key.dtype) for part in sides]
    return grad_query, *sides, query.new_empty(0) if grad_bias is None else grad_bias


@torch.library.custom_op(
    "ubp_fast::flash_attention_natural_lse",
    mutates_args=(),
    schema="(Tensor lse, Tensor query, Tensor key, Tensor cu_seqlens, str backend) -> Tensor",
)
def _natural_op(lse, query, key, cu_seqlens, backend):
    """The backend's log-sum-exp in natural logarithms.

    Its gradient is passed on as it is: `_backward`, the only one to get it, takes that of the natural logarithms.
    """
    problem = Problem(query, key, key, cu_seqlens, cu_seqlens, UNBOUNDED, UNBOUNDED, 1.0)
    return lse * _implementation(backend, problem).LSE_UNIT


def _implementation(backend: str, problem: Problem) -> ModuleType:
    return IMPLEMENTATIONS[backends.resolve(OP, backend, IMPLEMENTATIONS, ORDER, problem)]


def _chosen(backend: str, problem: Problem) -> tuple[ModuleType, Problem]:
    """The backend that runs, and the problem as it takes it."""
    implementation = _implementation(backend, problem)
    return implementation, problem if implementation is _triton else reference.with_all_heads(problem)


_direct_forward, _direct_backward = transforms.direct(_forward_op), transforms.direct(_backward_op)


def _problem(
    query, key, value, cu_seqlens, cu_seqlens_key, time_bias, timestamp_s, timestamp_key_s, seed,
    left, right, scale, dropout_p, is_backward=False,
) -> Problem:  # fmt: skip
    """The problem with checked offsets; backward finds those that forward has checked, or checks them again."""
    queries, keys = query.shape[0], key.shape[0]
    offsets = _checked_offsets("cu_seqlens", cu_seqlens, queries, is_backward)
    is_self = cu_seqlens_key is cu_seqlens and keys == queries
    offsets_key = offsets if is_self else _checked_offsets("cu_seqlens_key", cu_seqlens_key, keys, is_backward)
    seed = None if seed is None else seed.to(query.device, non_blocking=True)
    times = (time_bias, timestamp_s, timestamp_key_s, seed)
    return _as_problem(query, key, value, offsets, offsets_key, *times, left, right, scale, dropout_p)


def _as_problem(
    query, key, value, cu_seqlens, cu_seqlens_key, time_bias, timestamp_s, timestamp_key_s, seed,
    left, right, scale, dropout_p,
) -> Problem:  # fmt: skip
    times = (time_bias, timestamp_s, timestamp_key_s)
    return Problem(query, key, value, cu_seqlens, cu_seqlens_key, left, right, scale, *times, dropout_p, seed)


@_forward_op.register_fake
def _fake_forward(query, *_):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=lse_dtype(query.dtype))


@_backward_op.register_fake
def _fake_backward(grad_output, output, lse, query, key, value, cu_seqlens, cu_seqlens_key, time_bias, *_):
    grad_bias = query.new_empty(0) if time_bias is None else time_bias.new_empty(time_bias.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_bias


@_natural_op.register_fake
def _fake_natural(lse, *_):
    return torch.empty_like(lse)


def _setup_context(ctx, inputs, output):
    *tensors, left, right, scale, dropout_p, backend = inputs
    ctx.options = (left, right, scale, dropout_p, backend)
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)  # no zeros for the log-sum-exp


def _backward(ctx, grad_output, grad_lse):
    nothing = (None,) * 14
    if grad_output is None and grad_lse is None:
        return nothing
    output, lse, *inputs = ctx.saved_tensors
    if torch.is_grad_enabled() or transforms.is_transforming():
        *options, backend = ctx.options
        transforms.require_reference(OP, backend)
        grads = {0: grad_output, 1: None if grad_lse is None else grad_lse.to(output.dtype)}
        wanted = [which for which, grad in grads.items() if grad is not None]

        def results(*inputs):
            found = reference.attention(_as_problem(*inputs, *options))
            return [found[which] for which in wanted]

        found = transforms.differentiable_gradients(
            results, inputs, ctx.needs_input_grad, [grads[which] for which in wanted]
        )
        return (*found, *nothing[len(found) :])
    gradients = [None] * 4
    if grad_output is not None:
        gradients = list(_direct_backward(grad_output, output, lse, *inputs, *ctx.options))
    if grad_lse is not None:
        of_lse = _backward_of_lse(grad_lse, output, lse, inputs, ctx.options)
        gradients = [new if old is None else old + new for old, new in zip(gradients, of_lse, strict=True)]
    *gradients, grad_bias = gradients
    found = (*gradients, None, None, grad_bias, *nothing[6:])
    return tuple(part if need else None for part, need in zip(found, ctx.needs_input_grad, strict=True))


def _backward_of_lse(grad_lse, output, lse, inputs, options):
    """Gradients through the log-sum-exp, dS_ij = P_ij g_i, by the same kernels.

    With values 0, at which they read the output that they are given, dS_ij = -P_ij delta_i, and delta_i =
    <grad, output> is -g_i for the rows below. Two columns hold the leading and the trailing digits of g, whatever the
    dtype.
    """
    query, key, value, *rest = inputs
    grad, minus_one = torch.zeros_like(output), torch.zeros_like(output)
    grad[:, :, 0] = grad_lse.to(grad.dtype)
    minus_one[:, :, :2] = -1.0
    if output.shape[2] > 1:
        grad[:, :, 1] = (grad_lse - grad[:, :, 0]).to(grad.dtype)
    without = torch.zeros_like(value)
    grad_query, grad_key, _, grad_bias = _direct_backward(grad, minus_one, lse, query, key, without, *rest, *options)
    return grad_query, grad_key, without, grad_bias


def _natural_backward(_, grad):
    return grad, None, None, None, None


_natural_op.register_autograd(_natural_backward)
_forward_op.register_autograd(_backward, setup_context=_setup_context)
