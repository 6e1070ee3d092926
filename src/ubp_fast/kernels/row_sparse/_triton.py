"""The Triton backend for NVIDIA GPUs from compute capability 8.0: float32 tables on the device.

Numbers that become addresses (ids, slots, steps) are checked on the device; each call waits for it once to raise where
one is wrong, `reduce` also because the number of distinct ids is the shape of its result. Sums of equal ids are added
in the order of the batch in blocks of 16: the same in every run.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ubp_fast.kernels.backends import triton_unavailable
from ubp_fast.kernels.row_sparse.reference import ScheduleFreeRows, ScheduleFreeStep

MARK_BLOCK = 1024
MOST_COLUMNS = 512  # of a block; wider rows are walked over
BLOCK_SIZE = 2048  # elements of a block: 16 for each thread of four warps
GROUP_ROWS = 16
MAX_ROWS = 2**31 - MARK_BLOCK


def unsupported(table: Tensor) -> str | None:
    """Why tensors like this one cannot be computed here, or None."""
    if table.dtype != torch.float32:
        return f"it computes float32, the tensors are {table.dtype}"
    if len(table) > MAX_ROWS:
        return f"it takes at most {MAX_ROWS} rows, got {len(table)}"
    return triton_unavailable(table.device)


def gather(rows: ScheduleFreeRows, ids: Tensor) -> Tensor:
    """y of the rows `ids` at the present, [T, D]; writes nothing."""
    ids, blocks = ids.contiguous(), _blocks(rows.weight)
    output = torch.empty((len(ids), rows.weight.shape[1]), dtype=torch.float32, device=ids.device)
    fault = torch.zeros(1, dtype=torch.int32, device=ids.device)
    sizes = (len(ids), len(rows.weight), len(rows.state), len(rows.retained) - 1)
    if output.numel():
        grid = (math.ceil(len(ids) / blocks["ROWS"]),)
        _launch("gather_kernel", grid, *_table(rows), ids, output, fault, *sizes, **blocks)
        _raise_fault(rows, ids, int(fault))
    return output


def reduce(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids [U] and the sums of their gradients [U, D]."""
    width, blocks = gradient.shape[1], _blocks(gradient)
    ordered, order = torch.sort(ids, stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    if len(distinct) and int(distinct[0]) < 0:
        raise IndexError(f"row_sparse: ids must not be negative, got {int(distinct[0])}")
    start = torch.zeros(len(distinct) + 1, dtype=torch.int64, device=ids.device)
    torch.cumsum(counts, 0, out=start[1:])
    sums = torch.empty((len(distinct), width), dtype=torch.float32, device=ids.device)
    if sums.numel():
        blocks["ROWS"], blocks["BLOCK"] = GROUP_ROWS, min(blocks["BLOCK"], BLOCK_SIZE // GROUP_ROWS)
        grid = (len(distinct), math.ceil(width / blocks["BLOCK"]))
        _launch("reduce_kernel", grid, start, order, gradient, sums, *gradient.stride(), **blocks)
    return distinct, sums


def update(rows: ScheduleFreeRows, ids: Tensor, gradient: Tensor, step: ScheduleFreeStep) -> None:
    """Brings the distinct rows `ids` to the present and takes one step with `gradient` [U, D]."""
    if not len(ids):
        return
    ids, blocks, now = ids.contiguous(), _blocks(rows.weight), len(rows.retained) - 1
    order = torch.cumsum(_mark(rows, ids), 0)  # 1 for the first row without a slot
    needed = int(rows.used + order[-1])
    if needed > len(rows.state):
        raise ValueError(f"row_sparse: state must have a slot for every touched row, got {len(rows.state)}")
    sizes = (len(ids), len(rows.weight), len(rows.state), now)
    beta2 = (step.beta2, 1.0 - step.beta2, *_two_floats(math.log2(step.beta2)))
    numbers = (*step[:3], *beta2, 1.0 / step.bias_correction, step.eps)
    if rows.weight.shape[1]:
        grid = (math.ceil(len(ids) / blocks["ROWS"]),)
        tensors = (*_table(rows), ids, gradient.contiguous(), order, rows.used)
        _launch("update_kernel", grid, *tensors, *sizes, *numbers, IS_ADAPTIVE=step.is_adaptive, **blocks)
    rows.last_step.index_fill_(0, ids, now + 1)
    rows.used.fill_(needed)


def catch_up(rows: ScheduleFreeRows, beta2: float, toward_z: float) -> None:
    """Brings all touched rows to the present (step 0 from then on) and moves y towards z by the share `toward_z`."""
    blocks, now = _blocks(rows.weight), len(rows.retained) - 1
    _mark(rows, None)
    if rows.weight.numel():
        grid = (math.ceil(len(rows.weight) / blocks["ROWS"]),)
        sizes = (len(rows.weight), len(rows.state), now)
        _launch("catch_up_kernel", grid, *_table(rows), *sizes, *_two_floats(math.log2(beta2)), toward_z, **blocks)
    rows.last_step.clamp_(max=0)


def _mark(rows: ScheduleFreeRows, ids: Tensor | None) -> Tensor:
    """1 for each of the rows `ids` (None: all rows) that has no slot, int32; raises before anything is written."""
    count = len(rows.weight) if ids is None else len(ids)
    fresh = torch.empty(0 if ids is None else count, dtype=torch.int32, device=rows.weight.device)
    fault = torch.zeros(1, dtype=torch.int32, device=rows.weight.device)
    if count:
        sizes = (count, len(rows.weight), len(rows.state), len(rows.retained) - 1)
        tensors = (ids, rows.last_step, rows.slot, fresh, fault)
        _launch(
            "mark_kernel", (math.ceil(count / MARK_BLOCK),), *tensors, *sizes, HAS_IDS=ids is not None, BLOCK=MARK_BLOCK
        )
        _raise_fault(rows, ids, int(fault))
    return fresh


def _raise_fault(rows: ScheduleFreeRows, ids: Tensor | None, fault: int) -> None:
    """The kernels say what kind of fault there is; here it is looked up."""
    if fault == 0:
        return
    if ids is not None:
        outside = ((ids < 0) | (ids >= len(rows.weight))).nonzero()
        if len(outside):
            at = int(outside[0])
            last = len(rows.weight) - 1
            raise IndexError(f"row_sparse: ids must lie in 0..{last}, got {int(ids[at])} at entry {at}")
        falls = (ids[1:] <= ids[:-1]).nonzero()
        if fault == 4 and len(falls):
            before, here = ids[int(falls[0]) :][:2].tolist()
            raise ValueError(f"row_sparse: ids of an update must ascend, got {before} then {here}")
    last_step, slot = (part if ids is None else part[ids] for part in (rows.last_step, rows.slot))
    now, slots = len(rows.retained) - 1, len(rows.state)
    if bool((last_step > now).any()):
        raise ValueError(f"row_sparse: last_step must not lie in the future, got {int(last_step.max())} at step {now}")
    wrong = slot[(last_step >= 0) & ((slot < 0) | (slot >= slots))]
    raise ValueError(f"row_sparse: slots of touched rows must lie in 0..{slots - 1}, got {int(wrong[0])}")


def _table(rows: ScheduleFreeRows) -> tuple[Tensor, ...]:
    return rows.weight, rows.state, rows.slot, rows.last_step, rows.retained


def _blocks(table: Tensor) -> dict[str, Any]:
    width = table.shape[1]
    block = min(MOST_COLUMNS, max(16, 1 << max(0, width - 1).bit_length()))
    return {"WIDTH": width, "ROWS": BLOCK_SIZE // block, "BLOCK": block, "num_warps": 4}


def _two_floats(value: float) -> tuple[float, float]:
    """A float64 as two float32, which is what kernels take."""
    first = float(torch.tensor(value, dtype=torch.float32))
    return first, value - first


def _launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    device = next(part.device for part in arguments if isinstance(part, Tensor))
    with torch.cuda.device(device if device.type == "cuda" else -1):
        getattr(_kernels(), name)[grid](*arguments, **constants)


def _kernels() -> ModuleType:
    """Imported with the first launch: Triton costs a second, and is not there on every machine."""
    from ubp_fast.kernels.row_sparse import _triton_kernels

    return _triton_kernels
