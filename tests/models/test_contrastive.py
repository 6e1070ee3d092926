"""Two towers: shapes, gradients, time, and who pulls whom."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.shops import EMPTY_CLIENT, make_store
from support.small_models import (
    CUTOFF_S,
    NUM_FEATURES,
    assert_compiles_whole,
    pick_views,
    small_contrastive,
    step_without_values,
    untouched_parameters,
    whole_batch,
)
from torch.nn import functional

from ubp_fast.models.contrastive import ContrastiveConfig, rows_with_successor
from ubp_fast.models.layers.encoder import EncoderConfig
from ubp_fast.sequences import ViewBatch
from ubp_fast.store.event_store import EventStore


def test_every_client_gets_a_vector(store: EventStore) -> None:
    model, batch = small_contrastive(store).eval(), whole_batch(store)
    profile = model(batch)
    assert profile.shape == (30, model.embedding_width) == (30, 32)
    assert profile.dtype == torch.float32
    assert profile.isfinite().all()
    assert torch.equal(profile[EMPTY_CLIENT], model.history.empty)


def test_vector_does_not_depend_on_company(store: EventStore) -> None:
    model, batch = small_contrastive(store).eval(), whole_batch(store)
    profile, ahead = model(batch), model.embed_future(batch.future)
    order = [9, EMPTY_CLIENT, 2]
    some = pick_views(batch, order)
    torch.testing.assert_close(model(some), profile[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.embed_future(some.future), ahead[order], rtol=1e-4, atol=1e-5)


def test_loss_by_hand(store: EventStore) -> None:
    model, batch = small_contrastive(store).eval(), whole_batch(store)
    weight = torch.rand(30, generator=torch.Generator().manual_seed(0)) + 0.5
    terms = model.loss(replace(batch, weight=weight))
    has_future = batch.future.lengths() > 0
    assert 0 < int((~has_future).sum()) < 30
    ahead = functional.normalize(model.embed_future(batch.future)[has_future], dim=1)
    profile = functional.normalize(model(batch)[has_future], dim=1)
    per_row = functional.cross_entropy(ahead @ profile.T / 0.1, torch.arange(len(profile)), reduction="none")
    expected = (per_row * weight[has_future]).sum() / weight[has_future].sum()
    torch.testing.assert_close(terms["nt_xent"], expected, rtol=1e-4, atol=1e-5)
    logit = model.future_activity(model(batch))[:, 0]
    bce = functional.binary_cross_entropy_with_logits(logit, (~has_future).float(), reduction="none")
    torch.testing.assert_close(terms["future_activity"], (bce * weight).mean())


@pytest.mark.parametrize("next_event_weight", [0.0, 0.5])
def test_wide_features_are_added(next_event_weight: float, store: EventStore) -> None:
    """To what is embedded and to what is trained alike; some of them are dropped in training."""
    batch = whole_batch(store)
    given = {"next_event_weight": next_event_weight, "num_wide": NUM_FEATURES, "wide_dropout": 0.0}
    model = small_contrastive(store, **given).eval()
    without = model(replace(batch, features=torch.zeros_like(batch.features)))
    torch.testing.assert_close(model(batch), without + batch.features @ model.wide.weight.T)
    before = model.loss(batch)["nt_xent"]
    assert not torch.equal(model.loss(replace(batch, features=batch.features.flip(0)))["nt_xent"], before)
    with pytest.raises(ValueError, match="features must be in the batch"):
        model(replace(batch, features=None))
    model.history.train(False)
    model.training = True
    assert torch.equal(model(batch), model(batch))
    model.config = replace(model.config, wide_dropout=0.5)
    assert not torch.equal(model(batch), model(batch))


def test_next_event_by_hand(store: EventStore) -> None:
    """Every state tells its successor's content from the other contents; the same product or page is no rival."""
    model, batch = small_contrastive(store, next_event_weight=0.5).eval(), whole_batch(store)
    history = batch.history
    terms, plain = model.loss(batch), small_contrastive(store).loss(batch)
    assert set(terms) == {*plain, "next_event"}
    states = model.history.states(model.events(history, with_age=True), history)
    content = model.next_event(model.events(history, with_age=False))
    bounds = history.cu_seqlens.tolist()
    rows = [row for begin, end in pairwise(bounds) for row in range(begin, end - 1)]
    query = functional.normalize(states[rows], dim=1)
    key = functional.normalize(content[[row + 1 for row in rows]], dim=1)
    named = [(int(history.sku[row + 1]), int(history.url[row + 1]), row) for row in rows]
    what = [(sku, url) if sku or url else (0, 0, row) for sku, url, row in named]
    same = torch.tensor([[left == right for right in what] for left in what]) & ~torch.eye(len(rows), dtype=torch.bool)
    assert same.any()
    scores = (query @ key.T / 0.1).masked_fill(same, -torch.inf)
    expected = 0.5 * functional.cross_entropy(scores, torch.arange(len(rows)))
    torch.testing.assert_close(terms["next_event"], expected, rtol=1e-4, atol=1e-5)


