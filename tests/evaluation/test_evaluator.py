from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ubp_fast.evaluation import TASKS, EvaluationConfig, Metrics, Targets, build_targets, evaluate
from ubp_fast.evaluation.evaluator import row_orders
from ubp_fast.evaluation.readers import network
from ubp_fast.evaluation.readers.network import NetworkData, training_cost
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.profiles import Layout, Profiles
from ubp_fast.profiles.blocks import Block

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("small") / "events"
    Challenge(dir=str(GOLDEN / "small")).prepare(directory)
    return EventDirectory.open(directory)


@pytest.fixture(scope="module")
def profiles() -> Profiles:
    return Profiles.load(GOLDEN / "f_embeddings")


@pytest.fixture(scope="module")
def targets(events: EventDirectory, profiles: Profiles) -> Targets:
    return build_targets(events, profiles.client_ids)


def test_epochs_equal_the_organisers(profiles, targets):
    expected = json.loads((GOLDEN / "f_metrics.json").read_text())
    scores = evaluate(profiles, targets, EvaluationConfig())
    assert list(scores.tasks) == list(TASKS)
    for name, task in scores.tasks.items():
        epochs = expected[name]["epochs"]
        for number, (metrics, reference) in enumerate(zip(task.orders[0], epochs, strict=True)):
            for part, key in (("auroc", "val_auroc"), ("diversity", "val_diversity"), ("novelty", "val_novelty")):
                found = getattr(metrics, part)
                where = f"{name}, epoch {number}: {part} {found}, expected {reference.get(key)}"
                assert (found is None) == (key not in reference), where
                assert found is None or abs(found - reference[key]) <= 5e-3, where
            assert abs(metrics.score - reference["weighted"]) <= 5e-3
        assert abs(task.score - max(epoch["weighted"] for epoch in epochs)) <= 5e-3


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[NetworkData]:
    """Replaces the training by a formula of its data, and keeps what it was given."""
    seen: list[NetworkData] = []

    def pretend(data: NetworkData, config: EvaluationConfig, report) -> list[Metrics]:
        seen.append(data)
        report(training_cost(len(data.rows), config))
        return [Metrics(float(data.vectors[data.rows[0], 0]), None, None)]

    monkeypatch.setattr(network, "train_network", pretend)
    return seen


def test_clients_and_labels_of_the_tasks(profiles, targets, trainings, events):
    evaluate(profiles, targets, EvaluationConfig())
    active = np.isin(profiles.client_ids, events.active_clients)
    assert 0 < active.sum() < len(active)
    np.testing.assert_array_equal(trainings[0].rows, np.flatnonzero(active))
    bought = {
        window: set(events.purchases(*window)["client_id"].to_list())
        for window in (events.split.train_window_s, events.split.validation_window_s)
    }
    for data in trainings[:2]:
        for labels, buyers in zip((data.train, data.validation), bought.values(), strict=True):
            expected = [client not in buyers for client in profiles.client_ids[data.rows].tolist()]
            np.testing.assert_array_equal(labels.dense()[:, 0], expected)
    for data in trainings[1:]:
        np.testing.assert_array_equal(data.rows, np.arange(len(active)))


def test_equal_tasks_are_trained_once(profiles, targets, trainings):
    everyone = np.ones(len(profiles.client_ids), bool)
    tasks = {name: replace(task, included=everyone) for name, task in targets.tasks.items()}
    steps: list[tuple[int, int]] = []
    scores = evaluate(
        profiles, replace(targets, tasks=tasks), EvaluationConfig(), progress=lambda *pair: steps.append(pair)
    )
    assert len(trainings) == 5
    assert scores.tasks["churn"] == scores.tasks["conversion"]
    assert steps[-1] == (5 * training_cost(len(everyone), EvaluationConfig()),) * 2


def test_an_interrupted_evaluation_trains_what_it_has_not_scored(profiles, targets, trainings, tmp_path):
    config, kept, steps = EvaluationConfig(orders=2), tmp_path / "kept", []
    plain = evaluate(profiles, targets, config)
    number = len(trainings)
    trainings.clear()

    def stopped(done: int, total: int) -> None:
        if len(trainings) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(profiles, targets, config, progress=stopped, keep=kept)
    trainings.clear()
    again = evaluate(profiles, targets, config, progress=lambda *pair: steps.append(pair), keep=kept)
    assert len(trainings) == number - 7, "the eighth was not finished"
    assert again.to_json() == plain.to_json()
    assert again.tasks == plain.tasks
    assert steps[-1][0] == steps[-1][1] and not kept.exists()


