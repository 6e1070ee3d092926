"""Profile, tasks and masked losses of the multi-task model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.shops import EMPTY_CLIENT
from support.small_models import outputs_of, pick_views, small_multitask, untouched_parameters, whole_batch
from torch.nn import functional

from ubp_fast.models.multitask import MULTITASK_LABELS, masked_bce
from ubp_fast.store.event_store import EventStore


def test_masked_bce_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0], [5.0, -5.0], [1.0, 1.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    counted = functional.binary_cross_entropy_with_logits(logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(masked_bce(logits, labels), counted)
    nobody = masked_bce(logits.requires_grad_(), torch.zeros(3, 2))
    nobody.backward()
    assert nobody == 0
    assert not logits.grad.any()


def test_terms_by_hand(store: EventStore) -> None:
    batch = whole_batch(store)
    assert set(batch.labels) == set(MULTITASK_LABELS)
    model = small_multitask(store, outputs_of(batch.labels)).eval()
    terms, logits = model.loss(batch), model.tasks(model(batch))
    assert set(terms) == set(MULTITASK_LABELS)
    churn = functional.binary_cross_entropy_with_logits(logits["churn"][:, 0], batch.labels["churn"])
    torch.testing.assert_close(terms["churn"], 0.025 * churn)
    torch.testing.assert_close(terms["add_sku"], masked_bce(logits["add_sku"], batch.labels["add_sku"]))


def test_profile_does_not_depend_on_company(store: EventStore) -> None:
    batch = whole_batch(store)
    model = small_multitask(store, outputs_of(batch.labels)).eval()
    profile = model(batch)
    assert profile.shape == (30, model.embedding_width)
    assert profile.isfinite().all()
    order = [7, EMPTY_CLIENT, 0]
    torch.testing.assert_close(model(pick_views(batch, order)), profile[order], rtol=1e-4, atol=1e-5)


def test_profile_reads_the_features(store: EventStore) -> None:
    batch = whole_batch(store)
    model = small_multitask(store, outputs_of(batch.labels)).eval()
    assert not torch.equal(model(batch), model(replace(batch, features=batch.features + 1)))
    with pytest.raises(ValueError, match="history and features must be in the batch"):
        model(replace(batch, features=None))


@pytest.mark.parametrize("shop", ["store", "purchases_store"])
def test_gradients_reach_all_parameters(shop: str, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(shop)
    batch = whole_batch(store)
    model = small_multitask(store, outputs_of(batch.labels))
    assert ("add" in batch.labels) == (shop == "store")
    sum(model.loss(batch).values()).backward()
    assert not untouched_parameters(model)
