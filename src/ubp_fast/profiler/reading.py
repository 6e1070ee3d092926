"""Events that a shop brings, in whatever form, as `Histories` in the ids of a model.

one table      rows as the run's own table, or columns client_id, timestamp, kind, sku, url, query, ...
tables         kind -> table in the organisers' layout, also "product_properties"
paths          a table, a directory of tables <kind>.parquet, or the event directory of a run
a source       anything that writes an event directory
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl

from ubp_fast.events.checks import PRODUCT_SCHEMA
from ubp_fast.events.formats import RawTable
from ubp_fast.events.parse import parse_amounts
from ubp_fast.events.read import (
    DATASET_FILE,
    EventBatch,
    EventDirectory,
    canonical_events,
    canonical_products,
    event_batch,
    read_table,
)
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, PRODUCT_TABLE, DataError, UserError
from ubp_fast.events.sources.table import DATE_ORDER, PRICE_EDGES, EventRows, Table
from ubp_fast.events.sources.table_products import buckets, money
from ubp_fast.events.times import iso_seconds
from ubp_fast.store.event_store import rows_before
from ubp_fast.store.in_memory import Histories

# Seconds of the years 1 to 9999, which dates have.
LEAST_S, MOST_S = -62_135_596_800, 253_402_300_799
OPTIONAL_COLUMNS = ("url", "query", "category", "price", "name")
TABLE_COLUMNS = ("kind", *OPTIONAL_COLUMNS)
WHAT_IS = {"quantity": "how many pieces", "spend": "how much money"}


@dataclass(frozen=True)
class ClientIds:
    """The shop's own ids of clients, and the numbers that stand for them.

    Attributes:
        own: ids as they came, ascending, each once.
        numbers: int64 [N] of each: itself where ids are integers, else its place.
    """

    own: pl.Series
    numbers: np.ndarray

    @classmethod
    def of(cls, values: pl.Series, known: ClientIds | None = None) -> ClientIds:
        """Of the client column of some events; text that is known keeps its numbers."""
        own = values.unique().sort()
        if own.dtype == pl.Int64:
            return cls(own, own.to_numpy())
        return cls(own, np.arange(len(own)) if known is None else known.find(own))

    def find(self, wanted: pl.Series) -> np.ndarray:
        """Numbers i64 [N] of ids; those that are not there get new ones."""
        if wanted.dtype == pl.Int64:
            return wanted.to_numpy()
        known = pl.DataFrame({"id": self.own.cast(pl.String), "number": self.numbers})
        found = pl.DataFrame({"id": wanted}).join(known, on="id", how="left", maintain_order="left")["number"]
        numbers = found.fill_null(-1).to_numpy().copy()
        missing = numbers < 0
        first = int(self.numbers.max(initial=-1)) + 1
        numbers[missing] = first + np.arange(int(missing.sum()))
        return numbers


@dataclass(frozen=True)
class NewEvents:
    """Events to embed.

    Attributes:
        histories: by the clients' numbers.
        clients: who they are.
        last_s: second of the newest event, None without any.
        relevant: numbers i64 of the clients that need a vector, where the source names them.
        maps: numbers of text ids of items, those that were new included.
    """

    histories: Histories
    clients: ClientIds
    last_s: int | None
    relevant: np.ndarray | None = None
    maps: Mapping[str, pl.DataFrame] = field(default_factory=dict)

    def wanted_before(self, cutoff_s: int) -> pl.Series:
        """Own ids, ascending, of the clients that the source names, else of all with an event before a moment."""
        if self.relevant is not None:
            return pl.Series("client_id", np.sort(self.relevant))
        active = np.isin(self.clients.numbers, active_before(self.histories, cutoff_s))
        return self.clients.own.filter(pl.Series(active))


def active_before(histories: Histories, cutoff_s: int) -> np.ndarray:
    """Numbers i64 of the clients with an event before a moment."""
    has = np.zeros(len(histories.client_ids), bool)
    for offsets, timestamp_s, *_ in histories.kinds.values():
        has |= rows_before(offsets, timestamp_s, cutoff_s) > offsets[:-1]
    return histories.client_ids[has]


def read_new_events(
    events: Any,
    table: Table | None,
    maps: Mapping[str, pl.DataFrame],
    before_s: int | None = None,
    known: ClientIds | None = None,
    amounts: tuple[str, ...] = (),
) -> NewEvents:
    """Reads and checks what a shop brings.

    Args:
        events: see the module.
        table: how the run's own table names its columns, None where the run had another source.
        maps: how the run numbered text: "sku", "url", "category" -> (value, id); "price_edges" -> (edge,), and
            "date_order" -> (order,), where its dates could be read in two ways.
        before_s: rows of a table from this second on say nothing about items.
        known: clients whose text ids have numbers already.
        amounts: those of `AMOUNTS` that purchases of the run's log have; others are left out.

    Raises:
        DataError: a table breaks a rule, a file is missing, or purchases lack an amount.
        UserError: something that is no events.
    """
    if isinstance(events, str | Path):
        path = Path(events)
        if (path / DATASET_FILE).exists():
            return _of_directory(EventDirectory.open(path), amounts)
        found = {name: path / f"{name}.parquet" for name in (*EVENT_KINDS, PRODUCT_TABLE)}
        tables = {name: read_table(file) for name, file in found.items() if file.exists()}
        if tables:
            return _of_tables(tables, {name: str(file) for name, file in found.items()}, amounts)
        columns = (*TABLE_COLUMNS, *amounts)
        source = _own_names(str(path), columns) if table is None else replace(table, path=str(path), format=None)
        return _of_source(source, table is None, maps, before_s, known, amounts)
    if isinstance(events, Table):
        return _of_source(events, False, maps, before_s, known, amounts)
    if isinstance(events, EventRows):
        rows = events.raw()
        return _of_table(rows, rows.frame.columns, columns_of(events), maps, before_s, known, amounts)
    if hasattr(events, "prepare"):
        with TemporaryDirectory() as folder:
            events.prepare(Path(folder) / "events")
            return _of_directory(EventDirectory.open(Path(folder) / "events"), amounts)
    if isinstance(events, Mapping):
        unknown = set(events) - {*EVENT_KINDS, PRODUCT_TABLE}
        if unknown:
            raise UserError(f"events: tables must be named {[*EVENT_KINDS, PRODUCT_TABLE]}, got {sorted(unknown)}")
        return _of_tables({name: frame_of(one) for name, one in events.items()}, {}, amounts)
    frame = frame_of(events)
    table = table or _own_names("events", [*(name for name in TABLE_COLUMNS if name in frame.columns), *amounts])
    return _of_table(frame, frame.columns, replace(table, path="events"), maps, before_s, known, amounts)


def columns_of(source: EventRows) -> Table:
    """How a source of rows names its columns, as a table."""
    if isinstance(source, Table):
        return source
    return Table(path=source.name, **{one.name: getattr(source, one.name) for one in fields(EventRows)})


def _holds_uuids(column: Any) -> bool:
    """Whether the first object of a pandas column is one."""
    first = column.first_valid_index() if column.dtype == object else None
    return first is not None and isinstance(column.dropna().iloc[0], UUID)


def frame_of(value: Any) -> pl.DataFrame:
    """A polars, pandas or Arrow table as a polars frame.

    Raises:
        UserError: something else.
    """
    if isinstance(value, pl.LazyFrame):
        return value.collect()
    if isinstance(value, pl.DataFrame):
        return value
    if type(value).__module__.split(".")[0] == "pandas":
        # Older releases of pyarrow know no UUID objects.
        texts = {name: of.map(str, na_action="ignore") for name, of in value.items() if _holds_uuids(of)}
        return pl.from_pandas(value.assign(**texts))
    if hasattr(value, "__arrow_c_stream__"):
        return pl.DataFrame(value)
    raise UserError(
        "events: must be a polars, pandas or Arrow table, a dict of them by kind, a path or a source, got"
        f" {type(value).__name__}"
    )


def seconds_of(moment: int | str | date | datetime, zone: str | None = None) -> int:
    """Seconds of a moment as events count them: since 1970 by the shop's clock.

    Args:
        moment: seconds; a date is its midnight; a time that names no zone is the shop's.
        zone: of the shop's clock, UTC when None.

    Raises:
        UserError: something else.
    """
    if isinstance(moment, bool) or not isinstance(moment, int | np.integer | str | date):
        raise UserError(f"at: must be seconds, a date or a date-time like '2026-11-28 12:00:00', got {moment!r}")
    if isinstance(moment, int | np.integer):
        if not LEAST_S <= moment <= MOST_S:
            raise UserError(f"at: must be seconds since 1970, got {moment}; divide milliseconds by 1000")
        return int(moment)
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError as error:
            raise UserError(f"at: must be a date or a date-time like '2026-11-28 12:00:00', got '{moment}'") from error
    if isinstance(moment, datetime) and moment.tzinfo is not None:
        moment = moment.astimezone(ZoneInfo(zone or "UTC")).replace(tzinfo=None)
    return iso_seconds("at", moment.isoformat())


def own_ids(values: Sequence[Any] | np.ndarray | pl.Series, like: pl.Series) -> pl.Series:
    """Ids of clients as they stand in the events.

    Raises:
        UserError: ids of another kind than those of the events.
    """
    series = values if isinstance(values, pl.Series) else pl.Series(values, strict=False)
    try:
        series = _canonical_ids(series)
    except DataError as error:
        raise UserError(f"clients: {error}") from error
    if series.dtype == pl.String and like.dtype == pl.Int64:
        numbers = series.cast(pl.Int64, strict=False)
        series = series if numbers.null_count() else numbers
    if len(like) and series.dtype != like.dtype and len(series):
        raise UserError(f"clients: ids must be {like.dtype} as in the events, got {series.dtype}")
    return series


def _canonical_ids(values: pl.Series) -> pl.Series:
    """Integers as Int64, everything else as text."""
    if values.null_count():
        raise DataError(f"column '{values.name}' must hold an id in every row, got {values.null_count()} nulls")
    if values.dtype.is_integer():
        return values.cast(pl.Int64)
    if values.dtype == pl.Object:
        return pl.Series(values.name, [str(value) for value in values], dtype=pl.String)
    return values.cast(pl.String)


def _of_directory(directory: EventDirectory, amounts: tuple[str, ...]) -> NewEvents:
    file = str(directory.path)
    batches = {kind: _batch(file, kind, directory.frame(kind), amounts) for kind in directory.kinds}
    found = _gathered(batches, directory.products(), pl.Series("client_id", [], pl.Int64))
    return replace(found, relevant=directory.relevant_clients)


def _of_tables(tables: Mapping[str, pl.DataFrame], files: Mapping[str, str], amounts: tuple[str, ...]) -> NewEvents:
    """Tables in the organisers' layout; purchases may have amounts beside it."""
    products = None
    if PRODUCT_TABLE in tables:
        products = canonical_products(files.get(PRODUCT_TABLE, PRODUCT_TABLE), tables[PRODUCT_TABLE])
    batches = {}
    for kind in [kind for kind in EVENT_KINDS if kind in tables]:
        file, raw = files.get(kind, kind), tables[kind]
        frame = canonical_events(file, kind, raw)
        if kind == "product_buy":
            given = [parse_amounts(file, raw[name]) for name in amounts if name in raw.columns]
            frame = frame.with_columns(given)
        batches[kind] = _batch(file, kind, frame, amounts)
    return _gathered(batches, products, pl.Series("client_id", [], pl.Int64))


