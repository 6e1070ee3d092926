"""Ids that are text -> integers."""

from __future__ import annotations

import polars as pl

from ubp_fast.events.parse import parse_ids


def number(file: str, column: str, values: pl.Series, order: pl.Series) -> tuple[pl.Series, pl.DataFrame | None]:
    """Ids as i64; integers stay as they are, text is numbered in order of first appearance.

    Args:
        file: for messages.
        column: its name in that file.
        values: ids of any integer dtype, or text; nulls stay null.
        order: row numbers in the order in which to go through the rows. By time, so that later rows cannot change
            the numbers of earlier ones.

    Returns:
        i64 series of the same name, and for text the table value -> id.

    Raises:
        DataError: neither integers nor text.
    """
    if values.dtype not in (pl.String, pl.Categorical) and not isinstance(values.dtype, pl.Enum):
        parse_ids(file, values.drop_nulls().alias(column))
        return values.cast(pl.Int64), None
    text = values.cast(pl.String).alias("value")
    seen = text.gather(order).drop_nulls().unique(maintain_order=True)
    table = pl.DataFrame([seen]).with_row_index("id").select("value", pl.col("id").cast(pl.Int64))
    ids = pl.DataFrame([text]).join(table, on="value", how="left", maintain_order="left")["id"]
    return ids.alias(values.name), table
