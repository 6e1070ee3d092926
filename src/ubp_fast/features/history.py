"""What features may look at, and what they give: `History` in, `Column` out, block by block of clients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from ubp_fast.compiled import njit
from ubp_fast.events.schema import ITEM_COLUMN, NUM_CODES, SKU_KINDS, LabelLists
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import Features
from ubp_fast.features.scaling import DayStatistics, KnownMeans, Rows, gathered
from ubp_fast.features.writing import clients_at_once, in_client_blocks, in_sparse_blocks
from ubp_fast.kernels.windowed_aggregate import (
    SparseDecay,
    WindowedAggregate,
    WindowedAggregator,
    sparse_decay,
    window_aggregator,
)
from ubp_fast.store.event_store import TIMELINE, EventStore, KindColumns, end_to_end
from ubp_fast.store.vocabulary import FIRST_ID

T = TypeVar("T")
ROWS_TO_TURN = 64
# A matrix in memory keeps its zeros while it has no more values than this: 64 MiB.
MOST_ZEROS = 1 << 24
# Of a code.
NUM_VALUES = 256


def num_items(store: EventStore, kind: str) -> int:
    """How many items events of a kind may have: skus or urls of the store; of searches codes, by place and value."""
    of_columns = {"sku": store.num_skus, "url": store.num_urls, "query": NUM_CODES * NUM_VALUES}
    return of_columns[ITEM_COLUMN[kind]]


class Column(NamedTuple):
    """One feature of the clients at hand, or several of one unit side by side.

    Attributes:
        name: its name, or the names of all of them.
        unit: such as "events", "log1p days", "share".
        values: float [U] or [U, names]; NaN for a client that lacks what is measured, see `rich_features`.
    """

    name: str | tuple[str, ...]
    unit: str
    values: np.ndarray


@dataclass(frozen=True)
class History:
    """What happened before a cutoff to the clients at hand.

    Attributes:
        store: event store.
        cutoff_s: only events before it.
        lists: name -> (original ids, popularity) of the label lists.
        clients: int64, rows in the store of all clients that have features.
        rows: int64 [U], those at hand.
        day: what is compared among all clients.
        shared: what `once` has made, for all blocks of clients.
        seen: events that were looked at already, of this block.
    """

    store: EventStore
    cutoff_s: int
    lists: LabelLists
    clients: np.ndarray
    rows: np.ndarray
    day: DayStatistics = field(default_factory=DayStatistics)
    shared: dict[Hashable, Any] = field(default_factory=dict)
    seen: dict[str, KindColumns] = field(default_factory=dict)

    @classmethod
    def of(
        cls, store: EventStore, cutoff_s: int, lists: LabelLists | None = None, day: DayStatistics | None = None
    ) -> History:
        """All clients of a store that need a profile."""
        relevant = np.flatnonzero(store.is_relevant)
        return cls(store, cutoff_s, lists or {}, relevant, relevant, day or DayStatistics())

    def part(self, first: int, last: int) -> History:
        """The clients with these places among all of them."""
        return replace(self, rows=self.clients[first:last], seen={})

    def parts(self, num_columns: int) -> Iterator[History]:
        """All clients in blocks of the size that fits so many columns."""
        step = clients_at_once(num_columns)
        return (self.part(first, first + step) for first in range(0, len(self.clients), step))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make()` gave when the key was asked for first; for what does not depend on the clients at hand."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    @property
    def length_days(self) -> float:
        """Days from the first event of the store to the cutoff: the recency of what never happened."""
        return max(0, self.cutoff_s - self.store.first_timestamp_s) / DAY_S

    def present(self, kinds: tuple[str, ...]) -> list[str]:
        """Those of the kinds that the store has; the timeline not where it would only repeat one of them.

        Columns that say the same twice count twice wherever columns are weighed: in a regression, in a distance.
        """
        found = [kind for kind in kinds if kind in self.store.kinds]
        repeats = len(self.store.kinds) == 1 and found
        return [kind for kind in kinds if kind in found or (kind == TIMELINE and not repeats)]

    def events(self, kind: str) -> KindColumns:
        """Events of a kind or, without items, of the timeline, client by client; later ones than the cutoff, too."""
        if kind not in self.seen:
            columns = self.store.timeline if kind == TIMELINE else self.store.kind(kind)
            rows, offsets = end_to_end(columns.offsets[self.rows], columns.offsets[self.rows + 1])
            others = (None, None, None) if kind == TIMELINE else columns[2:]
            arrays = (None if array is None else array[rows] for array in (columns.timestamp_s, *others))
            self.seen[kind] = KindColumns(offsets, *arrays)  # type: ignore[arg-type]
        return self.seen[kind]

    def aggregate(
        self,
        key: Hashable,
        kind: str,
        distinct: tuple[str, ...] = (),
        codes: np.ndarray | None = None,
        anchor_s: int | None = None,
        **arguments: Any,
    ) -> WindowedAggregate:
        """`windowed_aggregate` of a kind up to the cutoff or another moment before it.

        Args:
            key: who asks; what depends on the arguments is made once for each key, kind and anchor.
            kind: of events, or "timeline".
            distinct: what is told apart: "items" (skus, urls or queries), of skus also "categories", "prices", "names".
            codes: int32 [N] of the events at hand, their items when None.
            anchor_s: the cutoff when None.
            arguments: as there; a table may be a function that makes it.
        """
        anchor_s, events = self.cutoff_s if anchor_s is None else anchor_s, self.events(kind)
        # Queries are numbered among those of the clients at hand: their table is another one each time.
        of_queries = events.codes is not None and bool(distinct)
        if codes is None and (distinct or {"slots", "values"} & {*arguments}):
            codes = numbered(events.codes) if events.codes is not None else events.item

        def make() -> WindowedAggregator:
            made = {name: value() if callable(value) else value for name, value in arguments.items()}
            made |= {"groups": self._groups(kind, distinct, codes)} if distinct else {}
            none = np.zeros(0, np.int32)
            return window_aggregator(
                np.zeros(1, np.int64), none, None if codes is None else none, anchor_s=anchor_s, **made
            )

        aggregator = make() if of_queries else self.once((key, kind, anchor_s), make)
        return aggregator.on(events.offsets, events.timestamp_s, codes)(threads=1)

    def decayed(self, kind: str, half_lives_days: tuple[float, ...], slots: np.ndarray, num_slots: int) -> SparseDecay:
        """Decayed counts of the slots of a kind's items, and of all of them, up to the cutoff.

        Args:
            kind: of events; the codes of a search are so many items, see `num_items`.
            half_lives_days: H half-lives.
            slots: int32 [items of the store, K], see `windowed_aggregate`.
            num_slots: of all lists.
        """
        offsets, times_s, item, codes, _ = self.events(kind)
        if codes is not None:
            item = (codes.astype(np.int32) + NUM_VALUES * np.arange(NUM_CODES, dtype=np.int32)).ravel()
            offsets, times_s = offsets * NUM_CODES, np.repeat(times_s, NUM_CODES)
        assert item is not None
        half_lives_s = [days * DAY_S for days in half_lives_days]
        lists: dict[str, Any] = {"slots": slots, "num_slots": num_slots, "half_lives_s": half_lives_s}
        return sparse_decay(offsets, times_s, item, anchor_s=self.cutoff_s, **lists)

    def _groups(self, kind: str, distinct: tuple[str, ...], codes: np.ndarray | None) -> np.ndarray:
        """int32 [codes, D] dense number of what each code is."""
        if kind not in SKU_KINDS:
            size = self.store.num_urls if codes is None or kind == "page_visit" else int(codes.max(initial=-1)) + 1
            return np.arange(size)[:, None]
        products = self.store.products
        tables = {
            "items": lambda: np.arange(self.store.num_skus),
            "categories": lambda: products.category,
            "prices": lambda: products.price,
            "names": lambda: self.once("names", lambda: numbered(products.name)),
        }
        return np.stack([tables[name]() for name in distinct], axis=1)

    def recency(self, found: WindowedAggregate, name: str) -> list[Column]:
        """Days since the last and the first event, as fractions; the whole history's length for none."""
        never = found.last_age_s < 0
        ages = (("last", found.last_age_s), ("first", found.first_age_s))
        return [
            Column(f"{name}_{end}_days", "days", np.where(never, self.length_days, age / DAY_S)) for end, age in ages
        ]


