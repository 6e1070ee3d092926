"""Two towers: shapes, gradients, time, and who pulls whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.shops import EMPTY_CLIENT, make_store
from support.small_models import CUTOFF_S, pick_views, small_contrastive, untouched_parameters, whole_batch
from torch.nn import functional

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


@pytest.mark.parametrize("shop", ["store", "purchases_store"])
def test_gradients_reach_all_parameters(shop: str, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(shop)
    model = small_contrastive(store, probes={"churn": 1})
    sum(model.loss(whole_batch(store)).values()).backward()
    assert not untouched_parameters(model)


def test_probes_leave_the_profile_alone(store: EventStore) -> None:
    model, batch = small_contrastive(store, probes={"churn": 1, "buy_category": 5}).eval(), whole_batch(store)
    terms = model.loss(batch)
    (terms["probe_churn"] + terms["probe_buy_category"]).backward()
    assert {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None} == {"probes"}


def test_events_from_the_cutoff_on_do_not_change_a_vector(tmp_path: Path) -> None:
    profiles = []
    for name, scrambled_from_s in (("a", None), ("b", CUTOFF_S)):
        other = make_store(tmp_path / name, scrambled_from_s=scrambled_from_s)
        profiles.append(small_contrastive(other).eval()(whole_batch(other)))
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
