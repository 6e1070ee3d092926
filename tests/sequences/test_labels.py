"""Labels of target windows against the tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.shops import DAY_S, END_S, make_store

from ubp_fast.sequences import views_at, window_labels
from ubp_fast.sequences.labels import label_of_sku
from ubp_fast.store.event_store import EventStore

CUTOFF_S = END_S - 28 * DAY_S
LISTS = {
    "propensity_sku": (np.array([33, 4, 999, 0]), np.ones(4)),
    "propensity_category": (np.array([9, 7]), np.ones(2)),
    "propensity_price": (np.arange(10)[::-1], np.ones(10)),
    "propensity_new_sku": (np.array([12]), np.ones(1)),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return make_store(tmp_path_factory.mktemp("labels"))


def skus_of(store: EventStore, kind: str, row: int, start_s: int) -> set[int]:
    columns = store.kind(kind)
    own = slice(columns.offsets[row], columns.offsets[row + 1])
    inside = (columns.timestamp_s[own] >= start_s) & (columns.timestamp_s[own] < start_s + 14 * DAY_S)
    return set(store.sku_ids[columns.item[own][inside]].tolist())


def test_labels_say_what_happened_in_the_window(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S, CUTOFF_S - 14 * DAY_S])
    labels = window_labels(store, views, LISTS)
    everything = np.arange(len(views.row))
    for prefix, kind in (("buy", "product_buy"), ("add", "add_to_cart")):
        dense = {
            name: np.asarray(labels[f"{prefix}_{name.removeprefix('propensity_')}"].dense(everything)) for name in LISTS
        }
        for view, (row, cutoff_s) in enumerate(zip(*views, strict=True)):
            skus = skus_of(store, kind, row, cutoff_s)
            assert dense["propensity_sku"][view].tolist() == [float(sku in skus) for sku in (33, 4, 999, 0)]
            assert dense["propensity_new_sku"][view].tolist() == [float(12 in skus)]
            assert dense["propensity_category"][view].tolist() == [
                float(c in {s % 5 + 7 for s in skus}) for c in (9, 7)
            ]
            assert dense["propensity_price"][view].tolist() == [
                float(p in {s % 10 for s in skus}) for p in range(9, -1, -1)
            ]
            happened = float(bool(skus))
            assert (labels["add"] if prefix == "add" else 1 - labels["churn"])[view] == happened
    assert 0 < labels["churn"].mean() < 1


def test_purchases_only_have_no_cart_labels(tmp_path: Path) -> None:
    store = make_store(tmp_path, kinds=("product_buy",))
    assert set(window_labels(store, views_at(store, [CUTOFF_S]), LISTS)) == {
        "churn", "buy_sku", "buy_category", "buy_price", "buy_new_sku",
    }  # fmt: skip


def test_unknown_ids_have_no_label(store: EventStore) -> None:
    for column in ("sku", "category", "price"):
        assert (label_of_sku(store, column, np.array([-1, 0, 1]))[:2] == -1).all()
        assert (label_of_sku(store, column, np.empty(0, np.int64)) == -1).all()
    with pytest.raises(ValueError, match="sku, category or price, got 'colour'"):
        label_of_sku(store, "colour", np.array([1]))


def test_windows_beyond_the_store_are_refused(store: EventStore) -> None:
    with pytest.raises(ValueError, match="use an earlier cutoff"):
        window_labels(store, views_at(store, [END_S - 1]), LISTS)
