"""The aggregated-features baseline of the RecSys Challenge 2025, number by number.

Per event kind that is present, in the order product_buy, add_to_cart, remove_from_cart, page_visit:

    [ events over all time | for each window, for each column, counts of the column's most frequent values ]

and for search_query the mean of the 16 query codes over all time. Columns are sku, category, price; url for visits.
What the organisers' code does and a careful reader would not expect, kept here on purpose:

- windows end at the last event of their own kind (relevant clients only), start and end inclusive;
- which events lie in a window is decided on sorted times, but applied to the client's events in file order: of n events
  before the window's start, the first n *in the file* are dropped. Right only if the file is sorted by time;
- top values: count descending, ties by first appearance in the file, over all time;
- client order: ascending buyers, then ascending new clients of add_to_cart, remove_from_cart, page_visit, search_query;
  clients without events have no row.

`values.astype(np.float16)` is their output; counts above 2,048 lose exactness there, from 65,520 on they become inf.
Source: Synerise/recsys2025, aggregated_features_baseline (behaviour, not code).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import SKU_KINDS, DataError
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import FeatureMatrix


def organisers_features(
    events: EventDirectory,
    windows_days: Sequence[int] = (1, 7, 30),
    top_values: int = 10,
    time_sorted: bool = False,
) -> FeatureMatrix:
    """The organisers' aggregated features of the input events (before `split.input_end_s`).

    Kinds that the shop does not have give no columns: with purchases only, the matrix is the product_buy block (91
    columns at the defaults). The organisers' own code needs all five kinds; their Complete Journey baseline has 173
    columns because three made-up events were added to each of the other four.

    Args:
        events: canonical event directory.
        windows_days: lengths of the windows.
        top_values: most frequent values counted per column; fewer if a column has fewer.
        time_sorted: sort every table by time first, which makes the windows right; False takes the files as they are.

    Returns:
        float32 counts and means; clients in the organisers' order.

    Raises:
        DataError: an event's sku has no properties, or no relevant client has an event.
    """
    blocks = []
    for kind in events.kinds:
        table = _input_events(events, kind)
        if time_sorted:
            table = table.sort("timestamp_s", maintain_order=True)
        if len(table):
            blocks.append((kind, table))
    if not blocks:
        raise DataError(f"{events.path}: input must hold events of relevant clients, got none; check relevant_clients")
    client_ids = _client_order([table["client_id"] for _, table in blocks])
    values, names, units = [], [], []
    for kind, table in blocks:
        rows = _rows_of(client_ids, table["client_id"].to_numpy())
        if kind == "search_query":
            block = _query_means(rows, table["query"].to_numpy(), len(client_ids))
            names += [f"{kind}_mean_code_{code}" for code in range(block.shape[1])]
            units += ["code"] * block.shape[1]
        else:
            block, kind_names = _statistics(rows, table, len(client_ids), windows_days, top_values)
            names += [f"{kind}_{name}" for name in kind_names]
            units += ["events"] * block.shape[1]
        values.append(block)
    return FeatureMatrix(client_ids, np.concatenate(values, axis=1), tuple(names), tuple(units))


def _input_events(events: EventDirectory, kind: str) -> pl.DataFrame:
    """Events of relevant clients before the end of the input, in file order, with category and price for skus."""
    rows = events.scan(kind).filter(pl.col("timestamp_s") < events.split.input_end_s)
    if events.relevant_clients is not None:
        rows = rows.filter(pl.col("client_id").is_in(pl.Series(events.relevant_clients).implode()))
    table = rows.collect()
    if kind not in SKU_KINDS:
        return table
    table = table.join(events.products().drop("name"), on="sku", how="left", maintain_order="left")
    missing = table["price"].is_null()
    if missing.any():
        raise DataError(
            f"{kind}: column 'sku' must have properties, got none for sku {table['sku'][int(missing.arg_max() or 0)]}"
            f" ({int(missing.sum())} rows); add it to product_properties"
        )
    return table


def _client_order(clients_of_kinds: list[pl.Series]) -> np.ndarray:
    known = np.zeros(0, np.int64)
    for clients in clients_of_kinds:
        new = np.setdiff1d(clients.unique().to_numpy(), known)
        known = np.concatenate((known, new))
    return known


def _rows_of(client_ids: np.ndarray, clients: np.ndarray) -> np.ndarray:
    """Position of every event's client in `client_ids`."""
    order = np.argsort(client_ids)
    return order[np.searchsorted(client_ids, clients, sorter=order)]


def _statistics(
    rows: np.ndarray, table: pl.DataFrame, num_clients: int, windows_days: Sequence[int], top_values: int
) -> tuple[np.ndarray, list[str]]:
    """[num_clients, 1 + windows * top values] counts and their names."""
    columns = [name for name in table.columns if name not in ("client_id", "timestamp_s")]
    timestamp_s = table["timestamp_s"].to_numpy()
    place = _place_in_client(rows)
    tops = {column: _top_values(table[column], top_values) for column in columns}
    slots = {column: _slots(tops[column], table[column].to_numpy()) for column in columns}
    blocks, names = [np.bincount(rows, minlength=num_clients)[:, None]], ["count"]
    for days in windows_days:
        earlier = timestamp_s < timestamp_s.max() - days * DAY_S
        dropped = np.bincount(rows[earlier], minlength=num_clients)
        inside = place >= dropped[rows]
        for column in columns:
            counted = inside & (slots[column] >= 0)
            width = len(tops[column])
            cells = rows[counted] * width + slots[column][counted]
            blocks.append(np.bincount(cells, minlength=num_clients * width).reshape(num_clients, width))
            names += [f"{column}_{value}_{days}d" for value in tops[column].tolist()]
    return np.concatenate(blocks, axis=1).astype(np.float32), names


def _place_in_client(rows: np.ndarray) -> np.ndarray:
    """How many earlier rows of the file belong to the same client."""
    order = np.argsort(rows, kind="stable")
    counts = np.bincount(rows)
    starts = np.cumsum(counts) - counts
    place = np.empty(len(rows), np.int64)
    place[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    return place


def _top_values(column: pl.Series, top_values: int) -> np.ndarray:
    """Most frequent values: count descending, then first appearance."""
    counted = column.to_frame("value").with_row_index("row").group_by("value").agg(pl.len(), pl.col("row").min())
    return counted.sort(["len", "row"], descending=[True, False]).head(top_values)["value"].to_numpy()


def _slots(top: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of each value in `top`, -1 if it is not there."""
    order = np.argsort(top)
    near = order[np.minimum(np.searchsorted(top, values, sorter=order), len(top) - 1)]
    return np.where(top[near] == values, near, -1)


def _query_means(rows: np.ndarray, codes: np.ndarray, num_clients: int) -> np.ndarray:
    """[num_clients, 16] mean codes, 0 for clients without a search."""
    counts = np.bincount(rows, minlength=num_clients)
    sums = np.stack([np.bincount(rows, weights=column, minlength=num_clients) for column in codes.T], axis=1)
    # float32 quotient of exact integers, as theirs: rounding the float64 mean twice can give another float16.
    return sums.astype(np.float32) / np.maximum(counts, 1).astype(np.float32)[:, None]
