"""The canonical event directory: what every source writes and everything else reads.

<kind>.parquet              one table per kind that is present, all events, file order of the source; a file, or a
                            directory of part-*.parquet when the source wrote it in parts
product_properties.parquet  one row per sku
target_purchases.parquet    optional: purchases of the target windows with the properties the source joined to them
relevant_clients.npy        optional: clients that need a profile (default: all with an event before the cutoff)
active_clients.npy          optional: clients of the churn task (default: all with a purchase before the cutoff)
labels/<list>.npy, labels/popularity_<list>.npy   optional: label lists that the source brought
dataset.json                source, kinds, boundaries, row counts, notes
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ubp_fast.events.schema import (
    CODES,
    EVENT_KINDS,
    ITEM_COLUMN,
    NUM_CODES,
    PRODUCT_SCHEMA,
    PRODUCT_TABLE,
    PURCHASE_SCHEMA,
    DataError,
    empty_frame,
    event_schema,
)
from ubp_fast.events.split import Split
from ubp_fast.events.tables import (
    BATCH_ROWS,
    LabelLists,
    in_batches,
    parquet_files,
    read_id_list,
    read_label_lists,
)

DATASET_FILE = "dataset.json"
Schema = dict[str, pl.DataType]
TARGET_PURCHASES = "target_purchases"
FORMAT = 2


class EventBatch(NamedTuple):
    """Some events of one kind.

    Attributes:
        client_id: i64 [N].
        timestamp_s: i64 [N].
        item: i64 [N] skus or urls, or u8 [N, 16] query codes.
    """

    client_id: np.ndarray
    timestamp_s: np.ndarray
    item: np.ndarray


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
        scan = self.scan(kind)
        return (scan if columns is None else scan.select(columns)).collect()

    def scan(self, kind: str) -> pl.LazyFrame:
        """The same as `frame`, lazily."""
        if kind not in self.kinds:
            return empty_frame(event_schema(kind)).lazy()
        return _with_codes(self._scan_stored(kind), event_schema(kind))

    def _scan_stored(self, name: str) -> pl.LazyFrame:
        return pl.scan_parquet(parquet_files(self.path / f"{name}.parquet"))

    def num_rows(self, kind: str) -> int:
        """Number of events of a kind."""
        return int(self.scan(kind).select(pl.len()).collect().item())

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
            column = ITEM_COLUMN[kind]
            item = (
                frame[column].to_numpy() if column in frame.columns else _joined(frame[name] for name in _words(column))
            )
            yield EventBatch(frame["client_id"].to_numpy(), frame["timestamp_s"].to_numpy(), item)

    def products(self, columns: Sequence[str] = tuple(PRODUCT_SCHEMA)) -> pl.DataFrame:
        """Product properties: sku, category, price (bucket 0..99), name (16 codes), or some of them."""
        return _with_codes(self._scan_stored(PRODUCT_TABLE), PRODUCT_SCHEMA).select(columns).collect()

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
        wanted = stored_schema(PRODUCT_SCHEMA if name == PRODUCT_TABLE else event_schema(name))
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