def test_next_events_are_spread_evenly(store: EventStore) -> None:
    history = whole_batch(store).history
    everything = rows_with_successor(history, history.num_tokens)
    ends = history.cu_seqlens[1:].long() - 1
    assert len(everything) == history.num_tokens - int((history.lengths() > 0).sum())
    assert not torch.isin(everything, ends[history.lengths() > 0]).any()
    some = rows_with_successor(history, 7)
    places = torch.searchsorted(everything, some)
    assert len(some) == 7
    assert torch.isin(some, everything).all()
    assert set(places.diff().tolist()) <= {len(everything) // 7, len(everything) // 7 + 1}


def test_views_without_a_successor_have_no_next_event(store: EventStore) -> None:
    model, batch = small_contrastive(store, next_event_weight=1.0), whole_batch(store)
    nobody = pick_views(batch, [EMPTY_CLIENT])
    terms = model.loss(nobody)
    assert float(terms["next_event"].detach()) == 0.0
    sum(terms.values()).backward()


def test_next_event_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"history\.causal must be true with a next_event_weight"):
        ContrastiveConfig(next_event_weight=0.1)
    causal = EncoderConfig(causal=True)
    with pytest.raises(ValueError, match="next_event_weight must be >= 0 and next_events >= 2, got -1"):
        ContrastiveConfig(history=causal, next_event_weight=-1.0)
    with pytest.raises(ValueError, match=r"next_events >= 2, got 0\.0 and 1"):
        ContrastiveConfig(history=causal, next_events=1)


@pytest.mark.parametrize("next_event_weight", [0.0, 0.5])
@pytest.mark.parametrize("shop", ["store", "purchases_store"])
def test_gradients_reach_all_parameters(shop: str, next_event_weight: float, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(shop)
    model = small_contrastive(store, probes={"churn": 1}, next_event_weight=next_event_weight)
    sum(model.loss(whole_batch(store)).values()).backward()
    assert not untouched_parameters(model)


def test_probes_leave_the_profile_alone(store: EventStore) -> None:
    model, batch = small_contrastive(store, probes={"churn": 1, "buy_category": 5}).eval(), whole_batch(store)
    terms = model.loss(batch)
    (terms["probe_churn"] + terms["probe_buy_category"]).backward()
    assert {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None} == {"probes"}


@pytest.mark.parametrize("next_event_weight", [0.0, 0.5])
def test_events_from_the_cutoff_on_do_not_change_a_vector(next_event_weight: float, tmp_path: Path) -> None:
    profiles = []
    for name, scrambled_from_s in (("a", None), ("b", CUTOFF_S)):
        other = make_store(tmp_path / name, scrambled_from_s=scrambled_from_s)
        model = small_contrastive(other, next_event_weight=next_event_weight)
        profiles.append(model.eval()(whole_batch(other)))
    assert torch.equal(*profiles)


def test_only_the_history_tower_knows_ages(store: EventStore) -> None:
    model, batch = small_contrastive(store).eval(), whole_batch(store)
    earlier = replace(batch.history, cutoff_s=batch.history.cutoff_s + 86_400 * 3)
    assert not torch.equal(model(replace(batch, history=earlier)), model(batch))
    moved = replace(batch.future, cutoff_s=batch.future.cutoff_s - 86_400 * 3)
    assert torch.equal(model.embed_future(moved), model.embed_future(batch.future))


def test_age_edges_are_state(store: EventStore) -> None:
    model = small_contrastive(store)
    model.set_age_edges(np.linspace(0.0, 80.0, 9))
    assert model.state_dict()["events.age.edges"].tolist() == np.linspace(0.0, 80.0, 9).tolist()
    with pytest.raises(ValueError, match=r"edges_days must have shape \(9,\), got \(4,\)"):
        model.set_age_edges(np.zeros(4))


def test_missing_parts_of_a_batch_are_named(store: EventStore) -> None:
    model, batch = small_contrastive(store), whole_batch(store)
    with pytest.raises(ValueError, match="history must be in the batch"):
        model(ViewBatch(features=batch.features))
    with pytest.raises(ValueError, match="give the loader a future_length"):
        model.loss(replace(batch, future=None))


@pytest.mark.parametrize("next_event_weight", [0.0, 0.5])
def test_no_step_waits_for_a_gpu(next_event_weight: float, store: EventStore) -> None:
    probes = {"churn": 1}
    model = small_contrastive(store, next_event_weight=next_event_weight, num_wide=NUM_FEATURES, probes=probes)
    step_without_values(model, whole_batch(store))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler looks at it
def test_compiles_whole_in_training(store: EventStore) -> None:
    batch = whole_batch(store)
    assert_compiles_whole(small_contrastive(store, num_wide=NUM_FEATURES, probes={"churn": 1}), batch)