class Block(Protocol):
    """A part of a feature set."""

    def columns(self, history: History) -> Iterator[Column]:
        """Its columns of the clients at hand, names each once and the same for all clients."""
        ...


def features_of(
    history: History,
    columns: Callable[[History], Iterable[Column]],
    directory: Path | None,
    sparse: bool = False,
    missing: str | None = None,
) -> Features:
    """The columns of all clients of a history; memory beyond the result holds a block of clients per thread.

    Args:
        history: all clients.
        columns: gives the columns of the clients at hand.
        directory: the result is written there and mapped from there, in memory when None.
        sparse: leave the zeros out, unless the result is in memory and small.
        missing: name under which the history's day knows what stands for NaN; None: there is none.
    """
    # Nobody's columns: their names, and whatever is made once.
    named = [
        (name, column.unit)
        for column in columns(history.part(0, 0))
        for name in ([column.name] if isinstance(column.name, str) else column.name)
    ]
    names, units = tuple(name for name, _ in named), tuple(unit for _, unit in named)

    def fill(block: np.ndarray, first: int, last: int) -> None:
        place, single = 0, []
        for column in columns(history.part(first, last)):
            if column.values.ndim == 1:
                single.append(column.values)
                continue
            place = _lay(single, block, place)
            block[:, place : place + column.values.shape[1]] = column.values
            place += column.values.shape[1]
        _lay(single, block, place)

    client_ids = np.asarray(history.store.client_ids)[history.clients]
    if sparse and (directory is not None or len(client_ids) * len(names) > MOST_ZEROS):
        return in_sparse_blocks(client_ids, names, units, fill, directory)
    if missing is None:
        return in_client_blocks(client_ids, names, units, fill, directory)
    return in_client_blocks(
        *(client_ids, names, units, fill, directory),
        missing=lambda values: _known_means(history.day, missing, values),
    )


