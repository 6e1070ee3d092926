"""Training on batches of fixed sizes, and through a captured step: the losses and weights of batches as they come.

`Recorder` stands for the graph of a GPU: it runs the operations of the step that was captured once more, on the same
memory, with the numbers that the host knew then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from schedulefree import RAdamScheduleFree
from support.small_models import (
    NUM_FEATURES,
    outputs_of,
    small_contrastive,
    small_multitask,
    training_loader,
    whole_batch,
)
from support.waits import recorded
from torch import nn

from ubp_fast.events.schema import UserError
from ubp_fast.kernels import graphs
from ubp_fast.models.layers.encoder import SequenceEncoder
from ubp_fast.models.stacking import StackingConfig, StackingModel
from ubp_fast.models.training import TrainingConfig, fit, initialise
from ubp_fast.optim import adopt_tables
from ubp_fast.sequences import ViewBatch, ViewLoader
from ubp_fast.store.event_store import EventStore

# Gradients that are 0 but for rounding must not decide a step: what they are differs with the shapes of products.
OPTIMIZERS = {
    "schedule_free": partial(RAdamScheduleFree, lr=1e-2, eps=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=3e-3, eps=1e-3),
    "adam": partial(torch.optim.Adam, lr=3e-3, eps=1e-3),
}


def multitask(
    store: EventStore, pooling: str = "last", all_clients: bool = False, attention_dropout: float = 0.0
) -> nn.Module:
    model = small_multitask(store, outputs_of(whole_batch(store).labels))
    model.config = replace(model.config, all_clients=all_clients)
    encoder = replace(model.config.encoder, pooling=pooling, attention_dropout=attention_dropout, time_bias_buckets=20)
    model.encoder = initialise(lambda: SequenceEncoder(model.config.events.width, encoder), 0)
    return model


def contrastive(store: EventStore, pooling: str = "last") -> nn.Module:
    model = small_contrastive(store, probes={"churn": 1, "buy_category": 5})
    encoder = replace(model.config.history, pooling=pooling)
    model.history = initialise(lambda: SequenceEncoder(model.config.events.width, encoder), 0)
    return model


def stacking(store: EventStore) -> nn.Module:
    return initialise(lambda: StackingModel(StackingConfig(), NUM_FEATURES, outputs_of(whole_batch(store).labels)), 0)


MODELS: dict[str, Callable[[EventStore], nn.Module]] = {
    "multitask": multitask,
    "multitask-mean-all": partial(multitask, pooling="mean", all_clients=True),
    "multitask-lstm": partial(multitask, pooling="lstm", attention_dropout=0.1),
    "contrastive": contrastive,
    "contrastive-lstm": partial(contrastive, pooling="lstm"),
    "stacking": stacking,
}


def loader_of(store: EventStore, model: nn.Module) -> ViewLoader:
    if isinstance(model, StackingModel):
        return training_loader(store, history_length=None, future_length=None)
    return training_loader(store)


def steps(store: EventStore, model: nn.Module, optimizer: str, updates: Any, is_fixed: bool) -> Iterator[list[float]]:
    loader = loader_of(store, model)
    loader.fills = loader.fixed_sizes() if is_fixed else None
    chosen = adopt_tables(OPTIMIZERS[optimizer](model.parameters()), model, updates)
    model.train()
    getattr(chosen, "train", lambda: None)()
    for epoch in range(2):
        loader.set_epoch(epoch)
        for at, batch in enumerate(loader):
            torch.manual_seed(100 * epoch + at)
            terms = model.loss(batch)
            sum(terms.values()).backward()
            chosen.step()
            chosen.zero_grad()
            yield [term.item() for term in terms.values()]
    getattr(chosen, "eval", lambda: None)()
    yield [*getattr(model, "epoch_metrics", dict)().values()]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("optimizer", "updates"), [("schedule_free", "row_sparse"), ("adamw", "row_sparse"), ("adam", "dense")]
)
def test_views_that_fill_up_move_nothing(
    make: Callable[[EventStore], nn.Module], optimizer: str, updates: str, store: EventStore
) -> None:
    models = [make(store) for _ in range(2)]
    plain, fixed = (list(steps(store, model, optimizer, updates, at == 1)) for at, model in enumerate(models))
    torch.testing.assert_close(fixed, plain, rtol=1e-6, atol=1e-6)
    assert_same_weights(*models)


@pytest.mark.parametrize("optimizer", ["schedule_free", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in MODELS if "lstm" not in name])
def test_captured_training_is_the_training(
    name: str, precision: Any, optimizer: str, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout of every step is that of the step, not that of the capture; counts of probes are those of the steps."""
    captures = []
    monkeypatch.setattr(graphs, "_recorded", lambda *given: (captures.append(1), recorded(*given))[1])
    models, losses = [], []
    for is_captured in (False, True):
        model = MODELS[name](store)
        config = TrainingConfig(
            epochs=2, cuda_graph=is_captured, table_updates="dense", precision=precision, gradient_clip_norm=1.0
        )
        losses.append(fit(model, loader_of(store, model), OPTIMIZERS[optimizer], config, tmp_path / str(is_captured)))
        models.append(model)
    assert 1 <= len(captures) <= 3
    if precision == "fp32":
        assert losses[1] == [pytest.approx(epoch, rel=1e-6, abs=1e-6) for epoch in losses[0]]
        assert_same_weights(*models)
    else:  # digits that products of other shapes round differently
        assert losses[1] == [pytest.approx(epoch, rel=0.02, abs=0.01) for epoch in losses[0]]


