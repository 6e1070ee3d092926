"""Reading tables of others (checked, made canonical) and the canonical event directory.

The canonical event directory is what every source writes and everything else reads:

    <kind>.parquet              one table per kind that is present, all events, file order of the source
    product_properties.parquet  one row per sku
    target_purchases.parquet    optional: purchases of the target windows with the properties the source joined to them
    relevant_clients.npy        optional: clients that need a profile (default: all with an event before the cutoff)
    active_clients.npy          optional: clients of the churn task (default: all with a purchase before the cutoff)
    labels/<list>.npy, labels/popularity_<list>.npy   optional: label lists that the source brought
    dataset.json                source, kinds, boundaries, row counts, notes
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ubp_fast.events.parse import parse_codes, parse_ids, parse_timestamps
from ubp_fast.events.schema import (
    EVENT_KINDS,
    ITEM_COLUMN,
    LABEL_LISTS,
    NUM_PRICE_BUCKETS,
    PRODUCT_SCHEMA,
    PRODUCT_TABLE,
    PURCHASE_SCHEMA,
    DataError,
    bad_rows,
    empty_frame,
    event_schema,
    require_columns,
    require_unique,
)
from ubp_fast.events.split import Split

LabelLists = dict[str, tuple[np.ndarray, np.ndarray]]
DATASET_FILE = "dataset.json"
TARGET_PURCHASES = "target_purchases"
FORMAT = 1


def read_table(path: Path, columns: list[str] | None = None, separator: str = ",") -> pl.DataFrame:
    """Reads a Parquet file, or a CSV file when its name ends in .csv or .csv.gz.

    Args:
        path: the file.
        columns: the columns wanted, in this order; None reads all.
        separator: of a CSV file.

    Raises:
        DataError: no such file, not readable (truncated, another format), or a column is missing.
    """
    if not path.is_file():
        raise DataError(f"{path}: table must exist, got no such file; check the directory and the file's name")
    is_csv = path.name.endswith((".csv", ".csv.gz"))
    try:
        if is_csv:
            frame = pl.read_csv(path, separator=separator, infer_schema_length=None)
            present = frame.columns
        else:
            present = list(pl.read_parquet_schema(path))
        if columns is not None:
            require_columns(str(path), present, columns, "rename the column or name it in the configuration")
        if is_csv:
            return frame if columns is None else frame.select(columns)
        return pl.read_parquet(path, columns=columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        kind = "CSV" if is_csv else "Parquet"
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{path}: file must be a complete {kind} file, got '{reason}'; it may be truncated: copy or make it again"
        ) from error


def read_events(path: Path, kind: str, timestamp_unit: str = "s") -> pl.DataFrame:
    """Reads one table in the organisers' layout (client_id, timestamp, sku | url | query) as canonical columns.

    Raises:
        DataError: see `read_table`, `parse_ids`, `parse_timestamps`, `parse_codes`.
    """
    item = ITEM_COLUMN[kind]
    raw = read_table(path, ["client_id", "timestamp", item])
    parse_item = parse_codes if item == "query" else parse_ids
    return pl.DataFrame(
        [
            parse_ids(str(path), raw["client_id"]),
            parse_timestamps(str(path), raw["timestamp"], timestamp_unit),
            parse_item(str(path), raw[item]),
        ],
        schema=event_schema(kind),
    )


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
            info = json.loads((path / DATASET_FILE).read_text(encoding="utf-8"))
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
        if kind not in self.kinds:
            frame = empty_frame(event_schema(kind))
            return frame if columns is None else frame.select(columns)
        return read_table(self.path / f"{kind}.parquet", columns)

    def scan(self, kind: str) -> pl.LazyFrame:
        """The same as `frame`, lazily."""
        if kind not in self.kinds:
            return empty_frame(event_schema(kind)).lazy()
        return pl.scan_parquet(self.path / f"{kind}.parquet")

    def products(self) -> pl.DataFrame:
        """Product properties: sku, category, price (bucket 0..99), name (16 codes)."""
        return read_table(self.path / f"{PRODUCT_TABLE}.parquet")

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
        wanted = PRODUCT_SCHEMA if name == PRODUCT_TABLE else event_schema(name)
        try:
            found = dict(pl.read_parquet_schema(path))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(
                f"{path}: file must be a complete Parquet file, got '{error}'; prepare the events again"
            ) from error
        if found != wanted:
            raise DataError(
                f"{path}: columns must be {wanted}, got {found}; prepare the events again from their source"
            )
