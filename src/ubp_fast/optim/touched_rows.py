"""What a row-sparse optimizer knows about a table: state for the rows that ever had a gradient, and where it lies.

A table in bfloat16 has its state in float32. Its rows are widened, computed in float32, and rounded back at random, up
with the chance by which the number exceeds the lower neighbour: the mean of what is written is what was computed, and
steps far smaller than a digit of bfloat16 still add up. (Rounding to the nearest would lose them all.)
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from ubp_fast.kernels import deferred, row_sparse
from ubp_fast.kernels.checks import require
from ubp_fast.kernels.row_sparse import Adam, AdamStep, RowTable, ScheduleFree, ScheduleFreeStep

_CHUNK_ROWS = 65_536
_PER_TABLE = ("slot", "used", "last_step")
RuleT = TypeVar("RuleT", ScheduleFree, Adam)
StepT = TypeVar("StepT", ScheduleFreeStep, AdamStep)


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros whose memory comes into being where it is written; on Linux in large pages."""
    count = math.prod(shape)
    # A mode that watches what is made, such as that of fake tensors, must see it.
    if device.type != "cpu" or count == 0 or _get_current_dispatch_mode() is not None:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Private: a forked process must not write into this one's weights.
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Rows lie anywhere: with small pages each costs several walks through the page table.
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours so that the mean is the value; exact numbers and NaN stay.

    Args:
        values: any shape.
        generator: on the device of `values`; 16 bits are drawn for each of them.
    """
    words = torch.empty(math.ceil(values.numel() / 4), dtype=torch.int64, device=values.device)
    # All bits of a word are random only when it may be any number.
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: values.numel()].view(values.shape).int()
    # A carry from below the last bit that stays moves the number to the neighbour further from 0.
    bits.bitwise_and_(0xFFFF).add_(values.contiguous().view(torch.int32)).bitwise_and_(-0x10000)
    return bits.view(torch.float32).masked_fill_(values.isnan(), torch.nan).bfloat16()


def check_weight(weight: Tensor) -> None:
    """Raises ValueError where no row-sparse optimizer can train a table with this weight."""
    rule = "be a [N, D] tensor of numbers in float32, float64 or bfloat16"
    is_table = weight.ndim == 2 and weight.dtype in (*row_sparse.FLOATS, torch.bfloat16) and not weight.is_meta
    found = f"{list(weight.shape)}, {weight.dtype} on {weight.device}"
    remedy = "convert it to one of them, or release() the table"
    require(is_table, "RowSparseEmbedding", "weight", rule, found, remedy)


@contextmanager
def _outside_of_transforms() -> Iterator[None]:
    """A table's own memory is meant, whatever transform, mode or recording the caller is inside of."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), temporarily_clear_interpreter_stack():
        yield


