"""Batches from the store against the training steps that eat them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import numpy as np
import pytest
from contest import Contest
from torch import nn
from training_steps import FEATURES, Step, our_step

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.models.contrastive import ContrastiveConfig, ContrastiveModel
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel
from ubp_fast.sequences import ViewLoader, training_cutoffs, views_at, window_labels
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    """A synthetic shop with all five kinds of events, about 100 of each client."""
    path = tmp_path_factory.mktemp("shop")
    Synthetic(clients=3000, skus=20_000, urls=50_000, categories=1000).prepare(path / "events")
    events = EventDirectory.open(path / "events")
    build_store(events, path / "store", events.split.input_end_s)
    return EventStore.open(path / "store")


def multitask(store: EventStore) -> tuple[ViewLoader, nn.Module]:
    """Histories, features and labels of 128 clients; the winner's model."""
    views = views_at(store, training_cutoffs(store, 2), with_history=True)
    lists = {
        "propensity_sku": (store.sku_ids[2:102], np.ones(100)),
        "propensity_category": (store.category_ids[2:102], np.ones(100)),
        "propensity_price": (np.arange(100), np.ones(100)),
    }
    features = np.random.default_rng(0).random((len(views.row), FEATURES), np.float32)
    labels = window_labels(store, views, lists)
    loader = ViewLoader(
        store, views, batch_size=128, history_length=64, features=features, labels=labels, shuffle_seed=0
    )
    outputs = {name: 1 if isinstance(label, np.ndarray) else label.num_labels for name, label in labels.items()}
    return loader, MultitaskModel(MultitaskConfig(), EventSizes.of(store), FEATURES, outputs)


def contrastive(store: EventStore) -> tuple[ViewLoader, nn.Module]:
    """Histories and futures of 1,024 clients; the winner's model."""
    views = views_at(store, training_cutoffs(store, 2), with_history=True)
    loader = ViewLoader(store, views, batch_size=1024, history_length=64, future_length=64, shuffle_seed=0)
    return loader, ContrastiveModel(ContrastiveConfig(), EventSizes.of(store))


@pytest.mark.parametrize(("make", "min_rounds"), [(multitask, 10), (contrastive, 1)], ids=["multi-task", "contrastive"])
def bench_loader(
    contest: Contest,
    store: EventStore,
    make: Callable[[EventStore], tuple[ViewLoader, nn.Module]],
    min_rounds: int,
) -> None:
    """Without prefetching, which would hide the loader behind the step; the step is the fast one, in bfloat16."""
    loader, model = make(store)
    order = np.random.default_rng(1).permutation(loader.num_views)
    parts = cycle([order[at : at + loader.batch_size] for at in range(0, loader.num_views, loader.batch_size)][:-1])
    step: Step = our_step(model, [loader.batch(next(parts))], "bf16")
    contest.run(
        f"loader, {make.__name__} batch of {loader.batch_size}",
        lambda: loader.batch(next(parts)),
        {"training step bf16": (step, 10.0)},
        lambda *_: None,  # a batch and a loss
        min_rounds=min_rounds,
        facts={"views": loader.num_views, "tokens": loader.batch(next(parts)).history.num_tokens},
    )
