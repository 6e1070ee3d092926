"""What an event table looks like, and the checks that everything read has to pass.

The canonical tables (one Parquet file per kind, see `ubp_fast.events.read`):

    product_buy, add_to_cart, remove_from_cart   client_id i64, timestamp_s i64, sku i64
    page_visit                                   client_id i64, timestamp_s i64, url i64
    search_query                                 client_id i64, timestamp_s i64, query u8[16]
    product_properties                           sku i64, category i64, price i64, name u8[16]

`timestamp_s` counts seconds since 1970-01-01 UTC. `query` and `name` are 16 product-quantisation codes, `price` is a
quantile bucket 0..99.
"""

from __future__ import annotations

import numpy as np
import polars as pl

EVENT_KINDS: tuple[str, ...] = ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")
ITEM_COLUMN: dict[str, str] = {
    "product_buy": "sku",
    "add_to_cart": "sku",
    "remove_from_cart": "sku",
    "page_visit": "url",
    "search_query": "query",
}
SKU_KINDS: tuple[str, ...] = tuple(kind for kind in EVENT_KINDS if ITEM_COLUMN[kind] == "sku")
LABEL_LISTS: tuple[str, ...] = ("propensity_category", "propensity_sku", "propensity_new_sku", "propensity_price")
LabelLists = dict[str, tuple[np.ndarray, np.ndarray]]  # list name -> (ids i64 [n], popularity f64 [n])
NUM_CODES = 16
NUM_PRICE_BUCKETS = 100
CODES = pl.Array(pl.UInt8, NUM_CODES)
PRODUCT_TABLE = "product_properties"
PRODUCT_SCHEMA: dict[str, pl.DataType] = {"sku": pl.Int64(), "category": pl.Int64(), "price": pl.Int64(), "name": CODES}
PURCHASE_SCHEMA: dict[str, pl.DataType] = {
    "client_id": pl.Int64(),
    "timestamp_s": pl.Int64(),
    "sku": pl.Int64(),
    "category": pl.Int64(),
    "price": pl.Int64(),
}


class UserError(ValueError):
    """What a user gave breaks a rule; the message is all that the user needs. Other errors are mistakes of ours."""


class DataError(UserError):
    """The data breaks a rule; the message names file, column, first bad row, count and the remedy."""


def event_schema(kind: str) -> dict[str, pl.DataType]:
    """Columns and dtypes of the canonical table of one kind.

    Raises:
        ValueError: `kind` is not one of `EVENT_KINDS`.
    """
    if kind not in ITEM_COLUMN:
        raise ValueError(f"events: kind must be one of {list(EVENT_KINDS)}, got '{kind}'")
    item: pl.DataType = CODES if ITEM_COLUMN[kind] == "query" else pl.Int64()
    return {"client_id": pl.Int64(), "timestamp_s": pl.Int64(), ITEM_COLUMN[kind]: item}


def empty_frame(schema: dict[str, pl.DataType]) -> pl.DataFrame:
    """A frame of that schema without rows."""
    return pl.DataFrame(schema=schema)


def bad_rows(
    file: str, column: str, rule: str, bad: pl.Series, values: pl.Series, remedy: str, detail: str = ""
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
    """
    first = int(bad.arg_true()[0])
    count = int(bad.sum())
    shown = _shown(values[first]) + (f" ({detail})" if detail else "")
    rows = "1 bad row" if count == 1 else f"{count} bad rows"
    return DataError(
        f"{file}: column '{column}' must {rule}, got {shown} in row {first} ({rows} of {len(bad)}); {remedy}"
    )


def require_columns(file: str, present: list[str], wanted: list[str], remedy: str) -> None:
    """Checks that every wanted column exists.

    Raises:
        DataError: names the first missing column and the columns that are there.
    """
    for column in wanted:
        if column not in present:
            raise DataError(f"{file}: column '{column}' must exist, got columns {present}; {remedy}")


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


def _shown(value: object) -> str:
    """A value for a message, cut to a length that leaves the message readable."""
    text = repr(value.to_list()) if isinstance(value, pl.Series) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
