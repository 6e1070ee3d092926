"""The Triton backend for NVIDIA GPUs from compute capability 8.0: float32 tables on the device.

Numbers that become addresses (ids, slots, steps) are checked on the device. On a GPU no call but `reduce`, whose result
has the shape that the data say, waits for the answer: a fault is raised by a later call or by `check_deferred`, and
nothing is written from it on. Equal ids are added in the order of the batch, in parts of about the square root of its
entries that programs of their own add first: a popular id keeps no program busy for long, and sums are the same in
every run.
"""

from __future__ import annotations

import ctypes
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ubp_fast.kernels import deferred
from ubp_fast.kernels.backends import on_device, triton_unavailable
from ubp_fast.kernels.row_sparse.reference import Adam, AdamStep, RowTable, Rule, ScheduleFreeStep, Step

MARK_BLOCK = 1024
MOST_COLUMNS = 512  # of a block; wider rows are walked over
BLOCK_SIZE = 2048  # elements of a block: 16 for each thread of four warps
ADAM_BLOCK_SIZE = 1024  # it keeps more vectors: registers would spill
GROUP_ROWS = 16
MAX_ROWS = 2**31 - MARK_BLOCK
NEGLIGIBLE = 1e-12  # of the first of Adam's missed steps: what the rest may add


def unsupported(table: Tensor) -> str | None:
    """Why tensors like this one cannot be computed here, or None."""
    if table.dtype != torch.float32:
        return f"it computes float32, the tensors are {table.dtype}"
    if len(table) > MAX_ROWS:
        return f"it takes at most {MAX_ROWS} rows, got {len(table)}"
    return triton_unavailable(table.device)


def gather(table: RowTable, rule: Rule, ids: Tensor) -> Tensor:
    """The weights of the rows `ids` at the present, [T, D]; writes nothing."""
    faults, ids, blocks = _Faults(table), ids.contiguous(), _blocks(table.weight, rule)
    output = torch.empty((len(ids), table.weight.shape[1]), dtype=torch.float32, device=ids.device)
    if output.numel():
        grid = (math.ceil(len(ids) / blocks["ROWS"]),)
        tensors = (*_tensors(table, rule), ids, output, faults.flag, *faults.codes[:3])
        sizes = (len(ids), len(table.weight), len(table.state), len(table.history) - 1)
        _launch("gather_kernel", grid, *tensors, *sizes, *_numbers(table, rule), **blocks)
        faults.raise_now(ids)
    return output


