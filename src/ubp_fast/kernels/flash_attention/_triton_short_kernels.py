"""Triton kernels of flash_attention for short sequences; `_triton.py` launches them. Equations are in `api.py`.

A program owns a pack: as many neighbouring sequences as have together at most BLOCK rows on either side. Queries, keys
and values are in one block each and are read once; the mask is block-diagonal, so that sequences do not see each other.

    pack      one program per 128 sequences: where packs begin and end, once per batch, for all layers
    pair      with a time_bias: the bucket of each pair of a pack, once per batch, for all layers and heads
    forward   all scores of a pack at once: no running maximum
    backward  one program, five products, dq, dk and dv; scores transposed, for p and dS are then operands as they are

Sums per bucket of the time_bias: dS of a pack in the order of the buckets, which is the same in all layers and heads,
and of its running sum the differences from the end of one bucket to the next.

Sequences longer than BLOCK are in no pack: the kernels of `_triton_kernels.py` have them. Nobody writes what another
program writes, so results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ubp_fast.kernels.flash_attention._triton_kernels import LOG2E, _buckets, _kept, _load, _store

GROUP = tl.constexpr(128)
UNSEEN = tl.constexpr(255)  # in place of the bucket of a pair that does not see each other
VARYING = ("sequences", "left", "right", "threshold")


@triton.jit
def _first_slot(cu_ptr, cu_key_ptr, sequence, IS_SELF: tl.constexpr, BLOCK: tl.constexpr):
    """Two packs that follow each other have more than BLOCK rows: 2 slots for every BLOCK rows, one for every group."""
    rows = tl.cast(tl.load(cu_ptr + sequence), tl.int64)
    if not IS_SELF:
        rows += tl.load(cu_key_ptr + sequence)
    return (2 * rows // BLOCK).to(tl.int32) + (sequence + GROUP - 1) // GROUP


@triton.jit(do_not_specialize=VARYING)
def pack_kernel(
    cu_ptr, cu_key_ptr, pack_ptr, sequences, IS_SELF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First and end sequence of each pack of GROUP sequences, [slots, 2]; -1 in slots without one."""
    begin = tl.program_id(0) * GROUP
    end = tl.minimum(begin + GROUP, sequences)
    lane = tl.arange(0, GROUP)
    is_there = begin + lane < sequences
    start = tl.load(cu_ptr + begin + lane, mask=is_there, other=0)
    stop = tl.load(cu_ptr + begin + lane + 1, mask=is_there, other=0)
    key_start = tl.load(cu_key_ptr + begin + lane, mask=is_there, other=0)
    key_stop = tl.load(cu_key_ptr + begin + lane + 1, mask=is_there, other=0)
    slot = _first_slot(cu_ptr, cu_key_ptr, begin, IS_SELF, BLOCK)
    last_slot = _first_slot(cu_ptr, cu_key_ptr, end, IS_SELF, BLOCK)
    here = begin
    while here < end:
        # Offsets ascend: what fits behind `here` is a run of lanes from it on.
        is_here = begin + lane == here
        row, key_row = tl.sum(tl.where(is_here, start, 0), 0), tl.sum(tl.where(is_here, key_start, 0), 0)
        fits = is_there & (begin + lane >= here) & (stop - row <= BLOCK) & (key_stop - key_row <= BLOCK)
        taken = tl.sum(fits.to(tl.int32), 0)
        if taken > 0:
            tl.store(pack_ptr + 2 * slot, here)
            tl.store(pack_ptr + 2 * slot + 1, here + taken)
            slot += 1
        here += tl.maximum(taken, 1)
    while slot < last_slot:
        tl.store(pack_ptr + 2 * slot, -1)
        tl.store(pack_ptr + 2 * slot + 1, -1)
        slot += 1


