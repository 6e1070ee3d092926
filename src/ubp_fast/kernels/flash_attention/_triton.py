"""The Triton backend for NVIDIA GPUs from compute capability 8.0: which tiles run, and the launches.

Where sequences are short on average (the table of tiles says up to which mean length), neighbours share a tile: one
launch forward, one backward (dq, dk and dv), over packs that are made once per batch and kept beside the offsets.
Sequences that no pack can hold, and batches of long ones, take the other kernels: one launch forward, two backward (dq,
which also leaves delta, then dk and dv). Grids follow from shapes alone, so no launch waits for the device; tiles
without rows end at once. Deterministic, no atomic additions. Memory beyond inputs and outputs: lse and delta, a float
per query and head; packs, two numbers per half tile and one per row; while a forward runs that takes its rows through
tensor descriptors, 256 bytes per tile and head; with a time_bias also sums [tiles, H, buckets], and once per batch a
byte for each pair of places of a pack, two more for backward (and eight while they are sorted).
"""

from __future__ import annotations

import contextvars
import math
import operator
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ubp_fast.kernels import deferred
from ubp_fast.kernels import tiles as tile_table
from ubp_fast.kernels.backends import on_device, triton_unavailable, unsupported_dtype
from ubp_fast.kernels.flash_attention.reference import UNBOUNDED, Gradients, Problem, of_key_heads

MAX_ROWS, MAX_SEQUENCES, MAX_HEADS = 2**29, 2**28, 2**16 - 1  # int32 places, rounds of the search, the grid's limit
SEARCH_FAN = 128
LSE_UNIT = math.log(2.0)  # of the log-sum-exp that forward gives and backward takes
Made = TypeVar("Made")
GROUP = 128  # sequences of which one program makes packs


