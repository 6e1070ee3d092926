"""Readers other than the network: against scikit-learn, and what they must not look at."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from ubp_fast.evaluation import READERS, TASKS, EvaluationConfig, Scores, Targets, TaskTargets, evaluate
from ubp_fast.evaluation.readers import boosting, linear, neighbours, reader_named
from ubp_fast.evaluation.readers.forecasts import SLOPES
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.schema import UserError
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import Block, Layout

OTHERS = tuple(name for name in READERS if name != "network")
CLIENTS, WIDTH, LABELS = 300, 12, 20


def matrix(labels: np.ndarray) -> LabelMatrix:
    rows, columns = np.nonzero(labels)
    return LabelMatrix.from_pairs(rows, columns, *labels.shape)


def make_shop(seed: int = 3) -> tuple[Profiles, Targets]:
    """Vectors that say something about two tasks; the churn task is of two clients in three."""
    random = np.random.default_rng(seed)
    ids = random.permutation(10 * CLIENTS)[:CLIENTS].astype(np.int64)
    vectors = random.normal(size=(CLIENTS, WIDTH)).astype(np.float16)
    weights = random.normal(size=(WIDTH, LABELS))
    train, validation = (vectors @ weights + 3 * random.normal(size=(CLIENTS, LABELS)) > 2 for _ in range(2))
    validation[:, 4], validation[:, 7] = False, True  # labels of one class
    train[:, 5] = False  # nothing to learn from
    everyone = np.ones(CLIENTS, bool)
    active = random.random(CLIENTS) < 2 / 3
    popularity = np.full(LABELS, 0.01)
    tasks = {
        "churn": TaskTargets(TASKS["churn"], active, matrix(train[:, :1]), matrix(validation[:, :1]), None),
        "propensity_sku": TaskTargets(TASKS["propensity_sku"], everyone, matrix(train), matrix(validation), popularity),
    }
    return Profiles(ids, vectors), Targets(ids, tasks)


def scores_of(reader: str, shop: tuple[Profiles, Targets], **options) -> Scores:
    return evaluate(*shop, EvaluationConfig(tasks=tuple(shop[1].tasks), readers=(reader,), **options))


@pytest.mark.parametrize("reader", OTHERS)
def test_labels_of_one_class_score_nothing(reader):
    found = scores_of(reader, make_shop(), labels_per_task=LABELS).others[reader]["propensity_sku"]
    (sample,) = found.samples
    assert sample.labels == tuple(label for label in range(LABELS) if label not in (4, 7))
    assert (found.skipped, found.num_labels) == (2, LABELS)
    assert found.warnings == ("2 of 20 labels have one class in the validation window, left out",)
    assert sample.auroc == pytest.approx(np.mean(sample.aurocs))
    assert sample.auroc > 0.6, "the vectors say something"
    assert sample.aurocs[sample.labels.index(5)] == 0.5, "a label without buyers in the train window cannot be learned"


@pytest.mark.parametrize("reader", OTHERS)
def test_the_validation_window_is_scored_and_never_learned(reader):
    """Flipped validation labels mirror the score: had a reader looked at them, it would have followed."""
    profiles, targets = make_shop()
    task = targets.tasks["propensity_sku"]
    flipped = replace(task, validation=matrix(1 - task.validation.dense()))
    first = scores_of(reader, (profiles, targets), labels_per_task=LABELS)
    other = replace(targets, tasks={**targets.tasks, "propensity_sku": flipped})
    second = scores_of(reader, (profiles, other), labels_per_task=LABELS)
    (mine,), (mirrored,) = (one.others[reader]["propensity_sku"].samples for one in (first, second))
    assert mine.choice == mirrored.choice
    np.testing.assert_allclose(mine.aurocs, 1 - np.array(mirrored.aurocs), atol=1e-12)


@pytest.mark.parametrize("reader", OTHERS)
def test_the_order_of_rows_changes_nothing(reader):
    profiles, targets = make_shop()
    flip = np.arange(CLIENTS)[::-1]
    tasks = {
        name: replace(
            task, included=task.included[flip], train=task.train.take(flip), validation=task.validation.take(flip)
        )
        for name, task in targets.tasks.items()
    }
    turned = (
        Profiles(profiles.client_ids[flip], profiles.embeddings[flip]),
        Targets(targets.client_ids[flip], tasks),
    )
    first, second = scores_of(reader, (profiles, targets), orders=2), scores_of(reader, turned, orders=2)
    for name in targets.tasks:
        mine, other = first.others[reader][name], second.others[reader][name]
        assert [sample.labels for sample in mine.samples] == [sample.labels for sample in other.samples]
        np.testing.assert_allclose(mine.aurocs, other.aurocs, atol=1e-3)


@pytest.mark.parametrize("reader", OTHERS)
def test_steps_add_up_and_clients_of_a_task_alone_take_part(reader):
    profiles, targets = make_shop()
    steps: list[tuple[int, int]] = []
    config = EvaluationConfig(tasks=tuple(targets.tasks), readers=(reader,), orders=2, labels_per_task=3)
    found = evaluate(profiles, targets, config, progress=lambda *pair: steps.append(pair)).others[reader]["churn"]
    assert steps[-1][0] == steps[-1][1] > 1
    inside = targets.tasks["churn"].included
    vectors = profiles.embeddings.copy()
    vectors[~inside] = 7.0
    again = evaluate(Profiles(profiles.client_ids, vectors), targets, config).others[reader]["churn"]
    assert found.aurocs == again.aurocs


def few_larger(scaled: np.ndarray, wanted: np.ndarray, candidates: Sequence[int] | None = None) -> np.ndarray:
    """The same columns, those that say most of a label by a factor that leaves a hundredth of the penalty."""
    count = linear.FIRST_COLUMNS if candidates is None else linear.FIRST_FORECASTS
    relevance = np.abs((scaled - scaled.mean(axis=0)).T @ (wanted - wanted.mean()))
    if candidates is not None:
        relevance = np.full(scaled.shape[1], -1.0)
        standard = (scaled - scaled.mean(axis=0))[:, candidates]
        standard /= np.maximum(standard.std(axis=0), 1e-9)
        fewer = wanted > 0 if 0 < wanted.mean() <= 0.5 else wanted == 0
        of_slopes = [slope * standard - np.log(np.exp(slope * standard).mean(axis=0)) for slope in SLOPES]
        relevance[candidates] = np.max([found[fewer].mean(axis=0) for found in of_slopes], axis=0).clip(0)
    candidates = np.arange(scaled.shape[1]) if candidates is None else np.asarray(candidates)
    relevance = relevance[candidates]
    factors = np.full(scaled.shape[1], linear.OTHERS**-0.5)
    factors[candidates] = 1.0
    factors[candidates[np.argsort(-relevance)[:count]]] = linear.FIRST**-0.5
    return scaled * factors


def test_ridge_is_that_of_scikit_learn():
    profiles, targets = make_shop()
    task = targets.tasks["propensity_sku"]
    (sample,) = scores_of("linear", (profiles, targets)).others["linear"]["propensity_sku"].samples
    scaling, penalty = linear.option_of(sample.choice)
    vectors = profiles.embeddings.astype(float)
    scaled = vectors / np.sqrt(vectors.var(axis=0).mean() if scaling == "absolute" else vectors.var(axis=0))
    expected = []
    for label in (one for one in sample.labels if one != 5):
        wanted = task.train.dense()[:, label]
        read = few_larger(scaled, wanted) if scaling == linear.FEW_FIRST else scaled
        predicted = Ridge(alpha=penalty * CLIENTS).fit(read, wanted).predict(read)
        expected.append(roc_auc_score(task.validation.dense()[:, label], predicted))
    found = [area for label, area in zip(sample.labels, sample.aurocs, strict=True) if label != 5]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("faint", "scaling"), [(slice(1, None), "absolute"), (slice(0, 1), "standardised")])
def test_folds_choose_the_scale_that_the_labels_follow(faint, scaling):
    """One column speaks, 150 are noise. Their own scale helps where noise is faint; it misleads where the word is."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(CLIENTS, 151))
    speaks = [vectors[:, 0] + 0.5 * random.normal(size=CLIENTS) > 0 for _ in range(2)]
    vectors[:, faint] *= 0.01
    everyone = np.ones(CLIENTS, bool)
    task = TaskTargets(TASKS["conversion"], everyone, *(matrix(window[:, None]) for window in speaks), None)
    ids = np.arange(CLIENTS)
    shop = Profiles(ids, vectors.astype(np.float32)), Targets(ids, {"conversion": task})
    (sample,) = scores_of("linear", shop).others["linear"]["conversion"].samples
    assert sample.choice.startswith(scaling)
    assert sample.auroc > (0.9 if scaling == "absolute" else 0.75)


