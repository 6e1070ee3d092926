"""What a row-sparse optimizer knows about a table: state for the rows that ever had a gradient, and where it lies."""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import ClassVar

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


class TouchedRows(ABC):
    """Two state vectors per row that ever had a gradient, each row as it was after its last step.

    Memory grows with these rows: it is reserved for all, and comes into being when it is used.

    Args:
        weight: the table [N, D], float32 or float64.
    """

    names: ClassVar[tuple[str, str]]  # of the state vectors in the dense optimizer

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the weights."""
        rows, width = self.weight.shape
        self.state = reserve((rows, 2, width), self.weight.dtype, self.weight.device)
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
    def _values(self) -> Tensor:
        return self.weight.detach()

    def dense_state(self) -> dict[str, Tensor]:
        """Both state vectors [N, D] at the present as the dense optimizer holds them, in memory of their own."""
        self.catch_up()
        first, second = self._first_at_rest().clone(), torch.zeros_like(self._values)
        for ids in (self.last_step >= 0).nonzero()[:, 0].split(_CHUNK_ROWS):
            first[ids], second[ids] = self.state[self.slot[ids].long()].unbind(1)
        return dict(zip(self.names, (first, second), strict=True))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state of a dense optimizer; rows that show no trace of a gradient count as untouched."""
        self.reset()
        self.has_state = True
        first, second = (state[name] for name in self.names)
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


def rows_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids and the sums of their gradients, of a sparse gradient [N, D]."""
    ids, sums = gradient._indices()[0], gradient._values()
    # Autograd forgets that a gradient was coalesced; several lookups of one step leave several parts.
    if bool((ids[1:] > ids[:-1]).all()):
        return ids, sums
    return row_sparse.reduce(ids, sums)


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
