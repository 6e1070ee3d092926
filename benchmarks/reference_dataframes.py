"""The organisers' aggregated features as a good data engineer writes them with a data frame library.

It starts from what suits it best: client-sorted tables in memory with 32-bit columns, properties joined, client ids as
dense rows. It returns cells (client, window, slot, count) per list, events per client, and mean query codes: nobody
pays for a matrix that he would not make.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from ubp_fast.events.schema import NUM_CODES
from ubp_fast.events.split import DAY_S
from ubp_fast.store.event_store import EventStore

CODES = [f"code_{index}" for index in range(NUM_CODES)]


class Cells(NamedTuple):
    """Results of one run.

    Attributes:
        names: label of every slot, per (kind, column).
        counts: (client row, window, slot, count) per (kind, column): events in the window, not in its band.
        totals: (client row, events) per kind.
        means: (client row, [16] mean codes).
    """

    names: dict[tuple[str, str], np.ndarray]
    counts: dict[tuple[str, str], np.ndarray]
    totals: dict[str, np.ndarray]
    means: tuple[np.ndarray, np.ndarray]


def tables_of(store: EventStore) -> dict[str, pl.DataFrame]:
    """Client-sorted 32-bit tables of every kind; times in seconds before the cutoff."""
    products = store.products
    tables = {}
    for kind in store.kinds:
        columns = store.kind(kind)
        data = {
            "client": np.repeat(np.arange(store.num_clients, dtype=np.int32), np.diff(columns.offsets)),
            "age_s": (store.cutoff_s - np.asarray(columns.timestamp_s)).astype(np.int32),
        }
        if columns.codes is not None:
            data |= {name: columns.codes[:, index] for index, name in enumerate(CODES)}
        elif kind == "page_visit":
            data["url"] = np.asarray(columns.item)
        else:
            item = np.asarray(columns.item)
            data |= {"sku": item, "category": products.category[item], "price": products.price[item]}
        tables[kind] = pl.DataFrame(data)
    return tables


def _bands(windows_days: tuple[int, ...]) -> pl.Expr:
    """Index of the smallest window that holds an event."""
    edges = [days * DAY_S for days in windows_days]
    return pl.sum_horizontal([(pl.col("age_s") > edge).cast(pl.UInt8) for edge in edges[:-1]]).alias("band")


def with_polars(tables: dict[str, pl.DataFrame], windows_days: tuple[int, ...], top_values: int) -> Cells:
    """Lazy queries on the streaming engine: few rows first (longest window, listed values), then a small group-by."""
    names: dict[tuple[str, str], np.ndarray] = {}
    counts: dict[tuple[str, str], np.ndarray] = {}
    totals: dict[str, np.ndarray] = {}
    means = (np.zeros(0), np.zeros(0))
    for kind, table in tables.items():
        lazy = table.lazy()
        if kind == "search_query":
            found = lazy.group_by("client").agg(pl.col(CODES).mean()).collect(engine="streaming").sort("client")
            means = (found["client"].to_numpy(), found.select(CODES).to_numpy())
            continue
        columns = table.columns[2:]
        tops = pl.collect_all(
            [
                lazy.group_by(column).len().sort(["len", column], descending=[True, False]).head(top_values)
                for column in columns
            ],
            engine="streaming",
        )
        recent = lazy.filter(pl.col("age_s") <= windows_days[-1] * DAY_S)
        queries = [lazy.group_by("client").len()]
        for column, top in zip(columns, tops, strict=True):
            slots = top.select(column, pl.int_range(pl.len(), dtype=pl.UInt8).alias("slot")).lazy()
            listed = recent.select("client", _bands(windows_days), column).join(slots, on=column)
            queries.append(listed.group_by("client", "band", "slot").len())
            names[kind, column] = top[column].to_numpy()
        found, *bands = pl.collect_all(queries, engine="streaming")
        totals[kind] = found.to_numpy()
        for column, frame in zip(columns, bands, strict=True):
            counts[kind, column] = _windows(frame, len(windows_days))
    return Cells(names, counts, totals, means)


def _windows(bands: pl.DataFrame, windows: int) -> np.ndarray:
    """[cells, 4] client, window, slot, count, ascending: an event of a band is in every longer window."""
    client, band, slot, length = (bands[name].to_numpy() for name in ("client", "band", "slot", "len"))
    slots = int(slot.max(initial=0)) + 1
    # One sorted key per (client, slot); dense over the windows only for pairs that occur.
    key, place = np.unique(client.astype(np.int64) * slots + slot, return_inverse=True)
    dense = np.zeros((len(key), windows), np.uint32)
    dense[place, band] = length
    np.cumsum(dense, axis=1, out=dense)
    row, window = np.nonzero(dense)
    return np.stack([key[row] // slots, window, key[row] % slots, dense[row, window]], axis=1)
