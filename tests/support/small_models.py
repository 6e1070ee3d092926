"""Small versions of the models and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from support.shops import DAY_S, END_S
from torch import nn

from ubp_fast.models.contrastive import ContrastiveConfig, ContrastiveModel
from ubp_fast.models.layers.encoder import EncoderConfig
from ubp_fast.models.layers.event_embedding import ConcatenatedEventConfig, EventSizes, ProjectedEventConfig, TableDtype
from ubp_fast.models.layers.ple import PLEConfig
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel
from ubp_fast.models.training import initialise
from ubp_fast.optim import clip_gradient_norm
from ubp_fast.sequences import SequenceBatch, ViewBatch, ViewLoader, views_at, window_labels
from ubp_fast.store.event_store import EventStore

CUTOFF_S = END_S - 28 * DAY_S
NUM_FEATURES = 3
LISTS = {
    "propensity_sku": (np.arange(20), np.ones(20)),
    "propensity_category": (np.arange(7, 12), np.ones(5)),
    "propensity_price": (np.arange(10), np.ones(10)),
}
SMALL_EVENTS = ProjectedEventConfig(4, 16, 8, 4, 16, 8, 8, 8, 32)


def small_contrastive(
    store: EventStore,
    seed: int = 0,
    next_event_weight: float = 0.0,
    table_dtype: TableDtype = "float32",
    wide_dropout: float = 0.4,
    **changes: Any,
) -> ContrastiveModel:
    """32 columns, one layer per tower; `changes` go to the model's constructor."""
    config = ContrastiveConfig(
        events=replace(SMALL_EVENTS, table_dtype=table_dtype),
        history=EncoderConfig(heads=2, layers=1, feed_forward=64, causal=next_event_weight > 0),
        future=EncoderConfig(heads=2, layers=1, feed_forward=64, pooling="mean"),
        temperature=0.1,
        next_event_weight=next_event_weight,
        wide_dropout=wide_dropout,
    )
    return initialise(lambda: ContrastiveModel(config, EventSizes.of(store), **changes), seed)


def small_multitask(store: EventStore, outputs: Mapping[str, int], seed: int = 0, num_wide: int = 0) -> MultitaskModel:
    """32 columns, eight tasks where there are carts; the last `num_wide` features are wide ones."""
    config = MultitaskConfig(
        events=ConcatenatedEventConfig(8, 16, 8, 4, 32, 4, 4),
        encoder=EncoderConfig(heads=1, feed_forward=64, activation="relu", norm_first=False, pooling="last"),
        profile_width=32,
        experts=PLEConfig(expert_hidden=32, expert_width=16, tower_hidden=16),
    )
    sizes, num_static = EventSizes.of(store), NUM_FEATURES - num_wide
    return initialise(lambda: MultitaskModel(config, sizes, num_static, outputs, num_wide), seed)


def training_loader(store: EventStore, batch_size: int = 16, **changes: Any) -> ViewLoader:
    """Histories, futures, features and labels at two cutoffs, shuffled."""
    views = views_at(store, [CUTOFF_S, CUTOFF_S - 14 * DAY_S], with_history=True)
    labels = window_labels(store, views, LISTS)
    features = np.random.default_rng(0).random((len(views.row), NUM_FEATURES))
    options = {"history_length": 64, "future_length": 64, "features": features, "labels": labels, "shuffle_seed": 0}
    return ViewLoader(store, views, batch_size=batch_size, **(options | changes))


def whole_batch(store: EventStore) -> ViewBatch:
    """All clients, the one without events included, at one cutoff."""
    views = views_at(store, [CUTOFF_S])
    features = np.random.default_rng(0).random((len(views.row), NUM_FEATURES))
    labels = window_labels(store, views, LISTS)
    loader = ViewLoader(
        store, views, batch_size=1000, history_length=64, future_length=64, features=features, labels=labels
    )
    (batch,) = loader
    return batch


def outputs_of(labels: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Number of labels per name."""
    return {name: 1 if label.dim() == 1 else label.shape[1] for name, label in labels.items()}


def pick(batch: SequenceBatch, order: list[int]) -> SequenceBatch:
    """The views of a batch in another order, or some of them."""
    bounds = batch.cu_seqlens.tolist()
    rows = torch.tensor([at for view in order for at in range(bounds[view], bounds[view + 1])], dtype=torch.int64)
    lengths = batch.lengths()[order]
    return SequenceBatch(
        *(getattr(batch, name)[rows] for name in ("kind", "sku", "category", "price", "url", "codes", "timestamp_s")),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        cutoff_s=batch.cutoff_s[order],
        client=batch.client[order],
    )


def pick_views(batch: ViewBatch, order: list[int]) -> ViewBatch:
    """The same for a batch of views."""
    return ViewBatch(
        history=pick(batch.history, order),
        future=pick(batch.future, order),
        features=batch.features[order],
        labels={name: label[order] for name, label in batch.labels.items()},
    )


def step_without_values(model: ContrastiveModel | MultitaskModel, batch: ViewBatch) -> None:
    """A training step on the meta device, which has shapes and no values: what would wait for a GPU raises."""
    model, parts = model.to("meta").train(), batch.to("meta")
    with mock.patch("torch.autocast", return_value=nullcontext()):  # which knows no such device
        sum(model.loss(parts).values()).backward()
        clip_gradient_norm(model.parameters(), 1.0)
    assert all(part.grad is not None for part in model.parameters())


def assert_compiles_whole(model: ContrastiveModel | MultitaskModel, batch: ViewBatch) -> None:
    """Losses and gradients of 50 batches of 2 and more views are those of the model as it is, by few, whole graphs."""
    from torch._dynamo.utils import counters

    def step(loss: Callable[[ViewBatch], dict[str, torch.Tensor]], some: ViewBatch, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        terms = list(loss(some).values())
        return [*terms, *torch.autograd.grad(sum(terms), list(model.parameters()), materialize_grads=True)]

    torch.compiler.reset()
    counters.clear()
    random = np.random.default_rng(0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
        for seed in range(50):
            order = random.permutation(batch.num_views)[: random.integers(2, batch.num_views)]
            some = pick_views(batch, order.tolist())
            assert all(map(torch.equal, step(compiled, some, seed), step(model.loss, some, seed)))
    assert 1 <= counters["stats"]["unique_graphs"] <= 3, "one for the first shapes, one for any"


def untouched_parameters(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient is missing or zero everywhere."""
    return [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().any()]
