"""Columns and dtypes of the canonical tables, and the checks that everything read has to pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl

from ubp_fast.events.schema import AMOUNTS, EVENT_KINDS, ITEM_COLUMN, NUM_CODES, DataError

CODES = pl.Array(pl.UInt8, NUM_CODES)
PRODUCT_SCHEMA: dict[str, pl.DataType] = {"sku": pl.Int64(), "category": pl.Int64(), "price": pl.Int64(), "name": CODES}
PURCHASE_SCHEMA: dict[str, pl.DataType] = {
    "client_id": pl.Int64(),
    "timestamp_s": pl.Int64(),
    "sku": pl.Int64(),
    "category": pl.Int64(),
    "price": pl.Int64(),
}


def event_schema(kind: str, amounts: Sequence[str] = ()) -> dict[str, pl.DataType]:
    """Columns and dtypes of the canonical table of one kind.

    Args:
        kind: one of `EVENT_KINDS`.
        amounts: those of `AMOUNTS` that the purchases of the source have; other kinds have none.

    Raises:
        ValueError: `kind` is not one of `EVENT_KINDS`.
    """
    if kind not in ITEM_COLUMN:
        raise ValueError(f"events: kind must be one of {list(EVENT_KINDS)}, got '{kind}'")
    item: pl.DataType = CODES if ITEM_COLUMN[kind] == "query" else pl.Int64()
    columns: dict[str, pl.DataType] = {"client_id": pl.Int64(), "timestamp_s": pl.Int64(), ITEM_COLUMN[kind]: item}
    return columns | dict.fromkeys(amounts if kind == "product_buy" else (), pl.Float32())


def amounts_among(columns: Iterable[str]) -> tuple[str, ...]:
    """Those of `AMOUNTS` that some columns name, in the order of `AMOUNTS`."""
    return tuple(name for name in AMOUNTS if name in set(columns))


def empty_frame(schema: dict[str, pl.DataType]) -> pl.DataFrame:
    """A frame of that schema without rows."""
    return pl.DataFrame(schema=schema)


class MissingColumnError(DataError):
    """A table lacks a column; `columns` are those that it has."""

    def __init__(self, message: str, columns: list[str]) -> None:
        super().__init__(message)
        self.columns = columns


def bad_rows(
    file: str,
    column: str,
    rule: str,
    bad: pl.Series,
    values: pl.Series,
    remedy: str,
    detail: str = "",
    row: int | None = None,
) -> DataError:
    """The error for a column in which the rows marked in `bad` break `rule`.

    Args:
        file: name of the file the user can look into.
        column: name of the column there.
        rule: what every value must do, as a verb phrase: "hold an integer".
        bad: boolean, one entry per row of the file; at least one is true.
        values: the column as read, to show the first bad value.
        remedy: what to do about it.
        detail: why the first bad value is bad, where that is not plain.
        row: number of the first bad row in the file, where that is not its place in `bad`.
    """
    first = int(bad.arg_true()[0])
    count = int(bad.sum())
    got = shown(values[first]) + (f" ({detail})" if detail else "")
    rows = "1 bad row" if count == 1 else f"{count} bad rows"
    return DataError(
        f"{file}: column '{column}' must {rule}, got {got} in row {first if row is None else row}"
        f" ({rows} of {len(bad)}); {remedy}"
    )


def require_columns(file: str, present: list[str], wanted: list[str], remedy: str) -> None:
    """Checks that every wanted column exists.

    Raises:
        MissingColumnError: names the first missing column and the columns that are there.
    """
    for column in wanted:
        if column not in present:
            message = f"{file}: column '{column}' must exist, got columns {present}; {remedy}"
            raise MissingColumnError(message, present)


def require_unique(file: str, column: str, values: pl.Series, remedy: str) -> None:
    """Checks that no value occurs twice.

    Raises:
        DataError: names the first repeated value and its row.
    """
    if values.n_unique() != len(values):
        repeated = ~values.is_first_distinct()
        raise bad_rows(file, column, "hold every value once", repeated, values, remedy, "seen before")


def require_canonical(file: str, frame: pl.DataFrame, schema: dict[str, pl.DataType]) -> None:
    """Checks names, order and dtypes of a canonical table, and that it holds no nulls.

    Raises:
        DataError: the first difference.
    """
    if list(frame.schema.items()) != list(schema.items()):
        raise DataError(
            f"{file}: columns must be {schema}, got {dict(frame.schema)}; prepare the events again from their source"
        )
    for column in schema:
        if frame[column].null_count():
            raise bad_rows(
                file, column, "hold no null", frame[column].is_null(), frame[column], "prepare the events again"
            )


def require_amounts(file: str, frame: pl.DataFrame, amounts: Sequence[str]) -> None:
    """Checks that amounts are numbers of 0 or more.

    Raises:
        DataError: the first column and row that break the rule.
    """
    for column in amounts:
        values = frame[column]
        bad = ~((values >= 0) & values.is_finite()).fill_null(False)
        if bad.any():
            raise bad_rows(file, column, "hold finite numbers >= 0", bad, values, "correct the rows")


def shown(value: object) -> str:
    """A value for a message, cut to a length that leaves the message readable."""
    text = repr(value.to_list()) if isinstance(value, pl.Series) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
