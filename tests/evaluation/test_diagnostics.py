"""What lies behind the scores says the same as the scores."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ubp_fast.evaluation import EvaluationConfig, Scores, build_targets, evaluate
from ubp_fast.evaluation.diagnostics import activity, by_length, diagnose
from ubp_fast.evaluation.readers.linear import option_of
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.profiles import Layout, Profiles
from ubp_fast.profiles.blocks import Block

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = EvaluationConfig(tasks=("churn", "conversion", "propensity_price"), readers=("linear",))


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("small") / "events"
    Challenge(dir=str(GOLDEN / "small")).prepare(directory)
    return EventDirectory.open(directory)


@pytest.fixture(scope="module")
def profiles() -> Profiles:
    """Three blocks: most columns, one that is the same for all, and the rest."""
    golden = Profiles.load(GOLDEN / "f_embeddings")
    vectors = golden.embeddings.copy()
    vectors[:, 10] = 1
    names = [f"c{one}" for one in range(vectors.shape[1])]
    parts = {"many": names[:10], "same": names[10:11], "rest": names[11:]}
    layout = Layout(tuple(Block(name, None, name, name, tuple(columns)) for name, columns in parts.items()))
    return replace(golden, embeddings=vectors, layout=layout)


@pytest.fixture(scope="module")
def scores(events: EventDirectory, profiles: Profiles) -> Scores:
    return evaluate(profiles, build_targets(events, profiles.client_ids, CONFIG.tasks), CONFIG)


@pytest.fixture(scope="module")
def found(events: EventDirectory, profiles: Profiles, scores: Scores) -> dict[str, Any]:
    choices = {task: option_of(one.samples[0].choice) for task, one in scores.others["linear"].items()}
    assert None not in choices.values()
    components = {"ours": profiles, "theirs": replace(profiles, layout=None)}
    return diagnose(components, events, CONFIG, {"ours": choices})  # type: ignore[dict-item]


def test_roc_is_of_the_reader_that_was_scored(found: dict[str, Any], scores: Scores) -> None:
    for task in found["tasks"]:
        curve = found["roc"]["ours"][task]
        # Folds are dealt in another order, which the fit to all clients does not see.
        assert curve["auroc"] == pytest.approx(scores.aurocs()["linear"][task][0], abs=1e-3)
        true, false = np.array(curve["true"]), np.array(curve["false"])
        area = float(((true[1:] + true[:-1]) / 2 * np.diff(false)).sum())
        assert area == pytest.approx(curve["auroc"], abs=0.02)
        assert curve["true"][-1] == 1 and np.all(np.diff(curve["true"]) >= 0)


def test_calibration_and_groups_hold_every_client_once(
    found: dict[str, Any], events: EventDirectory, profiles: Profiles
) -> None:
    targets = build_targets(events, profiles.client_ids, CONFIG.tasks)
    for task in found["tasks"]:
        labels = targets.tasks[task].validation.take(np.flatnonzero(targets.tasks[task].included))
        groups = np.array(found["calibration"]["ours"][task])
        assert groups[:, 2].sum() == labels.num_rows * labels.num_labels
        assert groups[:, 1] @ groups[:, 2] == pytest.approx(labels.column_counts().sum(), rel=1e-5)
        assert np.all(np.diff(groups[:, 0]) >= 0), "groups go up by what was predicted"
        for name, most_left_out in (("history", 0), ("recency", 19)):
            parts = found[name]["ours"][task]
            # Clients without any event are too few here to be a group by recency.
            assert 0 <= labels.num_rows - sum(part["clients"] for part in parts) <= most_left_out
            assert all(low["to"] <= high["from"] for low, high in pairwise(parts))


def test_histories_are_grouped_by_length_with_labels_of_their_own() -> None:
    """One event: ten of twenty have the label, and one of them ranks last. Two to four: nine have it, too few."""
    events = np.repeat([0.0, 1, 2, 4, 5, 700], [3, 20, 15, 15, 25, 1])
    predicted = np.full((len(events), 2), 0.5, np.float32)
    have = np.zeros((len(events), 2), bool)
    have[3:13, 0], predicted[3:12, 0], predicted[12, 0] = True, 0.9, 0.1
    have[23:32, 0], predicted[23:32, 0] = True, 0.9
    have[23:53:2, 1], predicted[23:53:2, 1] = True, 0.2  # 15 of 30, all of them last
    have[53:65, :], predicted[53:65, 0], predicted[53:65, 1] = True, 0.7, 0.5  # 12 of 25: all first, all alike
    rows, columns = have.nonzero()
    labels = LabelMatrix.from_pairs(rows, columns, *have.shape)
    found = by_length(predicted, labels, events)
    told = [(one["from"], one["to"], one["clients"], one["labels"], one["auroc"]) for one in found]
    assert told == [
        (0, 0, 3, 0, None),
        (1, 1, 20, 1, pytest.approx(0.9)),
        (2, 4, 30, 1, 0),
        (5, 5, 25, 2, pytest.approx(0.75)),
        (700, 700, 1, 0, None),
    ]
    # Hanley and McNeil, of ten and ten at .9.
    variance = 0.09 + 9 * (0.9 / 1.1 - 0.81) + 9 * (1.62 / 1.9 - 0.81)
    assert found[1]["error"] == pytest.approx((variance / 100) ** 0.5)
    assert found[0]["error"] is None


def test_only_events_before_the_cutoff_are_counted(events: EventDirectory, profiles: Profiles) -> None:
    cutoff_s = events.split.input_end_s
    counts, ages_s = activity(events, profiles.client_ids)
    seen: dict[int, list[int]] = {int(one): [] for one in profiles.client_ids}
    late = 0
    for kind in events.kinds:
        rows = events.scan(kind).select("client_id", "timestamp_s").collect()
        for client, when in rows.iter_rows():
            late += when >= cutoff_s
            if client in seen and when < cutoff_s:
                seen[client].append(when)
    assert late > 100
    assert counts.tolist() == [len(one) for one in seen.values()]
    ages = [cutoff_s - max(one) if one else np.nan for one in seen.values()]
    np.testing.assert_array_equal(ages_s, ages)


def test_tasks_that_ask_the_same_are_looked_at_once(found: dict[str, Any], events: EventDirectory) -> None:
    assert found["clients"] == found["of_clients"]
    asked = [*found["tasks"], *found["same"]]
    assert sorted(asked) == sorted(CONFIG.tasks)


def test_a_block_that_says_nothing_is_not_missed(found: dict[str, Any]) -> None:
    for task in found["tasks"]:
        lost = found["blocks"][task]
        assert list(lost) == ["many", "same", "rest"]
        assert lost["same"] == 0
        assert max(lost["many"], lost["rest"]) > 0.01
    assert "theirs" not in found["blocks"]


def test_more_clients_and_later_weeks(found: dict[str, Any], events: EventDirectory) -> None:
    days = (events.split.validation_window_s[1] - events.split.input_end_s) / 86_400
    for task in found["tasks"]:
        for component in ("ours", "theirs"):
            counts = [size[0] for size in found["sizes"][component][task]]
            assert counts == sorted(counts) and len(counts) >= 3
            parts = found["age"][component][task]
            assert [parts[0]["from"], parts[-1]["to"]] == pytest.approx([0, days])
            assert all(one["to"] == other["from"] for one, other in pairwise(parts))


def test_standard_error_shrinks_with_clients() -> None:
    from ubp_fast.evaluation.diagnostics import _area

    generator = np.random.default_rng(0)
    areas, errors = [], []
    for _ in range(300):
        truth = generator.random(200) < 0.3
        labels = LabelMatrix.from_pairs(np.flatnonzero(truth), np.zeros(int(truth.sum()), int), 200, 1)
        area, error = _area((generator.normal(size=200) + truth)[:, None], labels, np.array([0]))
        areas.append(area)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.15)
