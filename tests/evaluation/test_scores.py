from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ubp_fast.evaluation import EvaluationConfig, Metrics, Scores, TaskScore

NAN = math.nan


def task(*orders: list[float]) -> TaskScore:
    return TaskScore(tuple(tuple(Metrics(value, None, None) for value in epochs) for epochs in orders))


def scores(digests: tuple[str, ...] = ("a",), precision: str = "fp32", **tasks: TaskScore) -> Scores:
    config = EvaluationConfig(tasks=tuple(tasks), orders=len(digests), precision=precision)
    return Scores(tasks, config, digests, 10)


def test_the_best_epoch_counts_and_the_first_wins_ties():
    found = task([0.5, 0.71234, 0.71234])
    assert (found.best, found.best_epochs, found.score) == ((0.7123,), (1,), 0.7123)


def test_propensity_is_weighted():
    metrics = Metrics(0.6, 0.9, 0.3)
    assert metrics.score == pytest.approx(0.8 * 0.6 + 0.1 * 0.9 + 0.1 * 0.3)


def test_nan_never_wins_and_is_null_in_json():
    """A NaN in the first epoch won max() in the organisers' code and was written as NaN, which is no JSON."""
    nothing = Metrics(0.5, NAN, 1.0)
    found = scores(churn=task([NAN, 0.6, 0.5]), propensity_sku=TaskScore(((nothing, nothing),)))
    assert found.tasks["churn"].score == 0.6
    assert found.tasks["propensity_sku"].score is None
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["tasks"]["churn"]["orders"][0]["epochs"][0] == {"auroc": None, "score": None}
    stored = value["tasks"]["propensity_sku"]
    assert stored["score"] is None
    assert stored["warnings"][1] == "order 0, epoch 1: diversity is NaN, the epoch does not count"
    again = Scores.from_json(value)
    assert again.to_json() == found.to_json()
    assert math.isnan(again.tasks["propensity_sku"].orders[0][0].diversity)


def test_mean_and_standard_error_over_row_orders():
    found = scores(("a", "b", "c"), churn=task([0.5], [0.6], [0.8]), conversion=task([0.5], [NAN], [0.7]))
    mean, error = found.summary()["churn"]
    assert mean == pytest.approx(np.mean([0.5, 0.6, 0.8]))
    assert error == pytest.approx(np.std([0.5, 0.6, 0.8], ddof=1) / math.sqrt(3))
    assert found.summary()["conversion"] == (pytest.approx(0.6), pytest.approx(0.1))
    assert task([0.5]).standard_error is None


def test_no_client_is_no_score():
    found = task([])
    assert found.score is None
    assert found.warnings == ("order 0: no client takes part, there is no score",)


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="format must be 1 or 2, got 0"):
        Scores.from_json({"format": 0})
