"""Which column says most of a label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from ubp_fast.evaluation.readers.forecasts import SLOPES, evidence, log_means


def says(columns: np.ndarray, labels: np.ndarray, rows: int = 1 << 20) -> np.ndarray:
    """[C, L] of raw columns."""
    standard = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    blocks = (torch.from_numpy(standard[first : first + rows]) for first in range(0, len(standard), rows))
    away = torch.from_numpy(standard.T @ labels)
    with_label = torch.from_numpy(labels.sum(axis=0))
    return evidence(away, with_label, len(labels), log_means(blocks)).numpy()


def test_it_is_the_best_likelihood_of_who_has_the_label():
    random = np.random.default_rng(0)
    columns = np.concatenate([random.normal(size=(500, 3)), random.exponential(size=(500, 2)) ** 2], axis=1)
    labels = (columns[:, [0, 3]] + random.normal(size=(500, 2)) > 2).astype(float)
    standard = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    expected = np.zeros((5, 2))
    for slope in SLOPES:
        chance = np.exp(slope * standard)
        of_client = np.log(chance / chance.mean(axis=0))  # how much likelier than without the column
        for label in range(2):
            has = labels[:, label] > 0
            expected[:, label] = np.maximum(expected[:, label], of_client[has].mean(axis=0))
    np.testing.assert_allclose(says(columns, labels), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(says(columns, labels, rows=7), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(says(-columns, labels), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(says(columns, 1 - labels), expected, rtol=0, atol=1e-12)
    assert (expected.argmax(axis=0) == [0, 3]).all()
    assert (says(columns, np.zeros((500, 1))) == 0).all(), "who has a label that nobody has is told by nothing"


def test_a_rare_label_finds_the_column_that_a_logistic_regression_would():
    """A forecast with a long tail, beside a flag of a few clients, of whom as many have the label by chance."""
    random = np.random.default_rng(1)
    forecast = random.normal(size=6000) * 1.5 - 6
    labels = (random.random(6000) < 1 / (1 + np.exp(-forecast))).astype(float)
    noise = random.normal(size=(6000, 20))
    flag = np.zeros(6000)
    flag[np.flatnonzero(labels)[:3]] = flag[np.flatnonzero(labels == 0)[:3]] = 1.0
    columns = np.column_stack([noise, flag, forecast])
    correlation = np.abs(np.corrcoef(columns.T, labels)[-1, :-1])
    losses = []
    for column in columns.T:
        standard = ((column - column.mean()) / column.std())[:, None]
        losses.append(log_loss(labels, LogisticRegression(C=10).fit(standard, labels).predict_proba(standard)))
    assert int(correlation.argmax()) == 20 and int(np.argmin(losses)) == 21
    assert int(says(columns, labels[:, None]).argmax()) == 21


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="blocks must hold at least one row"):
        log_means([])