class TouchedRows(ABC, Generic[RuleT, StepT]):
    """Two state vectors per row that ever had a gradient, each row as it was after its last step.

    Memory grows with these rows: it is reserved for all, and comes into being when it is used. On a GPU lookups and
    steps do not wait for the device (those of tables in bfloat16 do); `catch_up` does, so that a fault of an earlier
    call raises before the history is forgotten.

    Args:
        weight: the table [N, D], float32, float64 or bfloat16. One in bfloat16 takes a seed from torch's generator.
        rule: what is the same in all steps; another one later brings all rows to the present first.
    """

    names: ClassVar[tuple[str, str]]  # of the state vectors in the dense optimizer
    history_columns: ClassVar[tuple[int, ...]] = ()
    numbers: ClassVar[tuple[str, ...]] = ("steps", "_kept", "has_state", "seed", "roundings")

    def __init__(self, weight: Tensor, rule: RuleT) -> None:
        self.rule: RuleT = rule
        self.seed, self.roundings = -1, 0
        self._take(weight)
        self.reset()

    def _take(self, weight: Tensor) -> None:
        check_weight(weight)
        if not weight.is_contiguous():
            weight.data = weight.contiguous()
        self.weight = weight.detach()  # its memory alone: it shall not keep the parameter alive
        self.is_rounded = weight.dtype == torch.bfloat16
        if self.is_rounded and self.seed < 0:
            self.seed = int(torch.randint(2**32, ()))

    def bind(self, weight: Tensor) -> None:
        """Follows the parameter to other memory, another dtype or device; all rows are up to date."""
        self._take(weight)
        for name in ("state", "slot", "used", "last_step", "_history"):
            setattr(self, name, getattr(self, name).to(weight.device))
        self.state: Tensor = self.state.to(self.state_dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the rows of the state that are in use, and not the weight: `restore` brings one."""
        self.catch_up()
        kept = {name: value for name, value in vars(self).items() if name not in ("weight", "_history")}
        return kept | {"state": self.state[: int(self.used)].clone()}

    def restore(self, weight: Tensor) -> None:
        """Makes a copy whole: it continues with this parameter, which holds the numbers of the original."""
        if hasattr(self, "weight"):  # it is the original: a shallow copy of its optimizer shares it
            return
        self._take(weight)
        state = reserve((len(weight), *self.state.shape[1:]), self.state_dtype, weight.device)
        state[: len(self.state)] = self.state
        self.state = state
        self._restart()

    @contextmanager
    def written(self) -> Iterator[None]:
        """Around whatever writes the weight from outside, all rows being up to date."""
        yield

    def reset(self) -> None:
        """Forgets everything but the weights."""
        rows, width = self.weight.shape
        self.state = reserve((rows, 2, width), self.state_dtype, self.weight.device)
        self.slot = torch.zeros(rows, dtype=torch.int32, device=self.weight.device)
        self.used = torch.zeros(1, dtype=torch.int64, device=self.weight.device)
        self.last_step = torch.full((rows,), -1, dtype=torch.int32, device=self.weight.device)
        self.has_state = False
        self._restart()

    def _restart(self) -> None:
        """Starts the history of steps anew; all rows are up to date."""
        columns = (1024, *self.history_columns)
        self._history = torch.ones(columns, dtype=torch.float64, device=self.weight.device)
        self.steps, self._kept = 0, 1.0

    @abstractmethod
    def _first_at_rest(self) -> Tensor:
        """The first state vector of rows that never had a gradient, [N, D]."""

    @abstractmethod
    def _numbers(self, group: dict[str, Any]) -> tuple[RuleT, StepT]:
        """The rule and the step that a parameter group asks for."""

    @abstractmethod
    def _record(self, step: StepT) -> bool:
        """Writes the step into the last entry of the history; True when the history must start anew."""

    @property
    def rows(self) -> RowTable:
        """The table for the kernels."""
        history = self._history[: self.steps + 1]
        return RowTable(self.weight, self.state, self.slot, self.used, self.last_step, history)

    @property
    def is_padded(self) -> bool:
        """Whether gradients keep the shape of the batch, so that no step waits to learn how many rows there are."""
        return deferred.is_deferred(self.weight.device) and not self.is_rounded

    def gather(self, ids: Tensor) -> Tensor:
        """Rows as of the present, [..., D]."""
        rows, places = self.part(ids.reshape(-1))
        return row_sparse.gather(rows, self.rule, places).view(*ids.shape, self.weight.shape[1])

    def step(self, gradient: Tensor, group: dict[str, Any]) -> None:
        """Takes one step with a gradient [N, D], sparse or dense, and the numbers of its parameter group."""
        rule, step = self._numbers(group)
        if rule != self.rule:
            self.catch_up()
            self.rule = rule
        ids, sums, count = self.summed(gradient)
        with self.changing(ids) as (rows, places):
            row_sparse.update(rows, rule, places, sums, step, count=count)
        if self.steps + 1 == len(self._history):
            self._history = torch.cat([self._history, torch.ones_like(self._history)])
        self.steps += 1
        self.has_state = True
        if self._record(step):
            self.catch_up()

    def catch_up(self, toward_z: float = 0.0) -> None:
        """Brings all rows to the present; those of a schedule-free table move by the share `toward_z` of z - y."""
        if self.steps == 0 and toward_z == 0.0:
            return
        with _outside_of_transforms():
            for ids in self.chunks():
                with self.changing(ids) as (rows, _):
                    row_sparse.catch_up(rows, self.rule, toward_z=toward_z)
            if deferred.is_deferred(self.weight.device):
                deferred.check_deferred(self.weight.device)
            self._restart()

    def summed(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ascending distinct ids of a gradient [N, D], their sums in the dtype of the state, and how many.

        None for all; where `is_padded` those of a sparse one have the length of the batch. Rows of zeros in a dense one
        are rows without a gradient.
        """
        if not gradient.is_sparse:
            ids = (gradient != 0).any(dim=1).nonzero()[:, 0]
            return ids, gradient[ids].to(self.state_dtype), None
        ids, sums = gradient._indices()[0], gradient._values().to(self.state_dtype)
        if self.is_padded:
            return row_sparse.reduce_padded(ids, sums)
        # Autograd forgets that a gradient was coalesced; several lookups of one step leave several parts.
        if not bool((ids[1:] > ids[:-1]).all()):
            ids, sums = row_sparse.reduce(ids, sums)
        return ids, sums, None

    @property
    def state_dtype(self) -> torch.dtype:
        """In which the state lies and steps are computed."""
        return torch.float32 if self.is_rounded else self.weight.dtype

    def part(self, ids: Tensor) -> tuple[RowTable, Tensor]:
        """`rows` in the dtype of the state, those of `ids` [n] alone where it is rounded, and the places of `ids`."""
        if not self.is_rounded:
            return self.rows, ids
        weight, slot, last_step = self.weight[ids].float(), self.slot[ids], self.last_step[ids]
        places = torch.arange(len(ids), device=ids.device)
        return self.rows._replace(weight=weight, slot=slot, last_step=last_step), places

    @contextmanager
    def changing(self, ids: Tensor) -> Iterator[tuple[RowTable, Tensor]]:
        """`part` for a kernel that writes; what it wrote is rounded and comes back into the table."""
        rows, places = self.part(ids)
        yield rows, places
        if self.is_rounded:
            generator = torch.Generator(self.weight.device).manual_seed(_mixed(self.seed, self.roundings))
            self.roundings += 1
            self.weight[ids] = round_at_random(rows.weight, generator)
            self.slot[ids], self.last_step[ids] = rows.slot, rows.last_step

    def chunks(self) -> Iterator[Tensor]:
        """Ids of rows that steps may have left behind, some at a time; an empty part where `rows` has them all."""
        if self.is_rounded:
            yield from self._left_behind().split(_CHUNK_ROWS)
        else:
            yield torch.empty(0, dtype=torch.int64, device=self.weight.device)

    def _left_behind(self) -> Tensor:
        return (self.last_step >= 0).nonzero()[:, 0]

    def dense_state(self) -> dict[str, Tensor]:
        """Both state vectors [N, D] at the present as the dense optimizer holds them, in memory of their own.

        Beside them `rounding` where the table is rounded: int64 [2], the seed and how often it was used.
        """
        self.catch_up()
        first = torch.empty(self.weight.shape, dtype=self.state_dtype, device=self.weight.device)
        first.copy_(self._first_at_rest())
        second = torch.zeros_like(first)
        for ids in (self.last_step >= 0).nonzero()[:, 0].split(_CHUNK_ROWS):
            first[ids], second[ids] = self.state[self.slot[ids].long()].unbind(1)
        state = dict(zip(self.names, (first, second), strict=True))
        return state | {"rounding": torch.tensor([self.seed, self.roundings])} if self.is_rounded else state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state of a dense optimizer; rows that show no trace of a gradient count as untouched."""
        self.reset()
        self.has_state = True
        if self.is_rounded and "rounding" in state:
            self.seed, self.roundings = state["rounding"].tolist()
        first, second = (state[name].to(self.weight.device) for name in self.names)
        at_rest, used = self._first_at_rest(), 0
        for start in range(0, len(self.weight), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            is_touched = ((second[part] != 0) | (first[part] != at_rest[part])).any(dim=1)
            ids = start + is_touched.nonzero()[:, 0]
            self.slot[ids] = torch.arange(used, used + len(ids), dtype=torch.int32, device=ids.device)
            self.state[used : used + len(ids), 0], self.state[used : used + len(ids), 1] = first[ids], second[ids]
            self.last_step[ids] = 0
            used += len(ids)
        self.used.fill_(used)

    def exact_state(self) -> dict[str, Any]:
        """All that decides the next steps, each row as of its last one; shares memory where it lies on a CPU."""
        tensors = {"state": self.state[: int(self.used)], "history": self._history[: self.steps + 1]}
        tensors |= {name: getattr(self, name) for name in _PER_TABLE}
        numbers = {name: getattr(self, name) for name in self.numbers}
        return {"rule": [*self.rule], **numbers, **{name: _of_memory(values) for name, values in tensors.items()}}

    def load_exact_state(self, exact: Mapping[str, Any]) -> None:
        """Takes what `exact_state` gave; the memory of the weight is to hold what it held then."""
        self.reset()
        self.rule = type(self.rule)(*exact["rule"])
        for name in self.numbers:
            setattr(self, name, exact[name])
        self.state[: len(exact["state"])] = exact["state"].to(self.state)
        for name in _PER_TABLE:
            getattr(self, name).copy_(exact[name])
        length = max(len(self._history), 1 << self.steps.bit_length())
        self._history = torch.ones((length, *self.history_columns), dtype=torch.float64, device=self.weight.device)
        self._history[: self.steps + 1] = exact["history"].to(self._history)


def _of_memory(values: Tensor) -> Tensor:
    """The values alone on a CPU: what is written of a part of a tensor would be all of its memory."""
    return torch.from_numpy(values.cpu().numpy())


def _mixed(seed: int, count: int) -> int:
    """A seed of 63 bits for each pair of numbers below 2^32. Source: Steele et al. 2014 (SplitMix64's finaliser)."""
    value = (seed << 32 | count) * 0x9E3779B97F4A7C15 & 2**64 - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return (value ^ value >> 31) >> 1