def _own_names(path: str, columns: Sequence[str]) -> Table:
    """A table whose columns have our names."""
    named: dict[str, Any] = {f"{name}_column": name for name in columns}
    return Table(path=path, **named)


def _of_source(
    table: Table,
    kind_is_optional: bool,
    maps: Mapping[str, pl.DataFrame],
    before_s: int | None,
    known: ClientIds | None,
    amounts: tuple[str, ...],
) -> NewEvents:
    """A table in files; what a product is may be left out."""
    optional = [getattr(table, f"{name}_column") for name in OPTIONAL_COLUMNS]
    raw = table.raw([name for name in (*optional, *(["kind"] if kind_is_optional else [])) if name is not None])
    if kind_is_optional and "kind" not in raw.frame.columns:
        table = replace(table, kind_column=None)
    return _of_table(raw, raw.frame.columns, table, maps, before_s, known, amounts)


def _of_table(
    raw: RawTable | pl.DataFrame,
    columns: Sequence[str],
    table: Table,
    maps: Mapping[str, pl.DataFrame],
    before_s: int | None,
    known: ClientIds | None,
    amounts: tuple[str, ...],
) -> NewEvents:
    """One table with a row per event."""
    # What a product is, and items of kinds that do not occur, may be left out.
    absent: dict[str, Any] = {
        f"{name}_column": None for name in OPTIONAL_COLUMNS if getattr(table, f"{name}_column") not in columns
    }
    file = table.name
    order = maps[DATE_ORDER]["order"][0] if DATE_ORDER in maps else None
    rows = replace(table, end=None, **absent).rows_of(raw, order)
    own = _canonical_ids(rows["client_id"])
    clients = ClientIds.of(own, known)
    rows = rows.with_columns(pl.Series("client_id", clients.find(own), dtype=pl.Int64))
    grown = dict(maps)
    for name in ("sku", "url"):
        if name in rows.columns:
            ids, grown_map = _numbered(file, rows[name], maps.get(name))
            rows = rows.with_columns(ids)
            grown |= {} if grown_map is None else {name: grown_map}
    described = rows.filter(pl.col("sku").is_not_null())
    if before_s is not None:
        described = described.filter(pl.col("timestamp_s") < before_s)
    products = _described(file, described, table, maps)
    batches = {}
    for kind in EVENT_KINDS:
        some = rows.filter(pl.col("kind") == kind)
        if len(some):
            item = ITEM_COLUMN[kind]
            values = table.text_codes(some["query"]) if item == "query" else some[item].cast(pl.Int64)
            given = [some[name] for name in amounts if name in some.columns]
            frame = pl.DataFrame([some["client_id"], some["timestamp_s"], values.alias(item), *given])
            batches[kind] = _batch(file, kind, frame, amounts, table)
    return replace(_gathered(batches, products, own), clients=clients, maps=grown)