def reduce(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids [U] and the sums of their gradients [U, D]; waits for U."""
    ordered, order = torch.sort(ids, stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    if len(distinct) and int(distinct[0]) < 0:
        raise IndexError(f"row_sparse: ids must not be negative, got {int(distinct[0])}")
    start = torch.zeros(len(distinct) + 1, dtype=torch.int64, device=ids.device)
    torch.cumsum(counts, 0, out=start[1:])
    return distinct, _sums(ordered, start, order, gradient)


def reduce_padded(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the shapes of the inputs: ids [T], -1 from U on, sums [T, D], 0 from U on, and U, int64 [1]."""
    ordered, order = torch.sort(ids, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=is_first[1:])
    group = torch.cumsum(is_first, 0) - 1
    distinct = torch.full_like(ids, -1).scatter_(0, group, ordered)
    # Entries that start no group write what the last place holds anyway.
    end, place = len(ids), torch.arange(len(ids), device=ids.device)
    start = torch.full((end + 1,), end, dtype=torch.int64, device=ids.device)
    start.scatter_(0, group.masked_fill(~is_first, end), place.masked_fill(~is_first, end))
    return distinct, _sums(ordered, start, order, gradient), is_first.sum(0, keepdim=True)


def part_of(entries: int) -> int:
    """Sorted entries that one program adds at most: as many as there are parts, about."""
    return max(GROUP_ROWS, 1 << math.ceil(math.log2(max(1, entries)) / 2))


def _sums(ordered: Tensor, start: Tensor, order: Tensor, gradient: Tensor) -> Tensor:
    width, blocks = gradient.shape[1], _blocks(gradient)
    sums = torch.empty((len(start) - 1, width), dtype=torch.float32, device=gradient.device)
    if sums.numel():
        blocks["ROWS"], blocks["BLOCK"] = GROUP_ROWS, min(blocks["BLOCK"], BLOCK_SIZE // GROUP_ROWS)
        columns, part = math.ceil(width / blocks["BLOCK"]), part_of(len(ordered))
        later = math.ceil(len(ordered) / part) - 1
        parts = torch.empty((later, width), dtype=torch.float32, device=gradient.device)
        if later:
            rest = (parts, *gradient.stride(), len(ordered))
            _launch("part_kernel", (later, columns), ordered, order, gradient, *rest, PART=part, **blocks)
        rest = (parts, sums, *gradient.stride())
        _launch("reduce_kernel", (len(sums), columns), start, order, gradient, *rest, PART=part, **blocks)
    return sums


def update(table: RowTable, rule: Rule, ids: Tensor, gradient: Tensor, step: Step, count: Tensor | None) -> None:
    """Brings the distinct rows `ids` [T], those from `count` on being padding, to the present and takes one step."""
    if not len(ids):
        return
    faults, ids, blocks, now = _Faults(table), ids.contiguous(), _blocks(table.weight, rule), len(table.history) - 1
    fresh = torch.empty(len(ids), dtype=torch.int32, device=ids.device)
    sizes, has_count = (len(ids), len(table.weight), len(table.state), now), count is not None
    _by_entry(
        "mark_kernel", len(ids), ids, table.last_step, table.slot, fresh, count, faults.flag, *faults.codes[:4], *sizes
    )
    order = torch.cumsum(fresh, 0)  # 1 for the first row without a slot
    tensors = (*_tensors(table, rule), ids, gradient.contiguous(), order, table.used, count, faults.flag)
    numbers = (faults.codes[4], *sizes, *_numbers(table, rule), *_step_numbers(rule, step))
    constants = {"IS_ADAPTIVE": bool(getattr(step, "is_adaptive", True)), **blocks}
    grid = (math.ceil(len(ids) / blocks["ROWS"]),)
    _launch("update_kernel", grid, *tensors, *numbers, HAS_COUNT=has_count, **constants)
    _by_entry("commit_kernel", len(ids), ids, table.last_step, order, table.used, count, faults.flag, len(ids), now)
    faults.raise_now(ids)


def catch_up(table: RowTable, rule: Rule, toward_z: float) -> None:
    """Brings all rows to the present (touched ones are at step 0 then); y moves towards z by the share `toward_z`."""
    faults, blocks, now, rows = _Faults(table), _blocks(table.weight, rule), len(table.history) - 1, len(table.weight)
    if not rows:
        return
    sizes = (rows, len(table.state), now)
    addresses = (table.last_step, table.slot, None, None, faults.flag, *faults.codes[:4])
    _by_entry("mark_kernel", rows, None, *addresses, rows, *sizes)
    grid = (math.ceil(rows / blocks["ROWS"]),)
    tensors = (*_tensors(table, rule), faults.flag)
    numbers = (*sizes, *_numbers(table, rule), toward_z)
    _launch("catch_up_kernel", grid, *tensors, *numbers, **blocks)
    _by_entry("commit_kernel", rows, None, table.last_step, None, None, None, faults.flag, rows, now)
    faults.raise_now(None)


class _Faults:
    """Where kernels write what is wrong: the device's flag, which is read later, or one of this call."""

    def __init__(self, table: RowTable) -> None:
        self.table, device, rows = table, table.weight.device, len(table.weight)
        self.is_deferred = deferred.is_deferred(device)
        self.codes: tuple[int, ...] = (1, 2, 3, 4, 5)
        if not self.is_deferred:
            self.flag = torch.zeros(1, dtype=torch.int32, device=device)
            return
        deferred.poll(device)
        self.flag = deferred.flag(device)
        rules = (
            (IndexError, f"ids must lie in 0..{rows - 1}, got others"),
            (ValueError, "last_step must not lie in the future, got a later one"),
            (ValueError, "slots of touched rows must lie in the state, got others"),
            (ValueError, "ids of an update must ascend, got others"),
            (ValueError, "state must have a slot for every touched row, got fewer"),
        )
        self.codes = tuple(_code(error, text) for error, text in rules)

    def raise_now(self, ids: Tensor | None) -> None:
        """Reads this call's flag; the kernels say what kind of fault there is, here it is looked up."""
        fault = 0 if self.is_deferred else int(self.flag)
        if fault == 0:
            return
        table = self.table
        now, slots, last = len(table.history) - 1, len(table.state), len(table.weight) - 1
        if fault == 5:
            raise ValueError(f"row_sparse: state must have a slot for every touched row, got {slots}")
        if ids is not None:
            outside = ((ids < 0) | (ids > last)).nonzero()
            if len(outside):
                at = int(outside[0])
                raise IndexError(f"row_sparse: ids must lie in 0..{last}, got {int(ids[at])} at entry {at}")
            falls = (ids[1:] <= ids[:-1]).nonzero()
            if fault == 4 and len(falls):
                before, here = ids[int(falls[0]) :][:2].tolist()
                raise ValueError(f"row_sparse: ids of an update must ascend, got {before} then {here}")
        steps, slot = (part if ids is None else part[ids] for part in (table.last_step, table.slot))
        if bool((steps > now).any()):
            raise ValueError(f"row_sparse: last_step must not lie in the future, got {int(steps.max())} at step {now}")
        wrong = slot[(steps >= 0) & ((slot < 0) | (slot >= slots))]
        raise ValueError(f"row_sparse: slots of touched rows must lie in 0..{slots - 1}, got {int(wrong[0])}")


def _code(error: type[Exception], text: str) -> int:
    text = f"row_sparse: {text} (found on the device, after the call that it is about; nothing was written since)"
    return deferred.code(lambda: error(text), text)


def _tensors(table: RowTable, rule: Rule) -> tuple[Tensor, ...]:
    kept = table.history
    if isinstance(rule, Adam):
        kept = torch.cat([torch.ones_like(kept[:1, 2]), kept[1:, 2].cumprod(0)])
    return table.weight, table.state, table.slot, table.last_step, kept, table.history


def _numbers(table: RowTable, rule: Rule) -> tuple[float, ...]:
    """Missed steps that count, logarithms of the betas, and eps."""
    if not isinstance(rule, Adam):
        return (0, 0.0, 0.0, *_log2(_float32(rule.beta2)), rule.eps)
    beta1, beta2, now = 1.0 - _float32(1.0 - rule.beta1), _float32(rule.beta2), len(table.history) - 1
    ratio = beta1 / math.sqrt(beta2)  # of one missed step to the one before
    if ratio < 1.0:
        now = min(now, math.ceil(math.log(NEGLIGIBLE) / math.log(ratio))) if ratio > 0.0 else 0
    return (now, *_log2(beta1), *_log2(beta2), rule.eps)


def _step_numbers(rule: Rule, step: Step) -> tuple[float, ...]:
    """beta2, 1 - beta1, 1 - beta2, and the numbers of the step; 0 where the rule has none."""
    if isinstance(rule, Adam):
        assert isinstance(step, AdamStep)
        return (rule.beta2, 1.0 - rule.beta1, 1.0 - rule.beta2, step.rate, 0.0, 0.0, 0.0, step.root, step.keep)
    assert isinstance(step, ScheduleFreeStep)
    return (rule.beta2, 0.0, 1.0 - rule.beta2, *step[:3], 1.0 / step.bias_correction, 0.0, 0.0)


def _blocks(table: Tensor, rule: Rule | None = None) -> dict[str, Any]:
    width = table.shape[1]
    block = min(MOST_COLUMNS, max(16, 1 << max(0, width - 1).bit_length()))
    rows = (ADAM_BLOCK_SIZE if isinstance(rule, Adam) else BLOCK_SIZE) // block
    blocks = {"WIDTH": width, "ROWS": rows, "BLOCK": block, "num_warps": 4}
    return blocks if rule is None else {"IS_ADAM": isinstance(rule, Adam), **blocks}


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def _log2(value: float) -> tuple[float, float]:
    """Of a number in [0, 1) as two float32, which is what kernels take; 0 has a logarithm that any power makes 0."""
    logarithm = math.log2(value) if value > 0.0 else -1e4
    return _float32(logarithm), logarithm - _float32(logarithm)


def _by_entry(name: str, entries: int, ids: Tensor | None, *arguments: Any) -> None:
    """Launches `mark` or `commit`: one entry of the batch (or row of the table) per lane."""
    constants = {"HAS_IDS": ids is not None, "HAS_COUNT": arguments[3] is not None, "BLOCK": MARK_BLOCK}
    _launch(name, (math.ceil(entries / MARK_BLOCK),), ids, *arguments, **constants)


def _launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    device = next(part.device for part in arguments if isinstance(part, Tensor))
    with on_device(device):
        getattr(_kernels(), name)[grid](*arguments, **constants)


def _kernels() -> ModuleType:
    """Imported with the first launch: Triton costs a second, and is not there on every machine."""
    from ubp_fast.kernels.row_sparse import _triton_kernels

    return _triton_kernels