def laid_out(profiles: Profiles, **columns: int) -> Profiles:
    """The same vectors as blocks of so many columns, from left to right."""
    blocks = (Block(name, 1.0, "", "", tuple(map(str, range(width)))) for name, width in columns.items())
    return replace(profiles, layout=Layout(tuple(blocks)))


def test_a_regression_may_believe_few_columns_of_a_label_first():
    """Among 200 columns of noise; those that a layout calls forecasts alone, where there is one."""
    profiles, targets = make_shop()
    noise = np.random.default_rng(1).normal(size=(CLIENTS, 200)).astype(np.float16)
    bare = Profiles(profiles.client_ids, np.concatenate([noise, profiles.embeddings], axis=1))
    known = laid_out(bare, own=200, scores=WIDTH)
    plain, told = (scores_of("linear", (one, targets)).others["linear"]["propensity_sku"] for one in (bare, known))
    assert plain.samples[0].choice.startswith(linear.FEW_FIRST)
    assert told.samples[0].choice.startswith(linear.FEW_FIRST)
    assert told.aurocs[0] > plain.aurocs[0] + 0.01
    assert laid_out(bare, own=200, other=WIDTH).layout.forecasts is None
    nothing = laid_out(bare, own=200 + WIDTH, scores=0)  # too few buyers to learn from
    assert scores_of("linear", (nothing, targets)).others["linear"]["propensity_sku"].aurocs == plain.aurocs