def _numbered(file: str, values: pl.Series, known: pl.DataFrame | None) -> tuple[pl.Series, pl.DataFrame | None]:
    """Ids as Int64: integers as they are, text as the run numbered it, other text with numbers beyond; and all text."""
    if values.null_count() == len(values):
        return values.cast(pl.Int64, strict=False), known
    if (known is None) != values.dtype.is_integer():
        wanted = "integers" if known is None else "text"
        raise DataError(
            f"{file}: column '{values.name}' must hold {wanted} as in the run, got {values.dtype}; cast the column"
        )
    if known is None:
        return values.cast(pl.Int64), None
    text = pl.DataFrame({"value": values.cast(pl.String)})
    new = text.drop_nulls().join(known, on="value", how="anti", maintain_order="left").unique(maintain_order=True)
    first = int(known["id"].max()) + 1  # type: ignore[arg-type]
    new = new.with_columns(pl.int_range(first, first + pl.len(), dtype=pl.Int64).alias("id"))
    everything = pl.concat([known.select("value", "id"), new])
    ids = text.join(everything, on="value", how="left", maintain_order="left")["id"]
    return ids.alias(values.name), everything


def _described(file: str, rows: pl.DataFrame, table: Table, maps: Mapping[str, pl.DataFrame]) -> pl.DataFrame | None:
    """What rows say of their items: the first category, price and name in time, null where none says any."""
    given = [name for name in ("category", "price", "name") if name in rows.columns]
    if not given or not len(rows):
        return None
    if "price" in given:
        rows = rows.with_columns(money(file, rows["price"]))
    first = [pl.col(name).drop_nulls().first() for name in given]
    found = rows.sort("timestamp_s", maintain_order=True).group_by("sku", maintain_order=True).agg(first)
    columns = [found["sku"]]
    for name, dtype in PRODUCT_SCHEMA.items():
        if name == "sku":
            continue
        values = found[name] if name in given else pl.Series(name, [None], dtype=dtype).new_from_index(0, len(found))
        if name == "category" and name in given:
            values = _categories(values, maps.get(name))
        elif name == "price" and name in given:
            edges = maps[PRICE_EDGES]["edge"].to_numpy() if PRICE_EDGES in maps else np.zeros(0)
            bucket = buckets(values, edges).cast(pl.Int64)
            values = pl.select(pl.when(values.is_not_null()).then(bucket)).to_series()
        elif name == "name" and name in given:
            known = values.is_not_null()
            values = pl.select(pl.when(known).then(table.text_codes(values))).to_series()
        columns.append(values.alias(name))
    return pl.DataFrame(columns)


