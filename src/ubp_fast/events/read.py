"""Reading: the canonical event directory that every source writes, and the tables of others that sources read.

<kind>.parquet              one table per kind that is present, all events, file order of the source; a file, or a
                            directory of part-*.parquet when the source wrote it in parts
product_properties.parquet  one row per sku
target_purchases.parquet    optional: purchases of the target windows with the properties the source joined to them
relevant_clients.npy        optional: clients that need a profile (default: all with an event before the cutoff)
active_clients.npy          optional: clients of the churn task (default: all with a purchase before the cutoff)
labels/<list>.npy, labels/popularity_<list>.npy   optional: label lists that the source brought
dataset.json                source, kinds, amounts of purchases, boundaries, row counts, notes
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ubp_fast.events.checks import (
    CODES,
    PRODUCT_SCHEMA,
    PURCHASE_SCHEMA,
    bad_rows,
    empty_frame,
    event_schema,
    require_columns,
    require_unique,
)
from ubp_fast.events.formats import readable
from ubp_fast.events.parse import parse_codes, parse_ids
from ubp_fast.events.schema import (
    EVENT_KINDS,
    ITEM_COLUMN,
    LABEL_LISTS,
    NUM_CODES,
    NUM_PRICE_BUCKETS,
    PRODUCT_TABLE,
    DataError,
    LabelLists,
)
from ubp_fast.events.split import TARGET_DAYS, Split
from ubp_fast.events.times import parse_timestamps
from ubp_fast.files import load_array, load_json

DATASET_FILE = "dataset.json"
Schema = dict[str, pl.DataType]
TARGET_PURCHASES = "target_purchases"
FORMAT = 2
BATCH_ROWS = 1 << 20


class EventBatch(NamedTuple):
    """Some events of one kind.

    Attributes:
        client_id: i64 [N].
        timestamp_s: i64 [N].
        item: i64 [N] skus or urls, or u8 [N, 16] query codes.
        amounts: f32 [N, A], pieces and money of purchases in the order of `EventDirectory.amounts`; None without any.
    """

    client_id: np.ndarray
    timestamp_s: np.ndarray
    item: np.ndarray
    amounts: np.ndarray | None = None


def stored_schema(schema: Schema) -> Schema:
    """Columns of the file that holds a canonical table."""
    stored: Schema = {}
    for name, dtype in schema.items():
        stored |= dict.fromkeys(_words(name), pl.UInt64()) if dtype == CODES else {name: dtype}
    return stored


def stored_form(frame: pl.DataFrame) -> pl.DataFrame:
    """A canonical table as its file holds it."""
    columns: list[pl.Series] = []
    for series in frame:
        if series.dtype == CODES:
            words = np.ascontiguousarray(series.to_numpy()).reshape(-1, NUM_CODES).view("<u8")
            columns += [pl.Series(name, words[:, index]) for index, name in enumerate(_words(series.name))]
        else:
            columns.append(series)
    return pl.DataFrame(columns)


def _words(column: str) -> tuple[str, str]:
    return f"{column}_0_7", f"{column}_8_15"


def _with_codes(scan: pl.LazyFrame, schema: Schema) -> pl.LazyFrame:
    """The canonical table of a stored one."""
    for name in [name for name, dtype in schema.items() if dtype == CODES]:
        words = pl.struct(_words(name)).map_batches(_codes, return_dtype=CODES)
        scan = scan.with_columns(words.alias(name))
    return scan.select(list(schema))


def _codes(words: pl.Series) -> pl.Series:
    return pl.Series(words.name, _joined(words.struct.unnest()), dtype=CODES)


def _joined(words: Iterable[pl.Series]) -> np.ndarray:
    """Codes u8 [N, 16] of two columns."""
    return np.stack([word.to_numpy() for word in words], axis=1).astype("<u8", copy=False).view(np.uint8)


@dataclass(frozen=True)
class EventDirectory:
    """A canonical event directory; open it with `EventDirectory.open`.

    Attributes:
        path: the directory.
        kinds: kinds of events that are present, in the order of `EVENT_KINDS`.
        split: the boundaries of its windows.
        info: the content of dataset.json.
    """

    path: Path
    kinds: tuple[str, ...]
    split: Split
    info: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> EventDirectory:
        """Opens a directory that a source has written; tables are read when they are asked for.

        Raises:
            DataError: not such a directory, or a table is missing or has other columns.
        """
        path = Path(path)
        try:
            info = load_json(path / DATASET_FILE)
            if info["format"] != FORMAT:
                raise DataError(
                    f"{path}: {DATASET_FILE} must have format {FORMAT}, got {info['format']}; prepare it again"
                )
            kinds = tuple(kind for kind in EVENT_KINDS if kind in info["kinds"])
            split = Split(info["input_end_s"], info["validation_start_s"], info["end_s"])
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: an event directory must hold {DATASET_FILE}, got none; prepare it first"
            ) from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path / DATASET_FILE}: file must be complete, got '{error}'; prepare it again") from error
        directory = cls(path, kinds, split, info)
        for name in (*kinds, PRODUCT_TABLE):
            directory._check_schema(name)
        return directory

    def frame(self, kind: str, columns: list[str] | None = None) -> pl.DataFrame:
        """All events of a kind in file order, or some of its columns; no rows when the kind is absent."""
        scan = self.scan(kind)
        return (scan if columns is None else scan.select(columns)).collect()

    def scan(self, kind: str) -> pl.LazyFrame:
        """The same as `frame`, lazily."""
        if kind not in self.kinds:
            return empty_frame(event_schema(kind, self.amounts)).lazy()
        return _with_codes(self._scan_stored(kind), event_schema(kind, self.amounts))

    def _scan_stored(self, name: str) -> pl.LazyFrame:
        return pl.scan_parquet(parquet_files(self.path / f"{name}.parquet"))

    def num_rows(self, kind: str) -> int:
        """Number of events of a kind."""
        return int(self.scan(kind).select(pl.len()).collect().item())

    @property
    def last_s(self) -> int:
        """Second of the last event of any kind."""
        newest = [self._scan_stored(kind).select(pl.col("timestamp_s").max()) for kind in self.kinds]
        return int(pl.concat(newest).collect()["timestamp_s"].max())  # type: ignore[arg-type]

    def num_batches(self, kind: str) -> int:
        """How many frames `batches` gives when it starts at the first event."""
        return -(-self.num_rows(kind) // BATCH_ROWS)

    def batches(self, kind: str, from_s: int | None = None) -> Iterator[EventBatch]:
        """All events of a kind in file order, 2^20 at a time; the next ones are read meanwhile.

        Args:
            kind: one of `EVENT_KINDS`.
            from_s: only events with `timestamp_s >= from_s`; these are all in memory at once.
        """
        if kind not in self.kinds:
            return
        scan, rows = self._scan_stored(kind), self.num_rows(kind)
        if from_s is not None:
            frame = scan.filter(pl.col("timestamp_s") >= from_s).collect()
            scan, rows = frame.lazy(), len(frame)
        for frame in in_batches(scan, rows):
            yield event_batch(kind, frame, self.amounts)

    def rows(self, kind: str, first: int, number: int) -> EventBatch:
        """Some rows of the table of a kind that is present, in file order."""
        return event_batch(kind, self._scan_stored(kind).slice(first, number).collect(), self.amounts)

    def products(self, columns: Sequence[str] = tuple(PRODUCT_SCHEMA)) -> pl.DataFrame:
        """Product properties: sku, category, price (bucket 0..99), name (16 codes), or some of them."""
        return _with_codes(self._scan_stored(PRODUCT_TABLE), PRODUCT_SCHEMA).select(columns).collect()

    @property
    def target_days(self) -> int:
        """Length of a target window in days: as asked for, or fewer where the history is short."""
        return int(self.info.get("target_days", TARGET_DAYS))  # directories of older versions leave out the challenge's

    @property
    def amounts(self) -> tuple[str, ...]:
        """Those of `AMOUNTS` that the purchases have."""
        return tuple(self.info.get("amounts", ()))

    @property
    def relevant_clients(self) -> np.ndarray | None:
        """Clients that need a profile, i64 in the source's order, or None when the source names none."""
        path = self.path / "relevant_clients.npy"
        return read_id_list(path, unique=True) if path.exists() else None

    @property
    def active_clients(self) -> np.ndarray | None:
        """Clients of the churn task, i64 in the source's order, or None when the source names none."""
        path = self.path / "active_clients.npy"
        return read_id_list(path, unique=True) if path.exists() else None

    @property
    def label_lists(self) -> LabelLists | None:
        """Label lists that the source brought: name -> (ids i64 [n], popularity f64 [n]); None when there are none."""
        return read_label_lists(self.path / "labels") or None

    def purchases(self, start_s: int, end_s: int) -> pl.DataFrame:
        """Purchases with `start_s <= timestamp_s < end_s` and their product properties, in file order.

        Inside the target windows of a source that joined the properties itself, its properties are the ones given.

        Returns:
            client_id, timestamp_s, sku, category, price (all i64).
        """
        inside = (pl.col("timestamp_s") >= start_s) & (pl.col("timestamp_s") < end_s)
        rows = self.scan("product_buy").filter(inside).collect()
        target_path = self.path / f"{TARGET_PURCHASES}.parquet"
        targets = empty_frame(PURCHASE_SCHEMA)
        if target_path.exists() and end_s > self.split.input_end_s:
            targets = pl.scan_parquet(target_path).filter(inside).collect()
            rows = rows.filter(pl.col("timestamp_s") < self.split.input_end_s)
        properties = self.products().select("sku", "category", "price")
        joined = rows.join(properties, on="sku", how="left", maintain_order="left")
        return pl.concat([joined.select(list(PURCHASE_SCHEMA)), targets])

    def _check_schema(self, name: str) -> None:
        path = self.path / f"{name}.parquet"
        wanted = stored_schema(PRODUCT_SCHEMA if name == PRODUCT_TABLE else event_schema(name, self.amounts))
        try:
            schemas = [dict(pl.read_parquet_schema(file)) for file in parquet_files(path)]
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(
                f"{path}: file must be a complete Parquet file, got '{error}'; prepare the events again"
            ) from error
        for found in schemas:
            if found != wanted:
                raise DataError(
                    f"{path}: columns must be {wanted}, got {found}; prepare the events again from their source"
                )


