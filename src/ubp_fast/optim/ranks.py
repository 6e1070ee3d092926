"""What processes that train as one exchange: sums of gradients, and rows of tables that are divided among them.

Dense gradients travel as one array per dtype, those of tables as distinct ids and the sum of each: what a step sends
grows with the rows in use, not with the table. Where tables are divided, every process keeps the rows whose ids leave
its rank when they are divided by the number of processes, with the optimizer's state beside them. Frequent ids often
lie together: so each process has its share of them. A lookup asks the owners for distinct ids. Their gradients go back
after the backward pass, in the order of the lookups, so that nobody waits where no gradient came to a part of a model;
the owner adds them up and steps alone. So no process ever holds a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ubp_fast.files import create_array, scratch_directory, write_tensors
from ubp_fast.kernels import row_sparse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NONE, _DENSE, _SPARSE = range(3)
_CHUNK_ROWS = 65_536
_dividing: ContextVar[ProcessGroup | None] = ContextVar("dividing", default=None)


@contextmanager
def divided_tables(group: ProcessGroup) -> Iterator[None]:
    """Every `RowSparseEmbedding` that is made inside holds the rows of this process alone.

    Its initial rows are those that a whole table would have. All processes of the group make the same modules and, from
    then on, the same lookups, also those that ask for no row; after every backward pass all call `return_gradients`.
    """
    token = _dividing.set(group)
    try:
        yield
    finally:
        _dividing.reset(token)


def division_of_new(rows: int) -> Division | None:
    """That of a table with so many rows which is made now."""
    group = _dividing.get()
    return None if group is None else Division(rows, group)


@dataclass(frozen=True)
class Division:
    """A table of which this process has the rows with id % world == rank, in the order of the ids.

    Attributes:
        total: rows of the whole table, N.
        group: the processes.
        waiting: lookups whose gradients are not yet with the owners.
    """

    total: int
    group: ProcessGroup
    waiting: list[_Answer] = field(default_factory=list, repr=False, compare=False)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def count(self) -> int:
        """Rows of this process."""
        return len(range(self.rank, self.total, self.world))

    def place(self, row: int) -> int | None:
        """Where a row of the table, counted from the end if negative, lies among those of this process; None: not."""
        at = range(self.total)[row]
        return at // self.world if at % self.world == self.rank else None

    def own(self, whole: Tensor) -> Tensor:
        """The rows of this process among all, a view."""
        return whole[self.rank :: self.world]

    def draw(self, weight: Tensor) -> None:
        """Fills the rows of this process [n, D] from the standard normal as `nn.Embedding` draws the whole table.

        torch draws in groups of 16 numbers, so that parts of as many rows continue each other.
        """
        begins = [*range(0, self.total, _CHUNK_ROWS)]
        if len(begins) > 1 and self.total - begins[-1] < 16:
            begins.pop()
        for begin, end in zip(begins, [*begins[1:], self.total], strict=True):
            part = torch.empty((end - begin, weight.shape[1]), dtype=weight.dtype, device=weight.device).normal_()
            first = -(begin - self.rank) % self.world  # the first of this process among them
            mine = part[first :: self.world]
            at = (begin + first) // self.world
            weight[at : at + len(mine)] = mine

    def lookup(self, rows_of: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """Rows [..., D] of ids int64 [...] from their owners; all processes call this.

        Args:
            rows_of: places int64 [n] among the rows of this process -> these rows [n, D], with their gradient.

        Raises:
            IndexError: an id lies outside of the table.
        """
        distinct, entry = torch.unique(ids.reshape(-1), return_inverse=True)
        if len(distinct) and not 0 <= (low := int(distinct[0])) <= (high := int(distinct[-1])) < self.total:
            raise IndexError(f"RowSparseEmbedding: ids must be in 0..{self.total - 1}, got {low if low < 0 else high}")
        order = (distinct % self.world).argsort(stable=True)
        asked = distinct[order]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(asked % self.world, minlength=self.world)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        exchange = _Exchange(theirs.tolist(), counts.tolist(), self.group)
        rows = rows_of(exchange(asked // self.world))
        found = exchange.back(rows.detach())
        if torch.is_grad_enabled() and rows.requires_grad:
            self.waiting.append(_Answer(rows, found.requires_grad_(), exchange))
        return found.index_select(0, place[entry]).view(*ids.shape, rows.shape[1])

    def pieces(self, own: Tensor) -> Iterator[Tensor]:
        """The whole table [N, D] some rows at a time, on the first process alone; all processes iterate."""
        world, step = self.world, max(1, _CHUNK_ROWS // self.world)
        most, first = -(-self.total // world), dist.get_global_rank(self.group, 0)
        for start in range(0, most, step):
            mine = own[start : start + step].contiguous()
            length = min(step, most - start)
            padded = mine.new_zeros((length, *own.shape[1:]))
            padded[: len(mine)] = mine
            parts = [torch.empty_like(padded) for _ in range(world)] if self.rank == 0 else None
            dist.gather(padded, parts, dst=first, group=self.group)
            if parts is not None:
                yield torch.stack(parts, dim=1).flatten(0, 1)[: self.total - start * world]


class _Exchange(NamedTuple):
    """Rows sent from all processes to all."""

    received: list[int]  # from each process
    sent: list[int]
    group: ProcessGroup

    def __call__(self, rows: Tensor) -> Tensor:
        found = rows.new_empty((sum(self.received), *rows.shape[1:]))
        dist.all_to_all_single(found, rows.contiguous(), self.received, self.sent, group=self.group)
        return found

    @property
    def back(self) -> _Exchange:
        return self._replace(received=self.sent, sent=self.received)


class _Answer(NamedTuple):
    """A lookup.

    Attributes:
        rows: what this process has sent to others, [n, D], which leads to its part of the table.
        found: what it got, [m, D], where gradients end.
        exchange: how gradients travel, against the rows.
    """

    rows: Tensor
    found: Tensor
    exchange: _Exchange


def return_gradients(divisions: Iterable[Division]) -> None:
    """After a backward pass: the gradients of all rows that were looked up go to their owners and are added there."""
    for division in divisions:
        for rows, found, exchange in division.waiting:
            rows.backward(exchange(torch.zeros_like(found) if found.grad is None else found.grad))
        division.waiting.clear()


def divided(model: nn.Module) -> dict[nn.Parameter, Division]:
    """The weights of a model of which each process has some rows."""
    found = {}
    for module in model.modules():
        if isinstance(division := getattr(module, "division", None), Division):
            found[module.weight] = division
    return found  # type: ignore[return-value]


def regrouped(parts: Sequence[Mapping[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """The rows of one of `world` processes from what those of another number have kept, by rank.

    Args:
        parts: of each former process `weight` [n, D] as it lay in memory and what `TouchedRows.exact_state` gave.

    Returns:
        The same for the rows of process `rank`; `rank` 0 of 1 has all.
    """
    former, total = len(parts), sum(len(part["weight"]) for part in parts)
    if former == world:
        return dict(parts[rank])
    count = len(range(rank, total, world))
    kept = {
        name: parts[0][name].new_empty((count, *parts[0][name].shape[1:])) for name in ("weight", "slot", "last_step")
    }
    state = []
    used = 0
    for number, part in enumerate(parts):
        ids = torch.arange(number, total, former)
        here = ids.remainder(world).eq(rank).nonzero()[:, 0]
        there = ids[here] // world
        for name, values in kept.items():
            values[there] = part[name][here]
        touched = part["last_step"][here] >= 0
        slots = part["slot"][here][touched]
        kept["slot"][there[touched]] = torch.arange(used, used + len(slots), dtype=torch.int32)
        state.append(part["state"][slots.long()])
        used += len(slots)
    return {**parts[0], **kept, "state": torch.cat(state), "used": torch.tensor([used])}


class WholeTensor(NamedTuple):
    """A tensor of a model's state as one process would hold it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterator[Tensor]  # its rows one behind the other; of a divided one on the first process alone


