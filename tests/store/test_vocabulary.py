from __future__ import annotations

import numpy as np
import polars as pl

from ubp_fast.store.vocabulary import PAD, UNKNOWN, dense_products, vocabulary


def test_real_ids_start_at_two() -> None:
    assert vocabulary(np.array([-5, -1, 7, 2**62])).tolist() == [-1, -1, -5, -1, 7, 2**62]
    assert vocabulary(np.empty(0, np.int64)).tolist() == [-1, -1]
    assert (PAD, UNKNOWN) == (0, 1)


def test_products_in_dense_ids() -> None:
    products = {"sku": [-9, -1, 2**63 - 1], "category": [2**63 - 1, -1, 2**63 - 1], "price": [99, 0, 3]}
    dense = dense_products(pl.DataFrame(products))
    assert dense.sku_ids.tolist() == [-1, -1, -9, -1, 2**63 - 1]
    assert dense.category_ids.tolist() == [-1, -1, -1, 2**63 - 1]
    assert dense.category.tolist() == [0, 1, 3, 2, 3]
    assert dense.price.tolist() == [0, 1, 101, 2, 5]
    assert [column.dtype for column in dense] == [np.int64, np.int64, np.int32, np.int32]


def test_no_products() -> None:
    dense = dense_products(pl.DataFrame(schema={"sku": pl.Int64, "category": pl.Int64, "price": pl.Int64}))
    assert [column.tolist() for column in dense] == [[-1, -1], [-1, -1], [0, 1], [0, 1]]