class Tiles(NamedTuple):
    """Queries and keys of a block, how Triton runs it, and whether keys and values come through descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    is_described: bool = False


TABLE = Path(__file__).with_name("tiles.json")


def unsupported(problem: Problem) -> str | None:
    """Why this problem cannot run here, or None."""
    if max(len(problem.query), len(problem.key)) >= MAX_ROWS:
        return f"it takes fewer than {MAX_ROWS} rows, got {max(len(problem.query), len(problem.key))}"
    if len(problem.cu_seqlens) > MAX_SEQUENCES or problem.query.shape[1] > MAX_HEADS:
        return f"it takes fewer than {MAX_SEQUENCES} sequences of at most {MAX_HEADS} heads"
    return unsupported_dtype(problem.query) or triton_unavailable(problem.query.device)


def kind(problem: Problem) -> str:
    """What the table of tiles tells apart beside width and length.

    Buckets and masks of dropout take many registers per score; float32 multiplies without tensor cores and holds its
    operands in registers.
    """
    if problem.query.dtype == torch.float32:
        return "float32"
    return "plain" if problem.time_bias is None and problem.seed is None else "options"


def tiles(kernel: str, problem: Problem, mean_length: float, device: tuple[str, ...]) -> Tiles:
    """The tiles of a kernel; `mean_length` is that of the side whose rows a tile owns.

    A tile should be about as long as a sequence: 64 rows to 160, else large ones, at which the tensor cores wait
    neither for memory nor for the exponential. Where the table has a row for it, a time_bias without dropout, "timed",
    has larger ones than both, and so have plain problems of which a descriptor could cover keys and values, "aligned".
    """
    which, width = kind(problem), problem.query.shape[2]
    special = "timed" if which == "options" and problem.seed is None else None
    if which == "plain" and is_aligned(problem.key) and is_aligned(problem.value):
        special = "aligned"
    found = special and tile_table.find(TABLE, device, kernel, special, width, mean_length)
    return Tiles(*(found or tile_table.choose(TABLE, device, kernel, which, width, mean_length)))


def is_aligned(part: Tensor) -> bool:
    """Whether all rows and heads begin at multiples of 16 bytes, as tensor descriptors ask for."""
    _, heads, width = part.shape
    strides = part.stride()[:2] if _is_plain(part) else (heads * width, width)
    return all(stride * part.itemsize % 16 == 0 for stride in strides) and part.data_ptr() % 16 == 0


def short_tiles(kernel: str, problem: Problem, mean_length: float, device: tuple[str, ...]) -> Tiles | None:
    """The tiles of a kernel for packs, `block_m` rows of either side; None where sequences are too long for it.

    `mean_length` is that of the longer side.
    """
    which = "dropout" if kind(problem) == "options" and problem.time_bias is None else kind(problem)
    found = tile_table.find(TABLE, device, kernel, which, problem.query.shape[2], mean_length)
    return None if found is None else Tiles(*found)


class Packs(NamedTuple):
    """Neighbouring sequences that share a tile.

    Attributes:
        table: int32 [slots, 2], first and end sequence of each pack; -1 in slots without one.
        sequence: int32 [T], of each query row.
        key_sequence: int32 [S], of each key row.
    """

    table: Tensor
    sequence: Tensor
    key_sequence: Tensor


def packs(problem: Problem, block: int) -> Packs:
    """Packs of at most `block` queries and keys: made for the first layer, forward, and found by all others."""
    return _once("_ubp_fast_packs", problem, (block,), (), lambda: _packs(problem, block))


def pairs(problem: Problem, block: int) -> Tensor:
    """The bucket of each pair of these packs, uint8 [slots, block * block], keys x queries; 255 where none is seen.

    Made and found like packs, for a window and for times that did not change.
    """
    return _of_times("_ubp_fast_pairs", problem, block, lambda: _pairs(problem, packs(problem, block), block))


def order_of_pairs(problem: Problem, block: int) -> tuple[Tensor, Tensor]:
    """The pairs of each pack by bucket, int16 [slots, block * block], and where buckets end, int16 [slots, buckets]."""
    return _of_times("_ubp_fast_order", problem, block, lambda: _order_of_pairs(problem, pairs(problem, block)))


def _of_times(name: str, problem: Problem, block: int, make: Callable[[], Made]) -> Made:
    assert problem.time_bias is not None
    key = (block, problem.left, problem.right, problem.time_bias.shape[1])
    return _once(name, problem, key, (problem.timestamp_s, problem.timestamp_key_s), make)


def _once(
    name: str, problem: Problem, key: tuple[int, ...], times: tuple[Tensor | None, ...], make: Callable[[], Made]
) -> Made:
    """What is kept beside the offsets; of other keys and times the last ones alone."""
    offsets, others = problem.cu_seqlens, problem.cu_seqlens_key
    # A reference to itself would keep the memory until Python looks for such rings.
    beside = (None if others is offsets else others, *times)
    # Where checks are immediate offsets may share memory with what somebody writes to later.
    is_kept = deferred.is_deferred(offsets.device)
    if not is_kept or any(part is not None and part.is_inference() for part in (offsets, *times)):
        return make()
    state = [0 if part is None else part._version for part in times]
    known: dict[tuple[int, ...], tuple[tuple[Tensor | None, ...], list[int], Made]] = offsets.__dict__.setdefault(
        name, {}
    )
    found = known.get(key)
    if found is None or not all(map(operator.is_, found[0], beside)) or found[1] != state:
        found = known[key] = (beside, state, make())
    return found[2]


def _pairs(problem: Problem, made: Packs, block: int) -> Tensor:
    slots, device = len(made.table), problem.query.device
    bucket = torch.empty((slots, block * block), dtype=torch.uint8, device=device)
    options = constants("pair", problem, Tiles(block, block, 4, 1))
    chosen = {name: options[name] for name in ("left", "right", "HAS_LEFT", "HAS_RIGHT", "BUCKETS")}
    times = _times(problem)[1:]
    with on_device(device):
        _short_kernels().pair_kernel[(slots,)](
            problem.cu_seqlens, problem.cu_seqlens_key, *times, *made, bucket, **chosen, BLOCK=block
        )
    return bucket


def _order_of_pairs(problem: Problem, bucket: Tensor) -> tuple[Tensor, Tensor]:
    assert problem.time_bias is not None
    shape = (len(bucket), problem.time_bias.shape[1])
    ordered, order = bucket.sort(dim=1, stable=True)
    every = torch.arange(shape[1], dtype=torch.uint8, device=bucket.device).expand(shape).contiguous()
    return order.to(torch.int16), torch.searchsorted(ordered, every, right=True).to(torch.int16)


def _packs(problem: Problem, block: int) -> Packs:
    offsets, offsets_key = problem.cu_seqlens.contiguous(), problem.cu_seqlens_key.contiguous()
    is_self, sequences = problem.cu_seqlens_key is problem.cu_seqlens, len(offsets) - 1
    rows = len(problem.query) if is_self else len(problem.query) + len(problem.key)
    groups = -(-sequences // GROUP)
    table = torch.empty((2 * rows // block + groups, 2), dtype=torch.int32, device=offsets.device)
    with on_device(offsets.device):
        _short_kernels().pack_kernel[(groups,)](
            offsets, offsets_key, table, sequences, IS_SELF=is_self, BLOCK=block, num_warps=1
        )
    sequence = _sequence_of_rows(offsets, len(problem.query))
    return Packs(table, sequence, sequence if is_self else _sequence_of_rows(offsets_key, len(problem.key)))


def _sequence_of_rows(offsets: Tensor, rows: int) -> Tensor:
    row = torch.arange(rows, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), row, right=True, out_int32=True)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of the inputs, and the log-sum-exp in units of log 2, float32 [T, H]."""
    tokens, heads, width = problem.query.shape
    if problem.scale <= 0.0:  # the kernel finds the largest score before it scales it
        sign, scale = (-1.0, -problem.scale) if problem.scale else (0.0, 1.0)
        problem = problem._replace(query=problem.query * sign, scale=scale)
    output = problem.query.new_empty((tokens, heads, width))
    lse = problem.query.new_empty((tokens, heads), dtype=torch.float32)
    if tokens and heads:
        short = _short_here("short_forward", problem)
        _launch_short("short_forward", problem, short, output, lse)
        _launch("forward", problem, short, output, lse)
    return output, lse


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> Gradients:
    """Gradients of query, key, value and time_bias from the saved output and log-sum-exp; scores are computed again."""
    saved = (output.contiguous(), lse.contiguous(), grad_output.contiguous())
    heads, key_heads = problem.query.shape[1], problem.key.shape[1]
    dq = problem.query.new_empty(problem.query.shape)
    # Several heads of the query may share one of key and value: each writes its part, in float32, and they are added.
    shape = (len(problem.key), heads, problem.key.shape[2])
    dtype = problem.key.dtype if heads == key_heads else torch.float32
    dk, dv = (problem.key.new_empty(shape, dtype=dtype) for _ in range(2))
    sums = []
    if heads:
        short = _short_here("short_backward", problem)
        sums.append(_launch_short("short_backward", problem, short, *saved, dq, dk, dv))
        delta = torch.empty_like(lse)
        sums.append(_launch("dq", problem, short, *saved, delta, dq))
        _launch("dkv", problem, short, *saved[1:], delta, dk, dv)
    dk, dv = (of_key_heads(part, key_heads, problem.key.dtype) for part in (dk, dv))
    if problem.time_bias is None:
        return dq, dk, dv, None
    parts = [part.sum(dim=0) for part in sums if part is not None]
    return dq, dk, dv, torch.stack([torch.zeros_like(problem.time_bias), *parts]).sum(dim=0)


