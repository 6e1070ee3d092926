from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ubp_fast.evaluation.tasks.metrics import (
    auroc,
    auroc_per_label,
    batch_sigmoid_,
    diversity,
    epoch_metrics,
    novelty,
)
from ubp_fast.events.labels import LabelMatrix

GOLDEN = Path(__file__).parents[2] / "golden"
VALUES = json.loads((GOLDEN / "a_metrics.json").read_text())
CASES = [name for name, value in VALUES.items() if "val_auroc" in value]
# Rows of equal scores: which labels are the top ten of them is up to torch.topk.
TIED_CASES = ("ml_saturated_high", "ml_neg_overflow", "ml_very_negative")


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "a_metrics.npz", allow_pickle=False) as stored:
        return dict(stored)


def sparse(labels: np.ndarray) -> LabelMatrix:
    indptr = np.concatenate([[0], np.cumsum((labels > 0).sum(1))]).astype(np.int64)
    return LabelMatrix(indptr, np.nonzero(labels)[1].astype(np.int32), labels.shape[1])


def assert_novelty_equals(value: float, expected: float, tolerance: float = 1e-6) -> None:
    assert abs(value ** (1 / 100) - expected ** (1 / 100)) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_metrics_equal_the_organisers(arrays, name):
    expected = VALUES[name]
    popularity = arrays.get(f"{name}__popularity")
    logits = torch.from_numpy(arrays[f"{name}__logits"].copy())
    metrics = epoch_metrics(logits, sparse(arrays[f"{name}__y"]), popularity, expected["batch"])
    assert abs(metrics.auroc - expected["val_auroc"]) <= 1e-6
    if popularity is None:
        assert metrics.diversity is None
        assert metrics.score == metrics.auroc
        return
    assert metrics.diversity == pytest.approx(expected["val_diversity"], abs=1e-6, nan_ok=True)
    assert_novelty_equals(metrics.novelty, expected["val_novelty"], 1e-3 if name in TIED_CASES else 1e-6)
    assert metrics.score == pytest.approx(expected["weighted"], abs=2e-6, nan_ok=True)


@pytest.mark.parametrize("top", [1, 3, 10, 30, 50])
def test_novelty_of_other_numbers_of_labels(arrays, top):
    expected = VALUES[f"novelty_k{top}_on_ml_low_logits"]["novelty"]
    logits = torch.from_numpy(arrays["ml_low_logits__logits"])
    assert_novelty_equals(novelty(logits, arrays["ml_low_logits__popularity"], top), expected)


def test_metrics_without_rows():
    nothing = torch.zeros(0, 5)
    assert diversity(nothing) == VALUES["diversity_no_update"]["value"]
    assert novelty(nothing, np.ones(5)) == VALUES["novelty_no_update"]["value"]
    assert epoch_metrics(nothing, sparse(np.zeros((0, 5))), np.ones(5), 128).auroc == 0.0


def test_the_scale_of_popularity_does_not_matter(arrays):
    logits, popularity = torch.from_numpy(arrays["ml_low_logits__logits"]), arrays["ml_low_logits__popularity"]
    assert novelty(logits, popularity * 1e6) == pytest.approx(novelty(logits, popularity), rel=1e-9)
    assert math.isnan(novelty(logits, np.zeros(30)))


def test_popularity_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"popularity must have shape \[4\] like the labels, got \(5,\)"):
        novelty(torch.zeros(2, 4), np.ones(5))


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"scores must have shape \[3, 2\] like labels, got \[3, 1\]"):
        auroc(torch.zeros(3, 1), sparse(np.zeros((3, 2))))


def test_nan_in_the_logits_makes_the_area_nan():
    logits = torch.tensor([[0.3], [math.nan], [2.0]])
    assert math.isnan(epoch_metrics(logits, sparse(np.array([[1], [0], [0]])), None, 128).score)


def definition(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties half: O(n^2)."""
    own, others = scores[positive, None], scores[None, ~positive]
    if own.size == 0 or others.size == 0:
        return 0.0
    return float(((own > others) + 0.5 * (own == others)).mean())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_area_equals_its_definition(data):
    rows, labels = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 3))
    levels = st.one_of(st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False))
    scores = np.array(data.draw(st.lists(levels, min_size=rows * labels, max_size=rows * labels)), np.float32)
    flags = np.array(data.draw(st.lists(st.booleans(), min_size=rows * labels, max_size=rows * labels)), bool)
    scores, flags = scores.reshape(rows, labels), flags.reshape(rows, labels)
    expected = [definition(scores[:, label], flags[:, label]) for label in range(labels)]
    np.testing.assert_allclose(auroc_per_label(torch.from_numpy(scores), sparse(flags)), expected, rtol=0, atol=1e-12)


def test_sigmoid_only_in_batches_that_leave_the_unit_interval():
    logits = torch.tensor([[0.2, 0.9], [1.0, 0.0], [0.4, 1.1], [0.5, 0.5], [-0.1, 0.5]])
    expected = logits.clone()
    expected[2:] = expected[2:].sigmoid()
    assert torch.equal(batch_sigmoid_(logits.clone(), 2), expected)
    assert torch.equal(batch_sigmoid_(logits.clone(), 5), logits.sigmoid())
    assert torch.equal(batch_sigmoid_(logits[:2].clone(), 2), logits[:2])
