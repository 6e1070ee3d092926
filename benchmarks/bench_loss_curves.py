"""Training on Complete Journey with tables updated row by row and as a whole: one loss curve."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
from contest import Contest
from schedulefree import RAdamScheduleFree

from ubp_fast.events.labels import make_label_lists
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.sources.complete_journey import CompleteJourney
from ubp_fast.features.static import static_features
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel
from ubp_fast.models.training import LOSSES_FILE, TrainingConfig, fit, initialise
from ubp_fast.sequences import ViewLoader, training_cutoffs, views_at, window_labels
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore


def bench_loss_curves(contest: Contest, tmp_path: Path) -> None:
    """The winner's multi-task model, two epochs at one cutoff, float32; both curves go into the results."""
    CompleteJourney().prepare(tmp_path / "events")
    events = EventDirectory.open(tmp_path / "events")
    build_store(events, tmp_path / "store", events.split.input_end_s)
    store = EventStore.open(tmp_path / "store")
    curves = contest.alone(
        lambda: {updates: curve(store, events, tmp_path / updates, updates) for updates in ("dense", "row_sparse")}
    )
    dense, row_sparse = (np.array(curves[updates]) for updates in ("dense", "row_sparse"))
    distance = float((np.abs(row_sparse - dense) / dense).max())
    figure = "loss curves on Complete Journey, row-sparse to dense: largest distance"
    contest.at_most(figure, "%", 100 * distance, 0.1, facts={"curves": curves})


def curve(store: EventStore, events: EventDirectory, directory: Path, updates: str) -> list[float]:
    """Losses along one training."""
    (cutoff_s,) = training_cutoffs(store, 1)
    views = views_at(store, [cutoff_s], with_history=True)
    labels = window_labels(store, views, make_label_lists(events, cutoff_s - store.target_days * 86_400, cutoff_s))
    features = static_features(store, cutoff_s).rows(views.row)
    features = features / np.maximum(features.max(axis=0), 1)
    loader = ViewLoader(
        store, views, batch_size=128, history_length=64, features=features, labels=labels, shuffle_seed=0
    )
    outputs = {name: 1 if isinstance(label, np.ndarray) else label.num_labels for name, label in labels.items()}
    model = initialise(
        lambda: MultitaskModel(MultitaskConfig(), EventSizes.of(store), features.shape[1], outputs), seed=0
    )
    fit(model, loader, partial(RAdamScheduleFree, lr=1e-3), TrainingConfig(epochs=2, table_updates=updates), directory)
    return [point["loss"] for point in json.loads((directory / LOSSES_FILE).read_text(encoding="utf-8"))["curve"]]
