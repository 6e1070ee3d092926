"""Features of clients at a cutoff: what they did in windows before it, and what they keep doing.

    count_features        the organisers' columns from the store, for any number of clients (`counts.py`)
    count_features_once   the same straight from the tables of events, without a store (`once.py`)
    rich_features         what the strongest systems added, as declared blocks (`rich.py`)
    aggregated_features   counts of popular values, distinct items, mean prices, active days per window, recency
    decayed_features      log1p of exponentially decayed counts per label, activity at several half-lives, recency
    static_features       the 46 summary numbers of the winner's multi-task model (`static.py`)
    organisers_features   the organisers' baseline (`organisers.py`)

All but the last are anchored at the cutoff and read only events before it, lists of popular values included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ubp_fast.events.schema import SKU_KINDS
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.features.organisers import organisers_features
from ubp_fast.features.popular import LabelLists, PopularValues, label_slots, popular_values
from ubp_fast.features.static import item_codes, price_table, static_features
from ubp_fast.features.writing import BLOCK_CLIENTS
from ubp_fast.kernels.windowed_aggregate import WindowedAggregate, window_aggregator, windowed_aggregate
from ubp_fast.store.event_store import EventStore

__all__ = [
    "AggregatedConfig",
    "DecayedConfig",
    "aggregated_features",
    "decayed_features",
    "organisers_features",
    "static_features",
]


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
        if (
            not self.windows_days
            or min(self.windows_days) < 1
            or sorted(set(self.windows_days)) != [*self.windows_days]
        ):
            raise ValueError(f"AggregatedConfig: windows_days must be > 0 and ascending, got {self.windows_days}")
        if self.top_values < 0:
            raise ValueError(f"AggregatedConfig: top_values must be >= 0, got {self.top_values}")


@dataclass(frozen=True)
class DecayedConfig:
    """What `decayed_features` measures.

    Attributes:
        label_kinds: kinds whose events are counted per label.
        half_life_days: of the counts per label.
        activity_half_lives_days: of the counts per kind.
        active_windows_days: windows in which active days are counted, besides all history.
    """

    label_kinds: tuple[str, ...] = ("product_buy", "add_to_cart")
    half_life_days: float = 60.0
    activity_half_lives_days: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 60.0, 180.0)
    active_windows_days: tuple[int, ...] = (14, 30, 90)

    def __post_init__(self) -> None:
        unknown = set(self.label_kinds) - set(SKU_KINDS)
        if unknown:
            raise ValueError(f"DecayedConfig: label_kinds must be among {list(SKU_KINDS)}, got {sorted(unknown)}")


def aggregated_features(
    store: EventStore, cutoff_s: int, config: AggregatedConfig | None = None, lists_cutoff_s: int | None = None
) -> FeatureMatrix:
    """Windowed counts of every client, all windows [cutoff - days, cutoff).

    Per kind of the store: number of events and different items over all time and per window, active days, recency in
    days (the whole history's length for what never happened), counts of the most frequent values of each column (sku,
    category, price; url) among all clients before the cutoff, and for skus the mean price bucket (0 if nothing).

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        config: windows and lists.
        lists_cutoff_s: the lists of frequent values are made from events before it, `cutoff_s` when None. The same one
            for several cutoffs gives all of them the same columns; it must not be after the profiles' own cutoff.

    Returns:
        [U, F] float32, all >= 0; clients in the order of the store.
    """
    config = config or AggregatedConfig()
    values: list[np.ndarray] = []
    names: list[str] = []
    for kind in store.kinds:
        columns = store.kind(kind)
        codes = item_codes(columns)
        popular = _popular(store, kind, cutoff_s if lists_cutoff_s is None else lists_cutoff_s, config)
        slots, labels = (None, []) if popular is None else (popular.slots, [*popular.labels])
        result = windowed_aggregate(
            columns.offsets,
            columns.timestamp_s,
            codes,
            anchor_s=cutoff_s,
            windows_s=(*(days * DAY_S for days in config.windows_days), None),
            slots=slots,
            num_slots=len(labels),
            groups=_distinct_groups(store, kind, codes),
            values=price_table(store) if kind in SKU_KINDS else None,
            periods_s=(DAY_S,),
        )
        windows = [*(f"{days}d" for days in config.windows_days), "all"]
        block = _window_columns(kind, result, windows, labels) | _recency(store, result, cutoff_s)
        values += block.values()
        names += [f"{kind}_{name}" for name in block]
    return matrix_of(store, values, names, [_unit(name) for name in names])


def decayed_features(
    store: EventStore, cutoff_s: int, lists: LabelLists, config: DecayedConfig | None = None
) -> FeatureMatrix:
    """Decayed interests of every client: a purchase from one half-life ago counts half of one from today.

    Args:
        store: event store.
        cutoff_s: events before it are seen, seconds since 1970 UTC.
        lists: name -> (original ids, popularity). The last word of a name says what the ids are: category, sku or
            price. Only lists made from history before the profiles' cutoff keep the result free of leaks.
        config: half-lives and kinds.

    Returns:
        [U, F] float32 >= 0: log1p of the decayed count per label kind, list and label; per kind of the store log1p of
        decayed activity, of days since the last and first event and of active days. Clients in the order of the store.
    """
    config = config or DecayedConfig()
    slots, labels = label_slots(store, lists)
    values: list[np.ndarray] = []
    names: list[str] = []
    for kind in store.kinds:
        columns = store.kind(kind)
        if kind in config.label_kinds and labels:
            aggregator = window_aggregator(
                columns.offsets,
                columns.timestamp_s,
                columns.item,
                anchor_s=cutoff_s,
                slots=slots,
                num_slots=len(labels),
                half_lives_s=(config.half_life_days * DAY_S,),
            )
            decayed = np.empty((len(labels), store.num_clients), np.float32)
            for first in range(0, store.num_clients, BLOCK_CLIENTS):
                last = min(first + BLOCK_CLIENTS, store.num_clients)
                decayed[:, first:last] = np.log1p(aggregator(first, last).decayed_counts[:, 0]).T
            values += [*decayed]
            names += [f"{kind}_decayed_{label}" for label in labels]
        block = _activity(store, kind, cutoff_s, config)
        values += [np.log1p(column) for column in block.values()]
        names += [f"{kind}_{name}" for name in block]
    units = [f"log1p {_unit(name)}" for name in names]
    return matrix_of(store, values, names, units)


def matrix_of(
    store: EventStore, columns: Sequence[np.ndarray], names: Sequence[str], units: Sequence[str]
) -> FeatureMatrix:
    """Columns of all clients of the store as float32, without a wider copy of the whole."""
    values = np.empty((store.num_clients, len(columns)), np.float32)
    for index, column in enumerate(columns):
        values[:, index] = column
    return FeatureMatrix(np.array(store.client_ids), values, tuple(names), tuple(units))


def _popular(store: EventStore, kind: str, before_s: int, config: AggregatedConfig) -> PopularValues | None:
    return None if kind == "search_query" else popular_values(store, kind, before_s, config.top_values)


def _unit(name: str) -> str:
    """Unit of a column of counts, active days, recency, mean prices or different items."""
    if name.endswith("_days") or "_active_days_" in name:
        return "days"
    if "_mean_price_" in name:
        return "price bucket"
    return "items" if "_different_" in name else "events"


def _distinct_groups(store: EventStore, kind: str, codes: np.ndarray) -> np.ndarray:
    """[codes, D] what distinct counts tell apart: items, and categories of skus."""
    if kind in SKU_KINDS:
        return np.stack((np.arange(store.num_skus), store.products.category), axis=1)
    size = store.num_urls if kind == "page_visit" else int(codes.max(initial=-1)) + 1
    return np.arange(size)[:, None]


def _window_columns(
    kind: str, result: WindowedAggregate, windows: list[str], labels: list[str]
) -> dict[str, np.ndarray]:
    """Columns per window, the named windows first, all history last; top values only inside the named windows."""
    columns = {}
    items = ("skus", "categories") if kind in SKU_KINDS else ("urls",) if kind == "page_visit" else ("queries",)
    for index, window in enumerate(windows):
        columns[f"count_{window}"] = result.totals[:, index]
        columns[f"active_days_{window}"] = result.distinct_times[:, index, 0]
        for place, item in enumerate(items):
            columns[f"different_{item}_{window}"] = result.distinct[:, index, place]
        if kind in SKU_KINDS:
            columns[f"mean_price_{window}"] = result.sums[:, index, 0] / np.maximum(result.sums[:, index, 1], 1)
        if window != "all":
            columns |= {f"{label}_{window}": result.counts[:, index, slot] for slot, label in enumerate(labels)}
    return columns


def _recency(store: EventStore, result: WindowedAggregate, cutoff_s: int) -> dict[str, np.ndarray]:
    """Days since the last and the first event, as fractions; the whole history's length for none."""
    never, history_days = result.last_age_s < 0, max(0, cutoff_s - store.first_timestamp_s) / DAY_S
    return {
        "last_days": np.where(never, history_days, result.last_age_s / DAY_S),
        "first_days": np.where(never, history_days, result.first_age_s / DAY_S),
    }


def _activity(store: EventStore, kind: str, cutoff_s: int, config: DecayedConfig) -> dict[str, np.ndarray]:
    """Decayed numbers of events, recency, and active days of one kind."""
    columns = store.kind(kind)
    result = windowed_aggregate(
        columns.offsets,
        columns.timestamp_s,
        anchor_s=cutoff_s,
        windows_s=(*(days * DAY_S for days in config.active_windows_days), None),
        half_lives_s=tuple(days * DAY_S for days in config.activity_half_lives_days),
        periods_s=(DAY_S,),
    )
    block = {
        f"activity_{days:g}d": result.decayed_totals[:, index]
        for index, days in enumerate(config.activity_half_lives_days)
    }
    block |= _recency(store, result, cutoff_s)
    windows = [*(f"{days}d" for days in config.active_windows_days), "all"]
    return block | {f"active_days_{name}": result.distinct_times[:, index, 0] for index, name in enumerate(windows)}
