from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.labels import (
    ClientRows,
    LabelMatrix,
    label_lists,
    label_matrices,
    make_label_lists,
    scored_skus,
)
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError
from ubp_fast.events.sources.challenge import Challenge

GOLDEN = Path(__file__).parents[1] / "golden"
PROPENSITY_TASKS = ("propensity_sku", "propensity_new_sku", "propensity_category", "propensity_price")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "b_targets.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def window() -> pl.DataFrame:
    return pl.read_parquet(GOLDEN / "b_target_events.parquet")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("small") / "events"
    Challenge(dir=str(GOLDEN / "small")).prepare(directory)
    return EventDirectory.open(directory)


def label_matrix(client_ids: np.ndarray, purchases: pl.DataFrame, column: str, label_ids: np.ndarray) -> LabelMatrix:
    return label_matrices(ClientRows(client_ids), purchases, {column: (column, label_ids)})[1][column]


def bought(client_ids: np.ndarray, purchases: pl.DataFrame) -> np.ndarray:
    return label_matrices(ClientRows(client_ids), purchases, {})[0]


def brute_force(client_ids: np.ndarray, purchases: pl.DataFrame, column: str, label_ids: np.ndarray) -> np.ndarray:
    """The definition: one client and one label at a time."""
    pairs = set(purchases.select("client_id", column).iter_rows())
    cells = [[(int(client), int(label)) in pairs for label in label_ids] for client in client_ids]
    return np.array(cells, np.float32).reshape(len(client_ids), len(label_ids))


@pytest.mark.parametrize("task", PROPENSITY_TASKS)
def test_labels_equal_the_organisers(golden, window, task):
    matrix = label_matrix(golden["clients"], window, task.rsplit("_", 1)[1], golden[f"{task}__ids"])
    dense = matrix.dense()
    assert dense.dtype == np.float32
    np.testing.assert_array_equal(dense, golden[f"{task}__target"])
    assert golden[f"{task}__target"].any()


def test_churn_equals_the_organisers(golden, window):
    churned = ~bought(golden["clients"], window)
    np.testing.assert_array_equal(churned.astype(np.float32)[:, None], golden["churn__target"])


@pytest.mark.parametrize(
    ("ids", "expected"), [("dup_ids", "dup_target"), ("propensity_category__ids", "object_ids_target")]
)
def test_repeated_and_object_label_ids(golden, window, ids, expected):
    label_ids = golden[ids].astype(object) if expected == "object_ids_target" else golden[ids]
    np.testing.assert_array_equal(
        label_matrix(golden["clients"], window, "category", label_ids).dense(), golden[expected]
    )


def test_an_empty_window_has_no_labels(golden, window):
    clients, nothing = golden["clients"][:3], window.clear()
    np.testing.assert_array_equal(1.0 - bought(clients, nothing)[:, None], golden["empty_window_churn"])
    matrix = label_matrix(clients, nothing, "sku", golden["propensity_sku__ids"])
    np.testing.assert_array_equal(matrix.dense(), golden["empty_window_sku"])


@pytest.mark.parametrize("seed", range(6))
def test_labels_equal_the_definition(seed):
    rng = np.random.default_rng(seed)
    num_clients, num_rows, num_labels = rng.integers(0, 40), rng.integers(0, 200), rng.integers(0, 12)
    client_ids = rng.integers(-5, 60, num_clients)  # in any order, some twice
    purchases = pl.DataFrame({"client_id": rng.integers(-5, 60, num_rows), "sku": rng.integers(0, 20, num_rows)})
    label_ids = rng.integers(0, 25, num_labels)
    matrix = label_matrix(client_ids, purchases, "sku", label_ids)
    np.testing.assert_array_equal(matrix.dense(), brute_force(client_ids, purchases, "sku", label_ids))
    np.testing.assert_array_equal(bought(client_ids, purchases), np.isin(client_ids, purchases["client_id"]))
    assert (matrix.indptr.dtype, matrix.indices.dtype) == (np.int64, np.int32)
    for row in range(matrix.num_rows):
        columns = matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]
        assert (np.diff(columns) > 0).all(), f"columns of row {row} are not ascending: {columns}"


def test_permuted_clients_and_purchases_permute_the_rows(golden, window):
    rng = np.random.default_rng(3)
    order = rng.permutation(len(golden["clients"]))
    shuffled = window[rng.permutation(len(window)).tolist()]
    ids = golden["propensity_sku__ids"]
    expected = label_matrix(golden["clients"], window, "sku", ids).dense(order)
    np.testing.assert_array_equal(label_matrix(golden["clients"][order], shuffled, "sku", ids).dense(), expected)


@pytest.mark.parametrize(
    "rows", [slice(3, 9), slice(60, None), slice(7, 3), slice(None, None, -2), np.array([5, 0, 5])]
)
def test_rows_of_a_matrix(golden, window, rows):
    matrix = label_matrix(golden["clients"], window, "price", golden["propensity_price__ids"])
    np.testing.assert_array_equal(matrix.dense(rows), golden["propensity_price__target"][rows])
    np.testing.assert_array_equal(matrix.take(rows).dense(), golden["propensity_price__target"][rows])
    np.testing.assert_array_equal(matrix.column_counts(), golden["propensity_price__target"].sum(0))


