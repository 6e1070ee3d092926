"""The stages that train: contrastive and multi-task models on past cutoffs, the stacking model on later ones.

Each writes its model and losses into `training/`, its vectors at every later cutoff, and profiles at the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ubp_fast.events.schema import LabelLists
from ubp_fast.features.decayed import OF_LABEL
from ubp_fast.features.matrix import Features, load_features
from ubp_fast.features.scaling import MinMaxScaler
from ubp_fast.files import load_array
from ubp_fast.models.contrastive import PROBE_LABELS, ContrastiveModel
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.membership import activity_columns, membership_weights
from ubp_fast.models.multitask import MULTITASK_LABELS, MultitaskModel
from ubp_fast.models.reduced_rank import ReducedRankConfig, ReducedRankModel
from ubp_fast.models.stacking import JoinedBlocks, StackingModel
from ubp_fast.models.training import embed, fit, initialise
from ubp_fast.pipeline.settings import Settings
from ubp_fast.profiles import Profiles
from ubp_fast.progress import Progress
from ubp_fast.sequences import ViewLoader, Views, age_quantiles_days, training_cutoffs, views_at, window_labels
from ubp_fast.store.event_store import EventStore

TRAINING = "training"
INFERENCE_BATCH = 512
MODELS = ("contrastive", "multitask")
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
    features = _static(store, views, inputs["features"])
    scaler = MinMaxScaler.fit(features)
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
        return ViewLoader(
            store,
            views,
            batch_size=INFERENCE_BATCH,
            history_length=config.history_length,
            features=scaler.transform(_static(store, views, inputs["features"])),
        )

    _write_vectors("multitask", model, loader_at, store, settings, directory)


def make_stacking(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Joins all blocks at later cutoffs than its parts learned from; what comes out are the final profiles."""
    store = EventStore.open(inputs["store"])
    config = settings.stacking.config
    _, cutoffs = cutoffs_of(store, settings)
    views = views_at(store, cutoffs)
    labels = _labels(store, views, inputs["features"], config.labels)
    if isinstance(config, ReducedRankConfig):
        is_summary = _is_summary(inputs, store.cutoff_s, settings)
        model = ReducedRankModel(config)
        model.fit([_joined(inputs, [cutoff_s], settings) for cutoff_s in cutoffs], labels, is_summary)
        model.save(directory / "reduced_rank.safetensors")
        vectors = model.transform(_joined(inputs, [store.cutoff_s], settings))
    else:
        vectors = _train_stacking(settings, store, inputs, labels, views, directory, progress)
    _profiles(store, vectors).save(directory / "stacked")


def _train_stacking(
    settings: Settings,
    store: EventStore,
    inputs: Inputs,
    labels: dict[str, Any],
    views: Views,
    directory: Path,
    progress: Progress,
) -> np.ndarray:
    """The winner's stacking network: its activations at the profiles' cutoff."""
    config, training = settings.stacking.config, settings.stacking.training
    # Rows in the order of the views.
    joined = _joined(inputs, cutoffs_of(store, settings)[1], settings)
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
        features=_joined(inputs, [store.cutoff_s], settings),
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
    labels = window_labels(store, views, load_lists(features))
    return {name: labels[name] for name in wanted if name in labels}


def load_lists(features: Path) -> LabelLists:
    """The label lists of the features' folder."""
    return {
        path.stem: (load_array(path), load_array(path.with_name(f"popularity_{path.name}")))
        for path in sorted(features.glob("propensity_*.npy"))
    }


def _widths(labels: Mapping[str, Any]) -> dict[str, int]:
    return {name: getattr(label, "num_labels", 1) for name, label in labels.items()}


def _static(store: EventStore, views: Views, features: Path) -> np.ndarray:
    """Static features of each view at its cutoff, float32 [N, 46]."""
    place = np.cumsum(store.is_relevant) - 1
    cutoffs = np.unique(views.cutoff_s)
    found = {cutoff_s: load_features(features / f"static-{cutoff_s}") for cutoff_s in cutoffs.tolist()}
    rows = np.empty((len(views.row), found[int(cutoffs[0])].shape[1]), np.float32)
    for cutoff_s, matrix in found.items():
        chosen = views.cutoff_s == cutoff_s
        rows[chosen] = matrix.rows(place[views.row[chosen]])
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


def _joined(inputs: Inputs, cutoffs: Sequence[int], settings: Settings) -> JoinedBlocks:
    """What `stacking.blocks` names about the relevant clients at some cutoffs, side by side."""
    blocks = [[_block(inputs, name, cutoff_s) for name in settings.stacking_blocks] for cutoff_s in cutoffs]
    return JoinedBlocks(blocks, [name == "aggregated" for name in settings.stacking_blocks])


def _block(inputs: Inputs, name: str, cutoff_s: int) -> np.ndarray | Features:
    if name in MODELS:
        return np.load(inputs[name] / f"vectors-{cutoff_s}.npy", mmap_mode="r", allow_pickle=False)
    return load_features(inputs["features"] / f"{name}-{cutoff_s}")


def _is_summary(inputs: Inputs, cutoff_s: int, settings: Settings) -> np.ndarray:
    """Bool [F], columns of `_joined` that sum a client up instead of counting one label."""
    found = []
    for name in settings.stacking_blocks:
        block = _block(inputs, name, cutoff_s)
        names = getattr(block, "names", ()) if name == "decayed" else (OF_LABEL,) * block.shape[1]
        found += [OF_LABEL not in column for column in names]
    return np.array(found)
