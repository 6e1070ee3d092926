"""Weights of clients by their chance to be relevant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.shops import DAY_S, EMPTY_CLIENT, END_S

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.models import membership
from ubp_fast.models.membership import (
    MembershipConfig,
    activity_columns,
    drawn,
    fit_logistic,
    membership_weights,
    weighted_views,
)
from ubp_fast.sequences import views_at
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore


def clients(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    columns = random.normal(size=(count, 3))
    return columns, random.random(count) < 1 / (1 + np.exp(-2 * columns[:, 0] + 1))


def test_logistic_regression_is_at_its_optimum() -> None:
    columns, relevant = clients()
    coefficients = fit_logistic(columns, relevant.astype(float), l2=1.0, steps=50)
    chance = 1 / (1 + np.exp(-(columns @ coefficients[:-1] + coefficients[-1])))
    gradient = columns.T @ (chance - relevant) + coefficients[:-1]
    assert np.abs(gradient).max() < 1e-6
    assert abs((chance - relevant).sum()) < 1e-3


def test_relevant_looking_clients_weigh_more() -> None:
    columns, relevant = clients()
    weights = membership_weights(columns, relevant)
    assert weights.dtype == np.float32
    assert (weights > 0).all()
    assert abs(weights.mean() - 1) < 1e-6
    assert weights[columns[:, 0] > 1].mean() > 3 * weights[columns[:, 0] < -1].mean()
    assert weights.tolist() == membership_weights(columns, relevant).tolist()


def test_a_client_is_judged_by_others_only() -> None:
    columns, relevant = clients()
    flipped = relevant.copy()
    flipped[17] = ~flipped[17]
    before, after = membership_weights(columns, relevant), membership_weights(columns, flipped)
    config = MembershipConfig()
    fold = np.random.default_rng(config.seed).permutation(len(columns)) % config.folds
    same = fold == fold[17]
    np.testing.assert_allclose(after[same] / after[17], before[same] / before[17], rtol=1e-5)
    assert not np.allclose(after[~same] / after[17], before[~same] / before[17], rtol=1e-5)


def test_without_a_choice_everybody_weighs_one() -> None:
    columns, _ = clients(20)
    for known in (None, np.ones(20, bool), np.zeros(20, bool)):
        assert membership_weights(columns, known).tolist() == [1.0] * 20


def test_activity_columns(store: EventStore) -> None:
    cutoff_s = END_S - 20 * DAY_S
    columns = activity_columns(store, cutoff_s)
    assert columns.shape == (30, 10)
    span = np.log1p((cutoff_s - store.first_timestamp_s) / DAY_S)
    np.testing.assert_allclose(columns[EMPTY_CLIENT], [0, span] * 5, rtol=1e-6)
    buys = store.kind("product_buy")
    own = np.asarray(buys.timestamp_s[buys.offsets[3] : buys.offsets[4]])
    own = own[own < cutoff_s]
    np.testing.assert_allclose(columns[3, :2], np.log1p([len(own), (cutoff_s - own.max()) / DAY_S]), rtol=1e-6)
    some = np.array([3, 7, 29])
    np.testing.assert_array_equal(activity_columns(store, cutoff_s, some), columns[some])


def test_blocks_of_clients_change_nothing(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, relevant = clients()
    whole = activity_columns(store, END_S), membership_weights(columns, relevant)
    monkeypatch.setattr(membership, "CLIENTS_AT_ONCE", 7)
    np.testing.assert_array_equal(activity_columns(store, END_S), whole[0])
    np.testing.assert_allclose(membership_weights(columns, relevant), whole[1], rtol=1e-6)


def test_a_part_of_the_clients_is_enough_for_the_fit() -> None:
    columns, relevant = clients(20_000)
    every, part = (membership_weights(columns, relevant, MembershipConfig(clients=limit)) for limit in (10**6, 5_000))
    assert not np.array_equal(every, part)
    assert np.corrcoef(every, part)[0, 1] > 0.999


def test_draws_keep_every_weighted_sum_on_average() -> None:
    random = np.random.default_rng(0)
    weight = np.exp(random.normal(0, 2, 5_000)).astype(np.float32)  # a few large, most near 0
    values = random.random((5_000, 2)) + weight[:, None] * [0, 1]
    wanted, sums, sizes = weight @ values, [], []
    for seed in range(200):
        chosen, drawn_weight = drawn(weight, 800, seed)
        sums.append(drawn_weight @ values[chosen])
        sizes.append(len(chosen))
        assert (np.diff(chosen) > 0).all()
    error = np.std(sums, axis=0) / np.sqrt(len(sums))
    assert (np.abs(np.mean(sums, axis=0) - wanted) < 4 * error).all()
    assert abs(np.mean(sizes) - 800) < 4
    uniform = [
        weight[even] @ values[even] * 5_000 / 800 for even in (random.permutation(5_000)[:800] for _ in range(200))
    ]
    assert (np.std(uniform, axis=0) > 5 * np.std(sums, axis=0)).all(), "far less noise than views drawn evenly"
    chosen, same = drawn(weight, 5_000, 0)
    assert len(chosen) == 5_000
    np.testing.assert_array_equal(same, weight)


def test_views_of_all_clients_and_a_draw_of_them(tmp_path: Path) -> None:
    Synthetic(clients=400, days=70, skus=60, categories=10, urls=60, seed=5, relevant=60).prepare(tmp_path / "events")
    events = EventDirectory.open(tmp_path / "events")
    build_store(events, tmp_path / "store", events.split.input_end_s, all_clients=True)
    store = EventStore.open(tmp_path / "store")
    cutoffs = [store.cutoff_s - 14 * DAY_S, store.cutoff_s - 28 * DAY_S]
    every, weight = weighted_views(store, cutoffs, None, 0)
    assert len(every.row) == len(views_at(store, cutoffs, with_history=True, relevant_only=False).row)
    assert weight.mean() == pytest.approx(1)
    is_relevant = store.is_relevant[every.row]
    assert weight[is_relevant].mean() > 1.5 * weight[~is_relevant].mean()
    some, few = weighted_views(store, cutoffs, 150, 0)
    assert 100 < len(some.row) == len(few) < 200
    assert few.mean() == pytest.approx(1, rel=1e-5)
    assert set(some.cutoff_s.tolist()) == set(cutoffs)
    assert store.is_relevant[some.row].mean() > 1.5 * is_relevant.mean()
    # Weights are of a view's own cutoff: a store that ends there gives the same.
    build_store(events, tmp_path / "early", cutoffs[1], all_clients=True)
    early = EventStore.open(tmp_path / "early")
    views, alone = weighted_views(early, cutoffs[1:], None, 0)
    of_second = every.cutoff_s == cutoffs[1]
    np.testing.assert_array_equal(store.client_ids[every.row[of_second]], early.client_ids[views.row])
    np.testing.assert_allclose(weight[of_second] / weight[of_second].mean(), alone, rtol=1e-5)
