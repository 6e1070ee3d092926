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
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ubp_fast.compiled import njit
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import ITEM_COLUMN, NUM_CODES
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import Features
from ubp_fast.features.organisers.counts import (
    CountedKind,
    CountsConfig,
    SearchedKind,
    counted_matrix,
    mean_codes,
    with_price_bins,
)
from ubp_fast.features.popular import PopularValues, most_frequent
from ubp_fast.store.build import count, places_of_skus
from ubp_fast.store.clients import clients_of, no_history
from ubp_fast.store.event_store import KindColumns
from ubp_fast.store.ids import MAX_COUNT, KnownIds, Numbering
from ubp_fast.store.spill import keys_of, sort_events
from ubp_fast.store.vocabulary import FIRST_ID, DenseProducts, dense_products


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


class _Skus:
    """Skus of one kind: their numbers are dense ids of the whole product table.

    Args:
        number: gives the places i32 of skus in the product table.
        products: the product table.
        in_order: ties in the lists go to what came first, not to the smaller id.
        price_bins: see `CountsConfig`.
    """

    def __init__(
        self, number: Callable[[np.ndarray], np.ndarray], products: DenseProducts, in_order: bool, price_bins: int
    ) -> None:
        self._number, self._dense, self._price_bins = number, products, price_bins
        self._counts = np.zeros(len(self._dense.sku_ids), np.int64)
        self._first_seen = np.full(len(self._counts), 2**62) if in_order else None
        self._done = 0

    def number(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Numbers i32 of values[rows], which are counted."""
        numbers = self._number(values[rows]) + np.int32(FIRST_ID)
        count(numbers, self._counts)
        if self._first_seen is not None:
            _note_first(numbers, self._done, self._first_seen)
            self._done += len(numbers)
        return numbers

    def listed(self, numbers: np.ndarray, top_values: int) -> tuple[PopularValues, np.ndarray, np.ndarray]:
        """The lists, which numbers are in one of them, and the codes i32 of these."""
        sku_ids, category_ids, category, price = self._dense
        prices = np.arange(int(price.max(initial=0)) + 1) - FIRST_ID
        tables = {"sku": (None, sku_ids), "category": (category, category_ids), "price": (price, prices)}
        popular = most_frequent(tables, self._counts, top_values, self._first_seen)
        popular = with_price_bins(popular, price, self._price_bins)
        is_listed = (popular.slots[numbers] >= 0).any(axis=1)
        return popular, is_listed, numbers[is_listed]


class _Urls:
    """Urls: see `Numbering` for their numbers."""

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

    def frequent(self, top_values: int) -> _FrequentUrls:
        """All that came often enough for the list, whatever breaks ties."""
        least = self._numbering.most_frequent(top_values)[2].min(initial=MAX_COUNT)
        ids, numbers = self._numbering.counted(int(least))
        order = np.argsort(ids)
        return _FrequentUrls(ids[order], self._numbering.counts_of(numbers[order]))


class _FrequentUrls:
    """Urls in order: the number of one is its place in `ids`, i64 ascending, or -1."""

    def __init__(self, ids: np.ndarray, counts: np.ndarray) -> None:
        self._ids, self._counts, self._known = ids, counts, KnownIds(ids)
        self._first_seen, self._done = np.full(len(ids), 2**62), 0

    def number(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Numbers i32 of values[rows]."""
        numbers = self._known.find(values[rows])
        _note_first(numbers, self._done, self._first_seen)
        self._done += len(numbers)
        return numbers

    def listed(self, numbers: np.ndarray, top_values: int) -> tuple[PopularValues, np.ndarray, np.ndarray]:
        """As `_Skus.listed`."""
        top = np.lexsort((self._first_seen, -self._counts))[:top_values]
        slots = np.full((len(self._ids) + 1, 1), -1, np.int32)  # the last one is that of -1
        slots[top, 0] = np.arange(len(top))
        is_listed = slots[numbers, 0] >= 0
        labels = tuple(f"url_{value}" for value in self._ids[top].tolist())
        return PopularValues(slots, labels), is_listed, numbers[is_listed]


class _Searches(NamedTuple):
    """Number of searches i64 [U] and mean codes float32 [U, 16] of each client."""

    num_events: np.ndarray
    means: np.ndarray

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
    items: _Skus | _Urls | _FrequentUrls
    anchor_s: int
    keys: np.ndarray
    numbers: np.ndarray

    def kind(self, name: str, config: CountsConfig) -> CountedKind:
        """The events that are in a list, sorted."""
        popular, is_listed, codes = self.items.listed(self.numbers, config.top_values)
        offsets, timestamp_s, item, _ = sort_events(self.keys[is_listed], codes, 0, len(self.num_events))

        def columns(first: int, last: int) -> KindColumns:
            return KindColumns(offsets[first : last + 1], timestamp_s, item, None)

        return CountedKind(name, columns, popular, self.anchor_s, config.anchor != "cutoff", self.num_events)


class _FileOrder(NamedTuple):
    """What a first pass finds out about the file order of a kind.

    Attributes:
        num_events: i64 [U], events of every client.
        anchor_s: where windows end.
        starts_s: i64 [W], where they begin.
        left_out: i32 [U, W], how many events of a client, the first ones in the file, each window leaves out.
        urls: that may be in the list; None for skus.
    """

    num_events: np.ndarray
    anchor_s: int
    starts_s: np.ndarray
    left_out: np.ndarray
    urls: _FrequentUrls | None


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
        self._order = self._place = np.arange(len(self.client_ids))

    @cached_property
    def _products(self) -> tuple[KnownIds, DenseProducts]:
        products = self._events.products(("sku", "category", "price")).sort("sku")
        return KnownIds(products["sku"].to_numpy()), dense_products(products)

    def _batches(self, kind: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Rows i32 of the events that count, places i32 of their clients, all times and all items."""
        for client_id, timestamp_s, values, _ in self._events.batches(kind):
            rows, clients = self._clients.known(client_id, timestamp_s, self._cutoff_s)
            if len(rows):
                yield rows, clients, timestamp_s, values

    def kinds(self) -> list[CountedKind | SearchedKind]:
        """What is counted of every kind that has an event of our clients."""
        in_order = self.config.anchor == "file_order"
        found = self._in_file_order() if in_order else ((kind, self._pass(kind)) for kind in self._events.kinds)
        return [each.kind(kind, self.config) for kind, each in found if each.num_events.any()]

    def _in_file_order(self) -> Iterator[tuple[str, _Pass | _Searches]]:
        """First how many events the windows leave out and who comes first, then the events that are left."""
        surveys = [(kind, self._survey(kind)) for kind in self._events.kinds]
        first_kind = np.full(len(self.client_ids), len(surveys))
        for index, (_, survey) in reversed([*enumerate(surveys)]):
            first_kind[survey.num_events > 0] = index
        self._order = np.argsort(first_kind, kind="stable")
        self._place, self.client_ids = np.argsort(self._order), self.client_ids[self._order]
        for kind, survey in surveys:
            if isinstance(survey, _Searches):
                yield kind, _Searches(survey.num_events[self._order], survey.means[self._order])
            else:
                yield kind, self._pass(kind, survey)

    def _survey(self, kind: str) -> _FileOrder | _Searches:
        if ITEM_COLUMN[kind] == "query":
            return self._searches(kind)
        anchor_s, urls = self._last_s(kind), _Urls() if ITEM_COLUMN[kind] == "url" else None
        starts_s = anchor_s - np.array(self.config.windows_days) * DAY_S
        num_events = np.zeros(len(self.client_ids), np.int64)
        left_out = np.zeros((len(num_events), len(starts_s)), np.int32)
        for rows, clients, timestamp_s, values in self._batches(kind):
            _leave_out(rows, clients, timestamp_s, starts_s, num_events, left_out)
            if urls is not None:
                urls.number(values, rows)
        frequent = None if urls is None else urls.frequent(self.config.top_values)
        return _FileOrder(num_events, anchor_s, starts_s, left_out, frequent)

    def _last_s(self, kind: str) -> int:
        """Last event of our clients: a pass of its own, or a file in the order of time would be kept as a whole."""
        return max((int(times_s[rows].max()) for rows, _, times_s, _ in self._batches(kind)), default=self._cutoff_s)

    def _searches(self, kind: str) -> _Searches:
        sums = np.zeros((len(self.client_ids), NUM_CODES), np.int64)
        num_events = np.zeros(len(self.client_ids), np.int64)
        for rows, clients, _, codes in self._batches(kind):
            _add_codes(rows, clients, codes, sums, num_events)
        return _Searches(num_events, mean_codes(sums, num_events))

    def _pass(self, kind: str, survey: _FileOrder | None = None) -> _Pass | _Searches:
        """All events of a kind; after a survey, those that are left have the start of their shortest window as time."""
        if ITEM_COLUMN[kind] == "query":
            return self._searches(kind)
        items: _Skus | _Urls | _FrequentUrls = _Urls() if survey is None or survey.urls is None else survey.urls
        if ITEM_COLUMN[kind] == "sku":
            known, dense = self._products
            number = partial(places_of_skus, self._events, kind, known)
            items = _Skus(number, dense, in_order=survey is not None, price_bins=self.config.price_bins)
        anchor_s = (
            self._cutoff_s if self.config.anchor == "cutoff" else survey.anchor_s if survey else self._last_s(kind)
        )
        from_s = anchor_s - self.config.windows_days[-1] * DAY_S
        num_events = np.zeros(len(self.client_ids), np.int64)
        keys, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for rows, clients, timestamp_s, values in self._batches(kind):
            numbered, times_s = items.number(values, rows), timestamp_s
            if survey is not None:
                times_s = timestamp_s.copy()
                _set_times(rows, clients, survey.left_out, survey.starts_s, num_events, times_s)
            kept = _recent(rows, clients, times_s, from_s, num_events)
            if survey is not None:
                kept, clients = kept[numbered[kept] >= 0], self._place[clients]
            keys.append(keys_of(clients[kept], times_s[rows[kept]]))
            numbers.append(numbered[kept])
        return _Pass(num_events[self._order], items, anchor_s, np.concatenate(keys), np.concatenate(numbers))


@njit
def _recent(rows, clients, timestamp_s, from_s, num_events):  # pragma: no cover - compiled
    """Counts all events of each client; places i32 of those from a time on."""
    places = np.empty(rows.size, np.int32)
    found = 0
    for place in range(rows.size):
        num_events[clients[place]] += 1
        places[found] = place
        found += timestamp_s[rows[place]] >= from_s
    return places[:found]


@njit
def _leave_out(rows, clients, timestamp_s, starts_s, num_events, left_out):  # pragma: no cover - compiled
    """Counts all events of each client, and those before each window."""
    for place in range(rows.size):
        num_events[clients[place]] += 1
        for window in range(starts_s.size):
            left_out[clients[place], window] += timestamp_s[rows[place]] < starts_s[window]


@njit
def _set_times(rows, clients, left_out, starts_s, num_events, timestamp_s):  # pragma: no cover - compiled
    """The start of the shortest window that has an event, a moment earlier where none has; `num_events` came before."""
    for place in range(rows.size):
        client, window = clients[place], 0
        while window < starts_s.size and num_events[client] < left_out[client, window]:
            window += 1
        timestamp_s[rows[place]] = starts_s[window] if window < starts_s.size else starts_s[-1] - 1
        num_events[client] += 1
    for place in range(rows.size):  # `_recent` counts them
        num_events[clients[place]] -= 1


@njit
def _note_first(numbers, done, first_seen):  # pragma: no cover - compiled
    """When each number was seen first, counted in events; `done` came before. -1 is none."""
    for place in range(numbers.size):
        if numbers[place] >= 0:
            first_seen[numbers[place]] = min(first_seen[numbers[place]], done + place)


@njit
def _add_codes(rows, clients, codes, sums, num_events):  # pragma: no cover - compiled
    """Adds the codes u8 [N, 16] of some rows to their clients."""
    for place in range(rows.size):
        client = clients[place]
        num_events[client] += 1
        for column in range(codes.shape[1]):
            sums[client, column] += codes[rows[place], column]