@pytest.mark.parametrize(
    "blocks", [{"strong": 2, "scores": WIDTH - 2, "own": 200}, {"own": WIDTH + 199, "scores": 1}, None]
)
def test_few_columns_first_is_a_ridge_of_its_own_for_every_label(blocks):
    profiles, targets = make_shop()
    random = np.random.default_rng(1)
    vectors = np.concatenate([profiles.embeddings, random.normal(size=(CLIENTS, 200)) * 7], axis=1).astype(np.float16)
    vectors[:, 5] = 3.0  # says nothing, of any label
    known = Profiles(profiles.client_ids, vectors)
    forecasts = None if blocks is None else laid_out(known, **blocks).layout.forecasts
    train = targets.tasks["propensity_sku"].train.dense()
    rows, option = np.arange(CLIENTS), (linear.FEW_FIRST, 0.1)
    whole = torch.from_numpy(known.embeddings)
    found = linear.Regression(whole, rows, train, forecasts).predicted(option, whole, rows)
    scaled = vectors.astype(float) - vectors.astype(float).mean(axis=0)
    scaled /= np.where(scaled.std(axis=0) > 0, scaled.std(axis=0), 1.0)
    for label, wanted in enumerate(train.T):
        own = few_larger(scaled, wanted, forecasts)
        expected = Ridge(alpha=0.1 * CLIENTS).fit(own, wanted).predict(own)
        np.testing.assert_allclose(found[:, label], expected, rtol=0, atol=1e-5)
    assert linear.option_of(linear.choice_text(option)) == option