def whole_state(model: nn.Module) -> Iterator[WholeTensor]:
    """The state of a model; where tables are divided, all processes read all pieces in this order."""
    divisions = {path: getattr(module, "division", None) for path, module in model.named_modules()}
    for name, values in model.state_dict().items():
        path, _, last = name.rpartition(".")
        division = divisions.get(path) if last == "weight" else None
        if division is None:
            yield WholeTensor(name, tuple(values.shape), values.dtype, iter([values]))
        else:
            yield WholeTensor(name, (division.total, *values.shape[1:]), values.dtype, division.pieces(values))


def write_whole(path: Path, model: nn.Module, is_first: bool) -> None:
    """Writes the state of a model as safetensors: all processes that train it as one call this, the first writes.

    No process holds a whole divided table: it comes together in a file beside `path`, which needs its room while it
    lasts. Rows of all tables are brought to the present everywhere, so that later steps round alike.
    """
    if not is_first:
        for whole in whole_state(model):
            for _ in whole.pieces:
                pass
        return
    place = path.with_name(f"{path.name}.tables")
    with scratch_directory(place) if divided(model) else nullcontext(place) as scratch:
        found = {}
        for number, whole in enumerate(whole_state(model)):
            first = next(whole.pieces)
            is_all = tuple(first.shape) == whole.shape
            found[whole.name] = first if is_all else _mapped(scratch / f"{number}.npy", whole, first)
        write_tensors(path, found)