@triton.jit
def _seen(
    query_at, key_at, query_sequence, key_sequence, cu_ptr, cu_key_ptr, left, right, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """[queries, keys] or transposed: of one sequence, and no further apart than the window; ends aligned."""
    if IS_TRANSPOSED:
        seen = query_sequence[None, :] == key_sequence[:, None]
    else:
        seen = query_sequence[:, None] == key_sequence[None, :]
    if HAS_LEFT or HAS_RIGHT:
        query_at -= tl.load(cu_ptr + query_sequence + 1, mask=query_sequence >= 0, other=0)
        key_at -= tl.load(cu_key_ptr + key_sequence + 1, mask=key_sequence >= 0, other=0)
        after = key_at[:, None] - query_at[None, :] if IS_TRANSPOSED else key_at[None, :] - query_at[:, None]
        if HAS_LEFT:
            seen &= after >= -left
        if HAS_RIGHT:
            seen &= after <= right
    return seen


@triton.jit
def _pack(pack_ptr, cu_ptr, cu_key_ptr, sequence_ptr, key_sequence_ptr, BLOCK: tl.constexpr):
    """First query row and queries of a pack, first key row and keys, and the sequences of its rows."""
    first, end = tl.load(pack_ptr + 2 * tl.program_id(0)), tl.load(pack_ptr + 2 * tl.program_id(0) + 1)
    start, key_start = tl.load(cu_ptr + first), tl.load(cu_key_ptr + first)
    queries, keys = tl.load(cu_ptr + end) - start, tl.load(cu_key_ptr + end) - key_start
    lane = tl.arange(0, BLOCK)
    sequence = tl.load(sequence_ptr + start + lane, mask=lane < queries, other=-1)
    key_sequence = tl.load(key_sequence_ptr + key_start + lane, mask=lane < keys, other=-2)
    return start, queries, key_start, keys, sequence, key_sequence


@triton.jit(do_not_specialize=VARYING)
def pair_kernel(
    cu_ptr, cu_key_ptr, time_ptr, key_time_ptr, pack_ptr, sequence_ptr, key_sequence_ptr, bucket_ptr, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BUCKETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bucket of each pair of a pack, keys x queries; UNSEEN where the query does not see the key."""
    lane = tl.arange(0, BLOCK)
    place = tl.cast(tl.program_id(0), tl.int64) * (BLOCK * BLOCK) + lane[:, None] * BLOCK + lane[None, :]
    bucket = tl.full([BLOCK, BLOCK], UNSEEN, tl.int32)
    if tl.load(pack_ptr + 2 * tl.program_id(0)) >= 0:
        start, _, key_start, _, sequence, key_sequence = _pack(
            pack_ptr, cu_ptr, cu_key_ptr, sequence_ptr, key_sequence_ptr, BLOCK
        )
        time = tl.load(time_ptr + start + lane, mask=sequence >= 0, other=0)[None, :]
        key_time = tl.load(key_time_ptr + key_start + lane, mask=key_sequence >= 0, other=0)[:, None]
        seen = _seen(
            start + lane, key_start + lane, sequence, key_sequence, cu_ptr, cu_key_ptr, left, right, HAS_LEFT,
            HAS_RIGHT, True,
        )  # fmt: skip
        bucket = tl.where(seen, _buckets(tl.abs(time - key_time), BUCKETS), bucket)
    tl.store(bucket_ptr + place, bucket.to(tl.uint8))


@triton.jit
def _up_to(running, number):
    """The sum of the first `number` elements, by the running sum of all."""
    return tl.where(number > 0, tl.gather(running, tl.maximum(number - 1, 0), 0), 0.0)


@triton.jit(do_not_specialize=VARYING)
def short_forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, cu_key_ptr, bias_ptr, seed_ptr, pack_ptr, sequence_ptr, key_sequence_ptr, bucket_ptr,
    out_ptr, lse_ptr, q_stride, q_stride_h, k_stride, k_stride_h, v_stride, v_stride_h, left, right,
    scale, threshold, keep_scale, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BUCKETS: tl.constexpr, SHARED_BY: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.load(pack_ptr + 2 * tl.program_id(0)) < 0:
        return
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, queries, key_start, keys, sequence, key_sequence = _pack(
        pack_ptr, cu_ptr, cu_key_ptr, sequence_ptr, key_sequence_ptr, BLOCK_M
    )
    if queries == 0:
        return
    row, key_row = tl.cast(start, tl.int64), tl.cast(key_start, tl.int64)
    query_at, key_at = start + tl.arange(0, BLOCK_M), key_start + tl.arange(0, BLOCK_M)
    q = _load(q_ptr + row * q_stride + head * q_stride_h, q_stride, queries, WIDTH, BLOCK_M, BLOCK_D)
    k = _load(k_ptr + key_row * k_stride + head // SHARED_BY * k_stride_h, k_stride, keys, WIDTH, BLOCK_M, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if BUCKETS > 0:
        lane, pack = tl.arange(0, BLOCK_M), tl.cast(tl.program_id(0), tl.int64)
        bucket = tl.load(bucket_ptr + pack * (BLOCK_M * BLOCK_M) + lane[None, :] * BLOCK_M + lane[:, None]).to(tl.int32)
        seen = bucket != UNSEEN
        s += tl.load(bias_ptr + head * BUCKETS + bucket, mask=seen, other=0.0) * LOG2E
    else:
        seen = _seen(
            query_at, key_at, sequence, key_sequence, cu_ptr, cu_key_ptr, left, right, HAS_LEFT, HAS_RIGHT, False
        )
    s = tl.where(seen, s, float("-inf"))
    peak = tl.max(s, 1)
    p = tl.exp2(s - tl.where(peak == float("-inf"), 0.0, peak)[:, None])  # a row that sees nothing: 0, not NaN
    total = tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(_kept(seed_ptr, key_at[None, :], query_at[:, None], head, threshold), p, 0.0)
    v = _load(v_ptr + key_row * v_stride + head // SHARED_BY * v_stride_h, v_stride, keys, WIDTH, BLOCK_M, BLOCK_D)
    output = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    output *= (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
    _store(out_ptr + (row * heads + head) * WIDTH, heads * WIDTH, output, queries, WIDTH, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + row * heads + head + tl.arange(0, BLOCK_M) * heads, lse, mask=sequence >= 0)


@triton.jit(do_not_specialize=VARYING)
def short_backward_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, cu_key_ptr, bias_ptr, seed_ptr, pack_ptr, sequence_ptr, key_sequence_ptr, bucket_ptr,
    order_ptr, end_ptr, out_ptr, lse_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr, q_stride, q_stride_h, k_stride,
    k_stride_h, v_stride, v_stride_h, left, right, scale, threshold, keep_scale, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, SHARED_BY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    if tl.load(pack_ptr + 2 * tl.program_id(0)) < 0:
        return
    head, heads = tl.program_id(1), tl.num_programs(1)
    start, queries, key_start, keys, sequence, key_sequence = _pack(
        pack_ptr, cu_ptr, cu_key_ptr, sequence_ptr, key_sequence_ptr, BLOCK_M
    )
    row, key_row = tl.cast(start, tl.int64), tl.cast(key_start, tl.int64)
    query_at, key_at = start + tl.arange(0, BLOCK_M), key_start + tl.arange(0, BLOCK_M)
    packed, key_packed, packed_stride = (row * heads + head) * WIDTH, (key_row * heads + head) * WIDTH, heads * WIDTH
    grad = _load(grad_ptr + packed, packed_stride, queries, WIDTH, BLOCK_M, BLOCK_D)
    out = _load(out_ptr + packed, packed_stride, queries, WIDTH, BLOCK_M, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + row * heads + head + tl.arange(0, BLOCK_M) * heads, mask=sequence >= 0, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # rows that see nothing: all weights 0
    q = _load(q_ptr + row * q_stride + head * q_stride_h, q_stride, queries, WIDTH, BLOCK_M, BLOCK_D)
    k = _load(k_ptr + key_row * k_stride + head // SHARED_BY * k_stride_h, k_stride, keys, WIDTH, BLOCK_M, BLOCK_D)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    if BUCKETS > 0:
        lane, pack = tl.arange(0, BLOCK_M), tl.cast(tl.program_id(0), tl.int64)
        bucket = tl.load(bucket_ptr + pack * (BLOCK_M * BLOCK_M) + lane[:, None] * BLOCK_M + lane[None, :]).to(tl.int32)
        seen = bucket != UNSEEN
        s += tl.load(bias_ptr + head * BUCKETS + bucket, mask=seen, other=0.0) * LOG2E
    else:
        seen = _seen(
            query_at, key_at, sequence, key_sequence, cu_ptr, cu_key_ptr, left, right, HAS_LEFT, HAS_RIGHT, True
        )
    p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
    if HAS_DROPOUT:
        kept = _kept(seed_ptr, key_at[:, None], query_at[None, :], head, threshold)
        dropped = tl.where(kept, p, 0.0).to(grad.dtype)
    else:
        dropped = p.to(grad.dtype)
    dv = tl.dot(dropped, grad, input_precision=PRECISION) * keep_scale
    _store(dv_ptr + key_packed, packed_stride, dv, keys, WIDTH, BLOCK_M, BLOCK_D)
    v = _load(v_ptr + key_row * v_stride + head // SHARED_BY * v_stride_h, v_stride, keys, WIDTH, BLOCK_M, BLOCK_D)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    if HAS_DROPOUT:
        dp = tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta[None, :])
    if BUCKETS > 0:
        lanes = tl.arange(0, BLOCK_BUCKETS)
        order = tl.load(order_ptr + pack * (BLOCK_M * BLOCK_M) + tl.arange(0, BLOCK_M * BLOCK_M)).to(tl.int32)
        running = tl.cumsum(tl.gather(tl.reshape(ds, [BLOCK_M * BLOCK_M]), order, 0), 0)
        ends_ptr = end_ptr + pack * BUCKETS + lanes
        end = tl.load(ends_ptr, mask=lanes < BUCKETS, other=0).to(tl.int32)
        begin = tl.load(ends_ptr - 1, mask=(lanes > 0) & (lanes < BUCKETS), other=0).to(tl.int32)
        sums = _up_to(running, end) - _up_to(running, begin)
        tl.store(dbias_ptr + (pack * heads + head) * BUCKETS + lanes, sums, mask=lanes < BUCKETS)
    small = ds.to(q.dtype)
    dk = tl.dot(small, q, input_precision=PRECISION) * scale
    _store(dk_ptr + key_packed, packed_stride, dk, keys, WIDTH, BLOCK_M, BLOCK_D)
    dq = tl.dot(tl.trans(small), k, input_precision=PRECISION) * scale
    _store(dq_ptr + packed, packed_stride, dq, queries, WIDTH, BLOCK_M, BLOCK_D)
