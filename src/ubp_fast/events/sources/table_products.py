"""Product properties from the rows of a user's own table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from ubp_fast.events.checks import CODES
from ubp_fast.events.schema import NUM_CODES, NUM_PRICE_BUCKETS, SKU_KINDS

NO_CATEGORY = "UNKNOWN"


def product_table(
    file: str, rows: pl.DataFrame, input_end_s: int, text_codes: Callable[[pl.Series], pl.Series]
) -> tuple[pl.DataFrame, list[str]]:
    """One row per sku, in order of first appearance in time.

    A product that occurs before `input_end_s` is described by those rows only: its first category and name, its median
    price. Price buckets are quantiles of the prices of these products. A product without a price has bucket 0.

    Args:
        file: for messages.
        rows: kind, timestamp_s, sku, and where the table has them category, price (f64), name.
        input_end_s: end of the history.
        text_codes: names -> codes.

    Returns:
        sku i64, category (i64, or text still to be numbered), price i64, name u8[16]; and notes.
    """
    rows = rows.filter(pl.col("kind").is_in(SKU_KINDS)).sort("timestamp_s", maintain_order=True)
    is_history = pl.col("timestamp_s") < input_end_s
    rows = rows.filter(is_history | ~is_history.any().over("sku"))
    described = [pl.col("timestamp_s").first()]
    described += [pl.col(name).drop_nulls().first() for name in ("category", "name") if name in rows.columns]
    notes: list[str] = []
    if "price" in rows.columns:
        described.append(pl.col("price").median())
    products = rows.group_by("sku", maintain_order=True).agg(described)
    category = (
        products["category"] if "category" in products.columns else pl.Series([0]).new_from_index(0, len(products))
    )
    if category.null_count():
        category = category.cast(pl.String).fill_null(NO_CATEGORY)
    price = pl.Series([0]).new_from_index(0, len(products))
    if "price" in products.columns:
        price = _buckets(products["price"], products["timestamp_s"] < input_end_s)
        if unpriced := products["price"].null_count():
            notes.append(f"{file}: {unpriced} products have no price, they are in bucket 0")
    name = pl.Series(np.zeros((len(products), NUM_CODES), np.uint8), dtype=CODES)
    if "name" in products.columns:
        name = text_codes(products["name"])
    columns = [products["sku"], category.alias("category"), price.alias("price"), name.alias("name")]
    return pl.DataFrame(columns), notes


def _buckets(price: pl.Series, is_history: pl.Series) -> pl.Series:
    """Quantile bucket 0..99 of each price among the products of the history."""
    known = price.filter(is_history).drop_nulls().to_numpy()
    if not len(known):
        return pl.Series([0]).new_from_index(0, len(price))
    edges = np.quantile(known, np.arange(1, NUM_PRICE_BUCKETS) / NUM_PRICE_BUCKETS)
    buckets = np.searchsorted(edges, price.fill_null(-np.inf).to_numpy(), side="right")
    return pl.Series(buckets.astype(np.int64))