def event_batch(kind: str, frame: pl.DataFrame, amounts: Sequence[str] = ()) -> EventBatch:
    """Events of rows, canonical or as they are stored, with some of the amounts that purchases have."""
    column = ITEM_COLUMN[kind]
    item = frame[column].to_numpy() if column in frame.columns else _joined(frame[name] for name in _words(column))
    if kind == "search_query":
        item = np.ascontiguousarray(item).reshape(-1, NUM_CODES)
    has_amounts = bool(amounts) and kind == "product_buy"
    values = np.stack([frame[name].to_numpy() for name in amounts], axis=1) if has_amounts else None
    return EventBatch(frame["client_id"].to_numpy(), frame["timestamp_s"].to_numpy(), item, values)


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or the Parquet files of a directory of parts in the order of their names.

    Raises:
        DataError: neither a file nor such a directory.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise DataError(f"{path}: table must exist, got no such file; check the directory and the file's name")
    return files


def in_batches(scan: pl.LazyFrame, rows: int) -> Iterator[pl.DataFrame]:
    """The first rows of a table, 2^20 at a time; the next ones are read meanwhile."""
    if not rows:
        return
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(_slice, scan, 0)
        for start in range(0, rows, BATCH_ROWS):
            frame = following.result()
            if start + BATCH_ROWS < rows:
                following = reader.submit(_slice, scan, start + BATCH_ROWS)
            yield frame


