"""Reading tables of others, checked and made canonical: Parquet (files, or directories of parts), CSV and npy lists."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.parse import parse_codes, parse_ids, parse_timestamps
from ubp_fast.events.schema import (
    ITEM_COLUMN,
    LABEL_LISTS,
    NUM_PRICE_BUCKETS,
    PRODUCT_SCHEMA,
    DataError,
    bad_rows,
    empty_frame,
    event_schema,
    require_columns,
    require_unique,
)

LabelLists = dict[str, tuple[np.ndarray, np.ndarray]]
BATCH_ROWS = 1 << 20


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


def read_table(path: Path, columns: list[str] | None = None, separator: str = ",") -> pl.DataFrame:
    """Reads a Parquet file or a directory of Parquet files, or a CSV file when its name ends in .csv or .csv.gz.

    Args:
        path: the file or directory.
        columns: the columns wanted, in this order; None reads all.
        separator: of a CSV file.

    Raises:
        DataError: no such file, not readable (truncated, another format), or a column is missing.
    """
    files = parquet_files(path)
    is_csv = path.name.endswith((".csv", ".csv.gz"))
    with _complete(path, "CSV" if is_csv else "Parquet"):
        frame = pl.read_csv(path, separator=separator, infer_schema_length=None) if is_csv else pl.scan_parquet(files)
        if columns is not None:
            present = frame.lazy().collect_schema().names()
            require_columns(str(path), present, columns, "rename the column or name it in the configuration")
            frame = frame.select(columns)
        return frame.lazy().collect()


@contextmanager
def _complete(path: Path, kind: str) -> Iterator[None]:
    """What goes wrong while a file is read becomes an error that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{path}: file must be a complete {kind} file, got '{reason}'; it may be truncated: copy or make it again"
        ) from error


def read_events(path: Path, kind: str, timestamp_unit: str = "s") -> Iterator[pl.DataFrame]:
    """Reads one table in the organisers' layout (client_id, timestamp, sku | url | query) as canonical columns.

    Returns:
        its rows in file order, 2^20 at a time; at least one frame.

    Raises:
        DataError: see `read_table`, `parse_ids`, `parse_timestamps`, `parse_codes`.
    """
    columns = ["client_id", "timestamp", ITEM_COLUMN[kind]]
    with _complete(path, "Parquet"):
        scan = pl.scan_parquet(parquet_files(path))
        require_columns(str(path), scan.collect_schema().names(), columns, "rename the column")
        rows = scan.select(pl.len()).collect().item()
        for number, raw in enumerate(in_batches(scan.select(columns), rows)):
            try:
                yield _events(str(path), kind, raw, timestamp_unit)
            except DataError as error:
                if number == 0:
                    raise
                raise DataError(f"{error} (rows are counted from row {number * BATCH_ROWS} of the table)") from None
    if not rows:
        yield empty_frame(event_schema(kind))


def _events(file: str, kind: str, raw: pl.DataFrame, timestamp_unit: str) -> pl.DataFrame:
    item = ITEM_COLUMN[kind]
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
    raw = read_table(path, list(PRODUCT_SCHEMA))
    columns = [parse_ids(str(path), raw[name]) for name in ("sku", "category", "price")]
    products = pl.DataFrame([*columns, parse_codes(str(path), raw["name"])], schema=PRODUCT_SCHEMA)
    if not len(products):
        raise DataError(f"{path}: table must hold products, got 0 rows; every sku in the events needs its properties")
    check_products(str(path), products)
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
    values = _read_array(path)
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
        ids, popularity = read_id_list(path, unique=False), _read_array(popularity_path)
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


def _read_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path}: array must exist, got no such file; check the directory and the file's name")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: file must be a complete npy array, got '{error}'; copy or make it again") from error
