"""The columns of `count_features` straight from the tables of events, for who needs them once and needs no store.

One pass over every kind. Of all events only their numbers per client and per item are kept, and, as 12 bytes each, the
events of the longest window. When the lists of frequent values are known, those of them that are in a list are sorted
by client and counted like the columns of a store, so that both ways give the same bytes.

The anchor "file_order" is the aggregated-features baseline of the RecSys Challenge 2025, number by number. What that
code does and a careful reader would not expect, kept there on purpose:

- windows end at the last event of their own kind (relevant clients only), start and end inclusive;
- which events lie in a window is decided on sorted times, but applied to the client's events in file order: of n events
  before the window's start, the first n *in the file* are left out. Right only if the file is sorted by time. It takes
  a second pass, which knows how many each client leaves out;
- lists: count descending, ties by first appearance in the file;
- clients: ascending buyers, then ascending new clients of add_to_cart, remove_from_cart, page_visit, search_query;
  those without events have no row there and follow here, as zeros.

`values.astype(np.float16)` is their output; counts above 2,048 lose exactness there, from 65,520 on they become inf.
Source: Synerise/recsys2025, aggregated_features_baseline (behaviour, not code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numba import njit

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import ITEM_COLUMN, NUM_CODES
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import Features
from ubp_fast.features.organisers.counts import CountedKind, CountsConfig, SearchedKind, counted_matrix, mean_codes
from ubp_fast.features.popular import PopularValues, most_frequent
from ubp_fast.store.build import count, places_of_skus
from ubp_fast.store.clients import clients_of, no_history
from ubp_fast.store.event_store import KindColumns
from ubp_fast.store.ids import MAX_COUNT, KnownIds, Numbering
from ubp_fast.store.spill import EARLIEST_S, TIME_BITS, keys_of, sort_events
from ubp_fast.store.vocabulary import FIRST_ID, dense_products

T = TypeVar("T")


def count_features_once(
    events: EventDirectory, cutoff_s: int, config: CountsConfig | None = None, directory: Path | None = None
) -> Features:
    """`count_features` of the store with this cutoff, which is not made.

    Args:
        events: the canonical events; order of rows and range of ids do not matter.
        cutoff_s: seconds since 1970 UTC; nothing from there on is looked at.
        config: windows, lists, anchor.
        directory: the result is written there and mapped from there.

    Returns:
        The relevant clients of the source when it names them, else all with an event before the cutoff; by ascending
        id, or in the organisers' order for the anchor "file_order". Sparse above 1,000 columns. Kinds that the shop
        does not have give no columns: with purchases only there are 91 at the defaults.

    Raises:
        DataError: no event before the cutoff, too many clients, or a sku without properties.
    """
    once = _Once(events, cutoff_s, config or CountsConfig())
    kinds = once.kinds()
    if not kinds:
        raise no_history(events, cutoff_s)
    return counted_matrix(once.client_ids, kinds, once.config, directory)


class _Products:
    """The product table, for all kinds with skus."""

    def __init__(self, events: EventDirectory) -> None:
        products = events.products(("sku", "category", "price")).sort("sku")
        self.known = KnownIds(products["sku"].to_numpy())
        self.dense = dense_products(products)


class _Skus:
    """Skus of one kind: their numbers are dense ids of the whole product table."""

    def __init__(self, events: EventDirectory, kind: str, products: _Products) -> None:
        self._events, self._kind = events, kind
        self._known, self._dense = products.known, products.dense
        self._counts = np.zeros(len(self._dense.sku_ids), np.int64)
        self.first_seen: np.ndarray | None = None

    def codes(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Numbers i32 of values[rows]."""
        return places_of_skus(self._events, self._kind, self._known, values[rows]) + np.int32(FIRST_ID)

    def number(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Numbers i32 of values[rows], which are counted."""
        numbers = self.codes(values, rows)
        count(numbers, self._counts)
        return numbers

    def candidates(self, top_values: int) -> _Skus:
        """For the second pass, which notes when each one was seen first."""
        self.first_seen = np.full(len(self._counts), np.iinfo(np.int64).max)
        return self

    def listed(self, numbers: np.ndarray, top_values: int) -> tuple[PopularValues, np.ndarray, np.ndarray]:
        """The lists, which numbers are in one of them, and the codes i32 of these."""
        sku_ids, category_ids, category, price = self._dense
        prices = np.arange(int(price.max(initial=0)) + 1) - FIRST_ID
        tables = {"sku": (None, sku_ids), "category": (category, category_ids), "price": (price, prices)}
        popular = most_frequent(tables, self._counts, top_values, self.first_seen)
        is_listed = (popular.slots[numbers] >= 0).any(axis=1)
        return popular, is_listed, numbers[is_listed]


class _Urls:
    """Urls: numbers in order of appearance, or the ids themselves; see `Numbering`."""

    def __init__(self) -> None:
        self._numbering = Numbering()
        self.number = self._numbering.number

    def listed(self, numbers: np.ndarray, top_values: int) -> tuple[PopularValues, np.ndarray, np.ndarray]:
        """As `_Skus.listed`; a code is the place of a number among those in the list."""
        ids, top, _ = self._numbering.most_frequent(top_values)
        order = np.argsort(top)
        codes = KnownIds(top[order]).find(numbers)
        popular = PopularValues(order.astype(np.int32)[:, None], tuple(f"url_{value}" for value in ids.tolist()))
        return popular, codes >= 0, codes[codes >= 0]

    def candidates(self, top_values: int) -> _FrequentUrls:
        """For the second pass: all that came often enough for the list, whatever breaks ties."""
        least = self._numbering.most_frequent(top_values)[2].min(initial=MAX_COUNT)
        ids, numbers = self._numbering.counted(int(least))
        order = np.argsort(ids)
        return _FrequentUrls(ids[order], self._numbering.counts_of(numbers[order]))


class _FrequentUrls:
    """Urls of the second pass: a code is a place in `ids`, i64 ascending, or -1."""

    def __init__(self, ids: np.ndarray, counts: np.ndarray) -> None:
        self._ids, self._counts, self._known = ids, counts, KnownIds(ids)
        self.first_seen = np.full(len(ids), np.iinfo(np.int64).max)

    def codes(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Codes i32 of values[rows]."""
        return self._known.find(values[rows])

    def listed(self, codes: np.ndarray, top_values: int) -> tuple[PopularValues, np.ndarray, np.ndarray]:
        """As `_Skus.listed`."""
        top = np.lexsort((self.first_seen, -self._counts))[:top_values]
        slots = np.full((len(self._ids), 1), -1, np.int32)
        slots[top, 0] = np.arange(len(top))
        is_listed = slots[codes, 0] >= 0
        labels = tuple(f"url_{value}" for value in self._ids[top].tolist())
        return PopularValues(slots, labels), is_listed, codes[is_listed]


class _Searches(NamedTuple):
    """Number of searches of each client, i64 [U], and their mean codes, float32 [U, 16]."""

    num_events: np.ndarray
    means: np.ndarray

    def of(self, order: np.ndarray) -> _Searches:
        return _Searches(self.num_events[order], self.means[order])

    def kind(self, name: str, config: CountsConfig) -> SearchedKind:
        return SearchedKind(name, lambda first, last: self.means[first:last])


class _Pass(NamedTuple):
    """What a pass over a kind with items leaves.

    Attributes:
        num_events: i64 [U], events of every client over all time.
        items: their counts.
        anchor_s: where windows end.
        keys: i64 [N], see `keys_of`, of the events that a window may hold.
        numbers: i32 [N], what they are about.
    """

    num_events: np.ndarray
    items: Any
    anchor_s: int
    keys: np.ndarray
    numbers: np.ndarray

    def kind(self, name: str, config: CountsConfig) -> CountedKind:
        """The events that are in a list, sorted."""
        popular, is_listed, codes = self.items.listed(self.numbers, config.top_values)
        offsets, timestamp_s, item = sort_events(self.keys[is_listed], codes, 0, len(self.num_events))

        def columns(first: int, last: int) -> KindColumns:
            return KindColumns(offsets[first : last + 1], timestamp_s, item, None)

        return CountedKind(name, columns, popular, self.anchor_s, config.anchor != "cutoff", self.num_events)


class _Survey(NamedTuple):
    """What the first pass leaves for the anchor "file_order".

    Attributes:
        num_events, items, anchor_s: as in `_Pass`.
        starts_s: i64 [W], where windows begin.
        left_out: i32 [U, W], how many events of a client, the first ones in the file, a window leaves out.
    """

    num_events: np.ndarray
    items: Any
    anchor_s: int
    starts_s: np.ndarray
    left_out: np.ndarray


class _Batch(NamedTuple):
    """Events of our clients before the cutoff: rows i32 of the batch, places i32 of their clients; all times, items."""

    rows: np.ndarray
    clients: np.ndarray
    timestamp_s: np.ndarray
    values: np.ndarray


class _Once:
    """The tables of a directory, kind by kind.

    Attributes:
        client_ids: i64 [U], in the order of the result once `kinds` has returned.
    """

    def __init__(self, events: EventDirectory, cutoff_s: int, config: CountsConfig) -> None:
        self.config = config
        self._events, self._cutoff_s = events, cutoff_s
        self.client_ids = clients_of(events, cutoff_s, False, None)[0].astype(np.int64)
        self._clients = KnownIds(self.client_ids)

    @cached_property
    def _products(self) -> _Products:
        return _Products(self._events)

    def _batches(self, kind: str) -> Iterator[_Batch]:
        for client_id, timestamp_s, values in self._events.batches(kind):
            rows, clients = self._clients.known(client_id, timestamp_s, self._cutoff_s)
            if len(rows):
                yield _Batch(rows, clients, timestamp_s, values)

    def kinds(self) -> list[CountedKind | SearchedKind]:
        """What is counted of every kind that has an event of our clients."""
        if self.config.anchor == "file_order":
            return self._kinds_in_file_order()
        passes = ((kind, self._first(kind, self._pass)) for kind in self._events.kinds)
        return [found.kind(kind, self.config) for kind, found in passes if found.num_events.any()]

    def _kinds_in_file_order(self) -> list[CountedKind | SearchedKind]:
        surveys = [(kind, self._first(kind, self._survey)) for kind in self._events.kinds]
        surveys = [(kind, found) for kind, found in surveys if found.num_events.any()]
        first_kind = np.full(len(self.client_ids), len(surveys))
        for index, (_, found) in reversed([*enumerate(surveys)]):
            first_kind[found.num_events > 0] = index
        order = np.argsort(first_kind, kind="stable")
        self.client_ids = self.client_ids[order]
        passes = (
            (kind, found.of(order) if isinstance(found, _Searches) else self._again(kind, found, order))
            for kind, found in surveys
        )
        return [found.kind(kind, self.config) for kind, found in passes]

    def _first(self, kind: str, of_items: Callable[[str], T]) -> T | _Searches:
        return self._searches() if ITEM_COLUMN[kind] == "query" else of_items(kind)

    def _searches(self) -> _Searches:
        sums = np.zeros((len(self.client_ids), NUM_CODES), np.int64)
        num_events = np.zeros(len(self.client_ids), np.int64)
        for batch in self._batches("search_query"):
            _add_codes(batch.rows, batch.clients, batch.values, sums, num_events)
        return _Searches(num_events, mean_codes(sums, num_events))

    def _pass(self, kind: str) -> _Pass:
        items = _Skus(self._events, kind, self._products) if ITEM_COLUMN[kind] == "sku" else _Urls()
        is_last = self.config.anchor != "cutoff"
        anchor_s = -(2**62) if is_last else self._cutoff_s
        num_events = np.zeros(len(self.client_ids), np.int64)
        keys, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for rows, clients, timestamp_s, values in self._batches(kind):
            if is_last:  # it only grows, so that no event of the last windows is lost
                anchor_s = max(anchor_s, int(timestamp_s[rows].max()))
            numbered = items.number(values, rows)
            kept = _recent(rows, clients, timestamp_s, anchor_s - self.config.windows_days[-1] * DAY_S, num_events)
            keys.append(keys_of(clients[kept], timestamp_s[rows[kept]]))
            numbers.append(numbered[kept])
        return _Pass(num_events, items, anchor_s, np.concatenate(keys), np.concatenate(numbers))

    def _survey(self, kind: str) -> _Survey:
        num_events, items, anchor_s, keys, _ = self._pass(kind)
        clients, time_s = keys >> TIME_BITS, (keys & ((1 << TIME_BITS) - 1)) + EARLIEST_S
        starts_s = anchor_s - np.array(self.config.windows_days) * DAY_S
        left_out = np.empty((len(num_events), len(starts_s)), np.int32)
        for window, start_s in enumerate(starts_s):
            left_out[:, window] = num_events - np.bincount(clients[time_s >= start_s], minlength=len(num_events))
        return _Survey(num_events, items, anchor_s, starts_s, left_out)

    def _again(self, kind: str, survey: _Survey, order: np.ndarray) -> _Pass:
        """Events get the start of the shortest window that has them as their time: it is all that counts."""
        items = survey.items.candidates(self.config.top_values)
        position, seen, done = np.argsort(order), np.zeros(len(order), np.int64), 0
        keys, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for rows, clients, _, values in self._batches(kind):
            codes = items.codes(values, rows)
            kept, times_s = _left(clients, codes, survey.left_out, survey.starts_s, seen, items.first_seen, done)
            keys.append(keys_of(position[clients[kept]], times_s))
            numbers.append(codes[kept])
            done += len(codes)
        num_events = survey.num_events[order]
        return _Pass(num_events, items, survey.anchor_s, np.concatenate(keys), np.concatenate(numbers))


@njit(cache=True, nogil=True)
def _recent(rows, clients, timestamp_s, from_s, num_events):  # pragma: no cover - compiled
    """Counts all events of each client; places i32 of those from a time on."""
    places = np.empty(rows.size, np.int32)
    found = 0
    for place in range(rows.size):
        num_events[clients[place]] += 1
        places[found] = place
        found += timestamp_s[rows[place]] >= from_s
    return places[:found]


@njit(cache=True, nogil=True)
def _left(clients, codes, left_out, starts_s, seen, first_seen, done):  # pragma: no cover - compiled
    """Events that no window leaves out, or a longer one does not, and the start of the shortest such window.

    Counts the events `seen` of each client so far, and notes when each code was seen first; `done` events came before.
    """
    places, times_s = np.empty(clients.size, np.int32), np.empty(clients.size, np.int64)
    found = 0
    for place in range(clients.size):
        client, code, window = clients[place], codes[place], 0
        number = seen[client]
        seen[client] += 1
        if code < 0:
            continue
        first_seen[code] = min(first_seen[code], done + place)
        while window < starts_s.size and number < left_out[client, window]:
            window += 1
        if window < starts_s.size:
            places[found], times_s[found] = place, starts_s[window]
            found += 1
    return places[:found], times_s[:found]


@njit(cache=True, nogil=True)
def _add_codes(rows, clients, codes, sums, num_events):  # pragma: no cover - compiled
    """Adds the codes u8 [N, 16] of some rows to their clients."""
    for place in range(rows.size):
        client = clients[place]
        num_events[client] += 1
        for column in range(codes.shape[1]):
            sums[client, column] += codes[rows[place], column]
