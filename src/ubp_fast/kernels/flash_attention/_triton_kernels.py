"""Triton kernels of flash_attention; `_triton.py` launches them. Equations are in `api.py`.

A program owns one tile: BLOCK rows of one sequence and head. Tiles are numbered without a list of them in memory:
those of sequence b start at number cu[b] // BLOCK + b, which leaves room for all of them, and a program finds its
sequence by comparing 128 of these numbers at a time (two rounds for 16,384 sequences). Numbers past the end of a
sequence end at once.

    forward   tile of queries: loop over the keys that any of its rows sees
    dq        the same; also delta, and sums per bucket of the time_bias, written per tile and added afterwards
    dkv       tile of keys: loop over the queries that see any of them, scores transposed

Sequences of at most LONGEST_PACKED rows on both sides belong to the kernels of `_triton_short_kernels.py`.

SHARED_BY heads of the query see one head of key and value; each leaves its part of dk and dv.

Nobody writes what another program writes, so results are the same in every run. Statistics, scores and sums are
float32. Scores and the saved log-sum-exp are in units of log 2: where one key outweighs all others both are the same
number, and its weight is exactly 1. Products of float32 take full float32 precision, never TF32. Blocks in which all
rows see all keys skip the mask. Offsets of rows are int64, offsets inside a tile int32.

Where its tiles are DESCRIBED, forward takes keys and values through tensor descriptors (sm_90 and newer copy them
without a thread's registers). A descriptor covers one sequence and head, and gives 0 past its end: rows of the next
sequence, which may hold infinities, never enter a product.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FAN = tl.constexpr(128)
BITS = tl.constexpr(64)
FAR = tl.constexpr(2**30)  # seconds, 34 years: between times that are nearer differences stay within int32
FEW = tl.constexpr(5)  # buckets of a tile
VARYING = ("sequences", "slots", "left", "right", "threshold")


@triton.jit
def _tile(slot, cu_ptr, sequences, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Sequence of a tile, its first packed row, its number of rows, and the tile's first row in it."""
    low = slot * 0
    for level in tl.static_range(LEVELS):
        probe = low + tl.arange(0, FAN) * FAN ** (LEVELS - 1 - level)
        start = tl.load(cu_ptr + probe, mask=probe < sequences, other=0)
        is_before = (probe < sequences) & (start // BLOCK + probe <= slot)
        low += (tl.sum(is_before.to(tl.int32), 0) - 1) * FAN ** (LEVELS - 1 - level)
    start = tl.load(cu_ptr + low)
    rows = tl.load(cu_ptr + low + 1) - start
    return low, start, rows, (slot - start // BLOCK - low) * BLOCK


@triton.jit
def _load(ptr, stride, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tile [BLOCK, BLOCK_D], 0 in rows past `rows` and columns past WIDTH."""
    at, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mask = (at < rows)[:, None]
    if WIDTH < BLOCK_D:
        mask &= (column < WIDTH)[None, :]
    return tl.load(ptr + at[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _passing(
    ptr, stride, rows, DESCRIBED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """What _rows takes tiles from: a descriptor of all rows, or where they begin."""
    if DESCRIBED:
        # No descriptor is of no rows; nobody takes any of them then.
        source = tl.make_tensor_descriptor(ptr, [tl.maximum(rows, 1), WIDTH], [stride, 1], [BLOCK, BLOCK_D])
    else:
        source = ptr
    return source


@triton.jit
def _rows(
    source, at, stride, rows, DESCRIBED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows at .. at + BLOCK - 1 of `rows`, as _load gives them."""
    if DESCRIBED:
        tile = source.load([at, 0])
    else:
        tile = _load(source + tl.cast(at, tl.int64) * stride, stride, rows - at, WIDTH, BLOCK, BLOCK_D)
    return tile


@triton.jit
def _store(ptr, stride, tile, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    at, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    ptrs = ptr + at[:, None] * stride + column[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(at < rows)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _seen(query_at, key_at, queries, keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which query sees which key; places inside the sequence that broadcast, ends aligned."""
    place = query_at + (keys - queries)
    seen = (query_at < queries) & (key_at < keys)
    if HAS_LEFT:
        seen &= key_at >= place - left
    if HAS_RIGHT:
        seen &= key_at <= place + right
    return seen


@triton.jit
def _buckets(gap, BUCKETS: tl.constexpr):
    """Two per octave of seconds + 1, int32 or int64: exponent and first digit of the float32.

    Without the bits two places below set ones no number is rounded up to the next octave or to its upper half.
    """
    x = gap + 1
    if gap.dtype == tl.int64:
        x = x.to(tl.uint64)  # between the two ends of int64 there is more than it holds
    bits = (x ^ (x & (x >> 2))).to(tl.float32).to(tl.int32, bitcast=True)
    return tl.minimum((bits >> 22) - 254, BUCKETS - 1)


@triton.jit
def _least_gap(bucket):
    """The smallest gap that is in this bucket of _buckets, or in one after it."""
    octave = 1 << (bucket >> 1)
    return octave - 1 + (bucket & 1) * ((octave + 1) >> 1)


@triton.jit
def _after(time_ptr, at, rows, origin):
    """Seconds from `origin` to the times of rows as int32, cut at FAR; the last row stands for those past the end."""
    after = tl.load(time_ptr + tl.minimum(at, rows - 1)) - origin
    return tl.minimum(tl.maximum(after, -FAR), FAR).to(tl.int32)


@triton.jit
def _span(low, high, other, BUCKETS: tl.constexpr):
    """First and last bucket of the pairs between times low .. high and others, and whether some are FAR away."""
    other_low, other_high = tl.min(other, 0), tl.max(other, 0)
    nearest = tl.maximum(tl.maximum(low - other_high, other_low - high), 0)
    furthest = tl.maximum(high - other_low, other_high - low)
    is_far = (tl.minimum(low, other_low) == -FAR) | (tl.maximum(high, other_high) == FAR)
    return _buckets(nearest, BUCKETS), _buckets(furthest, BUCKETS), is_far


@triton.jit
def _times_of(time_ptr, tile, at, rows):
    """The times of a tile's own rows, from that of the first one on, and where they and their limits come from."""
    origin = tl.load(time_ptr + tile)
    time = _after(time_ptr, at, rows, origin)
    return time, tl.min(time, 0), tl.max(time, 0), origin, time_ptr, at, rows


@triton.jit
def _times_of_both(own, other_ptr, other_at, others, BUCKETS: tl.constexpr):
    """What is known of a tile's times: its _span, the times of both sides, and where they are in memory."""
    time, low, high, origin, time_ptr, at, rows = own
    other = _after(other_ptr, other_at, others, origin)
    first, last, is_far = _span(low, high, other, BUCKETS)
    return first, last, is_far, time, other, time_ptr, at, rows, other_ptr, other_at, others


@triton.jit
def _gaps(time, other):
    return tl.abs(time[:, None] - other[None, :])


@triton.jit
def _buckets_of_pairs(times, BUCKETS: tl.constexpr, IS_BRANCHING: tl.constexpr):
    """The bucket of each pair of a tile; by the times in memory where gaps may be of any length."""
    _, _, is_far, time, other, time_ptr, at, rows, other_ptr, other_at, others = times
    if IS_BRANCHING:
        if is_far:
            bucket = _buckets(_whole_gaps(time_ptr, at, rows, other_ptr, other_at, others), BUCKETS)
        else:
            bucket = _buckets(_gaps(time, other), BUCKETS)
    else:
        bucket = _buckets(_whole_gaps(time_ptr, at, rows, other_ptr, other_at, others), BUCKETS)
    return bucket


@triton.jit
def _whole_gaps(time_ptr, at, rows, other_ptr, other_at, others):
    time = tl.load(time_ptr + tl.minimum(at, rows - 1))
    return _gaps(time, tl.load(other_ptr + tl.minimum(other_at, others - 1)))


@triton.jit
def _with_bias(s, bias_ptr, times, BUCKETS: tl.constexpr, IS_BRANCHING: tl.constexpr):
    """Scores of a tile and their time_bias; where there are few buckets a comparison for each after the first.

    Products of float32 do without: Triton 3.6 does not compile branches behind them.
    """
    first, last, is_far, time, other, _, _, _, _, _, _ = times
    if not IS_BRANCHING:  # noqa: SIM114 (known when it is compiled, the other condition is not)
        s += tl.load(bias_ptr + _buckets_of_pairs(times, BUCKETS, IS_BRANCHING)) * LOG2E
    elif is_far | (last - first >= FEW):
        s += tl.load(bias_ptr + _buckets_of_pairs(times, BUCKETS, IS_BRANCHING)) * LOG2E
    else:
        plain = s
        s += tl.load(bias_ptr + first) * LOG2E
        for here in range(first + 1, last + 1):
            s = tl.where(_gaps(time, other) >= _least_gap(here), plain + tl.load(bias_ptr + here) * LOG2E, s)
    return s


@triton.jit
def _with_sums(sums, grad, lanes, times, BUCKETS: tl.constexpr, IS_BRANCHING: tl.constexpr):
    """Sums of buckets and the gradients of a tile's scores, which are 0 where a query does not see a key."""
    first, last, is_far, time, other, _, _, _, _, _, _ = times
    if not IS_BRANCHING:  # noqa: SIM114
        sums = _many_sums(sums, grad, _buckets_of_pairs(times, BUCKETS, IS_BRANCHING), lanes, BUCKETS)
    elif is_far | (last - first >= FEW):
        sums = _many_sums(sums, grad, _buckets_of_pairs(times, BUCKETS, IS_BRANCHING), lanes, BUCKETS)
    else:
        # From the last bucket down: all that are at least so far apart, without those of the buckets after it.
        beyond = 0.0
        for back in range(0, last - first):
            here = last - back
            part = tl.sum(tl.where(_gaps(time, other) >= _least_gap(here), grad, 0.0))
            sums += tl.where(lanes == here, part - beyond, 0.0)
            beyond = part
        sums += tl.where(lanes == first, tl.sum(grad) - beyond, 0.0)
    return sums


@triton.jit
def _either(left, right):
    return left | right


@triton.jit
def _many_sums(sums, grad, bucket, lanes, BUCKETS: tl.constexpr):
    """A round for each bucket that has a gradient.

    Times of a history come in bursts: of the buckets between a tile's first and last one about half have none.
    """
    for begin in tl.static_range(0, BUCKETS, BITS):
        is_there = grad != 0.0
        if BUCKETS > BITS:
            is_there &= (bucket >= begin) & (bucket < begin + BITS)
        bits = tl.where(is_there, tl.full(bucket.shape, 1, tl.uint64) << (bucket - begin), 0)
        there = tl.reduce(bits, None, _either)
        while there != 0:
            rest = there & (there - 1)
            exponent = (there ^ rest).to(tl.float64).to(tl.int64, bitcast=True) >> 52  # of the lowest bit
            here = begin + exponent.to(tl.int32) - 1023
            sums += tl.where(lanes == here, tl.sum(tl.where(bucket == here, grad, 0.0)), 0.0)
            there = rest
    return sums


@triton.jit
def _scores(
    own, other, scale, bias_ptr, own_times, other_ptr, other_at, others, BUCKETS: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores [own, other] in units of log 2, with their time_bias if there is one, and what is known of the times."""
    s = tl.dot(own, tl.trans(other), input_precision=PRECISION) * (scale * LOG2E)
    times = own_times
    if BUCKETS > 0:
        times = _times_of_both(own_times, other_ptr, other_at, others, BUCKETS)
        s = _with_bias(s, bias_ptr, times, BUCKETS, PRECISION != "ieee")
    return s, times


@triton.jit
def _kept(seed_ptr, key_row, query_row, head, threshold):
    query_row += tl.load(seed_ptr + 1).to(tl.int32)
    key_row += tl.load(seed_ptr + 2).to(tl.int32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), key_row, query_row, head, head * 0)
    return word >= threshold.to(tl.uint32)


@triton.jit
def _keys_seen(place, keys, left, right, BLOCK_M: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """For queries at places place .. place + BLOCK_M - 1: first and end of the keys any of them sees, and all see."""
    first, end, free_first, free_end = place * 0, keys, place * 0, keys
    if HAS_LEFT:
        first = tl.maximum(place - left, 0)
        free_first = place + BLOCK_M - 1 - left
    if HAS_RIGHT:
        end = tl.minimum(place + BLOCK_M + right, keys)
        free_end = tl.minimum(place + right + 1, keys)
    return first, end, free_first, free_end


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, cu_key_ptr, bias_ptr, time_ptr, key_time_ptr, seed_ptr, out_ptr, lse_ptr, q_stride,
    q_stride_h, k_stride, k_stride_h, v_stride, v_stride_h, sequences, slots, left, right, scale, threshold, keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, BUCKETS: tl.constexpr,
    SHARED_BY: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr, LONGEST_PACKED: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    # The last tiles of a causal sequence are the longest: they start first.
    head, heads = tl.program_id(1), tl.num_programs(1)
    b, start, queries, tile = _tile(slots - 1 - tl.program_id(0), cu_ptr, sequences, BLOCK_M, LEVELS)
    if tile >= queries:
        return
    key_start = tl.load(cu_key_ptr + b)
    keys = tl.load(cu_key_ptr + b + 1) - key_start
    if (queries <= LONGEST_PACKED) & (keys <= LONGEST_PACKED):
        return
    row, key_row = tl.cast(start + tile, tl.int64), tl.cast(key_start, tl.int64)
    k_ptr += key_row * k_stride + head // SHARED_BY * k_stride_h
    v_ptr += key_row * v_stride + head // SHARED_BY * v_stride_h
    k_rows = _passing(k_ptr, k_stride, keys, DESCRIBED, WIDTH, BLOCK_N, BLOCK_D)
    v_rows = _passing(v_ptr, v_stride, keys, DESCRIBED, WIDTH, BLOCK_N, BLOCK_D)
    query_at = tile + tl.arange(0, BLOCK_M)
    q = _load(q_ptr + row * q_stride + head * q_stride_h, q_stride, queries - tile, WIDTH, BLOCK_M, BLOCK_D)
    own_times, unit = tile, scale * LOG2E
    if BUCKETS > 0:
        unit = 1.0  # the time_bias is added to scores that have theirs
        bias_ptr, time_ptr, key_time_ptr = bias_ptr + head * BUCKETS, time_ptr + start, key_time_ptr + key_start
        own_times = _times_of(time_ptr, tile, query_at, queries)

    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    place = tile + keys - queries
    first, end, free_first, free_end = _keys_seen(place, keys, left, right, BLOCK_M, HAS_LEFT, HAS_RIGHT)
    for at in range(first, end, BLOCK_N):
        key_at = at + tl.arange(0, BLOCK_N)
        k = _rows(k_rows, at, k_stride, keys, DESCRIBED, WIDTH, BLOCK_N, BLOCK_D)
        if BUCKETS > 0:
            s, _ = _scores(q, k, scale, bias_ptr, own_times, key_time_ptr, key_at, keys, BUCKETS, PRECISION)
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if (at < free_first) | (at + BLOCK_N > free_end):
            seen = _seen(query_at[:, None], key_at[None, :], queries, keys, left, right, HAS_LEFT, HAS_RIGHT)
            s = tl.where(seen, s, float("-inf"))
        # The unit is positive (_triton.py sees to it), so that it can wait: it is part of the subtraction then.
        new_peak = tl.maximum(peak, tl.max(s, 1) * unit)
        # A row that has seen nothing yet: 0 in place of -infinity makes its weights exp2(-inf) = 0 instead of NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s * unit - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(p, 1)
        if HAS_DROPOUT:
            kept = _kept(seed_ptr, (key_start + key_at)[None, :], (start + query_at)[:, None], head, threshold)
            p = tl.where(kept, p, 0.0)
        v = _rows(v_rows, at, v_stride, keys, DESCRIBED, WIDTH, BLOCK_N, BLOCK_D)
        output = tl.dot(p.to(v.dtype), v, output * fade[:, None], input_precision=PRECISION)
        peak = new_peak

    output *= (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
    out_ptr += (row * heads + head) * WIDTH
    _store(out_ptr, heads * WIDTH, output, queries - tile, WIDTH, BLOCK_M, BLOCK_D)
    at_lse = row * heads + head + tl.arange(0, BLOCK_M) * heads
    tl.store(lse_ptr + at_lse, lse, mask=query_at < queries)


@triton.jit(do_not_specialize=VARYING)
def backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, cu_key_ptr, bias_ptr, time_ptr, key_time_ptr, seed_ptr, out_ptr, lse_ptr, grad_ptr,
    delta_ptr, dq_ptr, dbias_ptr, q_stride, q_stride_h, k_stride, k_stride_h, v_stride, v_stride_h, sequences, slots,
    left, right, scale, threshold, keep_scale, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, BUCKETS: tl.constexpr, SHARED_BY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LEVELS: tl.constexpr,
    LONGEST_PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    head, heads, slot = tl.program_id(1), tl.num_programs(1), slots - 1 - tl.program_id(0)
    b, start, queries, tile = _tile(slot, cu_ptr, sequences, BLOCK_M, LEVELS)
    if BUCKETS > 0:
        lanes = tl.arange(0, BLOCK_BUCKETS)
        sums = tl.zeros([BLOCK_BUCKETS], tl.float32)
        dbias_ptr += (tl.cast(slot, tl.int64) * heads + head) * BUCKETS
    if tile >= queries:
        return
    key_start = tl.load(cu_key_ptr + b)
    keys = tl.load(cu_key_ptr + b + 1) - key_start
    if (queries <= LONGEST_PACKED) & (keys <= LONGEST_PACKED):
        return
    row, key_row = tl.cast(start + tile, tl.int64), tl.cast(key_start, tl.int64)
    k_ptr += key_row * k_stride + head // SHARED_BY * k_stride_h
    v_ptr += key_row * v_stride + head // SHARED_BY * v_stride_h
    query_at = tile + tl.arange(0, BLOCK_M)
    q = _load(q_ptr + row * q_stride + head * q_stride_h, q_stride, queries - tile, WIDTH, BLOCK_M, BLOCK_D)
    packed, packed_stride = (row * heads + head) * WIDTH, heads * WIDTH
    grad = _load(grad_ptr + packed, packed_stride, queries - tile, WIDTH, BLOCK_M, BLOCK_D)
    out = _load(out_ptr + packed, packed_stride, queries - tile, WIDTH, BLOCK_M, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    at_lse = row * heads + head + tl.arange(0, BLOCK_M) * heads
    tl.store(delta_ptr + at_lse, delta, mask=query_at < queries)
    lse = tl.load(lse_ptr + at_lse, mask=query_at < queries, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # rows that see nothing: all weights 0
    own_times = tile
    if BUCKETS > 0:
        bias_ptr, time_ptr, key_time_ptr = bias_ptr + head * BUCKETS, time_ptr + start, key_time_ptr + key_start
        own_times = _times_of(time_ptr, tile, query_at, queries)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    place = tile + keys - queries
    first, end, free_first, free_end = _keys_seen(place, keys, left, right, BLOCK_M, HAS_LEFT, HAS_RIGHT)
    for at in range(first, end, BLOCK_N):
        key_at, there = at + tl.arange(0, BLOCK_N), tl.cast(at, tl.int64)
        k = _load(k_ptr + there * k_stride, k_stride, keys - at, WIDTH, BLOCK_N, BLOCK_D)
        v = _load(v_ptr + there * v_stride, v_stride, keys - at, WIDTH, BLOCK_N, BLOCK_D)
        s, times = _scores(q, k, scale, bias_ptr, own_times, key_time_ptr, key_at, keys, BUCKETS, PRECISION)
        p = tl.exp2(s - lse[:, None])
        if (at < free_first) | (at + BLOCK_N > free_end):
            seen = _seen(query_at[:, None], key_at[None, :], queries, keys, left, right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if HAS_DROPOUT:
            kept = _kept(seed_ptr, (key_start + key_at)[None, :], (start + query_at)[:, None], head, threshold)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if BUCKETS > 0:
            sums = _with_sums(sums, ds, lanes, times, BUCKETS, PRECISION != "ieee")
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    _store(dq_ptr + packed, packed_stride, dq * scale, queries - tile, WIDTH, BLOCK_M, BLOCK_D)
    if BUCKETS > 0:
        tl.store(dbias_ptr + lanes, sums, mask=lanes < BUCKETS)


@triton.jit
def _queries_seeing(
    place, keys, queries, left, right, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """For keys place .. place + BLOCK_N - 1: first and end of the queries that see any of them, and that see all."""
    shift = keys - queries
    first, end, free_first, free_end = place * 0, queries, place * 0, queries
    if HAS_RIGHT:
        first = tl.maximum(place - right - shift, 0)
        free_first = place + BLOCK_N - 1 - right - shift
    if HAS_LEFT:
        end = tl.minimum(place + BLOCK_N + left - shift, queries)
        free_end = tl.minimum(place + left - shift + 1, queries)
    return first, end, free_first, free_end


@triton.jit(do_not_specialize=VARYING)
def backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, cu_key_ptr, bias_ptr, time_ptr, key_time_ptr, seed_ptr, lse_ptr, grad_ptr, delta_ptr,
    dk_ptr, dv_ptr, q_stride, q_stride_h, k_stride, k_stride_h, v_stride, v_stride_h, sequences, slots, left, right,
    scale, threshold, keep_scale, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BUCKETS: tl.constexpr, SHARED_BY: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, LEVELS: tl.constexpr, LONGEST_PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(1), tl.num_programs(1)
    b, key_start, keys, tile = _tile(tl.program_id(0), cu_key_ptr, sequences, BLOCK_N, LEVELS)
    if tile >= keys:
        return
    start = tl.load(cu_ptr + b)
    queries = tl.load(cu_ptr + b + 1) - start
    if (queries <= LONGEST_PACKED) & (keys <= LONGEST_PACKED):
        return
    row, key_row = tl.cast(start, tl.int64), tl.cast(key_start + tile, tl.int64)
    q_ptr += row * q_stride + head * q_stride_h
    grad_ptr += (row * heads + head) * WIDTH
    lse_ptr += row * heads + head
    delta_ptr += row * heads + head
    key_at = tile + tl.arange(0, BLOCK_N)
    k_ptr += key_row * k_stride + head // SHARED_BY * k_stride_h
    v_ptr += key_row * v_stride + head // SHARED_BY * v_stride_h
    k = _load(k_ptr, k_stride, keys - tile, WIDTH, BLOCK_N, BLOCK_D)
    v = _load(v_ptr, v_stride, keys - tile, WIDTH, BLOCK_N, BLOCK_D)
    own_times = tile
    if BUCKETS > 0:
        bias_ptr, time_ptr, key_time_ptr = bias_ptr + head * BUCKETS, time_ptr + start, key_time_ptr + key_start
        own_times = _times_of(key_time_ptr, tile, key_at, keys)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first, end, free_first, free_end = _queries_seeing(tile, keys, queries, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    for at in range(first, end, BLOCK_M):
        query_at, there = at + tl.arange(0, BLOCK_M), tl.cast(at, tl.int64)
        q = _load(q_ptr + there * q_stride, q_stride, queries - at, WIDTH, BLOCK_M, BLOCK_D)
        grad = _load(grad_ptr + there * heads * WIDTH, heads * WIDTH, queries - at, WIDTH, BLOCK_M, BLOCK_D)
        at_lse = there * heads + tl.arange(0, BLOCK_M) * heads
        lse = tl.load(lse_ptr + at_lse, mask=query_at < queries, other=float("-inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + at_lse, mask=query_at < queries, other=0.0)
        s, _ = _scores(k, q, scale, bias_ptr, own_times, time_ptr, query_at, queries, BUCKETS, PRECISION)
        p = tl.exp2(s - lse[None, :])
        if (at < free_first) | (at + BLOCK_M > free_end):
            seen = _seen(query_at[None, :], key_at[:, None], queries, keys, left, right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        if HAS_DROPOUT:
            kept = _kept(seed_ptr, (key_start + key_at)[:, None], (start + query_at)[None, :], head, threshold)
            dv = tl.dot(tl.where(kept, p, 0.0).to(grad.dtype), grad, dv, input_precision=PRECISION)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        else:
            dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    packed, packed_stride = (key_row * heads + head) * WIDTH, heads * WIDTH
    _store(dk_ptr + packed, packed_stride, dk * scale, keys - tile, WIDTH, BLOCK_N, BLOCK_D)
    _store(dv_ptr + packed, packed_stride, dv * keep_scale, keys - tile, WIDTH, BLOCK_N, BLOCK_D)
