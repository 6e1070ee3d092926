"""One long event table of the user's own, Parquet or CSV; its columns are named in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.checks import bad_rows, event_schema, require_columns
from ubp_fast.events.parse import hash_texts, number_ids, parse_codes, parse_timestamps
from ubp_fast.events.read import read_table
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, NUM_CODES, SKU_KINDS, DataError, UserError
from ubp_fast.events.sources.table_products import product_table
from ubp_fast.events.split import split_at
from ubp_fast.events.write import EventWriter, end_seconds, event_writer
from ubp_fast.progress import Progress, Steps

IGNORE = "ignore"
PRICE_EDGES = "price_edges"
TEXT_FORMATS = ("words", "codes")
ZERO_CODES = f"[{' '.join(['0'] * NUM_CODES)}]"


@dataclass(frozen=True)
class Table:
    """One table with a row per event as a source.

    Ids may be integers or text. Text is numbered in order of first appearance in time; the numbers are kept in
    `maps/<client_id|sku|url|category>.parquet` (columns value, id) beside the events, to join profiles back.

    Attributes:
        path: the Parquet file, or CSV file when the name ends in .csv or .csv.gz.
        client_column: who.
        timestamp_column: when: text 'YYYY-MM-DD HH:MM:SS', datetime or integer.
        kind_column: what happened; None means that every row is a purchase.
        kinds: the user's names of kinds -> ours, or "ignore"; None means that ours are used.
        sku_column: product of purchases and cart events.
        url_column: page of visits; may be the same column as `sku_column`.
        query_column: text of searches.
        category_column: category of the product; None means one category.
        price_column: money; becomes 100 quantile buckets of the products' median prices before the input's end.
        name_column: name of the product.
        timestamp_unit: of integers: "s", "ms", "us" or "ns".
        text_format: "words" hashes the words of queries and names into 16 codes, "codes" reads '[1 2 ... 16]'.
        separator: of a CSV file.
        end: ISO date-time; later events are removed before splitting.
    """

    path: str
    client_column: str = "client_id"
    timestamp_column: str = "timestamp"
    kind_column: str | None = None
    kinds: Mapping[str, str] | None = None
    sku_column: str = "sku"
    url_column: str | None = None
    query_column: str | None = None
    category_column: str | None = None
    price_column: str | None = None
    name_column: str | None = None
    timestamp_unit: str = "s"
    text_format: str = "words"
    separator: str = ","
    end: str | None = None

    def prepare(self, directory: Path, progress: Progress | None = None) -> None:
        """Writes the canonical event directory; rows keep their order.

        Raises:
            DataError: the table breaks a rule.
            OutputDirectoryError: `directory` cannot be written.
            ValueError: the configuration breaks a rule.
        """
        if self.text_format not in TEXT_FORMATS:
            raise UserError(f"Table: text_format must be one of {list(TEXT_FORMATS)}, got '{self.text_format}'")
        steps = Steps(progress, 3 + len(EVENT_KINDS))
        with event_writer(directory, "table", self.end) as writer:
            rows = self._read()
            steps.done()
            input_end_s = self._input_end_s(rows)
            rows = self._number(rows, writer)
            steps.done()
            writer.write_products(self._products(rows, input_end_s, writer))
            steps.done()
            for kind in EVENT_KINDS:
                self._write_kind(kind, rows.filter(pl.col("kind") == kind), writer)
                steps.done()
            writer.finish(writer.default_split())

    def _read(self) -> pl.DataFrame:
        raw = read_table(Path(self.path), list(dict.fromkeys(self._columns().values())), self.separator)
        if not len(raw):
            raise DataError(f"{self.path}: table must hold events, got 0 rows; check the file")
        return self.rows_of(raw)

    def _columns(self) -> dict[str, str]:
        """Our names -> theirs, of the columns that the table has."""
        wanted = {
            "client_id": self.client_column,
            "timestamp": self.timestamp_column,
            "kind": self.kind_column,
            "sku": self.sku_column,
            "url": self.url_column,
            "query": self.query_column,
            "category": self.category_column,
            "price": self.price_column,
            "name": self.name_column,
        }
        return {ours: theirs for ours, theirs in wanted.items() if theirs is not None}

    def rows_of(self, raw: pl.DataFrame) -> pl.DataFrame:
        """Checked rows under our names: kind, client_id, timestamp_s, and sku, url, query, category, price, name."""
        columns = self._columns()
        require_columns(self.path, raw.columns, list(columns.values()), "rename the column or name it in data.*_column")
        kind = self._kinds(raw)
        timestamp_s = parse_timestamps(self.path, raw[self.timestamp_column], self.timestamp_unit)
        self._require(raw, self.client_column, pl.repeat(True, len(raw), eager=True))
        for name in EVENT_KINDS:
            self._require_item(raw, name, kind == name)
        if self.text_format == "codes":
            self._check_codes(raw, kind)
        rows = raw.select(
            [pl.col(theirs).alias(ours) for ours, theirs in columns.items() if ours not in ("timestamp", "kind")]
        )
        rows = rows.with_columns(kind.alias("kind"), timestamp_s)
        end_s = end_seconds(self.end)
        keep = pl.col("kind") != IGNORE
        return rows.filter(keep if end_s is None else keep & (pl.col("timestamp_s") <= end_s))

    def _kinds(self, raw: pl.DataFrame) -> pl.Series:
        """Our kind, or IGNORE, of every row."""
        if self.kind_column is None:
            return pl.Series("kind", ["product_buy"]).new_from_index(0, len(raw))
        names = {kind: kind for kind in EVENT_KINDS} if self.kinds is None else dict(self.kinds)
        for theirs, ours in names.items():
            if ours not in (*EVENT_KINDS, IGNORE):
                raise UserError(f"Table: kinds must map to {[*EVENT_KINDS, IGNORE]}, got '{ours}' for '{theirs}'")
        column = raw[self.kind_column].cast(pl.String)
        kind = column.replace_strict({str(theirs): ours for theirs, ours in names.items()}, default=None)
        if kind.null_count():
            remedy = f"map the other names in data.kinds to one of {list(EVENT_KINDS)} or to '{IGNORE}'"
            raise bad_rows(self.path, self.kind_column, f"be one of {list(names)}", kind.is_null(), column, remedy)
        return kind

    def _require_item(self, raw: pl.DataFrame, kind: str, is_kind: pl.Series) -> None:
        """Rows of a kind need the column of that kind, with a value."""
        if not is_kind.any():
            return
        option = f"{ITEM_COLUMN[kind]}_column"
        column = getattr(self, option)
        if column is None:
            raise DataError(
                f"{self.path}: rows of kind {kind} must have a column for '{ITEM_COLUMN[kind]}', got none;"
                f" name it with data.{option} or map the kind to '{IGNORE}' in data.kinds"
            )
        self._require(raw, column, is_kind)

    def _check_codes(self, raw: pl.DataFrame, kind: pl.Series) -> None:
        """Code vectors are checked while rows still have their numbers in the file."""
        searches = (self.query_column, kind == "search_query")
        for column, rows in (searches, (self.name_column, kind.is_in(SKU_KINDS))):
            if column is not None and raw[column].dtype == pl.String:
                used = pl.when(rows & raw[column].is_not_null()).then(raw[column]).otherwise(pl.lit(ZERO_CODES))
                parse_codes(self.path, pl.select(used.alias(column)).to_series())

    def _require(self, raw: pl.DataFrame, column: str, rows: pl.Series) -> None:
        missing = raw[column].is_null() & rows
        if missing.any():
            raise bad_rows(self.path, column, "hold a value", missing, raw[column], "remove those rows")

    def _input_end_s(self, rows: pl.DataFrame) -> int:
        purchases = rows.filter(pl.col("kind") == "product_buy")["timestamp_s"].to_numpy()
        if not len(purchases):
            raise DataError(
                f"{self.path}: table must hold purchases, got no purchases at all;"
                " map the name of your purchases to product_buy in data.kinds, or check data.end"
            )
        return split_at(int(purchases.max())).input_end_s

    def _number(self, rows: pl.DataFrame, writer: EventWriter) -> pl.DataFrame:
        """Ids as i64; skus and urls only where their kind has them, so that a shared column is numbered twice."""
        of_kind = [pl.when(pl.col("kind").is_in(SKU_KINDS)).then("sku").alias("sku")]
        if self.url_column is not None:
            of_kind.append(pl.when(pl.col("kind") == "page_visit").then("url").alias("url"))
        rows = rows.with_columns(of_kind)
        order = pl.Series(np.argsort(rows["timestamp_s"].to_numpy(), kind="stable"))
        columns = {"client_id": self.client_column, "sku": self.sku_column, "url": self.url_column}
        for name, column in columns.items():
            if column is not None:
                ids, table = number_ids(self.path, column, rows[name], order)
                rows = rows.with_columns(ids)
                if table is not None:
                    writer.write_map(name, table)
        return rows

    def _products(self, rows: pl.DataFrame, input_end_s: int, writer: EventWriter) -> pl.DataFrame:
        products, notes, edges = product_table(self.path, rows, input_end_s, self.text_codes)
        writer.notes += notes
        if len(edges):
            writer.write_map(PRICE_EDGES, pl.DataFrame({"edge": edges}))
        in_order = pl.Series(range(len(products)), dtype=pl.UInt32)
        category, table = number_ids(self.path, self.category_column or "category", products["category"], in_order)
        if table is not None:
            writer.write_map("category", table)
        return products.with_columns(category)

    def _write_kind(self, kind: str, rows: pl.DataFrame, writer: EventWriter) -> None:
        if not len(rows):
            return
        schema = event_schema(kind)
        if ITEM_COLUMN[kind] == "query":
            rows = rows.with_columns(self.text_codes(rows["query"]))
        writer.write_events(kind, rows.select(list(schema)), self.path)

    def text_codes(self, texts: pl.Series) -> pl.Series:
        """16 codes of each text, see `text_format`."""
        if self.text_format == "words":
            return hash_texts(texts.cast(pl.String))
        return parse_codes(self.path, texts.fill_null(ZERO_CODES) if texts.dtype == pl.String else texts)
