"""The stages that train: contrastive and multi-task models on past cutoffs, the stacking model on later ones.

Each writes its model and losses into `training/`, its vectors at every later cutoff, and profiles at the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.features.scaling import Scaler
from ubp_fast.models.contrastive import PROBE_LABELS, ContrastiveModel
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.membership import activity_columns, membership_weights
from ubp_fast.models.multitask import MULTITASK_LABELS, MultitaskModel
from ubp_fast.models.reduced_rank import ReducedRankConfig, ReducedRankModel
from ubp_fast.models.stacking import StackingModel, join_blocks
from ubp_fast.models.training import embed, fit, initialise
from ubp_fast.pipeline.settings import Settings
from ubp_fast.profiles import Profiles
from ubp_fast.progress import Progress
from ubp_fast.sequences import ViewLoader, Views, age_quantiles_days, training_cutoffs, views_at, window_labels
from ubp_fast.store.event_store import EventStore

TRAINING = "training"
INFERENCE_BATCH = 512
MODELS = ("contrastive", "multitask")
# In the names of `decayed_features`: a count of one label, not a summary.
DECAYED_LABEL = "_decayed_"
Inputs = Mapping[str, Path]


def make_contrastive(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Two-tower model on past cutoffs; its vectors at the stacking cutoffs and at the profiles' cutoff."""
    store = EventStore.open(inputs["store"])
    config, training = settings.contrastive.config, settings.contrastive.training
    model_cutoffs, _ = cutoffs_of(store, settings)
    views = views_at(store, model_cutoffs, with_history=True, relevant_only=False)
    weight = membership_weights(activity_columns(store, store.cutoff_s), np.asarray(store.is_relevant))
    labels = _labels(store, views, inputs["features"], PROBE_LABELS) if config.probes else {}
    model = initialise(lambda: ContrastiveModel(config, EventSizes.of(store), _widths(labels)), settings.seed)
    edges = age_quantiles_days(store, views, max_length=config.history_length, bins=config.events.age_bins)
    model.set_age_edges(edges)
    loader = ViewLoader(
        store,
        views,
        batch_size=training.batch_size,
        history_length=config.history_length,
        future_length=config.future_length,
        labels=labels,
        weight=weight[views.row],
        shuffle_seed=settings.seed,
    )
    fit(model, loader, settings.contrastive.optimizer, training, directory / TRAINING, progress)

    def loader_at(views: Views, cutoff_s: int) -> ViewLoader:
        return ViewLoader(store, views, batch_size=INFERENCE_BATCH, history_length=config.history_length)

    _write_vectors("contrastive", model, loader_at, store, settings, directory)


