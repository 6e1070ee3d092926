"""The rivals of the networks in benchmarks/: what they read, what they learn, and what reads them."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import TINY
from support.shops import DAY_S, EMPTY_CLIENT, END_S, make_store
from support.small_models import SMALL_EVENTS, untouched_parameters, whole_batch

from ubp_fast.evaluation.readers import linear
from ubp_fast.features.static import static_features
from ubp_fast.models.layers.encoder import EncoderConfig
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.training import TrainingConfig
from ubp_fast.store.event_store import EventStore

NAMES = ("autoencoder", "autoencoder, wide", "next event", "next event, wide")
# Of the vectors, and of the views that are learned from, whose window ends there.
TODAY_S, LEARNED_S = END_S - 14 * DAY_S, END_S - 28 * DAY_S
NARROW = (
    "data=synthetic",
    "data.clients=300",
    "data.skus=60",
    "data.urls=80",
    "contrastive.config.history={heads: 2, feed_forward: 32}",
    "contrastive.config.future={heads: 2, feed_forward: 32}",
    "contrastive.training={epochs: 1, validation_views: 0, patience: null}",
    "stacking.blocks=[contrastive,aggregated,decayed]",
)
EVENT_TERMS = {
    "autoencoder": {"kind", "item", "gap", "categories", "prices"},
    "next event": {"next_event", "gap", "future_event", "inactive"},
}


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's module; benchmarks are no package."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    return importlib.import_module("rivals")


def small(rivals: Any) -> Any:
    encoder = EncoderConfig(heads=2, layers=1, feed_forward=64)
    return rivals.RivalConfig(events=SMALL_EVENTS, encoder=encoder, width=16, decoded=8, buckets=50)


def trained(rivals: Any, name: str, store: EventStore, directory: Path, epochs: int = 2) -> tuple[Any, Any]:
    """A rival that learned at one cutoff, and its inputs."""
    inputs = rivals.Inputs(store, (LEARNED_S,), lambda cutoff_s: static_features(store, cutoff_s).rows(slice(None)))
    training = TrainingConfig(epochs=epochs, batch_size=8)
    optimizer = partial(torch.optim.Adam, lr=0.01)
    return rivals.trained(name, inputs, small(rivals), optimizer, training, directory / "training"), inputs


@pytest.mark.parametrize("name", NAMES)
def test_nothing_from_the_cutoff_on_moves_a_rival(rivals: Any, name: str, tmp_path: Path) -> None:
    found = {}
    for which, scrambled_from_s in (("plain", None), ("future", TODAY_S), ("past", TODAY_S - 7 * DAY_S)):
        store = make_store(tmp_path / which, scrambled_from_s=scrambled_from_s)
        rival, inputs = trained(rivals, name, store, tmp_path / which)
        found[which] = rivals.vectors_at(rival, inputs, TODAY_S)
    assert found["plain"].shape == (30, rival.embedding_width)
    np.testing.assert_array_equal(found["future"], found["plain"])
    assert not np.array_equal(found["past"], found["plain"])


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_learns_and_every_client_gets_a_vector(rivals: Any, name: str, store: EventStore) -> None:
    kind, is_wide = rivals.RIVALS[name]
    batch = whole_batch(store)
    assert batch.features is not None
    num_wide = batch.features.shape[1] if is_wide else 0
    rival = kind(small(rivals), EventSizes.of(store), num_wide)
    terms = rival.loss(batch)
    own = {"wide"} if name == "autoencoder, wide" else set()
    assert {*terms} == EVENT_TERMS[name.removesuffix(", wide")] | own
    sum(terms.values()).backward()
    assert not untouched_parameters(rival)
    vectors = rival.eval()(batch)
    assert vectors.isfinite().all()
    other = replace(batch, features=batch.features + 1)
    assert torch.equal(rival(other), vectors) != is_wide


def test_losses_fall(rivals: Any, store: EventStore, tmp_path: Path) -> None:
    for name in ("autoencoder", "next event"):
        trained(rivals, name, store, tmp_path / name, epochs=6)
        epochs = json.loads((tmp_path / name / "training" / "losses.json").read_text())["epochs"]
        for term in EVENT_TERMS[name] - {"future_event"}:
            assert min(epoch[term] for epoch in epochs[-2:]) < 0.98 * epochs[0][term], (name, term)


def test_gaps_are_those_of_the_same_view(rivals: Any, store: EventStore) -> None:
    history = whole_batch(store).history
    assert history is not None and history.lengths()[EMPTY_CLIENT] == 0
    before, ahead = (rivals.gaps_s(history, ahead=ahead) for ahead in (False, True))
    ends = history.cu_seqlens.tolist()
    for first, end, cutoff_s in zip(ends, ends[1:], history.cutoff_s.tolist(), strict=False):
        times_s = history.timestamp_s[first:end].tolist()
        whole = [*times_s[:1], *times_s, cutoff_s]
        assert before[first:end].tolist() == np.diff(whole[:-1]).tolist()
        assert ahead[first:end].tolist() == np.diff(whole[1:]).tolist()


def test_the_file_writes_every_row_and_goes_on(rivals: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = ["--output", str(tmp_path / "r.json"), "--data", "a shop", "--root", str(tmp_path / "runs")]
    overrides = [word for word in (*TINY, *NARROW) if not word.startswith("evaluation.")]
    monkeypatch.setattr(rivals, "EPOCHS", 1)
    monkeypatch.setattr(rivals, "CACHED_S", 0.0)
    # Which penalty wins is not asked here.
    monkeypatch.setattr(linear.Regression, "choose", lambda self, train, *_: [linear.OPTIONS[-1]] * len(train))
    rows = ["features", "next event, wide", "features + next event", "profile + autoencoder", "profile of best"]
    rivals.main([*command, *overrides, "--rows", *rows[:2]])
    first = json.loads((tmp_path / "r.json").read_text())
    assert {*first["rivals"]["linear"]} == {*rows[:2]}
    assert {*NAMES} <= {*first["cpu_minutes"]["0"]}
    rivals.main([*command, *overrides, "--rows", *rows])
    report = json.loads((tmp_path / "r.json").read_text())
    assert {*report["rivals"]["linear"]} == {*rows}
    widths = {name: 64 if name.startswith("autoencoder") else 32 for name in NAMES}
    assert report["width"] == {"contrastive": 32, **widths}
    for row in rows[:2]:
        assert report["rivals"]["linear"][row] == first["rivals"]["linear"][row]
    assert all(0 < auroc <= 1 for (seed,) in report["rivals"]["linear"].values() for auroc in seed.values())
    with pytest.raises(SystemExit):
        rivals.main([*command, "experiment=demo"])
    with pytest.raises(SystemExit):
        rivals.main([*command, "--rows", "features", "data=synthetic"])
