"""Dense ids: 0 is padding, 1 is unknown, real ids start at 2, in ascending order of the original ids."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from ubp_fast.store.ids import KnownIds

PAD, UNKNOWN, FIRST_ID = 0, 1, 2


def vocabulary(ids: np.ndarray) -> np.ndarray:
    """Original id of every dense id.

    Args:
        ids: i64 [N], ascending, no id twice.

    Returns:
        i64 [N + 2], entries 0 and 1 are -1.
    """
    return np.concatenate([np.full(FIRST_ID, -1, np.int64), ids])


class DenseProducts(NamedTuple):
    """Vocabularies of products and their properties by dense sku id; rows 0 and 1 have the properties 0 and 1.

    Attributes:
        sku_ids: i64 [S], see `vocabulary`.
        category_ids: i64 [C], see `vocabulary`.
        category: i32 [S] dense ids.
        price: i32 [S], price bucket + 2.
    """

    sku_ids: np.ndarray
    category_ids: np.ndarray
    category: np.ndarray
    price: np.ndarray


def dense_products(products: pl.DataFrame) -> DenseProducts:
    """Dense ids of a product table with the columns sku, category and price, rows by ascending sku."""
    special = np.arange(FIRST_ID, dtype=np.int32)
    categories = products["category"].unique().sort().to_numpy()
    category = KnownIds(categories).find(products["category"].to_numpy())
    price = products["price"].to_numpy().astype(np.int32)
    return DenseProducts(
        vocabulary(products["sku"].to_numpy()),
        vocabulary(categories),
        *(np.concatenate([special, column + np.int32(FIRST_ID)]) for column in (category, price)),
    )
