"""Reduced-rank regression: against plain regressions, its scaling, determinism and errors."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from ubp_fast.events.labels import LabelMatrix
from ubp_fast.features import scaling
from ubp_fast.features.scaling import PANEL
from ubp_fast.models import reduced_rank
from ubp_fast.models.near import NearModel, NearPart
from ubp_fast.models.reduced_rank import ReducedRankConfig, ReducedRankModel


def label_matrix(dense: np.ndarray) -> LabelMatrix:
    rows, columns = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(len(dense) + 1)).astype(np.int64)
    return LabelMatrix(indptr, columns.astype(np.int32), dense.shape[1])


def example(clients: int = 600) -> tuple[np.ndarray, dict[str, LabelMatrix | np.ndarray], np.ndarray]:
    """Blocks of 12 columns on very different scales; labels caused by two hidden directions."""
    random = np.random.default_rng(3)
    causes = random.normal(size=(clients, 2))
    blocks = np.concatenate([causes, random.normal(size=(clients, 9)), np.full((clients, 1), 7.0)], axis=1)
    blocks = blocks @ np.diag([100.0, 0.01, *np.ones(10)]) + 50
    bought = (causes @ random.normal(size=(2, 20)) + random.normal(size=(clients, 20)) > 1.5).astype(np.float32)
    churn = (causes[:, 0] + random.normal(size=clients) > 0).astype(np.float32)
    return blocks.astype(np.float32), {"buy_sku": label_matrix(bought), "churn": churn}, causes


def test_directions_are_those_of_the_predictions() -> None:
    blocks, labels, _ = example()
    config = ReducedRankConfig(rank=3, ridge=0.2)
    profile = ReducedRankModel(config).fit([blocks], labels).transform(blocks)[:, :-1].astype(np.float64)
    deviation = blocks.std(axis=0, dtype=np.float64)
    inputs = (blocks - blocks.mean(axis=0, dtype=np.float64)) / np.where(deviation > 1e-6, deviation, np.inf)
    predictions = []
    for name in sorted(labels):
        label = labels[name]
        wanted = label.dense() if isinstance(label, LabelMatrix) else label[:, None]
        penalty = 0.2 * len(inputs) * np.eye(12)
        predicted = inputs @ np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ (wanted - wanted.mean(axis=0)))
        predictions.append(predicted / predicted.std(axis=0) / predicted.shape[1] ** 0.5)
    left, _, _ = np.linalg.svd(np.concatenate(predictions, axis=1), full_matrices=False)
    for column in range(3):
        alike = abs(left[:, column] @ profile[:, column]) / np.linalg.norm(profile[:, column])
        assert alike == pytest.approx(1.0, abs=1e-6)


def test_columns_have_variance_one_and_the_last_is_one() -> None:
    blocks, labels, causes = example()
    profile = ReducedRankModel(ReducedRankConfig(rank=2)).fit([blocks], labels).transform(blocks)
    assert profile.shape == (600, 3) and profile.dtype == np.float32
    assert profile[:, :2].std(axis=0) == pytest.approx(1.0, abs=1e-5)
    assert profile[:, :2].mean(axis=0) == pytest.approx(0.0, abs=1e-5)
    assert (profile[:, 2] == 1).all()
    explained = np.linalg.lstsq(profile, causes, rcond=None)[1] / ((causes - causes.mean(axis=0)) ** 2).sum(axis=0)
    assert (explained < 0.1).all(), "both causes must be found in two columns"


def test_columns_are_compared_inside_their_cutoff_only() -> None:
    blocks, labels, _ = example()
    halves = [blocks[:300], blocks[300:]]
    whole = ReducedRankModel(ReducedRankConfig(rank=2)).fit(halves, labels)
    moved = ReducedRankModel(ReducedRankConfig(rank=2)).fit([halves[0], halves[1] * np.float32(4) + 1000], labels)
    np.testing.assert_allclose(moved.directions, whole.directions, rtol=1e-3, atol=1e-4)
    profiles = whole.transform(halves[1])
    np.testing.assert_allclose(whole.transform(halves[1] * np.float32(4) + 1000), profiles, atol=2e-3)
    assert np.abs(whole.transform(blocks)[300:] - profiles).max() > 0.01, "clients of another day are another base"


def test_rows_of_several_cutoffs_meet_their_own_labels() -> None:
    blocks, labels, causes = example()
    order = np.random.default_rng(0).permutation(600)
    parts = [blocks[order[:100]], blocks[order[100:]]]
    shuffled = {
        name: label.take(order) if isinstance(label, LabelMatrix) else label[order] for name, label in labels.items()
    }
    config = ReducedRankConfig(rank=2)
    right = ReducedRankModel(config).fit(parts, shuffled).transform(blocks)[:, :2]
    explained = np.linalg.lstsq(np.c_[right, np.ones(600)], causes, rcond=None)[1]
    assert (explained / ((causes - causes.mean(axis=0)) ** 2).sum(axis=0) < 0.15).all()


def test_summary_columns_feel_less_of_the_penalty() -> None:
    random = np.random.default_rng(5)
    one, other = random.normal(size=(2, 500))
    blocks = np.stack([one, other], axis=1)
    labels = {"churn": (one + other + random.normal(size=500) > 0).astype(np.float32)}
    config = ReducedRankConfig(rank=1, ridge=3.0, summary_weight=5.0)
    plain = ReducedRankModel(config).fit([blocks], labels).directions[:, 0]
    chosen = ReducedRankModel(config).fit([blocks], labels, np.array([True, False])).directions[:, 0]
    assert plain[0] / plain[1] == pytest.approx(1.0, abs=0.2)
    # 25 / (25 + 3) against 1 / (1 + 3) of the two slopes survives.
    assert chosen[0] / chosen[1] == pytest.approx(25 / 7 * plain[0] / plain[1], rel=0.1)


def test_importance_is_the_part_in_the_predictions() -> None:
    blocks, labels, _ = example()
    model = ReducedRankModel(ReducedRankConfig(rank=8)).fit([blocks], labels)
    assert set(np.argsort(-model.importance)[:2]) == {0, 1}, "the two causes among twelve columns"
    assert model.importance.sum() == pytest.approx(2, rel=0.2), "the variance of both, columns being unrelated"
    assert (np.diff(model.singular_values) < 0).all() and len(model.singular_values) == model.directions.shape[1]
    # All lists count as one label of variance 1 each: what the directions carry adds up to both of them.
    assert (model.singular_values**2).sum() == pytest.approx(2, rel=0.05)


def test_rows_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, labels, _ = example()
    whole = ReducedRankModel(ReducedRankConfig()).fit([blocks], labels).transform(blocks)
    monkeypatch.setattr(scaling, "ROWS_AT_ONCE", 77)
    parts = ReducedRankModel(ReducedRankConfig()).fit([blocks], labels).transform(blocks)
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_bytes_do_not_depend_on_threads() -> None:
    """A cluster gave the BLAS one thread, the driver as many as it had cores: vectors differed in a few bits."""
    random = np.random.default_rng(0)
    blocks = random.normal(size=(1500, PANEL + 190)).astype(np.float32)
    lists = blocks[:, :400] + random.normal(size=(1500, 400)) > 1
    statistics = scaling.moments(blocks)
    found, before = [], torch.get_num_threads()
    for blas, threads in ((1, 1), (2, 1), (2, 3)):
        try:
            torch.set_num_threads(threads)
            with threadpool_limits(blas, user_api="blas"):
                assert {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"} == {blas}
                model = ReducedRankModel(ReducedRankConfig()).fit([blocks], {"lists": label_matrix(lists)})
                near = NearModel.fit([NearPart(blocks, *statistics, 1.0)], 40)
        finally:
            torch.set_num_threads(before)
        found.append([one.tobytes() for one in (model.directions, model.singular_values, near.mean, near.directions)])
    assert found[0] == found[1] == found[2]


def test_rows_may_be_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks were joined in memory once, several times over."""
    for module in (scaling, reduced_rank):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 128)
    blocks, labels, _ = example()

    class Lazy:
        shape = blocks.shape

        def __len__(self) -> int:
            return len(blocks)

        def __getitem__(self, chosen: slice) -> np.ndarray:
            assert len(blocks[chosen]) <= 128
            return blocks[chosen]

    one, other = (ReducedRankModel(ReducedRankConfig()).fit([each], labels) for each in (Lazy(), blocks))
    np.testing.assert_array_equal(one.transform(Lazy()), other.transform(blocks))


