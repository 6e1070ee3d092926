"""Dense ids: 0 is padding, 1 is unknown, real ids start at 2, in ascending order of the original ids."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

PAD, UNKNOWN, FIRST_ID = 0, 1, 2


def vocabulary(ids: np.ndarray) -> np.ndarray:
    """Original id of every dense id.

    Args:
        ids: i64 [N], no id twice.

    Returns:
        i64 [N + 2], entries 0 and 1 are -1.
    """
    return np.concatenate([np.full(FIRST_ID, -1, np.int64), np.sort(ids).astype(np.int64)])


def encode(ids: np.ndarray, vocabulary_ids: np.ndarray) -> np.ndarray:
    """Dense ids i32 [N] of original ids i64 [N]; what the vocabulary does not hold becomes `UNKNOWN`."""
    known = vocabulary_ids[FIRST_ID:]
    if not len(known):
        return np.full(len(ids), UNKNOWN, np.int32)
    position = np.searchsorted(known, ids)
    position[position == len(known)] = 0
    found = known[position] == ids
    return np.where(found, position + FIRST_ID, UNKNOWN).astype(np.int32)


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
    """Dense ids of a product table (sku, category, price), rows by ascending sku."""
    special = np.arange(FIRST_ID, dtype=np.int32)
    category_ids = vocabulary(products["category"].unique().to_numpy())
    category = np.concatenate([special, encode(products["category"].to_numpy(), category_ids)])
    price = np.concatenate([special, products["price"].to_numpy().astype(np.int32) + np.int32(FIRST_ID)])
    return DenseProducts(vocabulary(products["sku"].to_numpy()), category_ids, category, price)
