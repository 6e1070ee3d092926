"""Triton kernels of row_sparse; `_triton.py` launches them. Equations are in `api.py`.

A program owns ROWS rows of the batch (or of the table) and walks over their columns. No program reads what another
one writes: `last_step` is written after the launch, and the slot of a row is read only where nobody gives it one.
`mark` looks at the numbers that become addresses before anything is written; `gather` leaves out rows that it may not
read.
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = ("count", "table_rows", "slots", "now")
BAD_ID, BAD_STEP, BAD_SLOT, BAD_ORDER = (tl.constexpr(code) for code in (1, 2, 3, 4))


@triton.jit
def _rows_of(ids_ptr, last_ptr, slot_ptr, at, count, table_rows, slots, now, HAS_IDS: tl.constexpr):
    """Row, its last step, its slot (0 where it has none) and what is wrong with it (0: nothing)."""
    row = tl.cast(at, tl.int64)
    if HAS_IDS:
        row = tl.load(ids_ptr + at, mask=at < count, other=0)
    fault = tl.where((row < 0) | (row >= table_rows), BAD_ID, 0)
    is_row = (at < count) & (fault == 0)
    last = tl.load(last_ptr + row, mask=is_row, other=-1)
    fault = tl.where(last > now, BAD_STEP, fault)
    slot = tl.load(slot_ptr + row, mask=is_row & (last >= 0), other=0)
    fault = tl.where((last >= 0) & ((slot < 0) | (slot >= slots)), BAD_SLOT, fault)
    return row, last, tl.cast(slot, tl.int64), tl.where(at < count, fault, 0)


@triton.jit
def _shares(retained_ptr, last, now, log2_beta2, log2_beta2_rest):
    """What is left of y - z and of exp_avg_sq since `last`, float32; 1 of a row that was never touched."""
    is_touched = (last >= 0) & (last <= now)
    kept = tl.load(retained_ptr + now) / tl.load(retained_ptr + last, mask=is_touched, other=1.0)
    steps = tl.cast(now - last, tl.float64)
    decay = tl.exp2(steps * (tl.cast(log2_beta2, tl.float64) + tl.cast(log2_beta2_rest, tl.float64)))
    return tl.where(is_touched, kept, 1.0).to(tl.float32), tl.where(is_touched, decay, 1.0).to(tl.float32)


@triton.jit(do_not_specialize=VARYING)
def mark_kernel(
    ids_ptr,
    last_ptr,
    slot_ptr,
    fresh_ptr,
    fault_ptr,
    count,
    table_rows,
    slots,
    now,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 for each row without a slot; any fault that was found (ids must ascend, too)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, last, _, fault = _rows_of(ids_ptr, last_ptr, slot_ptr, at, count, table_rows, slots, now, HAS_IDS)
    if HAS_IDS:
        before = tl.load(ids_ptr + at - 1, mask=(at > 0) & (at < count), other=-1)
        fault = tl.where((fault == 0) & (at < count) & (before >= row), BAD_ORDER, fault)
        tl.store(fresh_ptr + at, (last < 0).to(tl.int32), mask=at < count)
    worst = tl.max(fault, 0)
    tl.store(fault_ptr, worst, mask=worst > 0)


@triton.jit(do_not_specialize=VARYING)
def gather_kernel(
    weight_ptr,
    state_ptr,
    slot_ptr,
    last_ptr,
    retained_ptr,
    ids_ptr,
    out_ptr,
    fault_ptr,
    count,
    table_rows,
    slots,
    now,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, last, slot, fault = _rows_of(ids_ptr, last_ptr, slot_ptr, at, count, table_rows, slots, now, True)
    worst = tl.max(fault, 0)
    tl.store(fault_ptr, worst, mask=worst > 0)
    is_row = (at < count) & (fault == 0)
    is_behind = is_row & (last >= 0) & (last < now)
    kept, _ = _shares(retained_ptr, last, now, 0.0, 0.0)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (column < WIDTH)[None, :]
        y = tl.load(weight_ptr + row[:, None] * WIDTH + column[None, :], mask=is_row[:, None] & inside, other=0.0)
        z = tl.load(
            state_ptr + slot[:, None] * (2 * WIDTH) + column[None, :], mask=is_behind[:, None] & inside, other=0.0
        )
        y = tl.where(is_behind[:, None], z + (y - z) * kept[:, None], y)
        place = tl.cast(at, tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(out_ptr + place, y, mask=is_row[:, None] & inside)


@triton.jit
def reduce_kernel(
    start_ptr,
    order_ptr,
    gradient_ptr,
    sum_ptr,
    row_stride,
    column_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One group of equal ids: its gradients, ROWS at a time in the order of the batch."""
    group = tl.program_id(0)
    first, end = tl.load(start_ptr + group), tl.load(start_ptr + group + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(first, end, ROWS):
        entry = at + tl.arange(0, ROWS)
        row = tl.load(order_ptr + entry, mask=entry < end, other=0)
        place = row[:, None] * row_stride + tl.cast(column, tl.int64)[None, :] * column_stride
        total += tl.sum(tl.load(gradient_ptr + place, mask=(entry < end)[:, None] & inside[None, :], other=0.0), 0)
    tl.store(sum_ptr + tl.cast(group, tl.int64) * WIDTH + column, total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def update_kernel(
    weight_ptr,
    state_ptr,
    slot_ptr,
    last_ptr,
    retained_ptr,
    ids_ptr,
    gradient_ptr,
    order_ptr,
    used_ptr,
    count,
    table_rows,
    slots,
    now,
    learning_rate,
    average_weight,
    gradient_weight,
    beta2,
    rest_of_beta2,
    log2_beta2,
    log2_beta2_rest,
    correction,
    eps,
    IS_ADAPTIVE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, last, slot, _ = _rows_of(ids_ptr, last_ptr, slot_ptr, at, count, table_rows, slots, now, True)
    is_row = at < count
    is_fresh = is_row & (last < 0)
    given = tl.load(used_ptr) + tl.load(order_ptr + at, mask=is_fresh, other=1) - 1
    slot = tl.where(is_fresh, given, slot)
    tl.store(slot_ptr + row, slot.to(tl.int32), mask=is_fresh)
    kept, decay = _shares(retained_ptr, last, now, log2_beta2, log2_beta2_rest)
    share, fade = (kept * (1.0 - average_weight))[:, None], (beta2 * decay)[:, None]
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = is_row[:, None] & (column < WIDTH)[None, :]
        old = (is_row & (last >= 0))[:, None] & (column < WIDTH)[None, :]
        y_ptrs = weight_ptr + row[:, None] * WIDTH + column[None, :]
        z_ptrs = state_ptr + slot[:, None] * (2 * WIDTH) + column[None, :]
        y = tl.load(y_ptrs, mask=inside, other=0.0)
        z = tl.where(old, tl.load(z_ptrs, mask=old, other=0.0), y)
        v = tl.load(z_ptrs + WIDTH, mask=old, other=0.0)
        place = tl.cast(at, tl.int64)[:, None] * WIDTH + column[None, :]
        direction = tl.load(gradient_ptr + place, mask=inside, other=0.0)
        v = v * fade + rest_of_beta2 * direction * direction
        if IS_ADAPTIVE:
            direction = tl.div_rn(direction, tl.sqrt_rn(v * correction) + eps)
        tl.store(y_ptrs, z + (y - z) * share + direction * gradient_weight, mask=inside)
        tl.store(z_ptrs, z - direction * learning_rate, mask=inside)
        tl.store(z_ptrs + WIDTH, v, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def catch_up_kernel(
    weight_ptr,
    state_ptr,
    slot_ptr,
    last_ptr,
    retained_ptr,
    count,
    slots,
    now,
    log2_beta2,
    log2_beta2_rest,
    toward_z,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, last, slot, _ = _rows_of(slot_ptr, last_ptr, slot_ptr, at, count, count, slots, now, False)
    is_touched = (at < count) & (last >= 0)
    kept, decay = _shares(retained_ptr, last, now, log2_beta2, log2_beta2_rest)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = is_touched[:, None] & (column < WIDTH)[None, :]
        y_ptrs = weight_ptr + row[:, None] * WIDTH + column[None, :]
        z_ptrs = state_ptr + slot[:, None] * (2 * WIDTH) + column[None, :]
        y = tl.load(y_ptrs, mask=inside, other=0.0)
        z = tl.load(z_ptrs, mask=inside, other=0.0)
        y = tl.where((last < now)[:, None], z + (y - z) * kept[:, None], y)
        tl.store(y_ptrs, y + (z - y) * toward_z, mask=inside)
        tl.store(z_ptrs + WIDTH, tl.load(z_ptrs + WIDTH, mask=inside, other=0.0) * decay[:, None], mask=inside)
