"""Aggregated features: what clients did in windows before a cutoff, with the lists of the most frequent values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ubp_fast.events.schema import SKU_KINDS
from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History, check_windows, features_of, price_table, windows_of
from ubp_fast.features.matrix import Features
from ubp_fast.features.popular import PopularLists, lists_of_kinds, popular_values
from ubp_fast.store.event_store import EventStore


@dataclass(frozen=True)
class AggregatedConfig:
    """What `aggregated_features` counts.

    Attributes:
        windows_days: lengths of the windows in days, ascending. Source: the organisers' 1, 7, 30.
        top_values: most frequent values counted per column. Source: the organisers' 10.
    """

    windows_days: tuple[int, ...] = (1, 7, 30)
    top_values: int = 10

    def __post_init__(self) -> None:
        check_windows("AggregatedConfig", self.windows_days)
        if self.top_values < 0:
            raise ValueError(f"AggregatedConfig: top_values must be >= 0, got {self.top_values}")


def aggregated_features(
    store: EventStore,
    cutoff_s: int,
    config: AggregatedConfig | None = None,
    lists_cutoff_s: int | None = None,
    directory: Path | None = None,
    lists: Mapping[str, PopularLists] | None = None,
) -> Features:
    """Windowed counts of every client that needs a profile, all windows [cutoff - days, cutoff).

    Per kind of the store: number of events and different items over all time and per window, active days, recency in
    days (the whole history's length for what never happened), counts of the most frequent values of each column (sku,
    category, price; url) before the cutoff, and for skus the mean price bucket (0 if nothing).

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        config: windows and lists.
        lists_cutoff_s: the lists of frequent values are made from events before it, `cutoff_s` when None. The same one
            for several cutoffs gives all of them the same columns; it must not be after the profiles' own cutoff.
        directory: the result is written there and mapped from there.
        lists: kind -> frequent values that were chosen already, see `popular_lists`.

    Returns:
        [U, F] float32, all >= 0; clients in the order of the store.
    """
    config = config or AggregatedConfig()
    if lists is None:
        before_s = cutoff_s if lists_cutoff_s is None else lists_cutoff_s
        lists = lists_of_kinds(store, before_s, config.top_values)

    def columns(history: History) -> Iterator[Column]:
        for kind in store.kinds:
            yield from _columns(history, kind, config, lists)

    return features_of(History.of(store, cutoff_s), columns, directory, sparse=True)


def _columns(
    history: History, kind: str, config: AggregatedConfig, lists: Mapping[str, PopularLists]
) -> Iterator[Column]:
    """Per window, the named ones first and all history last; top values only inside the named windows."""
    store, of_skus = history.store, kind in SKU_KINDS
    windows_s, windows = windows_of(config.windows_days)
    tables: dict[str, Any] = {"values": lambda: price_table(store)} if of_skus else {}
    labels: tuple[str, ...] = ()
    if kind != "search_query":
        popular = history.once(("popular", kind), lambda: popular_values(store, kind, lists[kind]))
        labels = popular.labels
        tables |= {"slots": popular.slots, "num_slots": len(labels)}
    distinct = ("items", "categories") if of_skus else ("items",)
    found = history.aggregate("aggregated", kind, distinct, windows_s=windows_s, periods_s=(DAY_S,), **tables)
    items = ("skus", "categories") if of_skus else ("urls",) if kind == "page_visit" else ("queries",)
    for index, window in enumerate(windows):
        yield Column(f"{kind}_count_{window}", "events", found.totals[:, index])
        yield Column(f"{kind}_active_days_{window}", "days", found.distinct_times[:, index, 0])
        for place, item in enumerate(items):
            yield Column(f"{kind}_different_{item}_{window}", "items", found.distinct[:, index, place])
        if of_skus:
            mean = found.sums[:, index, 0] / np.maximum(found.sums[:, index, 1], 1)
            yield Column(f"{kind}_mean_price_{window}", "price bucket", mean)
        if window != "all" and labels:
            yield Column(tuple(f"{kind}_{label}_{window}" for label in labels), "events", found.counts[:, index])
    yield from history.recency(found, kind)