def test_constant_columns_and_few_clients_are_no_trouble_to_ridge():
    profiles, targets = make_shop()
    constant = np.concatenate([profiles.embeddings, np.full((CLIENTS, 2), 60_000, np.float16)], axis=1)
    plain, more = (
        scores_of("linear", (Profiles(profiles.client_ids, vectors), targets)).others["linear"]["propensity_sku"]
        for vectors in (profiles.embeddings, constant)
    )
    assert more.aurocs == pytest.approx(plain.aurocs, abs=2e-3)
    few = np.zeros(CLIENTS, bool)
    few[: 2 * linear.FOLDS - 1] = True
    tasks = {"churn": replace(targets.tasks["churn"], included=few)}
    (lone,) = scores_of("linear", (profiles, replace(targets, tasks=tasks))).others["linear"].values()
    assert lone.aurocs == (None,) and lone.skipped == 0
    assert lone.warnings == (
        "the linear reader chooses by folds and needs 10 clients, there are fewer: it gives no score",
    )


def test_trees_on_shared_bins_equal_trees_on_their_own():
    import lightgbm

    profiles, targets = make_shop()
    shop = (profiles, targets)
    (sample,) = scores_of("boosting", shop, labels_per_task=4).others["boosting"]["propensity_sku"].samples
    task = targets.tasks["propensity_sku"]
    ascending = np.argsort(profiles.client_ids)
    rows = ascending[np.random.default_rng([0, 0]).permutation(CLIENTS)]
    vectors = profiles.embeddings[rows].astype(np.float32)
    for label, area in zip(sample.labels, sample.aurocs, strict=True):
        parameters = boosting.PARAMETERS | {"num_threads": 1, "seed": 0}
        data = lightgbm.Dataset(vectors, task.train.dense(rows)[:, label].copy())
        model = lightgbm.train(parameters, data, boosting.TREES)
        expected = roc_auc_score(task.validation.dense(rows)[:, label], model.predict(vectors, raw_score=True))
        assert area == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rows", [64, 1 << 14])
def test_trees_start_at_the_forecast_that_says_most(rows, monkeypatch):
    """By scikit-learn and LightGBM; it need not be a good one, and a column that says nothing is none."""
    import lightgbm

    monkeypatch.setattr(boosting, "BLOCK_ROWS", rows)
    random = np.random.default_rng(3)
    vectors = random.normal(size=(600, 8))
    labels = vectors[:, [0]] - vectors[:, [1]] + random.normal(size=(600, 2)) > 1
    vectors[:, 2] = vectors[:, 0] * -100 + 7 + random.normal(size=600) * 30
    vectors[:, 3] = 5.0
    bare = Profiles(np.arange(600), vectors.astype(np.float16))
    task = TaskTargets(TASKS["conversion"], np.ones(600, bool), *(matrix(one[:, None]) for one in labels.T), None)
    targets = Targets(np.arange(600), {"conversion": task})
    known = laid_out(bare, strong=2, scores=4, own=2)  # columns 0 and 1 say more, and are no forecasts
    plain, started = (scores_of("boosting", (one, targets)).others["boosting"]["conversion"] for one in (bare, known))
    order = np.random.default_rng([0, 0]).permutation(600)
    read = bare.embeddings[order].astype(np.float32)
    column = StandardScaler().fit_transform(read[:, [2]].astype(float))
    start = LogisticRegression(C=1 / boosting.START_PENALTY).fit(column, labels[order, 0]).decision_function(column)
    data = lightgbm.Dataset(read, labels[order, 0].astype(np.float32), init_score=start)
    model = lightgbm.train(boosting.PARAMETERS | {"num_threads": 1, "seed": 0}, data, boosting.STARTED_TREES)
    expected = roc_auc_score(labels[order, 1], start + model.predict(read, raw_score=True))
    assert started.aurocs[0] == pytest.approx(expected, abs=1e-6)
    assert abs(started.aurocs[0] - plain.aurocs[0]) > 1e-4


