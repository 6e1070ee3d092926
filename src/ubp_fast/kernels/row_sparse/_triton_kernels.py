"""Triton kernels of row_sparse; `_triton.py` launches them. Equations are in `api.py`.

A program owns ROWS rows of the batch (or of the table) and walks over their columns. No program reads what another
one writes: `last_step` and `used` are written by a launch of their own, and the slot of a row is read only where nobody
gives it one. `mark` looks at the numbers that become addresses before anything is written; launches that write do
nothing once a fault is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = ("count", "table_rows", "slots", "now", "horizon", "bad_id", "bad_step", "bad_slot", "bad_order", "no_slot")


@triton.jit
def _limit(count_ptr, count, HAS_COUNT: tl.constexpr):
    """Entries that are no padding."""
    limit = tl.cast(count, tl.int64)
    if HAS_COUNT:
        limit = tl.load(count_ptr)
    return limit


@triton.jit
def _rows_of(
    ids_ptr, last_ptr, slot_ptr, at, is_entry, table_rows, slots, now, bad_id, bad_step, bad_slot,
    HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Row, its last step (-1), its slot (0 where it has none) and what is wrong with it (0: nothing)."""
    row = tl.cast(at, tl.int64)
    if HAS_IDS:
        row = tl.load(ids_ptr + at, mask=is_entry, other=0)
    is_inside = (row >= 0) & (row < table_rows)
    last = tl.load(last_ptr + row, mask=is_entry & is_inside, other=-1)
    slot = tl.load(slot_ptr + row, mask=is_entry & is_inside & (last >= 0), other=0)
    fault = tl.where((last >= 0) & ((slot < 0) | (slot >= slots)), bad_slot, 0)
    fault = tl.where(last > now, bad_step, fault)
    fault = tl.where(is_inside, fault, bad_id)
    return row, last, tl.cast(slot, tl.int64), tl.where(is_entry, fault, 0)


@triton.jit
def _power(log2_base, log2_rest, exponent):
    """base^exponent in float64; the logarithm comes in two floats."""
    return tl.exp2(tl.cast(exponent, tl.float64) * (tl.cast(log2_base, tl.float64) + tl.cast(log2_rest, tl.float64)))


@triton.jit
def _kept_share(kept_ptr, last, is_row, now, IS_ADAM: tl.constexpr):
    """What is left of y - z (schedule-free) or of the weight (Adam) since `last`, float32."""
    is_moved = is_row
    if not IS_ADAM:
        is_moved = is_row & (last >= 0)
    kept = tl.load(kept_ptr + now) / tl.load(kept_ptr + tl.maximum(last, 0), mask=is_moved, other=1.0)
    return tl.where(is_moved, kept, 1.0).to(tl.float32)


@triton.jit
def _present(
    weight, first, second, last, is_behind, kept, kept_ptr, history_ptr, now, horizon, log2_beta1, log2_beta1_rest,
    log2_beta2, log2_beta2_rest, eps, IS_ADAM: tl.constexpr,
):  # fmt: skip
    """The weights [ROWS, BLOCK] at the present; Adam's missed steps are added up one by one."""
    if IS_ADAM:
        missed = tl.where(is_behind, tl.minimum(now - last, horizon), 0)
        start = tl.load(kept_ptr + last, mask=is_behind, other=1.0)
        root, moved = tl.sqrt_rn(second), tl.zeros_like(weight)
        for step in range(1, tl.max(missed, 0) + 1):
            is_missed = step <= missed
            place = tl.cast(last + step, tl.int64)
            rate = tl.load(history_ptr + 3 * place, mask=is_missed, other=0.0)
            rate *= start / tl.load(kept_ptr + place, mask=is_missed, other=1.0)
            inverse_root = tl.load(history_ptr + 3 * place + 1, mask=is_missed, other=1.0)
            up = (_power(log2_beta1, log2_beta1_rest, step) * rate).to(tl.float32)
            down = (_power(log2_beta2, log2_beta2_rest, 0.5 * step) * inverse_root).to(tl.float32)
            moved += tl.div_rn(up[:, None] * first, down[:, None] * root + eps)
        weight = kept[:, None] * (weight - moved)
    else:
        weight = tl.where(is_behind[:, None], first + (weight - first) * kept[:, None], weight)
    return weight