def _mapped(file: Path, whole: WholeTensor, first: Tensor) -> Tensor:
    """All rows of a tensor, in a file."""
    memory = create_array(file, np.uint8, (math.prod(whole.shape) * whole.dtype.itemsize,))
    rows, begin = torch.from_numpy(memory).view(whole.dtype).view(whole.shape), 0
    for piece in chain([first], whole.pieces):
        rows[begin : begin + len(piece)] = piece
        begin += len(piece)
    return rows


def sum_gradients(parameters: Iterable[nn.Parameter], group: ProcessGroup) -> None:
    """Replaces every gradient by its sum over the processes, the same bits on each.

    A parameter without a gradient here gets that of the others; one without any anywhere stays without.

    Args:
        parameters: those of a model that all processes have alike, in the same order.
        group: the processes; all call this.
    """
    with torch._C.DisableTorchFunctionSubclass():  # tables as they lie in memory
        trained = [part for part in parameters if part.requires_grad]
        if not trained:
            return
        kinds = torch.tensor([_kind(part.grad) for part in trained], device=trained[0].device)
        dist.all_reduce(kinds, op=dist.ReduceOp.MAX, group=group)
        found = list(zip(trained, kinds.tolist(), strict=True))
        for dtype in dict.fromkeys(part.dtype for part in trained):
            _sum_dense([part for part, kind in found if kind == _DENSE and part.dtype == dtype], group)
        for part, kind in found:
            if kind == _SPARSE:
                part.grad = _summed_rows(part, group)


def _kind(gradient: Tensor | None) -> int:
    if gradient is None:
        return _NONE
    return _SPARSE if gradient.is_sparse else _DENSE


def _sum_dense(parts: list[nn.Parameter], group: ProcessGroup) -> None:
    if not parts:
        return
    gradients = [part.new_zeros(part.shape) if part.grad is None else part.grad for part in parts]
    flat = torch.cat([gradient.to_dense().reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.grad = values.view(part.shape)


def _summed_rows(part: nn.Parameter, group: ProcessGroup) -> Tensor:
    """The gradient of a table: rows of all processes, those of one process distinct."""
    gradient = part.grad
    if gradient is None:
        ids, sums = torch.empty(0, dtype=torch.int64, device=part.device), part.new_empty((0, part.shape[1]))
    elif gradient.dtype in row_sparse.FLOATS:
        ids, sums = row_sparse.reduce(gradient._indices()[0], gradient._values())
    else:
        gradient = gradient.coalesce()
        ids, sums = gradient._indices()[0], gradient._values()
    world = dist.get_world_size(group)
    sizes = [torch.empty(1, dtype=torch.int64, device=part.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(ids)], device=part.device), group=group)
    counts = torch.cat(sizes).tolist()
    all_ids, all_sums = (_gathered(values, counts, group) for values in (ids, sums))
    return torch.sparse_coo_tensor(all_ids[None], all_sums, part.shape, check_invariants=False)


def _gathered(values: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    padded = values.new_zeros((max(counts), *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
