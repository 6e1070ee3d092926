"""Weights of clients by their chance to be relevant."""

from __future__ import annotations

import numpy as np
from support.shops import DAY_S, EMPTY_CLIENT, END_S

from ubp_fast.models.membership import MembershipConfig, activity_columns, fit_logistic, membership_weights
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
    np.testing.assert_allclose(columns[EMPTY_CLIENT], [0, span] * 5)
    buys = store.kind("product_buy")
    own = np.asarray(buys.timestamp_s[buys.offsets[3] : buys.offsets[4]])
    own = own[own < cutoff_s]
    np.testing.assert_allclose(columns[3, :2], np.log1p([len(own), (cutoff_s - own.max()) / DAY_S]))
