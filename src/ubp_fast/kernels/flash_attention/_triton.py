"""The Triton backend for NVIDIA GPUs from compute capability 8.0: which tiles run, and the launches.

Forward is one launch, backward two (dq, which also leaves delta, then dk and dv). The grid follows from shapes alone,
so no launch waits for the device; tiles that a sequence does not fill end at once. Deterministic, no atomic additions.
Memory beyond inputs and outputs: lse and delta, a float per query and head; with a time_bias also sums [tiles, H,
buckets].
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubp_fast.kernels import tiles as tile_table
from ubp_fast.kernels.backends import on_device, triton_unavailable, unsupported_dtype
from ubp_fast.kernels.flash_attention.reference import UNBOUNDED, Gradients, Problem

MAX_ROWS, MAX_SEQUENCES, MAX_HEADS = 2**29, 2**28, 2**16 - 1  # int32 places, rounds of the search, the grid's limit
SEARCH_FAN = 128


class Tiles(NamedTuple):
    """Queries and keys of a block, and how Triton runs it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


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

    A tile should be about as long as a sequence: 16 rows to 12, 32 rows to 48 (user histories), 64 rows to 160, else
    large ones, at which the tensor cores wait neither for memory nor for the exponential.
    """
    found = tile_table.choose(TABLE, device, kernel, kind(problem), problem.query.shape[2], mean_length)
    return Tiles(*found)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in the dtype of the inputs, and the log-sum-exp in units of log 2, float32 [T, H]."""
    tokens, heads, width = problem.query.shape
    output = problem.query.new_empty((tokens, heads, width))
    lse = problem.query.new_empty((tokens, heads), dtype=torch.float32)
    _launch("forward", problem, problem.cu_seqlens, tokens, output, lse)
    return output, lse


def backward(problem: Problem, output: Tensor, lse: Tensor, grad_output: Tensor) -> Gradients:
    """Gradients of query, key, value and time_bias from the saved output and log-sum-exp; scores are computed again."""
    tokens, heads, _ = problem.query.shape
    saved, delta = [output.contiguous(), lse.contiguous(), grad_output.contiguous()], torch.empty_like(lse)
    dq, dk, dv = (part.new_empty(part.shape) for part in problem[:3])
    sums = None
    if problem.time_bias is not None:
        slots = _slots(problem.cu_seqlens, tokens, _tiles_here("dq", problem).block_m)
        sums = lse.new_zeros((slots, heads, problem.time_bias.shape[1]))
    _launch("dq", problem, problem.cu_seqlens, tokens, *saved, delta, dq, sums)
    _launch("dkv", problem, problem.cu_seqlens_key, len(problem.key), *saved[1:], delta, dk, dv)
    return dq, dk, dv, None if sums is None else sums.sum(dim=0)


def _tiles_here(kernel: str, problem: Problem) -> Tiles:
    """The tiles for this device and the mean length of the side that a tile owns."""
    rows = len(problem.key if kernel == "dkv" else problem.query)
    device = tile_table.device_names(problem.query.device)
    return tiles(kernel, problem, rows / max(1, len(problem.cu_seqlens) - 1), device)


def _slots(cu_seqlens: Tensor, rows: int, block: int) -> int:
    """Numbers of tiles, used or not, known without looking at the lengths."""
    return rows // block + len(cu_seqlens) - 1


def _launch(name: str, problem: Problem, owner: Tensor, rows: int, *tensors: Tensor | None) -> None:
    """One kernel over the tiles of the side `owner`, `rows` long; `tensors` are what it has beyond the others."""
    heads = problem.query.shape[1]
    chosen = _tiles_here(name, problem)
    slots = _slots(owner, rows, chosen.block_n if name == "dkv" else chosen.block_m)
    if not (rows and heads):
        return
    kernels = _kernels()
    function = {
        "forward": kernels.forward_kernel,
        "dq": kernels.backward_dq_kernel,
        "dkv": kernels.backward_dkv_kernel,
    }[name]
    sides = [_unit_rows(part) for part in problem[:3]]
    strides = [stride for part in sides for stride in part.stride()[:2]]
    optional = (problem.time_bias, problem.timestamp_s, problem.timestamp_key_s)
    times = [None if part is None else part.contiguous() for part in optional]
    shared = (*sides, problem.cu_seqlens, problem.cu_seqlens_key, *times, problem.seed)
    with on_device(problem.query.device):
        function[(slots, heads)](*shared, *tensors, *strides, len(owner) - 1, slots, **constants(name, problem, chosen))


def constants(name: str, problem: Problem, chosen: Tiles) -> dict[str, Any]:
    """Everything a kernel takes beside tensors, strides and the sizes of its grid."""
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
        "WIDTH": width,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_D": max(16, _power_of_two(width)),
        "LEVELS": _levels(len(problem.cu_seqlens) - 1),
        "PRECISION": "ieee" if problem.query.dtype == torch.float32 else "tf32",
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
        # All that a block of this size may have; left alone, ptxas may settle for fewer registers and spill.
        "maxnreg": min(255, 65536 // (32 * chosen.num_warps)),
        # Fused, score minus log-sum-exp would keep the digits that the saved log-sum-exp lost: no longer exactly 0.
        "enable_fp_fusion": problem.query.dtype != torch.float32,
    }
    if name == "dq":
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
    is_plain = part.stride(2) == 1 and all(0 <= stride < 2**24 for stride in part.stride())
    return part if is_plain else part.contiguous()


def _kernels() -> ModuleType:
    """Imported with the first launch: Triton costs a second, and is not there on every machine."""
    from ubp_fast.kernels.flash_attention import _triton_kernels

    return _triton_kernels
