from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.evaluation import TASKS, build_targets
from ubp_fast.events.labels import ClientRows, label_lists, label_matrices, make_label_lists
from ubp_fast.events.read import PRODUCT_TABLE, TARGET_PURCHASES, EventDirectory
from ubp_fast.events.sources.challenge import Challenge

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def events(tmp_path: Path) -> EventDirectory:
    Challenge(dir=str(GOLDEN / "small")).prepare(tmp_path / "events")
    return EventDirectory.open(tmp_path / "events")


def clients_of(events: EventDirectory) -> np.ndarray:
    return np.concatenate([events.relevant_clients, [-7]])


def test_labels_of_both_windows_and_the_lists_that_came_with_the_data(events):
    clients = clients_of(events)
    targets = build_targets(events, clients)
    assert list(targets.tasks) == list(TASKS)
    assert targets.missing == {}
    for name, column in (("propensity_sku", "sku"), ("propensity_new_sku", "sku"), ("propensity_price", "price")):
        task, (ids, popularity) = targets.tasks[name], events.label_lists[name]
        np.testing.assert_array_equal(task.popularity, popularity)
        windows = (events.split.train_window_s, events.split.validation_window_s)
        for labels, window in zip((task.train, task.validation), windows, strict=True):
            _, expected = label_matrices(ClientRows(clients), events.purchases(*window), {name: (column, ids)})
            np.testing.assert_array_equal(labels.dense(), expected[name].dense())
    assert not targets.tasks["churn"].included[-1]
    assert targets.tasks["churn"].train.dense()[-1] == 1.0


def test_lists_and_active_clients_are_made_when_the_data_has_none(events):
    shutil.rmtree(events.path / "labels")
    (events.path / "active_clients.npy").unlink()
    clients = clients_of(events)
    targets = build_targets(events, clients)
    for name, (ids, popularity) in make_label_lists(events, *events.split.train_window_s).items():
        assert targets.tasks[name].train.num_labels == len(ids)
        np.testing.assert_array_equal(targets.tasks[name].popularity, popularity)
    before = set(events.purchases(0, events.split.input_end_s)["client_id"].to_list())
    expected = [client in before for client in clients.tolist()]
    np.testing.assert_array_equal(targets.tasks["churn"].included, expected)


def test_only_missing_lists_are_made(events):
    """The first release of the challenge had no lists for its hidden tasks."""
    for name in ("propensity_new_sku", "propensity_price"):
        (events.path / "labels" / f"{name}.npy").unlink()
    brought, made = events.label_lists, make_label_lists(events, *events.split.train_window_s)
    targets = build_targets(events, clients_of(events))
    for name, expected in (("propensity_sku", brought), ("propensity_price", made), ("propensity_new_sku", made)):
        np.testing.assert_array_equal(targets.tasks[name].popularity, expected[name][1])


@pytest.mark.parametrize("count", [0, 1])
def test_a_task_of_fewer_than_two_labels_is_left_out_and_says_why(events, count):
    """One label is bought by whoever buys: the task of a shop with one category equalled conversion."""
    for name in ("propensity_new_sku", "popularity_propensity_new_sku"):
        path = events.path / "labels" / f"{name}.npy"
        np.save(path, np.load(path)[:count])
    targets = build_targets(events, clients_of(events))
    assert targets.missing == {
        "propensity_new_sku": f"the list that came with the data has {count} labels, a task needs two"
    }
    assert "propensity_new_sku" not in targets.tasks
    assert build_targets(events, clients_of(events), ("churn",)).missing == {}


def test_a_shop_of_one_category_one_price_and_one_sku_has_no_such_tasks(events):
    """Label lists that are made, for models and for the evaluation alike, name nothing that is no choice."""
    for table in (PRODUCT_TABLE, TARGET_PURCHASES):
        path = events.path / f"{table}.parquet"
        rows = pl.read_parquet(path)
        rows.with_columns(category=pl.lit(0, pl.Int64), price=pl.lit(7, pl.Int64)).write_parquet(path)
    shutil.rmtree(events.path / "labels")
    assert list(make_label_lists(events, *events.split.train_window_s)) == ["propensity_sku", "propensity_new_sku"]
    targets = build_targets(events, clients_of(events))
    assert list(targets.tasks) == ["churn", "conversion", "propensity_sku", "propensity_new_sku"]
    assert targets.missing["propensity_price"] == (
        "the purchases of the train window leave fewer than two values of 'price' to ask for"
    )
    buys = events.purchases(*events.split.train_window_s).with_columns(sku=pl.lit(3, pl.Int64))
    assert label_lists(buys) == {}


def test_unknown_tasks_are_refused(events):
    with pytest.raises(ValueError, match="got 'propensity_brand'"):
        build_targets(events, clients_of(events), ("churn", "propensity_brand"))