def test_trees_of_rare_labels_do_not_fit_noise(monkeypatch):
    random = np.random.default_rng(2)
    clients, labels = 2000, 4
    vectors = random.normal(size=(clients, 40)).astype(np.float16)  # column l is the truth behind label l
    train, validation = (vectors[:, :labels] + random.normal(size=(clients, labels)) > 3.4 for _ in range(2))
    assert (train.sum(axis=0) < 25).all(), "hardly one client in a hundred"
    everyone = np.ones(clients, bool)
    task = TaskTargets(TASKS["propensity_sku"], everyone, matrix(train), matrix(validation), np.full(labels, 0.01))
    shop = (Profiles(np.arange(clients), vectors), Targets(np.arange(clients), {"propensity_sku": task}))

    def auroc() -> float:
        found = scores_of("boosting", shop, labels_per_task=labels)
        return found.aurocs()["boosting"]["propensity_sku"][0]

    found = auroc()
    monkeypatch.setitem(boosting.PARAMETERS, "lambda_l2", 0.0)
    assert found > auroc() + 0.02


def test_trees_sample_other_labels_in_every_repetition():
    found = scores_of("boosting", make_shop(), orders=3).others["boosting"]
    samples = [sample.labels for sample in found["propensity_sku"].samples]
    assert [len(labels) for labels in samples] == [2, 2, 2], "every tenth of twenty"
    assert len({label for labels in samples for label in labels}) == 6
    assert [sample.labels for sample in found["churn"].samples] == [(0,), (0,), (0,)]
    assert len(set(found["churn"].aurocs)) > 1, "other seeds grow other trees"


def test_neighbours_are_those_of_scikit_learn():
    random = np.random.default_rng(1)
    vectors = random.normal(size=(200, 6)).astype(np.float32)
    asked = torch.arange(0, 200, 7)
    for distance in neighbours.DISTANCES:
        found = neighbours.nearest(torch.from_numpy(vectors), asked, distance)
        search = NearestNeighbors(n_neighbors=51, metric=distance, algorithm="brute").fit(vectors)
        expected = search.kneighbors(vectors[asked], return_distance=False)[:, 1:]
        assert [set(row) for row in found.tolist()] == [set(row) for row in expected.tolist()]


def test_neighbours_in_blocks_with_units_and_of_a_sample(monkeypatch):
    profiles, targets = make_shop()
    task = {"propensity_sku": targets.tasks["propensity_sku"]}
    config = EvaluationConfig(tasks=tuple(task), readers=("neighbours",))
    targets = replace(targets, tasks=task)

    def aurocs(vectors: np.ndarray, has_units: bool) -> tuple[float, ...]:
        found = evaluate(Profiles(profiles.client_ids, vectors), targets, config, has_units=has_units)
        return found.others["neighbours"]["propensity_sku"].samples[0].aurocs

    whole = aurocs(profiles.embeddings, False)
    monkeypatch.setattr(neighbours, "BLOCK_VALUES", 7 * CLIENTS)
    assert aurocs(profiles.embeddings, False) == whole
    vectors = profiles.embeddings.astype(np.float32)
    in_cents = vectors * np.where(np.arange(WIDTH) == 2, 1e5, 1.0).astype(np.float32)
    np.testing.assert_allclose(aurocs(in_cents, True), aurocs(vectors, True), atol=5e-3)
    monkeypatch.setattr(neighbours, "MOST_ASKED", 100)
    assert aurocs(vectors, True) != whole


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest):
        if name == "lightgbm":
            raise ImportError("No module named 'lightgbm'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "ubp_fast.evaluation.readers.boosting")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"'boosting' is unavailable: No module .* pip install 'ubp_fast\[evaluate\]'"):
        reader_named("boosting")
    assert reader_named("linear") is linear
