"""The organisers' aggregated features as a good data engineer writes them with a data frame library or in SQL.

Both read what they need of the Parquet files once (rows of relevant clients, 32-bit columns, properties joined,
clients as dense rows), or start from such tables in memory. They return cells (client, window, slot, count) per list,
events per client, and mean query codes: nobody pays for a matrix that he would not make.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import polars as pl

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import ITEM_COLUMN, NUM_CODES
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


def read_with_polars(events: EventDirectory, cutoff_s: int) -> dict[str, pl.DataFrame]:
    """The same tables from the event directory, rows in file order, original ids: streaming join with the clients."""
    clients = pl.LazyFrame({"client_id": np.sort(events.relevant_clients)}).with_columns(
        pl.int_range(pl.len(), dtype=pl.Int32).alias("client")
    )
    products = pl.scan_parquet(events.path / "product_properties.parquet").select(
        pl.col("sku").cast(pl.Int32), pl.col("category").cast(pl.Int32), pl.col("price").cast(pl.UInt8)
    )
    lazy = {}
    for kind in events.kinds:
        path = events.path / f"{kind}.parquet"
        rows = pl.scan_parquet(path / "*.parquet" if path.is_dir() else path)
        rows = rows.filter(pl.col("timestamp_s") < cutoff_s).join(clients, on="client_id")
        age = (cutoff_s - pl.col("timestamp_s")).cast(pl.Int32).alias("age_s")
        if ITEM_COLUMN[kind] == "query":
            item = [
                (pl.col(f"query_{first}_{first + 7}") // 256**place & 255).cast(pl.UInt8).alias(CODES[first + place])
                for first in (0, 8)
                for place in range(8)
            ]
        else:
            item = [pl.col(ITEM_COLUMN[kind]).cast(pl.Int32)]
        rows = rows.select("client", age, *item)
        lazy[kind] = rows.join(products, on="sku") if ITEM_COLUMN[kind] == "sku" else rows
    return dict(zip(lazy, pl.collect_all(list(lazy.values()), engine="streaming"), strict=True))


def read_with_duckdb(events: EventDirectory, cutoff_s: int) -> tuple[duckdb.DuckDBPyConnection, dict[str, list[str]]]:
    """Such tables inside a database in memory, and their columns after client and age_s."""
    base = _connect()
    path = events.path
    clients = pl.DataFrame({"client_id": np.sort(events.relevant_clients)}).with_row_index("client")
    clients.write_parquet(path / "clients.tmp")
    base.execute(
        f"create table clients as select client::int as client, client_id from read_parquet('{path}/clients.tmp')"
    )
    base.execute(
        f"create view products as select sku, category::int as category, price::utinyint as price"
        f" from read_parquet('{path}/product_properties.parquet')"
    )
    columns = {}
    for kind in events.kinds:
        files = f"{path}/{kind}.parquet" + ("/*.parquet" if (path / f"{kind}.parquet").is_dir() else "")
        name, joined = ITEM_COLUMN[kind], ""
        if name == "query":
            columns[kind] = CODES
            item = ", ".join(
                f"((query_{first}_{first + 7} >> {8 * place}) & 255)::utinyint as {CODES[first + place]}"
                for first in (0, 8)
                for place in range(8)
            )
        elif name == "sku":
            columns[kind] = ["sku", "category", "price"]
            item, joined = "events.sku::int as sku, category, price", "join products using (sku)"
        else:
            columns[kind], item = ["url"], "url::int as url"
        base.execute(
            f"create table {kind} as select client, ({cutoff_s} - timestamp_s)::int as age_s, {item}"
            f" from read_parquet('{files}') events join clients using (client_id) {joined}"
            f" where timestamp_s < {cutoff_s}"
        )
    return base, columns


def load_into_duckdb(
    tables: dict[str, pl.DataFrame], directory: Path
) -> tuple[duckdb.DuckDBPyConnection, dict[str, list[str]]]:
    """Tables of `tables_of` inside a database in memory."""
    base = _connect()
    for kind, table in tables.items():
        table.write_parquet(directory / f"{kind}.tmp")
        base.execute(f"create table {kind} as select * from read_parquet('{directory}/{kind}.tmp')")
    return base, {kind: table.columns[2:] for kind, table in tables.items()}


def _connect() -> duckdb.DuckDBPyConnection:
    base = duckdb.connect()
    base.execute("set threads = 1")
    base.execute("set preserve_insertion_order = false")
    return base


def with_duckdb(
    base: duckdb.DuckDBPyConnection, tables: dict[str, list[str]], windows_days: tuple[int, ...], top_values: int
) -> Cells:
    """One query per column: its list of frequent values, then few rows, then a small group-by."""
    names: dict[tuple[str, str], np.ndarray] = {}
    counts: dict[tuple[str, str], np.ndarray] = {}
    totals: dict[str, np.ndarray] = {}
    means = (np.zeros(0), np.zeros(0))
    edges = [days * DAY_S for days in windows_days]
    band = " + ".join(f"(age_s > {edge})::utinyint" for edge in edges[:-1])
    for kind, columns in tables.items():
        if columns == CODES:
            averages = ", ".join(f"avg({name})" for name in CODES)
            found = base.execute(f"select client, {averages} from {kind} group by 1 order by 1").fetchnumpy()
            client, *codes = found.values()
            means = (client, np.stack(codes, axis=1))
            continue
        found = base.execute(f"select client, count(*) as n from {kind} group by 1").fetchnumpy()
        totals[kind] = np.stack([found["client"], found["n"]], axis=1)
        for column in columns:
            base.execute(
                f"create or replace temp table top as select {column}, (row_number() over () - 1)::int as slot from"
                f" (select {column} from {kind} group by 1 order by count(*) desc, {column} limit {top_values})"
            )
            names[kind, column] = base.execute(f"select {column} from top order by slot").fetchnumpy()[column]
            found = base.execute(
                f"select client, {band} as band, slot, count(*)::int as len from {kind} join top using ({column})"
                f" where age_s <= {edges[-1]} group by all"
            ).fetchnumpy()
            counts[kind, column] = _windows(pl.DataFrame(found), len(windows_days))
    return Cells(names, counts, totals, means)


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