@pytest.mark.parametrize("name", ["multitask", "multitask-mean-all", "contrastive", "stacking"])
def test_a_captured_step_asks_the_device_for_nothing(name: str, store: EventStore) -> None:
    """Forward and backward on the meta device, which has shapes and no values, with the seeds of a captured step."""
    model = MODELS[name](store)
    loader = loader_of(store, model)
    batch = loader.fixed_sizes()(next(iter(loader)))
    captured = graphs.CapturedStep(model.to("meta").train().loss, model)
    with (
        mock.patch("torch.autocast", return_value=nullcontext()),  # which knows no such device
        mock.patch("torch.is_autocast_enabled", return_value=False),
        mock.patch("torch.get_autocast_dtype", return_value=torch.bfloat16),
        mock.patch.object(graphs, "_recorded", lambda step, fill, device: (step(), lambda: None)),
    ):
        terms = captured(batch.to("meta"))
    assert terms and all(term.is_meta for term in terms.values())
    assert all(part.grad is not None for part in model.parameters())


def test_what_cannot_be_captured_is_told(store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(model: nn.Module, **changes: Any) -> None:
        config = TrainingConfig(**{"cuda_graph": True, "table_updates": "dense", **changes})
        fit(model, loader_of(store, model), OPTIMIZERS["adamw"], config, tmp_path)

    with pytest.raises(UserError, match=r"cuda_graph must be false here, got true: .* on a CUDA device, got cpu"):
        train(multitask(store))
    with pytest.raises(UserError, match="cuda_graph must be false where the rows in use of a table alone are updated"):
        train(multitask(store), table_updates="row_sparse")
    monkeypatch.setattr(graphs, "_recorded", recorded)
    with pytest.raises(UserError, match=r"a batch of fixed sizes must have next_event_weight 0, got 0\.5"):
        train(small_contrastive(store, next_event_weight=0.5))
    assert not any(tmp_path.glob("*.safetensors"))


def test_states_of_an_lstm_follow_from_lengths(store: EventStore) -> None:
    """On a GPU, whose library is told the lengths by the host."""
    model = multitask(store, pooling="lstm").to("meta")
    loader = loader_of(store, model)
    batch: ViewBatch = loader.fixed_sizes()(next(iter(loader))).to("meta")
    with (
        mock.patch("torch.autocast", return_value=nullcontext()),
        mock.patch("torch.is_autocast_enabled", return_value=False),
        pytest.raises(UserError, match="must be pooled by 'last' or 'mean', got 'lstm'"),
    ):
        model.loss(batch)
