from __future__ import annotations

import polars as pl

from ubp_fast.events.labels import top_label_lists


def test_ranks_ties_and_popularity() -> None:
    purchases = pl.DataFrame({"sku": [9, 9, 4, 4, 7, 1], "category": [2, 2, 1, 1, 3, 3], "price": [5] * 6})
    lists = top_label_lists(purchases, num_labels=2)
    assert {name: ids.tolist() for name, (ids, _) in lists.items()} == {
        "propensity_category": [1, 2],
        "propensity_sku": [4, 9],
        "propensity_new_sku": [1, 7],
        "propensity_price": [5],
    }
    assert lists["propensity_sku"][1].tolist() == [2 / 6, 2 / 6]
    assert lists["propensity_new_sku"][1].tolist() == [1 / 6, 1 / 6]
    assert lists["propensity_price"][1].tolist() == [1.0]


def test_no_sku_is_left_for_the_new_ones() -> None:
    purchases = pl.DataFrame({"sku": [1], "category": [1], "price": [1]})
    assert "propensity_new_sku" not in top_label_lists(purchases)
    assert top_label_lists(purchases.head(0)) == {}