def _categories(values: pl.Series, known: pl.DataFrame | None) -> pl.Series:
    """Categories as Int64 as the run numbered them; -1 for others, null stays null."""
    if known is None:
        return values.cast(pl.Int64, strict=False)
    text = pl.DataFrame({"value": values.cast(pl.String)})
    found = text.join(known, on="value", how="left", maintain_order="left")["id"].fill_null(-1)
    return pl.select(pl.when(values.is_not_null()).then(found)).to_series()


def _batch(
    file: str, kind: str, frame: pl.DataFrame, amounts: tuple[str, ...], table: Table | None = None
) -> EventBatch:
    """Events of a canonical table, with the amounts that purchases of the run's log have."""
    missing = [name for name in amounts if name not in frame.columns]
    if kind == "product_buy" and missing and len(frame):
        name = missing[0]
        own = None if table is None else getattr(table, f"{name}_column") or (name == "spend" and table.price_column)
        raise DataError(
            f"{file}: purchases must have a column '{own or name}', as those of the run's log say {WHAT_IS[name]}, got"
            " none; bring it, or make a run without it"
        )
    return event_batch(kind, frame, () if missing else amounts)


def _gathered(batches: Mapping[str, EventBatch], products: pl.DataFrame | None, own: pl.Series) -> NewEvents:
    histories = Histories.of_events(batches, products)
    last_s = histories.last_s if any(len(one.timestamp_s) for one in batches.values()) else None
    clients = ClientIds(pl.Series("client_id", histories.client_ids), histories.client_ids)
    return NewEvents(histories, clients if not len(own) else ClientIds.of(own), last_s)