def test_the_rows_of_one_cutoff_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 rows of 2,400 numbers are 80 MB, and a run may have many cutoffs."""
    blocks, labels, _ = example()
    held: list[weakref.ref[np.ndarray]] = []
    original = reduced_rank.products

    def products(values: np.ndarray, others: Sequence[np.ndarray]) -> list[np.ndarray]:
        assert not [one for one in held if one() is not None]
        held.append(weakref.ref(values))
        return original(values, others)

    monkeypatch.setattr(reduced_rank, "products", products)
    ReducedRankModel(ReducedRankConfig(rank=2)).fit([blocks[:200], blocks[200:300], blocks[300:]], labels)
    assert len(held) == 3


def test_scale_and_order_of_columns_do_not_matter() -> None:
    blocks, labels, _ = example()
    config = ReducedRankConfig(rank=2)
    before = ReducedRankModel(config).fit([blocks], labels).transform(blocks)
    changed = blocks[:, ::-1] * np.float32(8) - 3
    np.testing.assert_allclose(ReducedRankModel(config).fit([changed], labels).transform(changed), before, atol=1e-3)


def test_saved_model_gives_the_same_profiles(tmp_path: Path) -> None:
    blocks, labels, _ = example()
    model = ReducedRankModel(ReducedRankConfig()).fit([blocks], labels)
    model.save(tmp_path / "model.safetensors")
    again = ReducedRankModel.load(tmp_path / "model.safetensors", ReducedRankConfig())
    assert np.array_equal(again.transform(blocks), model.transform(blocks))


def test_fewer_causes_than_asked_for_give_fewer_columns() -> None:
    blocks, labels, _ = example()
    model = ReducedRankModel(ReducedRankConfig(rank=8)).fit([blocks], {"churn": labels["churn"]})
    assert model.transform(blocks).shape == (600, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks, labels: blocks.__setitem__((4, 2), np.nan), r"finite, got nan at \[4, 2\] of cutoff 0"),
        (lambda blocks, labels: labels.__setitem__("churn", np.zeros(5)), "churn must have 600 rows, got 5"),
        (
            lambda blocks, labels: blocks.__setitem__(slice(None), 1.0),
            "clients must differ in what they do and in what they buy later",
        ),
    ],
    ids=["nan", "rows", "constant"],
)
def test_errors(change, message: str) -> None:  # type: ignore[no-untyped-def]
    blocks, labels, _ = example()
    change(blocks, labels)
    with pytest.raises(ValueError, match=message):
        ReducedRankModel(ReducedRankConfig()).fit([blocks], labels)


def test_bad_constants_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        ReducedRankConfig(rank=0)
    with pytest.raises(ValueError, match="ridge must be > 0, got 0"):
        ReducedRankConfig(ridge=0.0)
    with pytest.raises(ValueError, match="summary_weight must be > 0, got 0"):
        ReducedRankConfig(summary_weight=0.0)
    blocks, labels, _ = example()
    with pytest.raises(ValueError, match="12 columns of the fit, got 3"):
        ReducedRankModel(ReducedRankConfig()).fit([blocks], labels).transform(blocks[:, :3])
