"""The Triton kernel of dropout: values are read and written once, and their draws are in registers alone."""

from __future__ import annotations

import triton
import triton.language as tl

GAMMA, FIRST, SECOND = (
    tl.constexpr(0x9E3779B97F4A7C15),
    tl.constexpr(0xBF58476D1CE4E5B9),
    tl.constexpr(0x94D049BB133111EB),
)
VALUES = 1024  # of a program, eight for each thread
VARYING = ("seed", "first", "count", "least")


@triton.jit(do_not_specialize=VARYING)
def drop_kernel(
    values_ptr, held_ptr, out_ptr, seed, first, count, least, scale, IS_HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Values first .. first + count - 1 of a step; the seed lies on the device where IS_HELD."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    number = (at + first).to(tl.uint64)
    if IS_HELD:
        seed = tl.load(held_ptr)
    word = tl.cast(seed, tl.uint64) + (number >> 2) * GAMMA
    word = (word ^ (word >> 30)) * FIRST
    word = (word ^ (word >> 27)) * SECOND
    word = word ^ (word >> 31)
    draw = (word >> ((number & 3) * 16)).to(tl.uint16).to(tl.int16, bitcast=True)
    value = tl.load(values_ptr + at, mask=at < count, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + at, tl.where(draw >= least, value, 0.0).to(out_ptr.dtype.element_ty), mask=at < count)