def test_no_clients():
    matrix = label_matrix(np.zeros(0, np.int64), pl.DataFrame({"client_id": [1], "sku": [2]}), "sku", np.array([2]))
    assert isinstance(matrix, LabelMatrix)
    assert matrix.dense().shape == (0, 1)


def test_text_label_ids_are_refused(window):
    with pytest.raises(ValueError, match="label_ids must be integers, got dtype <U4"):
        label_matrix(np.array([1]), window, "sku", np.array(["1001"]))


def test_nulls_are_refused():
    purchases = pl.DataFrame({"client_id": [1, 2, 3], "category": [1, None, None]})
    with pytest.raises(DataError, match="column 'category' must not be null, got 2 nulls, the first in row 1"):
        label_matrix(np.array([1]), purchases, "category", np.array([1]))


def test_new_skus_are_those_bought_more_often_than_ever_before(small):
    start_s, end_s = small.split.train_window_s
    lists = make_label_lists(small, start_s, end_s, num_labels=10)
    window = small.purchases(start_s, end_s)
    top = label_lists(window, None, 10)
    for name in ("propensity_category", "propensity_sku", "propensity_price"):
        np.testing.assert_array_equal(lists[name][0], top[name][0])
    counts, before = (dict(frame["sku"].value_counts().iter_rows()) for frame in (window, small.purchases(0, start_s)))
    by_rank = sorted(counts, key=lambda sku: (-counts[sku], sku))
    new = [sku for sku in by_rank if counts[sku] > before.get(sku, 0)]
    fill = [sku for sku in by_rank if sku not in new and sku not in set(top["propensity_sku"][0].tolist())]
    ids, popularity = lists["propensity_new_sku"]
    assert new
    assert ids.tolist() == (new + fill)[:10]
    assert ids.tolist() != top["propensity_new_sku"][0].tolist()
    np.testing.assert_allclose(popularity, [counts[sku] / len(window) for sku in ids.tolist()])


def test_scored_skus_are_those_of_the_lists_and_the_most_bought():
    purchases = pl.DataFrame({"sku": [7, 7, 7, 2, 2, 9, 9, 5, 4]})
    lists = {"propensity_sku": (np.array([9, 3]), np.zeros(2)), "propensity_new_sku": (np.array([5, 9]), np.zeros(2))}
    ids, popularity = scored_skus(purchases, {**lists, "propensity_price": (np.array([1]), np.zeros(1))}, 3)
    assert ids.tolist() == [9, 3, 5, 7, 2], "lists first; of equally bought ones the smaller id"
    np.testing.assert_allclose(popularity * 9, [2, 0, 1, 3, 2])
    assert scored_skus(purchases, lists, 0)[0].tolist() == [9, 3, 5]
    assert scored_skus(purchases, {}, 99)[0].tolist() == [7, 2, 9, 4, 5]


def test_label_lists_need_purchases(small):
    with pytest.raises(DataError, match="got 0 purchases"):
        make_label_lists(small, 0, 1)
    with pytest.raises(ValueError, match="num_labels must be >= 1, got 0"):
        make_label_lists(small, *small.split.train_window_s, num_labels=0)


def test_ranks_ties_and_popularity() -> None:
    purchases = pl.DataFrame({"sku": [9, 9, 4, 4, 7, 1], "category": [2, 2, 1, 1, 3, 3], "price": [5] * 6})
    lists = label_lists(purchases, num_labels=2)
    assert {name: ids.tolist() for name, (ids, _) in lists.items()} == {
        "propensity_category": [1, 2],
        "propensity_sku": [4, 9],
        "propensity_new_sku": [1, 7],
    }, "one price is no choice"
    assert lists["propensity_sku"][1].tolist() == [2 / 6, 2 / 6]
    assert lists["propensity_new_sku"][1].tolist() == [1 / 6, 1 / 6]


def test_new_skus_come_before_those_next_in_rank() -> None:
    purchases = pl.DataFrame({"sku": [9, 9, 4, 4, 7, 1], "category": [2, 2, 1, 1, 3, 3], "price": [5] * 6})
    before = pl.DataFrame({"sku": [9, 9, 4, 1, 1]})
    lists = label_lists(purchases, before, num_labels=2)
    assert lists["propensity_sku"][0].tolist() == [4, 9], "new or not"
    assert lists["propensity_new_sku"][0].tolist() == [4, 7], "bought more often than ever before"
    assert label_lists(purchases, before, num_labels=3)["propensity_new_sku"][0].tolist() == [4, 7]
    assert label_lists(purchases, before.head(4), num_labels=1)["propensity_new_sku"][0].tolist() == [4]


def test_no_sku_is_left_for_the_new_ones() -> None:
    purchases = pl.DataFrame({"sku": [1], "category": [1], "price": [1]})
    assert "propensity_new_sku" not in label_lists(purchases)
    assert label_lists(purchases.head(0)) == {}
