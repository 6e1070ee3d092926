"""The columns of `count_features` straight from the tables of events, for who needs them once and needs no store.

One pass over every kind. Of all events only their numbers per client and per item are kept, and, as 12 bytes each, the
events of the longest window. When the lists of frequent values are known, those of them that are in a list are sorted
by client and counted like the columns of a store, so that both ways give the same bytes.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numba import njit

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import ITEM_COLUMN, NUM_CODES
from ubp_fast.events.split import DAY_S
from ubp_fast.features.counts import CountedKind, CountsConfig, SearchedKind, counted_matrix, mean_codes
from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.features.popular import PopularValues, most_frequent
from ubp_fast.features.sparse import SparseFeatureMatrix
from ubp_fast.store.build import count, places_of_skus
from ubp_fast.store.clients import clients_of, no_history
from ubp_fast.store.event_store import KindColumns
from ubp_fast.store.ids import KnownIds, Numbering
from ubp_fast.store.spill import keys_of, sort_events
from ubp_fast.store.vocabulary import FIRST_ID, dense_products


def count_features_once(
    events: EventDirectory, cutoff_s: int, config: CountsConfig | None = None, directory: Path | None = None
) -> FeatureMatrix | SparseFeatureMatrix:
    """`count_features` of the store with this cutoff, which is not made.

    Args:
        events: the canonical events; order of rows and range of ids do not matter.
        cutoff_s: seconds since 1970 UTC; nothing from there on is looked at.
        config: windows, lists, anchor.
        directory: the result is written there and, if dense, mapped from there.

    Returns:
        Clients by ascending id: the relevant ones of the source when it names them, else all with an event before the
        cutoff. Sparse above 1,000 columns.

    Raises:
        DataError: no event before the cutoff, too many clients, or a sku without properties.
    """
    once = _Once(events, cutoff_s, config or CountsConfig())
    kinds = [found for kind in events.kinds if (found := once.kind(kind)) is not None]
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

    def number(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Numbers i32 of values[rows], which are counted."""
        numbers = places_of_skus(self._events, self._kind, self._known, values[rows]) + np.int32(FIRST_ID)
        count(numbers, self._counts)
        return numbers

    def listed(self, numbers: np.ndarray, top_values: int) -> tuple[PopularValues, np.ndarray, np.ndarray]:
        """The lists, which numbers are in one of them, and the codes i32 of these."""
        sku_ids, category_ids, category, price = self._dense
        prices = np.arange(int(price.max(initial=0)) + 1) - FIRST_ID
        tables = {"sku": (None, sku_ids), "category": (category, category_ids), "price": (price, prices)}
        popular = most_frequent(tables, self._counts, top_values)
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


class _Once:
    """One pass over the tables of a directory, kind by kind."""

    def __init__(self, events: EventDirectory, cutoff_s: int, config: CountsConfig) -> None:
        self.config = config
        self._events, self._cutoff_s = events, cutoff_s
        self.client_ids = clients_of(events, cutoff_s, False, None)[0].astype(np.int64)
        self._clients = KnownIds(self.client_ids)

    @cached_property
    def _products(self) -> _Products:
        return _Products(self._events)

    def kind(self, kind: str) -> CountedKind | SearchedKind | None:
        """What is counted of a kind; None if it has no event of our clients."""
        return self._searched(kind) if ITEM_COLUMN[kind] == "query" else self._counted(kind)

    def _searched(self, kind: str) -> SearchedKind | None:
        sums = np.zeros((len(self.client_ids), NUM_CODES), np.int64)
        num_events = np.zeros(len(self.client_ids), np.int64)
        for client_id, timestamp_s, codes in self._events.batches(kind):
            rows, clients = self._clients.known(client_id, timestamp_s, self._cutoff_s)
            _add_codes(rows, clients, codes, sums, num_events)
        means = mean_codes(sums, num_events)
        return SearchedKind(kind, lambda first, last: means[first:last]) if num_events.any() else None

    def _counted(self, kind: str) -> CountedKind | None:
        items = _Skus(self._events, kind, self._products) if ITEM_COLUMN[kind] == "sku" else _Urls()
        is_last = self.config.anchor == "last_event"
        anchor_s = -(2**62) if is_last else self._cutoff_s
        num_events = np.zeros(len(self.client_ids), np.int64)
        keys, numbers = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
        for client_id, timestamp_s, values in self._events.batches(kind):
            rows, clients = self._clients.known(client_id, timestamp_s, self._cutoff_s)
            if not len(rows):
                continue
            if is_last:  # it only grows, so that no event of the last windows is lost
                anchor_s = max(anchor_s, int(timestamp_s[rows].max()))
            numbered = items.number(values, rows)
            kept = _recent(rows, clients, timestamp_s, anchor_s - self.config.windows_days[-1] * DAY_S, num_events)
            keys.append(keys_of(clients[kept], timestamp_s[rows[kept]]))
            numbers.append(numbered[kept])
        if not num_events.any():
            return None
        popular, is_listed, codes = items.listed(np.concatenate(numbers), self.config.top_values)
        histories = sort_events(np.concatenate(keys)[is_listed], codes, 0, len(self.client_ids))
        return CountedKind(kind, KindColumns(*histories, None), popular, anchor_s, is_last, num_events)


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
def _add_codes(rows, clients, codes, sums, num_events):  # pragma: no cover - compiled
    """Adds the codes u8 [N, 16] of some rows to their clients."""
    for place in range(rows.size):
        client = clients[place]
        num_events[client] += 1
        for column in range(codes.shape[1]):
            sums[client, column] += codes[rows[place], column]