def _mean_length(rows: Tensor, problem: Problem) -> float:
    return len(rows) / max(1, len(problem.cu_seqlens) - 1)


def _short_here(kernel: str, problem: Problem) -> Tiles | None:
    """The tiles of packs for this device and these sequences, if they are short."""
    mean_length = max(_mean_length(problem.query, problem), _mean_length(problem.key, problem))
    return short_tiles(kernel, problem, mean_length, tile_table.device_names(problem.query.device))


def _slots(cu_seqlens: Tensor, rows: int, block: int) -> int:
    """Numbers of tiles, used or not, known without looking at the lengths."""
    return rows // block + len(cu_seqlens) - 1


def _launch_short(name: str, problem: Problem, chosen: Tiles | None, *tensors: Tensor) -> Tensor | None:
    """One kernel over packs, if there are any; the sums [slots, H, buckets] of the time_bias in backward."""
    if chosen is None or len(problem.cu_seqlens) < 2:
        return None
    made, heads = packs(problem, chosen.block_m), problem.query.shape[1]
    outputs, sums = list(tensors), None
    if name == "short_backward":
        sums = _bucket_sums(problem, len(made.table))
        outputs.append(sums)  # type: ignore[arg-type]
    if len(made.table):
        sides, strides = _sides(problem)
        offsets = (problem.cu_seqlens, problem.cu_seqlens_key)
        of_pairs: list[Tensor | None] = [None] * (3 if name == "short_backward" else 1)
        if problem.time_bias is not None:
            of_pairs[0] = pairs(problem, chosen.block_m)
            if name == "short_backward":
                of_pairs[1:] = order_of_pairs(problem, chosen.block_m)
        given = (*sides, *offsets, _times(problem)[0], problem.seed, *made, *of_pairs)
        options = constants(name, problem, chosen)
        with on_device(problem.query.device):
            function = getattr(_short_kernels(), f"{name}_kernel")
            function[(len(made.table), heads)](*given, *outputs, *strides, **options)
    return sums


def _launch(name: str, problem: Problem, short: Tiles | None, *tensors: Tensor) -> Tensor | None:
    """One kernel over the tiles of all sequences, or of those that no pack of `short` holds.

    Returns:
        The sums [slots, H, buckets] of the time_bias from "dq".
    """
    owner, rows = (problem.cu_seqlens, problem.query) if name != "dkv" else (problem.cu_seqlens_key, problem.key)
    heads, longest = problem.query.shape[1], 0 if short is None else short.block_m
    if not len(rows) or max(len(problem.query), len(problem.key)) <= longest:
        return None
    device = tile_table.device_names(problem.query.device)
    chosen = tiles(name, problem, max(_mean_length(rows, problem), longest + 1 if short else 0), device)
    slots = _slots(owner, len(rows), chosen.block_n if name == "dkv" else chosen.block_m)
    outputs, sums = list(tensors), None
    if name == "dq":
        sums = _bucket_sums(problem, slots)
        outputs.append(sums)  # type: ignore[arg-type]
    function = getattr(_kernels(), f"{'backward_' * (name != 'forward')}{name}_kernel")
    sides, strides = _sides(problem)
    given = (*sides, problem.cu_seqlens, problem.cu_seqlens_key, *_times(problem), problem.seed)
    options = constants(name, problem, chosen, longest)
    arguments = (*given, *outputs, *strides, len(owner) - 1, slots)
    with on_device(problem.query.device):
        if chosen.is_described:
            _with_memory(problem.query.device, lambda: function[(slots, heads)](*arguments, **options))
        else:
            function[(slots, heads)](*arguments, **options)
    return sums