def _known_means(day: DayStatistics, name: str, values: Rows) -> np.ndarray:
    """Float64 [F]: what the day knows under a name, or the means of the values that are there."""
    return day.statistic((name,), lambda: gathered(KnownMeans(), values, day.first_part))[0]


def _lay(single: list[np.ndarray], block: np.ndarray, place: int) -> int:
    """Lays columns into a block from a place on and forgets them; returns the place behind them."""
    if single:
        _turn(np.stack(single, dtype=np.float32, casting="same_kind"), block, place)
        place += len(single)
        single.clear()
    return place


@njit
def _turn(columns, block, place):  # pragma: no cover - compiled
    """Some rows at a time: their lines stay in the cache until all columns are written."""
    for start in range(0, columns.shape[1], ROWS_TO_TURN):
        end = min(start + ROWS_TO_TURN, columns.shape[1])
        for column in range(columns.shape[0]):
            for row in range(start, end):
                block[row, place + column] = columns[column, row]


def windows_of(days: tuple[int, ...]) -> tuple[tuple[int | None, ...], list[str]]:
    """Lengths in seconds and names of windows, all history last."""
    return (*(length * DAY_S for length in days), None), [*(f"{length}d" for length in days), "all"]


def check_windows(name: str, days: tuple[int, ...]) -> None:
    """Raises ValueError unless the lengths of some windows are > 0 and ascending."""
    if not days or min(days) < 1 or sorted(set(days)) != [*days]:
        raise ValueError(f"{name}: windows_days must be > 0 and ascending, got {days}")


def share_of(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


def known_where(has: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values where there is one, elsewhere NaN."""
    return np.where(has, values, np.nan)


def numbered(codes: np.ndarray) -> np.ndarray:
    """int32 [N]: equal rows of uint8 [N, 16] get equal numbers, 0 up to their number - 1."""
    halves = np.ascontiguousarray(codes).view(np.uint64).reshape(-1, 2)
    slots = np.full(1 << (2 * len(halves) + 1).bit_length(), -1, np.int32)
    numbers = np.empty(len(halves), np.int32)
    _number(halves, slots, numbers)
    return numbers


@njit
def _number(halves, slots, numbers):  # pragma: no cover - compiled
    """A hash table with the first row of each number in it; half of its slots stay free."""
    last, different = np.uint64(len(slots) - 1), 0
    for row in range(len(halves)):
        one, other = halves[row, 0], halves[row, 1]
        mixed = (one ^ (other * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xFF51AFD7ED558CCD)
        slot = (mixed ^ (mixed >> np.uint64(32))) & last
        while slots[slot] >= 0 and (halves[slots[slot], 0] != one or halves[slots[slot], 1] != other):
            slot = (slot + np.uint64(1)) & last
        if slots[slot] < 0:
            slots[slot] = row
            numbers[row] = different
            different += 1
        else:
            numbers[row] = numbers[slots[slot]]


def price_table(store: EventStore) -> np.ndarray:
    """float64 [S, 2] per sku: price bucket (0 if unknown) and whether it is known."""
    known = store.products.price >= FIRST_ID
    return np.stack((np.where(known, store.products.price - FIRST_ID, 0), known), axis=1).astype(np.float64)
