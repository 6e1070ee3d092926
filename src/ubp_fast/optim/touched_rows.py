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
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from ubp_fast.kernels import row_sparse

_CHUNK_ROWS = 65_536


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros whose memory comes into being where it is written; on Linux in large pages."""
    count = math.prod(shape)
    if device.type != "cpu" or count == 0:
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


class TouchedRows(ABC):
    """Two state vectors per row that ever had a gradient, each row as it was after its last step.

    Memory grows with these rows: it is reserved for all, and comes into being when it is used.

    Args:
        weight: the table [N, D], float32, float64 or bfloat16. One in bfloat16 takes a seed from torch's generator.
    """

    names: ClassVar[tuple[str, str]]  # of the state vectors in the dense optimizer

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.is_rounded = weight.dtype == torch.bfloat16
        self.seed, self.roundings = int(torch.randint(2**32, ())) if self.is_rounded else 0, 0
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the weights."""
        rows, width = self.weight.shape
        self.state = reserve((rows, 2, width), self.state_dtype, self.weight.device)
        self.slot = torch.zeros(rows, dtype=torch.int32, device=self.weight.device)
        self.used = torch.zeros(1, dtype=torch.int64, device=self.weight.device)
        self.last_step = torch.full((rows,), -1, dtype=torch.int32, device=self.weight.device)
        self.has_state = False
        self._restart()

    @abstractmethod
    def gather(self, ids: Tensor) -> Tensor:
        """Rows as of the present, [..., D]."""

    @abstractmethod
    def catch_up(self) -> None:
        """Brings all rows to the present."""

    @abstractmethod
    def _restart(self) -> None:
        """Starts the history of steps anew; all rows are up to date."""

    @abstractmethod
    def _first_at_rest(self) -> Tensor:
        """The first state vector of rows that never had a gradient, [N, D]."""

    @property
    @abstractmethod
    def rows(self) -> Any:
        """The table for the kernels, a named tuple with `weight`, `slot` and `last_step` of all rows."""

    @property
    def state_dtype(self) -> torch.dtype:
        """In which the state lies and steps are computed."""
        return torch.float32 if self.is_rounded else self.weight.dtype

    def part(self, ids: Tensor) -> tuple[Any, Tensor]:
        """`rows` in the dtype of the state, those of `ids` [n] alone where it is rounded, and the places of `ids`."""
        if not self.is_rounded:
            return self.rows, ids
        weight, slot, last_step = self._values[ids].float(), self.slot[ids], self.last_step[ids]
        places = torch.arange(len(ids), device=ids.device)
        return self.rows._replace(weight=weight, slot=slot, last_step=last_step), places

    @contextmanager
    def changing(self, ids: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """`part` for a kernel that writes; what it wrote is rounded and comes back into the table."""
        rows, places = self.part(ids)
        yield rows, places
        if self.is_rounded:
            generator = torch.Generator(self.weight.device).manual_seed(_mixed(self.seed, self.roundings))
            self.roundings += 1
            self._values[ids] = round_at_random(rows.weight, generator)
            self.slot[ids], self.last_step[ids] = rows.slot, rows.last_step

    def chunks(self) -> Iterator[Tensor]:
        """Ids of rows that steps may have left behind, some at a time; an empty part where `rows` has them all."""
        if self.is_rounded:
            yield from self._left_behind().split(_CHUNK_ROWS)
        else:
            yield torch.empty(0, dtype=torch.int64, device=self.weight.device)

    def _left_behind(self) -> Tensor:
        return (self.last_step >= 0).nonzero()[:, 0]

    @property
    def _values(self) -> Tensor:
        return self.weight.detach()

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


def _mixed(seed: int, count: int) -> int:
    """A seed of 63 bits for each pair of numbers below 2^32. Source: Steele et al. 2014 (SplitMix64's finaliser)."""
    value = (seed << 32 | count) * 0x9E3779B97F4A7C15 & 2**64 - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return (value ^ value >> 31) >> 1


def rows_of(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids and the sums of their gradients in `dtype`, of a sparse gradient [N, D]."""
    ids, sums = gradient._indices()[0], gradient._values().to(dtype)
    # Autograd forgets that a gradient was coalesced; several lookups of one step leave several parts.
    if bool((ids[1:] > ids[:-1]).all()):
        return ids, sums
    return row_sparse.reduce(ids, sums)


def split_state(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], tables: Mapping[Tensor, TouchedRows]
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Tensor]]]:
    """An optimizer's state without that of the tables, and that of the tables.

    torch casts what it loads to the dtype of the weight: that of a table in bfloat16 would lose most of its digits.
    """
    places = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    weights = chain.from_iterable(group["params"] for group in groups)
    # Other numbers of parameters are for torch to refuse.
    place_of = {weight: place for weight, place in zip(weights, places, strict=False) if weight in tables}
    left = {place: state for place, state in state_dict["state"].items() if place not in place_of.values()}
    taken = {weight: state_dict["state"].get(place, {}) for weight, place in place_of.items()}
    return {**state_dict, "state": left}, taken


@contextmanager
def table_gradients(name: str, tables: Mapping[Tensor, TouchedRows]) -> Iterator[dict[Tensor, Tensor]]:
    """The sparse gradients of the tables that have one; inside, the dense step does not see them.

    Raises:
        ValueError: a table has a dense gradient (its weight was used outside its module).
    """
    gradients = {weight: weight.grad for weight in tables if weight.grad is not None}
    for gradient in gradients.values():
        if not gradient.is_sparse:
            raise ValueError(
                f"{name}: gradients of tables must be sparse, got a dense one; read a table only by calling its module"
            )
    try:
        for weight in gradients:
            weight.grad = None
        yield gradients
    finally:
        for weight, gradient in gradients.items():
            weight.grad = gradient