def _with_memory(device: torch.device, launch: Callable[[], object]) -> None:
    """A launch that needs memory for its descriptors: PyTorch's. Whoever gave Triton an allocator keeps his own."""
    import triton

    def allocated_launch() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        launch()

    contextvars.copy_context().run(allocated_launch)


def _bucket_sums(problem: Problem, slots: int) -> Tensor | None:
    if problem.time_bias is None:
        return None
    shape = (slots, *problem.time_bias.shape)
    return torch.zeros(shape, dtype=torch.float32, device=problem.query.device)


def _sides(problem: Problem) -> tuple[list[Tensor], list[int]]:
    """Query, key and value as all kernels take them first, and their strides."""
    sides = [_unit_rows(part) for part in problem[:3]]
    return sides, [stride for part in sides for stride in part.stride()[:2]]


def _times(problem: Problem) -> list[Tensor | None]:
    """The time_bias and the times of queries and keys."""
    optional = (problem.time_bias, problem.timestamp_s, problem.timestamp_key_s)
    return [None if part is None else part.contiguous() for part in optional]


def constants(name: str, problem: Problem, chosen: Tiles, longest_packed: int = 0) -> dict[str, Any]:
    """Everything a kernel takes beside tensors, strides and the sizes of its grid.

    Args:
        name: of the kernel.
        problem: what it computes.
        chosen: its tiles.
        longest_packed: sequences of at most so many rows on either side belong to packs.
    """
    width = problem.query.shape[2]
    far = len(problem.query) + len(problem.key)  # as good as unbounded, and far from overflow
    buckets = 0 if problem.time_bias is None else problem.time_bias.shape[1]
    found: dict[str, Any] = {
        "left": min(problem.left, far),
        "right": min(problem.right, far),
        "scale": problem.scale,
        "threshold": int(problem.dropout_p * 2**32),
        "keep_scale": 1.0 / (1.0 - problem.dropout_p),
        "HAS_LEFT": problem.left != UNBOUNDED,
        "HAS_RIGHT": problem.right != UNBOUNDED,
        "HAS_DROPOUT": problem.seed is not None,
        "BUCKETS": buckets,
        "SHARED_BY": problem.query.shape[1] // problem.key.shape[1],
        "WIDTH": width,
        "BLOCK_M": chosen.block_m,
        "BLOCK_D": max(16, _power_of_two(width)),
        "PRECISION": "ieee" if problem.query.dtype == torch.float32 else "tf32",
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        # All that a block of this size may have; left alone, ptxas may settle for fewer registers and spill.
        "maxnreg": min(255, 65536 // (32 * chosen.num_warps)),
        # Fused, score minus log-sum-exp would keep the digits that the saved log-sum-exp lost: no longer exactly 0.
        "enable_fp_fusion": problem.query.dtype != torch.float32,
    }
    if not name.startswith("short"):
        levels = _levels(len(problem.cu_seqlens) - 1)
        found |= {"BLOCK_N": chosen.block_n, "LEVELS": levels, "LONGEST_PACKED": longest_packed}
    if name == "forward":
        found["DESCRIBED"] = chosen.is_described
    if name in ("dq", "short_backward"):
        found["BLOCK_BUCKETS"] = _power_of_two(buckets)
    return found


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _levels(sequences: int) -> int:
    """Rounds of the search for a tile's sequence."""
    levels = 1
    while SEARCH_FAN**levels < sequences:
        levels += 1
    return levels


def _unit_rows(part: Tensor) -> Tensor:
    """Rows whose elements are neighbours, and strides that stay within int32 inside a tile."""
    return part if _is_plain(part) else part.contiguous()


def _is_plain(part: Tensor) -> bool:
    return part.stride(2) == 1 and all(0 <= stride < 2**24 for stride in part.stride())


def _kernels() -> ModuleType:
    """Imported with the first launch: Triton costs a second, and is not there on every machine."""
    from ubp_fast.kernels.flash_attention import _triton_kernels

    return _triton_kernels


def _short_kernels() -> ModuleType:
    from ubp_fast.kernels.flash_attention import _triton_short_kernels

    return _triton_short_kernels