def _slice(scan: pl.LazyFrame, start: int) -> pl.DataFrame:
    return scan.slice(start, BATCH_ROWS).collect()


def read_table(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """Reads a Parquet file or a directory of Parquet files.

    Args:
        path: the file or directory.
        columns: the columns wanted, in this order; None reads all.

    Raises:
        DataError: no such file, not readable (truncated, another format), or a column is missing.
    """
    files = parquet_files(path)
    with readable(path, "parquet"):
        frame = pl.scan_parquet(files)
        if columns is not None:
            present = frame.collect_schema().names()
            require_columns(str(path), present, columns, "rename the column or name it in the configuration")
            frame = frame.select(columns)
        return frame.collect()


def read_events(path: Path, kind: str, timestamp_unit: str = "s") -> Iterator[pl.DataFrame]:
    """Reads one table in the organisers' layout (client_id, timestamp, sku | url | query) as canonical columns.

    Returns:
        its rows in file order, 2^20 at a time; at least one frame.

    Raises:
        DataError: see `read_table`, `parse_ids`, `parse_timestamps`, `parse_codes`.
    """
    columns = ["client_id", "timestamp", ITEM_COLUMN[kind]]
    with readable(path, "parquet"):
        scan = pl.scan_parquet(parquet_files(path))
        require_columns(str(path), scan.collect_schema().names(), columns, "rename the column")
        rows = scan.select(pl.len()).collect().item()
        for number, raw in enumerate(in_batches(scan.select(columns), rows)):
            try:
                yield canonical_events(str(path), kind, raw, timestamp_unit)
            except DataError as error:
                if number == 0:
                    raise
                raise DataError(f"{error} (rows are counted from row {number * BATCH_ROWS} of the table)") from None
    if not rows:
        yield empty_frame(event_schema(kind))


def canonical_events(file: str, kind: str, raw: pl.DataFrame, timestamp_unit: str = "s") -> pl.DataFrame:
    """The canonical table of one in the organisers' layout (client_id, timestamp, sku | url | query).

    Raises:
        DataError: a column is missing, or as `read_events`.
    """
    item = ITEM_COLUMN[kind]
    require_columns(file, raw.columns, ["client_id", "timestamp", item], "rename the column")
    parse_item = parse_codes if item == "query" else parse_ids
    columns = [
        parse_ids(file, raw["client_id"]),
        parse_timestamps(file, raw["timestamp"], timestamp_unit),
        parse_item(file, raw[item]),
    ]
    return pl.DataFrame(columns, schema=event_schema(kind))


def read_products(path: Path) -> pl.DataFrame:
    """Reads a product table in the organisers' layout (sku, category, price, name) as canonical columns.

    Raises:
        DataError: as `read_events`; also a sku that occurs twice, a price outside 0..99, no rows.
    """
    products = canonical_products(str(path), read_table(path, list(PRODUCT_SCHEMA)))
    if not len(products):
        raise DataError(f"{path}: table must hold products, got 0 rows; every sku in the events needs its properties")
    return products


def canonical_products(file: str, raw: pl.DataFrame) -> pl.DataFrame:
    """The canonical table of products of one in the organisers' layout.

    Raises:
        DataError: as `read_products`; no rows are fine.
    """
    require_columns(file, raw.columns, list(PRODUCT_SCHEMA), "rename the column")
    columns = [parse_ids(file, raw[name]) for name in ("sku", "category", "price")]
    products = pl.DataFrame([*columns, parse_codes(file, raw["name"])], schema=PRODUCT_SCHEMA)
    check_products(file, products)
    return products


def check_products(file: str, products: pl.DataFrame) -> None:
    """Checks that every sku occurs once and that prices are buckets.

    Raises:
        DataError: the first row that breaks a rule.
    """
    require_unique(file, "sku", products["sku"], "keep one row of properties per sku")
    price = products["price"]
    outside = (price < 0) | (price >= NUM_PRICE_BUCKETS)
    if outside.any():
        remedy = "turn money into quantile buckets first"
        raise bad_rows(file, "price", f"be a quantile bucket 0..{NUM_PRICE_BUCKETS - 1}", outside, price, remedy)


def read_id_list(path: Path, unique: bool) -> np.ndarray:
    """Reads a list of ids from an npy file as i64 [N], in file order.

    Raises:
        DataError: not readable, not one-dimensional integers, or (when `unique`) an id that occurs twice.
    """
    values = read_array(path)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise DataError(
            f"{path}: array must be one-dimensional integers, got {values.dtype} of shape {values.shape};"
            " save the ids as int64"
        )
    ids = pl.Series("ids", values.astype(np.int64))
    if unique:
        require_unique(str(path), "ids", ids, "name every client once")
    return ids.to_numpy()


def read_label_lists(directory: Path) -> LabelLists:
    """Reads the label lists (ids i64 [n], popularity f64 [n]) that exist in `directory`, in file order.

    Raises:
        DataError: ids without popularity, other lengths, or a popularity that is negative or not finite.
    """
    lists: LabelLists = {}
    for name in LABEL_LISTS:
        path, popularity_path = directory / f"{name}.npy", directory / f"popularity_{name}.npy"
        if not path.exists():
            continue
        ids, popularity = read_id_list(path, unique=False), read_array(popularity_path)
        if popularity.shape != ids.shape or not np.issubdtype(popularity.dtype, np.number):
            raise DataError(
                f"{popularity_path}: array must hold one number per id of {path.name} ({len(ids)}),"
                f" got {popularity.dtype} of shape {popularity.shape}; save both lists in the same order"
            )
        good = np.isfinite(popularity) & (popularity >= 0)
        if not good.all():
            values = pl.Series(popularity.astype(np.float64))
            remedy = "use each label's share of the purchases"
            raise bad_rows(str(popularity_path), "popularity", "be finite and >= 0", pl.Series(~good), values, remedy)
        lists[name] = (ids, popularity.astype(np.float64))
    return lists


class ArrayError(DataError):
    """A file holds no array; `reason` is "missing", "empty_file" or "not_array"."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_array(path: Path) -> np.ndarray:
    """Reads one npy file without ever unpickling.

    Raises:
        ArrayError: missing, empty, truncated, another format, or an array of Python objects.
    """
    if not path.is_file():
        raise ArrayError("missing", f"{path}: file must exist, got none; check the directory and the file's name")
    size = path.stat().st_size
    if size == 0:
        raise ArrayError("empty_file", f"{path}: file must hold an npy array, got 0 bytes; save it again")
    with path.open("rb") as handle:
        start = handle.read(6)
    if start != np.lib.format.MAGIC_PREFIX:
        raise ArrayError("not_array", f"{path}: file must be in npy format, got one that starts with {start!r}")
    try:
        return load_array(path)
    except (ValueError, OSError, EOFError) as error:
        raise ArrayError(
            "not_array",
            f"{path}: file must hold a complete array of numbers, got {size} bytes and '{error}'; save it again",
        ) from error
