"""What the rows of a user's own table are worth: bad ones, numbers in text, ids of any dtype, lone outliers in time."""

from __future__ import annotations

import numpy as np
import polars as pl

from ubp_fast.events.checks import bad_rows, shown
from ubp_fast.events.formats import RawTable, natural
from ubp_fast.events.split import DAY_S, utc_text

SHOWN_ROWS = 10
BAD_ROW_SCHEMA = {
    "file": pl.String,
    "row": pl.Int64,
    "line": pl.Int64,
    "column": pl.String,
    "value": pl.String,
    "reason": pl.String,
}
# A time is an outlier when at most this share of the rows lies beyond a gap that is longer than a year and than all
# that the other rows span.
OUTLYING_SHARE = 0.01
LEAST_GAP_S = 365 * DAY_S
_CURRENCY = r"^[$€£¥\s]+|[$€£¥\s]+$"
# Digits in groups of three, or without groups, by the sign of the fraction.
_MONEY = {
    ".": r"^[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][+-]?\d+)?$",
    ",": r"^[+-]?(?:\d{1,3}(?:\.\d{3})+|\d+)?(?:,\d*)?$",
}
_LARGEST_WHOLE_FLOAT = 2.0**53


class RowChecks:
    """Finds rows that break a rule: the first one refuses the table, or all are left out and counted.

    Args:
        raw: the table as read.
        rows: u32, rows of `raw` that are looked at; masks and columns given later have as many entries.
        drop: leave bad rows out.
    """

    def __init__(self, raw: RawTable, rows: pl.Series, drop: bool) -> None:
        self._raw, self._rows, self._drop = raw, rows, drop
        self.bad = pl.Series([False]).new_from_index(0, len(rows))
        self._shown: list[dict[str, object]] = [
            {"file": file, "line": line, "value": text, "reason": f"the line holds {reason}"}
            for file, line, text, reason in raw.bad_lines[:SHOWN_ROWS]
        ]

    def check(self, column: str, rule: str, bad: pl.Series, values: pl.Series, remedy: str, detail: str = "") -> None:
        """Every row must do what `rule` says; those marked in `bad` do not.

        Raises:
            DataError: there is one, and bad rows are refused.
        """
        bad = bad & ~self.bad
        if not bad.any():
            return
        if not self._drop:
            file, row = self._raw.place(int(self._rows[int(bad.arg_true()[0])]))
            remedy = f"{remedy}, or leave such rows out with data.on_bad_rows=drop"
            raise bad_rows(file, column, rule, bad, values, remedy, detail, row)
        for place in bad.arg_true().head(SHOWN_ROWS):
            file, row = self._raw.place(int(self._rows[place]))
            reason = f"must {rule}" + (f" ({detail})" if detail else "")
            value = shown(values[place])
            self._shown.append({"file": file, "row": row, "column": column, "value": value, "reason": reason})
        self.bad = self.bad | bad

    @property
    def count(self) -> int:
        """Rows and lines that are left out."""
        return int(self.bad.sum()) + len(self._raw.bad_lines)

    def first(self) -> pl.DataFrame:
        """The first bad rows of every kind: file, row (or line of a text that holds no row), column, value, reason."""
        return pl.DataFrame(self._shown, schema=BAD_ROW_SCHEMA)


def numbers(column: pl.Series, decimal: str) -> pl.Series:
    """Amounts as f64; missing and infinite ones are null, and so is text that is no number.

    Args:
        column: numbers, or text with or without a currency sign and thousands in groups.
        decimal: "." or ",", the sign of the fraction in text.
    """
    if isinstance(column.dtype, pl.Categorical | pl.Enum):
        column = column.cast(pl.String)
    if column.dtype == pl.String:
        text = column.str.strip_chars().str.replace_all(_CURRENCY, "")
        fits = text.str.contains(_MONEY[decimal]) & text.str.contains(r"\d")
        bare = text.str.replace_all("," if decimal == "." else ".", "", literal=True)
        bare = bare if decimal == "." else bare.str.replace(",", ".", literal=True)
        column = pl.select(pl.when(fits).then(bare)).to_series().cast(pl.Float64, strict=False).alias(column.name)
    if not column.dtype.is_numeric() and column.dtype not in (pl.Null, pl.Boolean):
        return pl.Series(column.name, [None], pl.Float64).new_from_index(0, len(column))
    amount = column.cast(pl.Float64)
    return pl.select(pl.when(amount.is_finite()).then(amount).alias(column.name)).to_series()


def whole_ids(checks: RowChecks, column: pl.Series, is_text: bool) -> pl.Series:
    """Ids of any dtype as integers or text: floats and decimals without a fraction are integers, bytes are hex text.

    Args:
        checks: told of fractions.
        column: ids; nulls stay null.
        is_text: the file holds text only: what is text of an integer becomes one.
    """
    dtype = column.dtype
    if dtype == pl.String:
        known = pl.select(pl.when(column != "").then(column)).to_series().alias(column.name)
        return natural(known, whole_only=True) if is_text else known
    if dtype.is_float() or dtype.is_decimal():
        floats = column.cast(pl.Float64)
        known = pl.select(pl.when(floats.is_finite()).then(floats)).to_series()
        broken = ((known != known.floor()) | (known.abs() > _LARGEST_WHOLE_FLOAT)).fill_null(False)
        checks.check(column.name, "hold ids without a fraction", broken, column, "name the column of the ids")
        return pl.select(pl.when(~broken).then(known)).to_series().cast(pl.Int64).alias(column.name)
    if dtype.is_integer():
        whole = column.cast(pl.Int64, strict=False)
        return whole if whole.null_count() == column.null_count() else column.cast(pl.String)
    return column.bin.encode("hex") if dtype == pl.Binary else column


def check_outliers(checks: RowChecks, column: str, seconds: pl.Series, values: pl.Series) -> None:
    """The newest time must not stand alone: a purchase in 2099 would move all windows to where there is no other.

    Args:
        checks: told of rows that lie far behind all others.
        column: name of the column of times.
        seconds: i64, nulls do not count.
        values: the column as read.
    """
    known = np.sort(seconds.drop_nulls().to_numpy())
    if len(known) < 2:
        return
    most = max(1, int(len(known) * OUTLYING_SHARE))
    start = max(len(known) - most, 1)
    gaps = np.diff(known[start - 1 :])
    largest = int(np.argmax(gaps))
    last_s = int(known[start - 1 + largest])
    if gaps[largest] <= max(LEAST_GAP_S, last_s - int(known[0])) or start - 1 + largest == 0:
        return
    years = gaps[largest] / (365.25 * DAY_S)
    rule = f"lie near the other times, which end on {utc_text(last_s)[:10]}"
    remedy = f"correct it, or end before it with data.end={utc_text(last_s)[:10]}T23:59:59"
    checks.check(
        column, rule, (seconds > last_s).fill_null(False), values, remedy, f"{years:.0f} years after all others"
    )


def duplicate_note(name: str, rows: pl.DataFrame, is_first: pl.Series, drop: bool) -> str:
    """What is said of rows that occur more than once."""
    copies = int((~is_first).sum())
    every = " every row occurs twice;" if copies * 2 == len(rows) and int(is_first.sum()) == copies else ""
    done = "left out" if drop else "kept; leave them out with data.duplicates=drop"
    return f"{name}:{every} {copies} of {len(rows)} rows repeat an earlier one exactly, they are {done}"
