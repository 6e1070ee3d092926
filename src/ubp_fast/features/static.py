"""The 46 static features of a client at a cutoff, from all events before it.

Per table add, buy, remove: has any event, distinct skus, categories, prices, names, mean price bucket; per visit and
search: has any, distinct urls or queries; per table and for all tables together: days since the last and the first
event, days between them, distinct timestamps. Days are whole days; names and order are those of the winner's list.

Fixed against the original: a client without such events gets the whole history's length as its recency, not 0 days
("today"), and scaling is a separate step that is fitted once (`scaling.py`), not per data set.
Source: the list of 46 names in public descendants of the winning solution of the RecSys Challenge 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History, features_of, price_table
from ubp_fast.features.matrix import Features
from ubp_fast.kernels.windowed_aggregate import WindowedAggregate
from ubp_fast.store.event_store import TIMELINE, EventStore

SHORT_NAMES = {
    "add_to_cart": "add",
    "product_buy": "buy",
    "remove_from_cart": "remove",
    "page_visit": "visit",
    "search_query": "search",
}
ITEM_TABLES = ("add_to_cart", "product_buy", "remove_from_cart")


def static_features(store: EventStore, cutoff_s: int, directory: Path | None = None) -> Features:
    """The 46 static features of every client that needs a profile.

    Args:
        store: event store.
        cutoff_s: events with `timestamp_s < cutoff_s` are seen, seconds since 1970 UTC.
        directory: the result is written there and mapped from there.

    Returns:
        [U, 46] float32; clients in the order of the store. Urls that the store's vocabulary does not hold count as one.
    """
    return features_of(History.of(store, cutoff_s), _columns, directory)


def _columns(history: History) -> Iterator[Column]:
    found = {kind: _of_kind(history, kind) for kind in SHORT_NAMES}
    everything = history.aggregate("static", TIMELINE, windows_s=(None,), periods_s=(1,))
    for kind in ITEM_TABLES:
        short, result = SHORT_NAMES[kind], found[kind]
        yield Column(f"{short}_flag", "flag", result.totals[:, 0] > 0)
        for index, name in enumerate(("sku", "category", "price", "name")):
            yield Column(f"unique_{short}_{name}", "items", result.distinct[:, 0, index])
        mean = result.sums[:, 0, 0] / np.maximum(result.sums[:, 0, 1], 1)
        yield Column(f"{short}_price_mean", "price bucket", mean)
    for kind, item in (("page_visit", "url"), ("search_query", "search_query")):
        yield Column(f"{kind}_flag", "flag", found[kind].totals[:, 0] > 0)
        yield Column(f"unique_{item}", "items", found[kind].distinct[:, 0, 0])
    for short, result in (("all", everything), *((SHORT_NAMES[kind], found[kind]) for kind in SHORT_NAMES)):
        yield from _times(short, result, int(history.length_days))


def _of_kind(history: History, kind: str) -> WindowedAggregate:
    """All-history aggregate with distinct items; for skus also categories, prices, names, and the sum of prices."""
    is_item = kind in ITEM_TABLES
    distinct = ("items", "categories", "prices", "names") if is_item else ("items",)
    tables: dict[str, Any] = {"values": lambda: price_table(history.store)} if is_item else {}
    return history.aggregate("static", kind, distinct, windows_s=(None,), periods_s=(1,), **tables)


def _times(short: str, result: WindowedAggregate, history_days: int) -> Iterator[Column]:
    """The four features of time of one table, in whole days."""
    never = result.last_age_s < 0
    ages = ((f"{short}_from_last_to_end", result.last_age_s), (f"min_{short}_from_first_to_end", result.first_age_s))
    for name, age_s in ages:
        yield Column(f"{name}_days", "days", np.where(never, history_days, age_s // DAY_S))
    yield Column(f"{short}_duration_days", "days", result.span_s // DAY_S)
    yield Column(f"unique_{short}_timestamp", "items", result.distinct_times[:, 0, 0])
