"""Product properties from the rows of a user's own table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from ubp_fast.events.checks import CODES
from ubp_fast.events.schema import NUM_CODES, NUM_PRICE_BUCKETS, SKU_KINDS, DataError

NO_CATEGORY = "UNKNOWN"


def product_table(
    file: str,
    rows: pl.DataFrame,
    input_end_s: int,
    text_codes: Callable[[pl.Series], pl.Series],
    edges: np.ndarray | None = None,
) -> tuple[pl.DataFrame, list[str], np.ndarray]:
    """One row per sku, in order of first appearance in time.

    A product that occurs before `input_end_s` is described by those rows only: its first category and name, its median
    price. Price buckets are quantiles of the prices of these products. A product without a price has bucket 0.

    Args:
        file: for messages.
        rows: kind, timestamp_s, sku, and where the table has them category, price, name.
        input_end_s: end of the history.
        text_codes: names -> codes.
        edges: of the price buckets, float64 ascending; None: those of the quantiles.

    Returns:
        sku i64, category (i64, or text still to be numbered), price i64, name u8[16]; notes; the edges.

    Raises:
        DataError: a price that is no number.
    """
    rows = rows.filter(pl.col("kind").is_in(SKU_KINDS)).sort("timestamp_s", maintain_order=True)
    is_history = pl.col("timestamp_s") < input_end_s
    rows = rows.filter(is_history | ~is_history.any().over("sku"))
    described = [pl.col("timestamp_s").first()]
    described += [pl.col(name).drop_nulls().first() for name in ("category", "name") if name in rows.columns]
    notes: list[str] = []
    if "price" in rows.columns:
        rows = rows.with_columns(money(file, rows["price"]))
        described.append(pl.col("price").median())
    products = rows.group_by("sku", maintain_order=True).agg(described)
    category = (
        products["category"] if "category" in products.columns else pl.Series([0]).new_from_index(0, len(products))
    )
    if category.null_count():
        category = category.cast(pl.String).fill_null(NO_CATEGORY)
    price = pl.Series([0]).new_from_index(0, len(products))
    if "price" in products.columns:
        if edges is None:
            edges = _edges(products["price"], products["timestamp_s"] < input_end_s)
        price = buckets(products["price"], edges)
        if unpriced := products["price"].null_count():
            notes.append(f"{file}: {unpriced} products have no price, they are in bucket 0")
    name = pl.Series(np.zeros((len(products), NUM_CODES), np.uint8), dtype=CODES)
    if "name" in products.columns:
        name = text_codes(products["name"])
    columns = [products["sku"], category.alias("category"), price.alias("price"), name.alias("name")]
    return pl.DataFrame(columns), notes, np.zeros(0) if edges is None else edges


def money(file: str, price: pl.Series) -> pl.Series:
    """Prices as f64; missing, NaN and infinite ones are null."""
    if not price.dtype.is_numeric() and price.dtype != pl.Null:
        raise DataError(
            f"{file}: the price column must hold numbers, got {price.dtype};"
            " remove currency signs and thousands separators"
        )
    money = price.cast(pl.Float64)
    return pl.select(pl.when(money.is_finite()).then(money).alias("price")).to_series()


def _edges(price: pl.Series, is_history: pl.Series) -> np.ndarray:
    """Quantiles of the prices of the history's products; without any, all products are in one bucket."""
    known = price.filter(is_history).drop_nulls().to_numpy()
    quantiles = np.arange(1, NUM_PRICE_BUCKETS) / NUM_PRICE_BUCKETS
    return np.quantile(known, quantiles) if len(known) else np.zeros(0)


def buckets(price: pl.Series, edges: np.ndarray) -> pl.Series:
    """Bucket 0..99 of each price."""
    buckets = np.searchsorted(edges, price.fill_null(-np.inf).to_numpy(), side="right")
    return pl.Series(buckets.astype(np.int64))