def test_labels_of_few_or_one_class_are_told(profiles, targets, trainings):
    """A task of one class is not trained; one with a handful of positives is, with a warning."""
    conversion = targets.tasks["conversion"]
    rows = len(profiles.client_ids)
    nobody = LabelMatrix(np.zeros(rows + 1, np.int64), np.zeros(0, np.int32), 1)
    three = LabelMatrix(np.minimum(np.arange(rows + 1), 3), np.zeros(3, np.int32), 1)
    tasks = {
        "conversion": replace(conversion, validation=nobody),
        "churn": replace(targets.tasks["churn"], included=np.ones(rows, bool), validation=three),
    }
    steps: list[tuple[int, int]] = []
    config = EvaluationConfig(tasks=("conversion", "churn"))
    scores = evaluate(profiles, replace(targets, tasks=tasks), config, progress=lambda *pair: steps.append(pair))
    assert len(trainings) == 1 and steps[-1][0] == steps[-1][1]
    assert scores.tasks["conversion"].score is None and scores.tasks["churn"].score is not None
    assert list(scores.remarks) == ["churn"]
    assert scores.remarks["churn"].startswith("the label has fewer than 10 clients of one class")


def test_seeded_orders_do_not_depend_on_the_submitted_order(profiles, targets, trainings, events):
    config = EvaluationConfig(orders=2, tasks=("conversion", "churn"))
    first = evaluate(profiles, targets, config)
    flipped = Profiles(profiles.client_ids[::-1].copy(), profiles.embeddings[::-1].copy())
    second = evaluate(flipped, build_targets(events, flipped.client_ids), config)
    assert first.order_digests == second.order_digests
    assert len(set(first.order_digests)) == 2
    for data, other in zip(trainings[:4], trainings[4:], strict=True):
        np.testing.assert_array_equal(profiles.client_ids[data.rows], flipped.client_ids[other.rows])
        np.testing.assert_array_equal(data.train.dense(), other.train.dense())
        np.testing.assert_array_equal(data.validation.dense(), other.validation.dense())
    assert evaluate(profiles, targets, EvaluationConfig()).order_digests != (first.order_digests[0],)


def test_one_order_is_the_submitted_one():
    ids = np.array([5, 3, 9])
    (order,) = row_orders(ids, EvaluationConfig())
    np.testing.assert_array_equal(order, [0, 1, 2])
    assert [order.tolist() for order in row_orders(ids, EvaluationConfig(orders=3, seed=1))] != [
        order.tolist() for order in row_orders(ids, EvaluationConfig(orders=3, seed=2))
    ]


def test_float32_vectors_are_scored_as_they_would_be_submitted(profiles, targets, trainings):
    vectors = profiles.embeddings.astype(np.float32)
    evaluate(Profiles(profiles.client_ids, vectors + 1e-5), targets, EvaluationConfig(tasks=("conversion",)))
    np.testing.assert_array_equal(trainings[0].vectors.numpy(), (vectors + 1e-5).astype(np.float16))
    vectors[4, 2] = 1e6
    with pytest.raises(DataError, match="column 2 must fit float16"):
        evaluate(Profiles(profiles.client_ids, vectors), targets, EvaluationConfig())


def test_profiles_are_aligned_by_client(profiles, targets, trainings):
    flipped = Profiles(profiles.client_ids[::-1].copy(), profiles.embeddings[::-1].copy())
    evaluate(flipped, targets, EvaluationConfig(tasks=("conversion",)))
    np.testing.assert_array_equal(trainings[0].vectors.numpy(), profiles.embeddings)


def test_neighbours_take_the_block_that_is_made_for_them(profiles, targets):
    width = profiles.dim
    noise = np.random.default_rng(0).normal(size=(profiles.num_clients, 3)).astype(np.float32) * 100
    blocks = [Block(name, 1.0, "", "", tuple(map(str, range(size)))) for name, size in (("strong", 3), ("near", width))]
    vectors = np.concatenate([noise, profiles.embeddings.astype(np.float32)], axis=1)
    config = EvaluationConfig(readers=("linear", "neighbours"), tasks=("churn", "propensity_sku"))
    both = Profiles(profiles.client_ids, vectors, Layout(tuple(blocks)))
    found, alone = (evaluate(one, targets, config).others for one in (both, profiles))
    blind = evaluate(Profiles(profiles.client_ids, vectors), targets, config).others
    assert found["neighbours"] == alone["neighbours"] != blind["neighbours"]
    assert found["linear"] == blind["linear"] != alone["linear"]


def test_vectors_of_width_zero_are_refused(profiles, targets):
    with pytest.raises(ValueError, match="got width 0"):
        evaluate(Profiles(profiles.client_ids, profiles.embeddings[:, :0]), targets, EvaluationConfig())


def test_readers_learn_from_some_vectors_and_read_others(profiles, targets):
    config = EvaluationConfig(tasks=("propensity_category",), readers=("linear", "boosting"))
    wanted = evaluate(profiles, targets, config).aurocs()
    assert evaluate(profiles, targets, config, read=profiles).aurocs() == wanted
    mirrored = replace(profiles, embeddings=-profiles.embeddings.astype(np.float32))
    found = evaluate(profiles, targets, config, read=mirrored).aurocs()
    linear, mirror = wanted["linear"]["propensity_category"][0], found["linear"]["propensity_category"][0]
    assert mirror == pytest.approx(1 - linear, abs=1e-6), "what a model of the others says, the other way round"
    assert found["boosting"] != wanted["boosting"]
    with pytest.raises(UserError, match=r"readers of other vectors must be among \['boosting', 'linear'\]"):
        evaluate(profiles, targets, replace(config, readers=("network",)), read=profiles)