@triton.jit(do_not_specialize=VARYING)
def mark_kernel(
    ids_ptr, last_ptr, slot_ptr, fresh_ptr, count_ptr, fault_ptr, bad_id, bad_step, bad_slot, bad_order, count,
    table_rows, slots, now, HAS_IDS: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """1 for each row without a slot; any fault that was found (ids must ascend, too)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry = at < _limit(count_ptr, count, HAS_COUNT)
    row, last, _, fault = _rows_of(
        ids_ptr, last_ptr, slot_ptr, at, is_entry, table_rows, slots, now, bad_id, bad_step, bad_slot, HAS_IDS
    )
    if HAS_IDS:
        before = tl.load(ids_ptr + at - 1, mask=(at > 0) & is_entry, other=-1)
        fault = tl.where((fault == 0) & is_entry & (before >= row), bad_order, fault)
        tl.store(fresh_ptr + at, (is_entry & (last < 0)).to(tl.int32), mask=at < count)
    worst = tl.max(fault, 0)
    tl.store(fault_ptr, worst, mask=worst > 0)


@triton.jit(do_not_specialize=VARYING)
def commit_kernel(
    ids_ptr, last_ptr, order_ptr, used_ptr, count_ptr, fault_ptr, count, now, HAS_IDS: tl.constexpr,
    HAS_COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """After an update its rows are at step `now` + 1 and have their slots; after a catch-up touched rows are at 0."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_entry = (at < _limit(count_ptr, count, HAS_COUNT)) & (tl.load(fault_ptr) == 0)
    if HAS_IDS:
        row = tl.load(ids_ptr + at, mask=is_entry, other=0)
        tl.store(last_ptr + row, tl.zeros_like(at) + (now + 1), mask=is_entry)
        is_first = (tl.program_id(0) == 0) & (tl.load(fault_ptr) == 0)
        given = tl.load(order_ptr + count - 1, mask=is_first, other=0)
        tl.store(used_ptr, tl.load(used_ptr) + given, mask=is_first)
    else:
        last = tl.load(last_ptr + at, mask=is_entry, other=-1)
        tl.store(last_ptr + at, tl.zeros_like(at), mask=is_entry & (last > 0))


@triton.jit(do_not_specialize=VARYING)
def gather_kernel(
    weight_ptr, state_ptr, slot_ptr, last_ptr, kept_ptr, history_ptr, ids_ptr, out_ptr, fault_ptr, bad_id, bad_step,
    bad_slot, count, table_rows, slots, now, horizon, log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, eps,
    IS_ADAM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that cannot be read give NaN."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, last, slot, fault = _rows_of(
        ids_ptr, last_ptr, slot_ptr, at, at < count, table_rows, slots, now, bad_id, bad_step, bad_slot, True
    )
    worst = tl.max(fault, 0)
    tl.store(fault_ptr, worst, mask=worst > 0)
    is_row = (at < count) & (fault == 0)
    is_behind = is_row & (last >= 0) & (last < now)
    kept = _kept_share(kept_ptr, last, is_row, now, IS_ADAM)
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = (column < WIDTH)[None, :]
        old = is_behind[:, None] & inside
        weight = tl.load(
            weight_ptr + row[:, None] * WIDTH + column[None, :], mask=is_row[:, None] & inside, other=float("nan")
        )
        state_ptrs = state_ptr + slot[:, None] * (2 * WIDTH) + column[None, :]
        first = tl.load(state_ptrs, mask=old, other=0.0)
        second = first
        if IS_ADAM:
            second = tl.load(state_ptrs + WIDTH, mask=old, other=0.0)
        weight = _present(
            weight, first, second, last, is_behind, kept, kept_ptr, history_ptr, now, horizon,
            log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, eps, IS_ADAM,
        )  # fmt: skip
        place = tl.cast(at, tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(out_ptr + place, weight, mask=(at < count)[:, None] & inside)


@triton.jit
def _gradients(
    order_ptr, gradient_ptr, row_stride, column_stride, begin, end, column, inside, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of sorted entries begin .. end - 1, ROWS at a time."""
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(begin, end, ROWS):
        entry = at + tl.arange(0, ROWS)
        row = tl.load(order_ptr + entry, mask=entry < end, other=0)
        place = row[:, None] * row_stride + tl.cast(column, tl.int64)[None, :] * column_stride
        total += tl.sum(tl.load(gradient_ptr + place, mask=(entry < end)[:, None] & inside[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=VARYING)
def part_kernel(
    ids_ptr, order_ptr, gradient_ptr, part_ptr, row_stride, column_stride, count, WIDTH: tl.constexpr,
    PART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a part of the sorted entries but the first one: the sum of those that belong to the last id before it."""
    begin = (tl.program_id(0) + 1) * PART
    lane = begin + tl.arange(0, PART)
    is_same = tl.load(ids_ptr + lane, mask=lane < count, other=-1) == tl.load(ids_ptr + begin - 1)
    end = begin + tl.sum((is_same & (lane < count)).to(tl.int32), 0)
    if end == begin:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = _gradients(order_ptr, gradient_ptr, row_stride, column_stride, begin, end, column, inside, ROWS, BLOCK)
    tl.store(part_ptr + tl.cast(tl.program_id(0), tl.int64) * WIDTH + column, total, mask=inside)


@triton.jit
def reduce_kernel(
    start_ptr, order_ptr, gradient_ptr, part_ptr, sum_ptr, row_stride, column_stride, WIDTH: tl.constexpr,
    PART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of equal ids: its gradients in the part where it begins, and the sums of the parts it goes on in.

    In the order of the batch, ROWS at a time; an empty group gives 0.
    """
    group = tl.program_id(0)
    first, end = tl.load(start_ptr + group), tl.load(start_ptr + group + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    near = tl.minimum(end, (first // PART + 1) * PART)
    total = _gradients(order_ptr, gradient_ptr, row_stride, column_stride, first, near, column, inside, ROWS, BLOCK)
    last_part = (end - 1) // PART
    for at in range(first // PART, last_part, ROWS):
        part = at + tl.arange(0, ROWS)
        place = part[:, None] * WIDTH + column[None, :]
        total += tl.sum(tl.load(part_ptr + place, mask=(part < last_part)[:, None] & inside[None, :], other=0.0), 0)
    tl.store(sum_ptr + tl.cast(group, tl.int64) * WIDTH + column, total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def update_kernel(
    weight_ptr, state_ptr, slot_ptr, last_ptr, kept_ptr, history_ptr, ids_ptr, gradient_ptr, order_ptr, used_ptr,
    count_ptr, fault_ptr, no_slot, count, table_rows, slots, now, horizon, log2_beta1, log2_beta1_rest, log2_beta2,
    log2_beta2_rest, eps, beta2, first_new, second_new, rate, average_weight, gradient_weight, correction, root, keep,
    IS_ADAM: tl.constexpr, IS_ADAPTIVE: tl.constexpr, HAS_COUNT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`rate` is the learning rate of schedule-free; what follows it belongs to one rule each."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    has_room = tl.load(used_ptr) + tl.load(order_ptr + count - 1) <= slots
    is_sound = tl.load(fault_ptr) == 0
    tl.store(fault_ptr, no_slot, mask=is_sound & (has_room == 0))
    is_row = (at < _limit(count_ptr, count, HAS_COUNT)) & is_sound & has_room
    row, last, slot, _ = _rows_of(ids_ptr, last_ptr, slot_ptr, at, is_row, table_rows, slots, now, 0, 0, 0, True)
    is_fresh = is_row & (last < 0)
    given = tl.load(used_ptr) + tl.load(order_ptr + at, mask=is_fresh, other=1) - 1
    slot = tl.where(is_fresh, given, slot)
    tl.store(slot_ptr + row, slot.to(tl.int32), mask=is_fresh)
    is_behind = is_row & (last >= 0) & (last < now)
    kept = _kept_share(kept_ptr, last, is_row, now, IS_ADAM)
    missed = tl.where(is_row & (last >= 0), now - last, 0)
    second_kept = (beta2 * _power(log2_beta2, log2_beta2_rest, missed)).to(tl.float32)[:, None]
    first_kept = _power(log2_beta1, log2_beta1_rest, missed).to(tl.float32)[:, None]
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = is_row[:, None] & (column < WIDTH)[None, :]
        old = (is_row & (last >= 0))[:, None] & (column < WIDTH)[None, :]
        weight_ptrs = weight_ptr + row[:, None] * WIDTH + column[None, :]
        state_ptrs = state_ptr + slot[:, None] * (2 * WIDTH) + column[None, :]
        weight = tl.load(weight_ptrs, mask=inside, other=0.0)
        first = tl.load(state_ptrs, mask=old, other=0.0)
        second = tl.load(state_ptrs + WIDTH, mask=old, other=0.0)
        place = tl.cast(at, tl.int64)[:, None] * WIDTH + column[None, :]
        gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0)
        squared = second * second_kept + second_new * gradient * gradient
        if IS_ADAM:
            weight = _present(
                weight, first, second, last, is_behind, kept, kept_ptr, history_ptr, now, horizon,
                log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, eps, IS_ADAM,
            )  # fmt: skip
            first = first * first_kept
            first += first_new * (gradient - first)
            weight = weight * keep - tl.div_rn(rate * first, tl.sqrt_rn(squared) * root + eps)
        else:
            first = tl.where(old, first, weight)
            if IS_ADAPTIVE:
                gradient = tl.div_rn(gradient, tl.sqrt_rn(squared * correction) + eps)
            share = (kept * (1.0 - average_weight))[:, None]
            weight = first + (weight - first) * share + gradient * gradient_weight
            first = first - gradient * rate
        tl.store(weight_ptrs, weight, mask=inside)
        tl.store(state_ptrs, first, mask=inside)
        tl.store(state_ptrs + WIDTH, squared, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def catch_up_kernel(
    weight_ptr, state_ptr, slot_ptr, last_ptr, kept_ptr, history_ptr, fault_ptr, count, slots, now, horizon,
    log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, eps, toward_z, IS_ADAM: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = (at < count) & (tl.load(fault_ptr) == 0)
    row, last, slot, _ = _rows_of(slot_ptr, last_ptr, slot_ptr, at, is_row, count, slots, now, 0, 0, 0, False)
    is_touched = is_row & (last >= 0)
    is_behind = is_touched & (last < now)
    kept = _kept_share(kept_ptr, last, is_row, now, IS_ADAM)
    missed = tl.where(is_touched, now - last, 0)
    second_kept = _power(log2_beta2, log2_beta2_rest, missed).to(tl.float32)[:, None]
    for begin in range(0, WIDTH, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = is_row[:, None] & (column < WIDTH)[None, :]
        old = is_touched[:, None] & (column < WIDTH)[None, :]
        weight_ptrs = weight_ptr + row[:, None] * WIDTH + column[None, :]
        state_ptrs = state_ptr + slot[:, None] * (2 * WIDTH) + column[None, :]
        weight = tl.load(weight_ptrs, mask=inside, other=0.0)
        first = tl.load(state_ptrs, mask=old, other=0.0)
        second = tl.load(state_ptrs + WIDTH, mask=old, other=0.0)
        weight = _present(
            weight, first, second, last, is_behind, kept, kept_ptr, history_ptr, now, horizon,
            log2_beta1, log2_beta1_rest, log2_beta2, log2_beta2_rest, eps, IS_ADAM,
        )  # fmt: skip
        if IS_ADAM:
            tl.store(weight_ptrs, weight, mask=inside)
            first_kept = _power(log2_beta1, log2_beta1_rest, missed).to(tl.float32)[:, None]
            tl.store(state_ptrs, first * first_kept, mask=old)
        else:
            tl.store(weight_ptrs, weight + (first - weight) * toward_z, mask=old)
        tl.store(state_ptrs + WIDTH, second * second_kept, mask=old)
