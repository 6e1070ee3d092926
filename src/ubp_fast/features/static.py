"""The 46 static features of a client at a cutoff, from all events before it.

Per table add, buy, remove: has any event, distinct skus, categories, prices, names, mean price bucket; per visit and
search: has any, distinct urls or queries; per table and for all tables together: days since the last and the first
event, days between them, distinct timestamps. Days are whole days; names and order are those of the winner's list.

Fixed against the original: a client without such events gets the whole history's length as its recency, not 0 days
("today"), and scaling is a separate step that is fitted once (`scaling.py`), not per data set.
Source: the list of 46 names in public descendants of the winning solution of the RecSys Challenge 2025.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.kernels.windowed_aggregate import WindowedAggregate, windowed_aggregate
from ubp_fast.store.event_store import EventStore, KindColumns

SHORT_NAMES = {
    "add_to_cart": "add",
    "product_buy": "buy",
    "remove_from_cart": "remove",
    "page_visit": "visit",
    "search_query": "search",
}
ITEM_TABLES = ("add_to_cart", "product_buy", "remove_from_cart")
FIRST_REAL_ID = 2


def static_features(store: EventStore, cutoff_s: int) -> FeatureMatrix:
    """The 46 static features of every client of the store.

    Args:
        store: event store.
        cutoff_s: events with `timestamp_s < cutoff_s` are seen, seconds since 1970 UTC.

    Returns:
        [U, 46] float32; clients in the order of the store. Urls that the store's vocabulary does not hold count as one.
    """
    history_days = whole_history_days(store, cutoff_s)
    found = {kind: _of_kind(store, kind, cutoff_s) for kind in SHORT_NAMES}
    timeline = store.timeline
    everything = windowed_aggregate(
        timeline.offsets, timeline.timestamp_s, anchor_s=cutoff_s, windows_s=(None,), periods_s=(1,)
    )
    columns: dict[str, np.ndarray] = {}
    for kind in ITEM_TABLES:
        short, result = SHORT_NAMES[kind], found[kind]
        columns[f"{short}_flag"] = result.totals[:, 0] > 0
        for index, name in enumerate(("sku", "category", "price", "name")):
            columns[f"unique_{short}_{name}"] = result.distinct[:, 0, index]
        priced = result.sums[:, 0, 1]
        columns[f"{short}_price_mean"] = result.sums[:, 0, 0] / np.maximum(priced, 1)
    for kind, item in (("page_visit", "url"), ("search_query", "search_query")):
        columns[f"{kind}_flag"] = found[kind].totals[:, 0] > 0
        columns[f"unique_{item}"] = found[kind].distinct[:, 0, 0]
    for short, result in (("all", everything), *((SHORT_NAMES[kind], found[kind]) for kind in SHORT_NAMES)):
        columns |= _times(short, result, history_days)
    values = np.stack([column.astype(np.float32) for column in columns.values()], axis=1)
    return FeatureMatrix(np.array(store.client_ids), values, tuple(columns), tuple(_unit(name) for name in columns))


def whole_history_days(store: EventStore, cutoff_s: int) -> int:
    """Whole days from the first event of the store to the cutoff: the recency of what never happened."""
    return max(0, cutoff_s - store.first_timestamp_s) // DAY_S


def item_codes(columns: KindColumns) -> np.ndarray:
    """int32 [N] code per event: the dense sku or url id, or a number per different query."""
    if columns.item is not None:
        return columns.item
    assert columns.codes is not None
    halves = np.ascontiguousarray(columns.codes).view(np.int64).reshape(-1, 2)
    return numbered(halves)


def numbered(rows: np.ndarray) -> np.ndarray:
    """int32 [N]: equal rows of an int64 [N, 2] array get equal numbers, 0 up to their number - 1."""
    frame = pl.DataFrame(rows, schema=["a", "b"], orient="row")
    different = frame.unique(maintain_order=True).with_row_index("number")
    return frame.join(different, on=["a", "b"], how="left", maintain_order="left")["number"].to_numpy().astype(np.int32)


def price_table(store: EventStore) -> np.ndarray:
    """float64 [S, 2] per sku: price bucket (0 if unknown) and whether it is known."""
    known = store.products.price >= FIRST_REAL_ID
    return np.stack((np.where(known, store.products.price - FIRST_REAL_ID, 0), known), axis=1).astype(np.float64)


def _of_kind(store: EventStore, kind: str, cutoff_s: int) -> WindowedAggregate:
    """All-history aggregate with distinct items; for skus also categories, prices, names, and the sum of prices."""
    columns = store.kind(kind)
    codes, values = item_codes(columns), None
    if kind in ITEM_TABLES:
        products = store.products
        names = numbered(np.ascontiguousarray(products.name).view(np.int64).reshape(-1, 2))
        groups = np.stack((np.arange(store.num_skus), products.category, products.price, names), axis=1)
        values = price_table(store)
    else:
        groups = np.arange(int(codes.max(initial=-1)) + 1)[:, None]
    return windowed_aggregate(
        columns.offsets,
        columns.timestamp_s,
        codes,
        anchor_s=cutoff_s,
        windows_s=(None,),
        groups=groups,
        values=values,
        periods_s=(1,),
    )


def _unit(name: str) -> str:
    if name.endswith("_days"):
        return "days"
    return "flag" if name.endswith("_flag") else "price bucket" if name.endswith("_price_mean") else "items"


def _times(short: str, result: WindowedAggregate, history_days: int) -> dict[str, np.ndarray]:
    """The four features of time of one table, in whole days."""
    never = result.last_age_s < 0
    return {
        f"{short}_from_last_to_end_days": np.where(never, history_days, result.last_age_s // DAY_S),
        f"min_{short}_from_first_to_end_days": np.where(never, history_days, result.first_age_s // DAY_S),
        f"{short}_duration_days": result.span_s // DAY_S,
        f"unique_{short}_timestamp": result.distinct_times[:, 0, 0],
    }
