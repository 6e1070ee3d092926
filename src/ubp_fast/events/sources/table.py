"""One long event table of the user's own, in files or in a database; its columns are named in the configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.checks import amounts_among, event_schema, require_columns
from ubp_fast.events.formats import FileForm, RawTable, find_files, natural, read_files
from ubp_fast.events.parse import hash_texts, number_ids, parse_codes
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, NUM_CODES, SKU_KINDS, DataError, UserError
from ubp_fast.events.sources.inspect import OF_COMMAND, suggestion
from ubp_fast.events.sources.table_products import product_table
from ubp_fast.events.sources.table_rows import RowChecks, check_outliers, duplicate_note, numbers, whole_ids
from ubp_fast.events.split import TARGET_DAYS, fitting_days, split_at
from ubp_fast.events.times import TimeForm, Times, outside_years, read_times
from ubp_fast.events.write import EventWriter, end_seconds, event_writer
from ubp_fast.files import file_digest, find_objects, is_url
from ubp_fast.progress import Progress, Steps

IGNORE = "ignore"
PRICE_EDGES, DATE_ORDER = "price_edges", "date_order"
TEXT_FORMATS = ("words", "codes")
ZERO_CODES = f"[{' '.join(['0'] * NUM_CODES)}]"
# A cart event with a negative quantity is one of these.
RETURNED_AS = {"add_to_cart": "remove_from_cart"}


@dataclass(frozen=True, kw_only=True)
class EventRows:
    """A table with a row per event: which column is what, and which rows count.

    Ids may be integers or text. Text is numbered in order of first appearance in time; the numbers are kept in
    `maps/<client_id|sku|url|category>.parquet` (columns value, id) beside the events, to join profiles back.

    Attributes:
        client_column: who.
        timestamp_column: when, in any form of `ubp_fast.events.times`; two names: a date and a time of day.
        kind_column: what happened; None means that every row is a purchase.
        kinds: the user's names of kinds -> ours, or "ignore"; None means that ours are used.
        sku_column: product of purchases and cart events; None where all are of one product.
        url_column: page of visits; may be the same column as `sku_column`.
        query_column: text of searches.
        category_column: category of the product; None means one category.
        price_column: money of one piece; becomes 100 quantile buckets of the products' median prices before the input's
            end, and times the pieces what a purchase cost.
        name_column: name of the product.
        quantity_column: pieces; purchases of none or fewer are returns or cancellations and left out, cart events of
            fewer than none are removals.
        spend_column: money of the whole row, in place of price times pieces.
        filter: SQL condition on the columns of the table; other rows are left out.
        timestamp_unit: of numbers: "s", "ms", "us", "ns", "d"; None: the one that gives times from 1990 on.
        timestamp_format: of text, such as "%d/%m/%Y %H:%M"; None: ISO 8601 and other forms with one reading.
        timestamp_origin: ISO date-time that numbers count from instead of 1970.
        timezone: name of the zone on whose clock days begin; None: UTC.
        decimal: sign of the fraction in prices and quantities that are text, "." or ",".
        text_format: "words" hashes the words of queries and names into 16 codes, "codes" reads '[1 2 ... 16]'.
        on_bad_rows: "refuse" the table, or "drop" those rows, say how many and show the first in `bad_rows.csv`.
        duplicates: exact copies of a row: "keep" or "drop".
        end: ISO date-time; later events are removed before splitting.
    """

    client_column: str = "client_id"
    timestamp_column: str | Sequence[str] = "timestamp"
    kind_column: str | None = None
    kinds: Mapping[str, str] | None = None
    sku_column: str | None = "sku"
    url_column: str | None = None
    query_column: str | None = None
    category_column: str | None = None
    price_column: str | None = None
    name_column: str | None = None
    quantity_column: str | None = None
    spend_column: str | None = None
    filter: str | None = None
    timestamp_unit: str | None = None
    timestamp_format: str | None = None
    timestamp_origin: str | None = None
    timezone: str | None = None
    decimal: str = "."
    text_format: str = "words"
    on_bad_rows: str = "refuse"
    duplicates: str = "keep"
    end: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("text_format", TEXT_FORMATS),
            ("on_bad_rows", ("refuse", "drop")),
            ("duplicates", ("keep", "drop")),
            ("decimal", (".", ",")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"Table: {name} must be one of {list(allowed)}, got '{getattr(self, name)}'")
        for theirs, ours in (self.kinds or {}).items():
            if ours not in (*EVENT_KINDS, IGNORE):
                raise UserError(f"Table: kinds must map to {[*EVENT_KINDS, IGNORE]}, got '{ours}' for '{theirs}'")
        self._time_form()
        self._condition()

    def prepare(self, directory: Path, progress: Progress | None = None, target_days: int = TARGET_DAYS) -> None:
        """Writes the canonical event directory; rows keep their order.

        Raises:
            DataError: the table breaks a rule.
            OutputDirectoryError: `directory` cannot be written.
            ValueError: the configuration breaks a rule.
        """
        steps = Steps(progress, 3 + len(EVENT_KINDS))
        with event_writer(directory, "table", self.end, target_days) as writer:
            raw = self.raw()
            rows, checks, order = self._checked(raw, writer.notes, is_log=True)
            if checks.count:
                writer.write_bad_rows(checks.first())
            if order:
                writer.write_map(DATE_ORDER, pl.DataFrame({"order": [order]}))
            steps.done()
            input_end_s = self._input_end_s(rows, target_days)
            rows = self._number(rows, writer)
            steps.done()
            writer.write_products(self._products(rows, input_end_s, writer))
            steps.done()
            for kind in EVENT_KINDS:
                self._write_kind(kind, rows.filter(pl.col("kind") == kind), writer)
                steps.done()
            writer.finish(writer.fitting_split())

    @property
    def name(self) -> str:
        """What messages call the table."""
        raise NotImplementedError

    def raw(self) -> RawTable:
        """The columns that are asked for, as they are in the files or the database."""
        raise NotImplementedError

    def rows_of(self, raw: RawTable | pl.DataFrame, order: str | None = None) -> pl.DataFrame:
        """Checked rows under our names: kind, client_id, timestamp_s; sku, url, query, category, price, name; amounts.

        Args:
            raw: a table with the columns that this one names.
            order: of dates such as 12/1/2010, as the log was read that these rows are added to.

        Raises:
            DataError: a row breaks a rule, or a column is missing.
        """
        if isinstance(raw, pl.DataFrame):
            require_columns(self.name, raw.columns, self._wanted(), "rename the column or name it in data.*_column")
            raw = RawTable(self.name, raw, ((self.name, len(raw)),))
        return self._checked(raw, [], is_log=False, order=order)[0]

    def _time_form(self, order: str | None = None) -> TimeForm:
        return TimeForm(self.timestamp_unit, self.timestamp_format, self.timezone, self.timestamp_origin, order)

    def _time_columns(self) -> list[str]:
        return [self.timestamp_column] if isinstance(self.timestamp_column, str) else list(self.timestamp_column)

    def _condition(self) -> pl.Expr | None:
        if self.filter is None:
            return None
        try:
            condition = pl.sql_expr(self.filter)
            condition.meta.root_names()
            return condition
        except pl.exceptions.PolarsError as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"Table: filter must be an SQL condition like 'quantity > 0', got '{self.filter}': {reason}"
            ) from error

    def _wanted(self) -> list[str]:
        """Names of all columns that are needed."""
        condition = self._condition()
        named = [
            self.client_column,
            *self._time_columns(),
            self.kind_column,
            self.sku_column,
            self.url_column,
            self.query_column,
            self.category_column,
            self.price_column,
            self.name_column,
            self.quantity_column,
            self.spend_column,
            *([] if condition is None else condition.meta.root_names()),
        ]
        return list(dict.fromkeys(name for name in named if name is not None))

    def _checked(
        self, raw: RawTable, notes: list[str], is_log: bool, order: str | None = None
    ) -> tuple[pl.DataFrame, RowChecks, str]:
        """Rows under our names, what was found, and the order of dates that can be read in two ways.

        A whole log is looked at for lone outliers and copies of rows.
        """
        if is_log and not len(raw.frame):
            raise DataError(f"{raw.name}: table must hold events, got 0 rows; check the file")
        frame = self._filtered(raw, notes)
        if is_log and not len(frame):
            raise DataError(f"{raw.name}: table must hold events, got none that data.filter lets through; correct it")
        checks = RowChecks(raw, frame["_row"], self.on_bad_rows == "drop")
        kind = self._kinds(frame, checks)
        times = self._times(frame, kind != IGNORE, checks, notes, is_log, order)
        seconds = times.seconds.fill_null(0)
        columns: dict[str, pl.Series] = {}
        columns["client_id"] = whole_ids(checks, frame[self.client_column], raw.is_text)
        self._require(self.client_column, kind != IGNORE, columns["client_id"], checks)
        kind = self._returns(frame, kind, checks, notes)
        items = {"sku": self.sku_column, "url": self.url_column, "category": self.category_column}
        for ours, theirs in items.items():
            if theirs is not None:
                columns[ours] = whole_ids(checks, frame[theirs], raw.is_text)
        if self.sku_column is None:
            columns["sku"] = pl.Series([0]).new_from_index(0, len(frame))
            notes.append(f"{raw.name}: no product column is named, all purchases are of one product")
        for ours, theirs in (("query", self.query_column), ("name", self.name_column)):
            if theirs is not None:
                columns[ours] = frame[theirs]
        for name in EVENT_KINDS:
            self._require_item(name, kind == name, columns, checks)
        if self.price_column is not None:
            columns["price"] = self._money(self.price_column, frame, kind.is_in(SKU_KINDS), checks)
        columns |= self._amounts(frame, kind, columns.get("price"), checks)
        if self.text_format == "codes":
            self._check_codes(frame, kind)
        if checks.count:
            notes.append(f"{raw.name}: {checks.count} bad rows are left out, the first are in bad_rows.csv")
        rows = pl.DataFrame([series.alias(name) for name, series in columns.items()])
        rows = rows.with_columns(kind.alias("kind"), seconds)
        end_s = end_seconds(self.end)
        keep = ~checks.bad & (kind != IGNORE)
        keep = keep if end_s is None else keep & (seconds <= end_s)
        rows = rows.filter(keep)
        rows = self._without_copies(rows, frame.drop("_row").filter(keep), notes) if is_log else rows
        return rows, checks, times.order

    def _filtered(self, raw: RawTable, notes: list[str]) -> pl.DataFrame:
        """The rows that the condition lets through, with their numbers."""
        frame = raw.frame.with_row_index("_row")
        condition = self._condition()
        if condition is None:
            return frame
        typed = raw.frame.select(condition.meta.root_names())
        try:
            typed = pl.DataFrame([natural(column) for column in typed]) if raw.is_text else typed
            chosen = typed.select(condition.alias("chosen"))["chosen"]
        except pl.exceptions.PolarsError as error:
            reason = str(error).strip().split("\n")[0]
            types = dict(zip(typed.columns, map(str, typed.dtypes), strict=True))
            raise UserError(f"Table: filter must fit the columns {types}, got '{self.filter}': {reason}") from error
        if chosen.dtype != pl.Boolean or len(chosen) != len(frame):
            raise UserError(f"Table: filter must be true or false for every row, got '{self.filter}'")
        kept = frame.filter(chosen)
        notes.append(f"{raw.name}: data.filter leaves {len(frame) - len(kept)} of {len(frame)} rows out")
        return kept

    def _kinds(self, frame: pl.DataFrame, checks: RowChecks) -> pl.Series:
        """Our kind, or IGNORE, of every row."""
        if self.kind_column is None:
            return pl.Series("kind", ["product_buy"]).new_from_index(0, len(frame))
        names = {kind: kind for kind in EVENT_KINDS} if self.kinds is None else dict(self.kinds)
        column = frame[self.kind_column]
        text = column.cast(pl.String)
        known = {str(theirs): ours for theirs, ours in names.items()}
        kind = text.replace_strict(known, default=None, return_dtype=pl.String)
        found = text.drop_nulls().unique(maintain_order=True).head(20).to_list()
        remedy = f"map all of {found} in data.kinds to one of {list(EVENT_KINDS)} or to '{IGNORE}'"
        checks.check(self.kind_column, f"be one of {list(names)}", kind.is_null(), column, remedy)
        return kind.fill_null(IGNORE).alias("kind")

    def _time(self, frame: pl.DataFrame) -> pl.Series:
        names = self._time_columns()
        if len(names) == 1:
            return frame[names[0]]
        joined = pl.concat_str([pl.col(name).cast(pl.String) for name in names], separator=" ")
        return frame.select(joined.alias("+".join(names))).to_series()

    def _times(
        self,
        frame: pl.DataFrame,
        kept: pl.Series,
        checks: RowChecks,
        notes: list[str],
        is_log: bool,
        order: str | None,
    ) -> Times:
        """Times of every row that counts, null of the others."""
        time = self._time(frame)
        chosen = pl.select(pl.when(kept).then(time)).to_series().alias(time.name)
        times = read_times(self.name, chosen, self._time_form(order))
        checks.check(time.name, times.rule, times.seconds.is_null() & kept, time, times.remedy, times.detail)
        outside = outside_years(times.seconds)
        remedy = "check data.timestamp_unit" if time.dtype.is_numeric() else "correct the rows"
        checks.check(time.name, "lie in the years 1900..2199", outside, time, remedy)
        if is_log and self.end is None:
            check_outliers(checks, time.name, pl.select(pl.when(~outside).then(times.seconds)).to_series(), time)
        notes += [f"{self.name}: column '{time.name}' is {times.note}"] if times.note else []
        if times.are_instants and self.timezone is None:
            notes.append(
                f"{self.name}: column '{time.name}' holds moments, taken as the clock in UTC shows them: days and weeks"
                " begin at its midnight; data.timezone names the shop's own, or UTC"
            )
        return times

    def _returns(self, frame: pl.DataFrame, kind: pl.Series, checks: RowChecks, notes: list[str]) -> pl.Series:
        """Kinds, with rows of no or negative quantity as removals from the cart, or to be ignored."""
        if self.quantity_column is None:
            return kind
        column = frame[self.quantity_column]
        quantity = numbers(column, self.decimal)
        counted = kind.is_in(["product_buy", *RETURNED_AS])
        remedy = "write numbers, or set data.decimal=',' for 1,5"
        checks.check(self.quantity_column, "hold a number", quantity.is_null() & counted, column, remedy)
        is_none, is_less = (quantity == 0).fill_null(False) & counted, (quantity < 0).fill_null(False) & counted
        new = pl.when(is_less).then(kind.replace_strict(RETURNED_AS, default=IGNORE)).otherwise(kind)
        new = pl.when(is_none).then(pl.lit(IGNORE)).otherwise(new)
        kinds = pl.select(new.alias("kind")).to_series()
        good = ~checks.bad
        returned = int((is_less & (kinds == IGNORE) & good).sum())
        removed = int((is_less & (kinds != IGNORE) & good).sum())
        empty = int((is_none & good).sum())
        told = [
            f"{count} rows {text}"
            for count, text in (
                (returned, "of a negative quantity are returns or cancellations, left out"),
                (removed, "of a negative quantity are removals from the cart"),
                (empty, "of quantity 0 are left out"),
            )
            if count
        ]
        notes += [f"{self.name}: {text}" for text in told]
        return kinds

    def _amounts(
        self, frame: pl.DataFrame, kind: pl.Series, price: pl.Series | None, checks: RowChecks
    ) -> dict[str, pl.Series]:
        """Pieces and money f32 of every purchase, what the table says of them; anything of other rows."""
        is_purchase, found = kind == "product_buy", {}
        if self.quantity_column is not None:
            found["quantity"] = numbers(frame[self.quantity_column], self.decimal)
        if self.spend_column is not None:
            found["spend"] = self._money(self.spend_column, frame, is_purchase, checks)
        elif price is not None:
            found["spend"] = price * found["quantity"] if "quantity" in found else price
        for name, values in found.items():
            found[name] = values.fill_null(0.0).clip(lower_bound=0.0).cast(pl.Float32)
            too_large = found[name].is_infinite() & is_purchase
            column = frame[str(getattr(self, f"{name}_column") or self.price_column)]
            checks.check(column.name, "hold numbers that fit float32", too_large, column, "correct the rows")
        return found

    def _money(self, name: str, frame: pl.DataFrame, counted: pl.Series, checks: RowChecks) -> pl.Series:
        """A column of money as f64; null where there is none."""
        column = frame[name]
        amount = numbers(column, self.decimal)
        missing = column.is_null() if column.dtype != pl.String else column.is_null() | (column.str.strip_chars() == "")
        missing = missing | column.is_nan() | column.is_infinite() if column.dtype.is_float() else missing
        bad = amount.is_null() & ~missing & counted
        remedy = "write numbers, or set data.decimal=',' for 1,5"
        checks.check(name, "hold numbers or nothing", bad, column, remedy)
        return amount

    def _require_item(self, kind: str, is_kind: pl.Series, columns: Mapping[str, pl.Series], checks: RowChecks) -> None:
        """Rows of a kind need the column of that kind, with a value."""
        if not is_kind.any():
            return
        item = ITEM_COLUMN[kind]
        if item not in columns:
            raise DataError(
                f"{self.name}: rows of kind {kind} must have a column for '{item}', got none;"
                f" name it with data.{item}_column or map the kind to '{IGNORE}' in data.kinds"
            )
        self._require(getattr(self, f"{item}_column") or item, is_kind, columns[item], checks)

    def _require(self, name: str, rows: pl.Series, values: pl.Series, checks: RowChecks) -> None:
        checks.check(name, "hold a value", values.is_null() & rows, values, "remove those rows")

    def _check_codes(self, frame: pl.DataFrame, kind: pl.Series) -> None:
        """Code vectors are checked while rows still have their numbers in the file."""
        searches = (self.query_column, kind == "search_query")
        for column, rows in (searches, (self.name_column, kind.is_in(SKU_KINDS))):
            if column is not None and frame[column].dtype == pl.String:
                used = pl.when(rows & frame[column].is_not_null()).then(frame[column]).otherwise(pl.lit(ZERO_CODES))
                parse_codes(self.name, pl.select(used.alias(column)).to_series())

    def _without_copies(self, rows: pl.DataFrame, frame: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
        """Tells of rows that are the same in all columns that are read, and leaves them out when asked to."""
        if frame.hash_rows().n_unique() == len(frame):
            return rows
        is_first = frame.select(pl.struct(pl.all()).is_first_distinct()).to_series()
        notes.append(duplicate_note(self.name, rows, is_first, self.duplicates == "drop"))
        return rows.filter(is_first) if self.duplicates == "drop" else rows

    def _input_end_s(self, rows: pl.DataFrame, target_days: int) -> int:
        purchases = rows.filter(pl.col("kind") == "product_buy")["timestamp_s"].to_numpy()
        if not len(purchases):
            raise DataError(
                f"{self.name}: table must hold purchases, got no purchases at all;"
                " map the name of your purchases to product_buy in data.kinds, or check data.end"
            )
        first_s, last_s = int(rows["timestamp_s"].min()), int(purchases.max())  # type: ignore[arg-type]
        return split_at(last_s, fitting_days(first_s, last_s, target_days)).input_end_s

    def _number(self, rows: pl.DataFrame, writer: EventWriter) -> pl.DataFrame:
        """Ids as i64; skus and urls only where their kind has them, so that a shared column is numbered twice."""
        of_kind = [pl.when(pl.col("kind").is_in(SKU_KINDS)).then("sku").alias("sku")]
        if self.url_column is not None:
            of_kind.append(pl.when(pl.col("kind") == "page_visit").then("url").alias("url"))
        rows = rows.with_columns(of_kind)
        order = pl.Series(np.argsort(rows["timestamp_s"].to_numpy(), kind="stable"))
        columns = {"client_id": self.client_column, "sku": self.sku_column or "sku", "url": self.url_column}
        for name, column in columns.items():
            if column is not None:
                ids, table = number_ids(self.name, column, rows[name], order)
                rows = rows.with_columns(ids)
                if table is not None:
                    writer.write_map(name, table)
        return rows

    def _products(self, rows: pl.DataFrame, input_end_s: int, writer: EventWriter) -> pl.DataFrame:
        products, notes, edges = product_table(self.name, rows, input_end_s, self.text_codes)
        writer.notes += notes
        if len(edges):
            writer.write_map(PRICE_EDGES, pl.DataFrame({"edge": edges}))
        in_order = pl.Series(range(len(products)), dtype=pl.UInt32)
        category, table = number_ids(self.name, self.category_column or "category", products["category"], in_order)
        if table is not None:
            writer.write_map("category", table)
        return products.with_columns(category)

    def _write_kind(self, kind: str, rows: pl.DataFrame, writer: EventWriter) -> None:
        if not len(rows):
            return
        schema = event_schema(kind, amounts_among(rows.columns))
        if ITEM_COLUMN[kind] == "query":
            rows = rows.with_columns(self.text_codes(rows["query"]))
        writer.write_events(kind, rows.select(list(schema)), self.name)

    def text_codes(self, texts: pl.Series) -> pl.Series:
        """16 codes of each text, see `text_format`."""
        if self.text_format == "words":
            return hash_texts(texts.cast(pl.String))
        return parse_codes(self.name, texts.fill_null(ZERO_CODES) if texts.dtype == pl.String else texts)


@dataclass(frozen=True)
class Table(EventRows):
    """Files with a row per event as a source.

    Attributes:
        path: a file, a pattern, a directory of parts, the URL of such in a bucket (s3://...), or a list of those.
        format: "parquet", "arrow", "csv", "tsv" or "json"; None: what the content says.
        separator: of text: a character, or "tab", "semicolon", "pipe", "space", "whitespace"; None: the one that fits.
        columns: names of the columns of text without a header.
        encoding: of text, such as "latin-1"; None: UTF-8, or what a mark at its start says.
        quote: around values of text; "" when quotes are plain text.
        null_values: texts that stand for a missing value, beside nothing at all.
    """

    path: str | Sequence[str]
    format: str | None = None
    separator: str | None = None
    columns: Sequence[str] | None = None
    encoding: str | None = None
    quote: str = '"'
    null_values: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._file_form()

    def content(self) -> dict[str, str]:
        """Digest of every file that is read; of objects in a bucket their version."""
        found: dict[str, str] = {}
        for place in [self.path] if isinstance(self.path, str) else self.path:
            versions = find_objects(place) if is_url(place) else {}
            for file, _ in find_files(place):
                found[str(file)] = file_digest(file) if isinstance(file, Path) else versions[file]
        return found

    def _file_form(self) -> FileForm:
        return FileForm(self.format, self.separator, self.columns, self.encoding, self.quote, self.null_values)

    @property
    def name(self) -> str:
        return self.path if isinstance(self.path, str) else str(next(iter(self.path), "table"))

    def raw(self, optional: Collection[str] | None = None) -> RawTable:
        """As `EventRows.raw`.

        Args:
            optional: columns that may be missing, in events that are brought to the model of a run; None in its log.
        """
        columns, is_log = self._wanted(), optional is None
        remedy = "name the column in the configuration" if is_log else "rename the columns to those of the run's log"

        def wanted(names: list[str]) -> list[str]:
            present = [name for name in columns if name in names or name not in (optional or ())]
            require_columns(str(self.path), names, present, remedy)
            return present

        try:
            return read_files(self.path, self._file_form(), wanted, self.on_bad_rows == "drop")
        except DataError as error:
            if not is_log:
                raise
            roles = {role: getattr(self, f"{role}_column") for role in OF_COMMAND}
            roles["timestamp"] = self._time_columns()[0]
            typed = suggestion(self.path, self._file_form(), roles)
            raise DataError(f"{error}, {typed}" if typed else str(error)) from error
