"""Writing the canonical event directory (layout: `ubp_fast.events.read`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ubp_fast.events.checks import (
    PRODUCT_SCHEMA,
    PURCHASE_SCHEMA,
    amounts_among,
    bad_rows,
    event_schema,
    require_amounts,
    require_canonical,
)
from ubp_fast.events.read import BATCH_ROWS, DATASET_FILE, FORMAT, TARGET_PURCHASES, check_products, stored_form
from ubp_fast.events.schema import EVENT_KINDS, LABEL_LISTS, PRODUCT_TABLE, SKU_KINDS, DataError, LabelLists
from ubp_fast.events.split import TARGET_DAYS, WINDOWS_OF_A_LOG, Split, fitting_days, split_at, utc_text
from ubp_fast.events.times import iso_seconds
from ubp_fast.files import published_directory, save_array, save_table, write_json


def end_seconds(end: str | None) -> int | None:
    """The `end` option of a source (ISO date-time, a bare date is its midnight) in seconds since 1970 UTC.

    Raises:
        ValueError: not an ISO date-time.
    """
    return None if end is None else iso_seconds("end", end)


class EventWriter:
    """Takes canonical tables one at a time, checks them against each other and writes them.

    Give the products first, then the tables, then call `finish`.

    Attributes:
        directory: where the files are until all are complete.
        target_days: length of a target window in days; `fitting_split` shortens it where the log is short.
        notes: remarks for dataset.json.
    """

    def __init__(self, directory: Path, source: str, end_s: int | None, target_days: int) -> None:
        self.directory, self.target_days = directory, target_days
        self._end_s = end_s
        self._products: pl.DataFrame | None = None
        self._rows: dict[str, int] = {}
        self._parts: dict[str, int] = {}
        self._given: dict[str, None] = {}
        self._amounts: tuple[str, ...] | None = None
        self._first_s: int | None = None
        self._last_purchase_s: int | None = None
        self._info: dict[str, Any] = {"format": FORMAT, "source": source}
        self.notes: list[str] = []

    def write_products(self, products: pl.DataFrame) -> None:
        """Writes the product table (`PRODUCT_SCHEMA`).

        Raises:
            DataError: wrong columns, a sku twice, a price outside 0..99.
        """
        require_canonical(PRODUCT_TABLE, products, PRODUCT_SCHEMA)
        check_products(PRODUCT_TABLE, products)
        self._products = products
        self._write(PRODUCT_TABLE, products)

    def write_events(self, kind: str, frame: pl.DataFrame, file: str | None = None) -> None:
        """Writes events of one kind without those after the end; may be called again with the rows that follow.

        Args:
            kind: one of `EVENT_KINDS`; one without any rows is absent.
            frame: canonical columns of that kind; all purchases have the same amounts beside them, or none.
            file: where the rows came from, for messages.

        Raises:
            DataError: wrong columns, an amount below 0, or a sku without properties.
        """
        file = file or kind
        amounts = amounts_among(frame.columns) if self._amounts is None else self._amounts
        require_canonical(file, frame, event_schema(kind, amounts))
        if kind == "product_buy":
            require_amounts(file, frame, amounts)
            self._amounts = amounts
        self._given.setdefault(kind)
        if kind in SKU_KINDS:
            self._require_properties(file, frame["sku"])
        if self._end_s is not None:
            frame = frame.filter(pl.col("timestamp_s") <= self._end_s)
        if not len(frame):
            return
        self._rows[kind] = self._rows.get(kind, 0) + len(frame)
        first_s, last_s = int(frame["timestamp_s"].min()), int(frame["timestamp_s"].max())  # type: ignore[arg-type]
        self._first_s = first_s if self._first_s is None else min(self._first_s, first_s)
        if kind == "product_buy":
            self._last_purchase_s = max(last_s, self._last_purchase_s or last_s)
        self._write_part(kind, frame)

    def write_target_purchases(self, frame: pl.DataFrame) -> None:
        """Writes the purchases of the target windows with the properties that the source joined to them."""
        require_canonical(TARGET_PURCHASES, frame, PURCHASE_SCHEMA)
        self._write(TARGET_PURCHASES, frame)

    def write_clients(self, name: str, clients: np.ndarray) -> None:
        """Writes `relevant_clients` or `active_clients`."""
        save_array(self.directory / f"{name}.npy", clients.astype(np.int64))

    def write_map(self, name: str, table: pl.DataFrame) -> None:
        """Writes how text ids were numbered: value, id."""
        directory = self.directory / "maps"
        directory.mkdir(exist_ok=True)
        _write_parquet(directory / f"{name}.parquet", table)

    def write_bad_rows(self, rows: pl.DataFrame) -> None:
        """Writes the first of the rows that were left out, for the user to look at."""
        (self.directory / "bad_rows.csv").write_text(rows.write_csv(), encoding="utf-8")

    def write_label_lists(self, lists: LabelLists) -> None:
        """Writes label lists: name -> (ids, popularity)."""
        directory = self.directory / "labels"
        directory.mkdir(exist_ok=True)
        for name in LABEL_LISTS:
            if name in lists:
                ids, popularity = lists[name]
                save_array(directory / f"{name}.npy", ids.astype(np.int64))
                save_array(directory / f"popularity_{name}.npy", popularity.astype(np.float64))

    def default_split(self) -> Split:
        """The organisers' split, from the last purchase, with windows of `target_days`.

        Raises:
            DataError: there are no purchases, or the windows leave nothing before them.
        """
        if self._last_purchase_s is None:
            raise DataError(
                f"product_buy: table must hold purchases, got no purchases at all{self._until()};"
                " profiles are evaluated on purchases, so bring that table"
            )
        return split_at(self._last_purchase_s, self.target_days)

    def fitting_split(self) -> Split:
        """The split of a log of three weeks or more; windows that are shorter than asked for are noted.

        Raises:
            DataError: there are no purchases, or the log is shorter.
        """
        self.default_split()
        assert self._last_purchase_s is not None and self._first_s is not None
        wanted = self.target_days
        self.target_days = fitting_days(self._first_s, self._last_purchase_s, wanted)
        if self.target_days < wanted:
            self.notes.append(
                f"events: the history is short, target windows are {self.target_days} days instead of {wanted};"
                f" {WINDOWS_OF_A_LOG * wanted} days of events give whole ones"
            )
        return split_at(self._last_purchase_s, self.target_days)

    def finish(self, split: Split, **info: object) -> None:
        """Writes dataset.json: the directory is complete.

        Raises:
            DataError: no purchases, or no event before the end of the input.
        """
        self.default_split()
        assert self._first_s is not None
        self.notes += [f"{kind}: no rows, the kind is left out" for kind in self._given if kind not in self._rows]
        if self._first_s >= split.input_end_s:
            raise DataError(
                f"events: the first event must lie before the end of the input {utc_text(split.input_end_s)}, got"
                f" {utc_text(self._first_s)}; the two target windows take the last {2 * self.target_days} days, bring a"
                " longer history"
            )
        self._info |= {
            "kinds": [kind for kind in EVENT_KINDS if kind in self._rows],
            "target_days": self.target_days,
            "input_end_s": split.input_end_s,
            "validation_start_s": split.validation_start_s,
            "end_s": split.end_s,
            "first_s": self._first_s,
            "rows": {kind: self._rows[kind] for kind in EVENT_KINDS if kind in self._rows},
            "products": 0 if self._products is None else len(self._products),
            "notes": self.notes,
            **({"amounts": list(self._amounts)} if self._amounts else {}),
            **info,
        }
        write_json(self.directory / DATASET_FILE, self._info)

    def _require_properties(self, file: str, skus: pl.Series) -> None:
        assert self._products is not None, "products come first"
        unknown = ~skus.is_in(self._products["sku"].implode())
        if unknown.any():
            remedy = f"add the missing skus to {PRODUCT_TABLE} or remove those rows"
            raise bad_rows(file, "sku", f"occur in {PRODUCT_TABLE}", unknown, skus, remedy)

    def _write_part(self, kind: str, frame: pl.DataFrame) -> None:
        """The first rows are a file; when more follow, it becomes a directory of parts."""
        path = self.directory / f"{kind}.parquet"
        number = self._parts[kind] = self._parts.get(kind, -1) + 1
        if number == 1:
            first = path.rename(self.directory / f"{kind}.part-00000.parquet")
            path.mkdir()
            first.rename(path / "part-00000.parquet")
        _write_parquet(path / f"part-{number:05d}.parquet" if number else path, frame)

    def _write(self, name: str, frame: pl.DataFrame) -> None:
        _write_parquet(self.directory / f"{name}.parquet", frame)

    def _until(self) -> str:
        return "" if self._end_s is None else f" until {utc_text(self._end_s)}"


@contextmanager
def event_writer(
    directory: Path, source: str, end: str | None = None, target_days: int = TARGET_DAYS
) -> Iterator[EventWriter]:
    """Gives a writer whose files appear in `directory` together, when the block ends without an error.

    Args:
        directory: new or empty.
        source: name of the source, kept in dataset.json.
        end: ISO date-time; later events are removed.
        target_days: length of a target window in days.

    Raises:
        OutputDirectoryError: the directory is in use or cannot be written.
    """
    end_s = end_seconds(end)
    with published_directory(Path(directory)) as partial:
        yield EventWriter(partial, source, end_s, target_days)


def _write_parquet(path: Path, frame: pl.DataFrame) -> None:
    save_table(path, stored_form(frame), compression="zstd", compression_level=1, row_group_size=BATCH_ROWS)
