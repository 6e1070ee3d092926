"""Profile, tasks and masked losses of the multi-task model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.shops import EMPTY_CLIENT
from support.small_models import (
    assert_compiles_whole,
    outputs_of,
    pick_views,
    small_multitask,
    step_without_values,
    untouched_parameters,
    whole_batch,
)
from torch.nn import functional

from ubp_fast.models.layers.encoder import SequenceEncoder
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


def test_losses_over_all_clients(store: EventStore) -> None:
    batch = whole_batch(store)
    model = small_multitask(store, outputs_of(batch.labels)).eval()
    model.config = replace(model.config, all_clients=True)
    label = batch.labels["buy_sku"]
    assert not label.any(dim=1).all()
    expected = functional.binary_cross_entropy_with_logits(model.label_logits(batch)["buy_sku"], label)
    torch.testing.assert_close(model.loss(batch)["buy_sku"], expected)


def test_wide_features_reach_profile_and_logits_linearly(store: EventStore) -> None:
    batch = whole_batch(store)
    model = small_multitask(store, outputs_of(batch.labels), num_wide=2).eval()
    with torch.no_grad():
        for layer in (model.fusion[-1], *(tower[-1] for tower in model.tasks.towers.values())):
            layer.weight.zero_()
            layer.bias.zero_()
    wide = batch.features[:, -2:]
    torch.testing.assert_close(model(batch), wide @ model.wide.weight.T)
    head = model.linear_tasks["buy_sku"]
    torch.testing.assert_close(model.label_logits(batch)["buy_sku"], model(batch) @ head.weight.T + head.bias)


def test_wide_features_are_dropped_in_training_alone(store: EventStore) -> None:
    batch = whole_batch(store)
    model = small_multitask(store, outputs_of(batch.labels), num_wide=2)
    for part in (model.encoder, model.fusion):
        part.eval()
    model.config = replace(model.config, embedding_dropout=0.0)
    torch.manual_seed(0)
    assert not torch.equal(model(batch), model(batch))
    model.config = replace(model.config, wide_dropout=0.0)
    assert torch.equal(model(batch), model(batch))


@pytest.mark.parametrize(("shop", "num_wide"), [("store", 0), ("store", 2), ("purchases_store", 0)])
def test_gradients_reach_all_parameters(shop: str, num_wide: int, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(shop)
    batch = whole_batch(store)
    model = small_multitask(store, outputs_of(batch.labels), num_wide=num_wide)
    assert ("add" in batch.labels) == (shop == "store")
    sum(model.loss(batch).values()).backward()
    assert not untouched_parameters(model)


@pytest.mark.parametrize("pooling", ["last", "mean", "lstm"])
def test_no_step_waits_for_a_gpu(pooling: str, store: EventStore) -> None:
    batch = whole_batch(store)
    model = small_multitask(store, outputs_of(batch.labels))
    config = replace(model.config.encoder, pooling=pooling)
    model.encoder = SequenceEncoder(model.config.events.width, config)
    step_without_values(model, batch)
    bare = batch.to("meta")
    bare = replace(bare, history=replace(bare.history, counted=None))
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta|Meta"):
        model.loss(bare)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler looks at it
def test_compiles_whole_in_training(store: EventStore) -> None:
    batch = whole_batch(store)
    some = {name: label for name, label in batch.labels.items() if name in ("churn", "buy_sku")}
    assert_compiles_whole(small_multitask(store, outputs_of(some), num_wide=2), batch)
