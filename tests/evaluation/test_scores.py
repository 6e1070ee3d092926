from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ubp_fast.evaluation import EvaluationConfig, LabelScores, Metrics, Sample, Scores, TaskScore

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


def test_labels_of_one_class_count_in_the_challenges_score_alone():
    """Its rule takes them as 0; beside it stands the mean of the others, and a task without any other has no score."""
    orders = ((Metrics(0.6, None, None),), (Metrics(0.45, None, None),))
    found = TaskScore(orders, num_labels=4, skipped=1)
    assert found.best == (0.6, 0.45)
    assert found.aurocs == (pytest.approx(0.8), pytest.approx(0.6))
    assert found.warnings == (
        "1 of 4 labels have one class in the validation window: the challenge's rule counts them as 0 in the score, its"
        " AUROC is that of the others",
    )
    nothing = TaskScore(((), ()), num_labels=1, skipped=1)
    assert nothing.score is None and nothing.aurocs == (None, None)
    (warning,) = nothing.warnings
    assert "there is no score" in warning
    kept = Scores.from_json(scores(("a", "b"), churn=nothing, propensity_sku=found).to_json())
    assert kept.tasks == {"churn": nothing, "propensity_sku": found}


def test_no_client_is_no_score():
    found = task([])
    assert found.score is None
    assert found.warnings == ("order 0: no client takes part, there is no score",)


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="format must be 1 or 2, got 0"):
        Scores.from_json({"format": 0})


def by_linear(**options) -> Scores:
    samples = (Sample((0, 3), (0.75, 0.5), "absolute"), Sample((1,), (0.6,), "absolute"))
    config = EvaluationConfig(tasks=("propensity_sku",), readers=("linear",), orders=2)
    missing = {"propensity_price": "one price"}
    others = {"linear": {"propensity_sku": LabelScores(samples, 4, 1)}}
    return Scores({}, config, options.get("digests", ("a", "b")), 10, missing, others)


def test_scores_of_readers_are_read_back_and_joined():
    network = Scores({"propensity_sku": task([0.5], [0.7])}, EvaluationConfig(("propensity_sku",)), ("a", "b"), 10)
    joined = Scores.join([by_linear(), network])
    assert joined.config.readers == ("linear", "network")
    again = Scores.from_json(json.loads(json.dumps(joined.to_json(), allow_nan=False)))
    assert again == joined
    assert again.aurocs()["linear"]["propensity_sku"] == (pytest.approx(0.6125), pytest.approx(0.0125))
    assert again.aurocs()["network"]["propensity_sku"] == (pytest.approx(0.6), pytest.approx(0.1))
    assert joined.warnings() == [
        ("linear", "propensity_sku: 1 of 4 labels have one class in the validation window, left out")
    ]
    for parts in ([network, network], [network, by_linear(digests=("a", "c"))]):
        with pytest.raises(ValueError, match="must be of the same clients and tasks by other readers"):
            Scores.join(parts)


def test_scores_of_the_first_format_are_read():
    found = scores(churn=task([0.5, 0.6]))
    value = {**found.to_json(), "format": 1, "missing_tasks": ["propensity_sku"]}
    del value["readers"], value["config"]["readers"], value["config"]["labels_per_task"]
    again = Scores.from_json(value)
    assert again.tasks == found.tasks
    assert again.missing == {"propensity_sku": "the data has no labels for it"}