def make_multitask(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Multi-task model on past cutoffs; its vectors at the stacking cutoffs and at the profiles' cutoff."""
    store = EventStore.open(inputs["store"])
    config, training = settings.multitask.config, settings.multitask.training
    model_cutoffs, _ = cutoffs_of(store, settings)
    views = views_at(store, model_cutoffs, with_history=True)
    static = {
        cutoff_s: FeatureMatrix.load(inputs["features"] / f"static-{cutoff_s}").values for cutoff_s in model_cutoffs
    }
    features = _rows_of(views, static)
    scaler = Scaler("minmax").fit(features)
    scaler.save(directory / "scaler")
    labels = _labels(store, views, inputs["features"], MULTITASK_LABELS)
    sizes, widths = EventSizes.of(store), _widths(labels)
    model = initialise(lambda: MultitaskModel(config, sizes, features.shape[1], widths), settings.seed)
    loader = ViewLoader(
        store,
        views,
        batch_size=training.batch_size,
        history_length=config.history_length,
        features=scaler.transform(features),
        labels=labels,
        shuffle_seed=settings.seed,
    )
    fit(model, loader, settings.multitask.optimizer, training, directory / TRAINING, progress)

    def loader_at(views: Views, cutoff_s: int) -> ViewLoader:
        values = FeatureMatrix.load(inputs["features"] / f"static-{cutoff_s}").values
        return ViewLoader(
            store,
            views,
            batch_size=INFERENCE_BATCH,
            history_length=config.history_length,
            features=scaler.transform(values[views.row]),
        )

    _write_vectors("multitask", model, loader_at, store, settings, directory)


def make_stacking(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Joins all blocks at later cutoffs than its parts learned from; what comes out are the final profiles."""
    store = EventStore.open(inputs["store"])
    config = settings.stacking.config
    _, cutoffs = cutoffs_of(store, settings)
    views = views_at(store, cutoffs)
    # Rows in the order of the views.
    past = [_blocks_at(store, inputs, cutoff_s, settings)[0] for cutoff_s in cutoffs]
    labels = _labels(store, views, inputs["features"], config.labels)
    if isinstance(config, ReducedRankConfig):
        newest, is_summary = _blocks_at(store, inputs, store.cutoff_s, settings)
        model = ReducedRankModel(config).fit(past, labels, is_summary)
        model.save(directory / "reduced_rank.safetensors")
        vectors = model.transform(newest)
    else:
        vectors = _train_stacking(settings, store, inputs, np.concatenate(past), labels, views, directory, progress)
    _profiles(store, vectors).save(directory / "stacked")


def _train_stacking(
    settings: Settings,
    store: EventStore,
    inputs: Inputs,
    joined: np.ndarray,
    labels: dict[str, Any],
    views: Views,
    directory: Path,
    progress: Progress,
) -> np.ndarray:
    """The winner's stacking network: its activations at the profiles' cutoff."""
    config, training = settings.stacking.config, settings.stacking.training
    model = initialise(lambda: StackingModel(config, joined.shape[1], _widths(labels)), settings.seed)
    model.fit_scaling(joined)
    loader = ViewLoader(
        None, views, batch_size=training.batch_size, features=joined, labels=labels, shuffle_seed=settings.seed
    )
    fit(model, loader, settings.stacking.optimizer, training, directory / TRAINING, progress)
    final = ViewLoader(
        None,
        views_at(store, [store.cutoff_s]),
        batch_size=INFERENCE_BATCH,
        features=_blocks_at(store, inputs, store.cutoff_s, settings)[0],
    )
    return embed(model, final)


def cutoffs_of(store: EventStore, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cutoffs of the contrastive and multi-task models, and the later ones of the stacking model."""
    windows = settings.windows
    newest_days = windows.days * (windows.stacking_cutoffs + 1)
    model = training_cutoffs(store, windows.model_cutoffs, newest_days=newest_days, step_days=windows.days)
    stacking = training_cutoffs(store, windows.stacking_cutoffs, newest_days=windows.days, step_days=windows.days)
    return model, stacking


def _labels(store: EventStore, views: Views, features: Path, wanted: Sequence[str]) -> dict[str, Any]:
    lists = {
        path.stem: (
            np.load(path, allow_pickle=False),
            np.load(features / f"popularity_{path.name}", allow_pickle=False),
        )
        for path in sorted(features.glob("propensity_*.npy"))
    }
    labels = window_labels(store, views, lists)
    return {name: labels[name] for name in wanted if name in labels}


def _widths(labels: Mapping[str, Any]) -> dict[str, int]:
    return {name: getattr(label, "num_labels", 1) for name, label in labels.items()}


def _rows_of(views: Views, by_cutoff: Mapping[int, np.ndarray]) -> np.ndarray:
    """The row of each view from the matrix of its cutoff, float32 [N, F]."""
    width = next(iter(by_cutoff.values())).shape[1]
    rows = np.empty((len(views.row), width), np.float32)
    for cutoff_s, values in by_cutoff.items():
        chosen = views.cutoff_s == cutoff_s
        rows[chosen] = values[views.row[chosen]]
    return rows


def _write_vectors(
    name: str,
    model: torch.nn.Module,
    loader_at: Callable[[Views, int], ViewLoader],
    store: EventStore,
    settings: Settings,
    directory: Path,
) -> None:
    _, stacking = cutoffs_of(store, settings)
    for cutoff_s in (*stacking, store.cutoff_s):
        vectors = embed(model, loader_at(views_at(store, [cutoff_s]), cutoff_s))
        np.save(directory / f"vectors-{cutoff_s}.npy", vectors)
    _profiles(store, vectors).save(directory / name)


def _profiles(store: EventStore, vectors: np.ndarray) -> Profiles:
    return Profiles(store.client_ids[store.is_relevant], vectors).to_float16()


def _blocks_at(store: EventStore, inputs: Inputs, cutoff_s: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """What `stacking.blocks` names about the relevant clients at a cutoff, side by side, and which columns sum up.

    Returns:
        float32 [relevant U, F]; bool [F], True for what sums a client up instead of counting one label.
    """
    blocks, is_normalised, is_summary = [], [], []
    for name in settings.stacking_blocks:
        if name in MODELS:
            values = np.load(inputs[name] / f"vectors-{cutoff_s}.npy", allow_pickle=False)
            of_label = np.ones(values.shape[1], bool)
        else:
            matrix = FeatureMatrix.load(inputs["features"] / f"{name}-{cutoff_s}")
            values = matrix.values[store.is_relevant]
            of_label = np.array([name != "decayed" or DECAYED_LABEL in column for column in matrix.names])
        blocks.append(np.log1p(values) if name == "aggregated" else values)
        is_normalised.append(name == "aggregated")
        is_summary.append(~of_label)
    return join_blocks(blocks, is_normalised), np.concatenate(is_summary)
