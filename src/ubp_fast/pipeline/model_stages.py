"""The stages that train: contrastive and multi-task models on past cutoffs, the stacking model on later ones.

Each writes its model and losses into `training/`, its vectors at every later cutoff, and profiles at the last one. The
stacking stage lays the profile's blocks side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from ubp_fast.profiles.blocks import Part, compose
from ubp_fast.progress import Progress
from ubp_fast.sequences import ViewLoader, Views, age_quantiles_days, past_cutoffs, views_at, window_labels
from ubp_fast.store.event_store import EventStore

TRAINING = "training"
INFERENCE_BATCH = 512
MODELS = ("contrastive", "multitask")
Inputs = Mapping[str, Path]
OWN_BLOCKS = ("aggregated", "decayed", "static")
# Falls slower than the singular values, for distances in which the first directions are not alone.
GRADING = 0.75


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
    """Joins all blocks at later cutoffs than its parts learned from, and composes the final profiles."""
    store = EventStore.open(inputs["store"])
    config = settings.stacking.config
    _, cutoffs = cutoffs_of(store, settings)
    views = views_at(store, cutoffs)
    labels = _labels(store, views, inputs["features"], config.labels)
    if isinstance(config, ReducedRankConfig):
        is_summary = _is_summary(inputs, settings.stacking_blocks, store.cutoff_s)
        model = ReducedRankModel(config)
        model.fit([_joined(inputs, [cutoff_s], settings) for cutoff_s in cutoffs], labels, is_summary)
        model.save(directory / "reduced_rank.safetensors")
        vectors = model.transform(_joined(inputs, [store.cutoff_s], settings))
        vectors[:, -1] = settings.layout.constant
        columns = [*(f"direction_{column}" for column in range(vectors.shape[1] - 1)), "constant"]
    else:
        vectors = _train_stacking(settings, store, inputs, labels, views, directory, progress)
        columns = [f"activation_{column}" for column in range(vectors.shape[1])]
    source = f"{', '.join(settings.stacking_blocks)}; labels of {len(cutoffs)} past windows"
    strong = Part("strong", vectors, columns, None, "what says most about the next two weeks", source)
    parts = [
        strong,
        *_own(settings, store, inputs, labels, cutoffs, directory),
        *_as_they_are(settings, store, inputs),
    ]
    halves, layout = compose(parts, settings.layout.max_width)
    Profiles(store.client_ids[store.is_relevant], halves, layout).save(directory / "stacked")


def own_blocks(settings: Settings) -> tuple[str, ...]:
    """Features that the profile holds themselves, and that its graded directions are made of."""
    if not settings.layout.own and not settings.layout.graded:
        return ()
    return OWN_BLOCKS if settings.rich is None else (*OWN_BLOCKS, "rich")


def _own(
    settings: Settings,
    store: EventStore,
    inputs: Inputs,
    labels: dict[str, Any],
    cutoffs: Sequence[int],
    directory: Path,
) -> list[Part]:
    """Graded directions of all features, and these features."""
    names, layout = own_blocks(settings), settings.layout
    if not names:
        return []

    def joined(cutoff_s: int) -> JoinedBlocks:
        blocks = [_block(inputs, name, cutoff_s) for name in names]
        return JoinedBlocks([blocks], [name == "aggregated" for name in names], unit_length=False)

    stacking = settings.stacking.config
    if not isinstance(stacking, ReducedRankConfig):
        stacking = ReducedRankConfig(labels=stacking.labels)
    model = ReducedRankModel(replace(stacking, rank=layout.directions))
    model.fit([joined(cutoff_s) for cutoff_s in cutoffs], labels, _is_summary(inputs, names, store.cutoff_s))
    model.save(directory / "graded.safetensors")
    features, parts = joined(store.cutoff_s), []
    if layout.graded:
        directions = model.transform(features)[:, :-1]
        share = model.singular_values / model.singular_values[0]
        columns = [f"direction_{column}" for column in range(directions.shape[1])]
        source = f"{', '.join(names)}; labels of {len(cutoffs)} past windows"
        scale = tuple((layout.graded * share**GRADING).tolist())
        parts.append(Part("graded", directions, columns, scale, "what says most next, as large as it says", source))
    if layout.own:
        columns = [f"{name}.{column}" for name in names for column in _names(inputs, name, store.cutoff_s)]
        parts.append(Part("own", features, columns, layout.own, "the features", ", ".join(names), model.importance))
    return parts


def _as_they_are(settings: Settings, store: EventStore, inputs: Inputs) -> list[Part]:
    """Tastes, rhythm and the vectors of trained models."""
    what = {
        "tastes": ("factors of all items", "decayed counts of every item"),
        "rhythm": ("when, how often, how much at once, at what price, how much of it new", "times, items and prices"),
    }
    parts = []
    for name, (text, source) in what.items():
        if getattr(settings.layout, name):
            values = JoinedBlocks([[_block(inputs, name, store.cutoff_s)]], [False])
            columns = _names(inputs, name, store.cutoff_s)
            parts.append(Part(name, values, columns, getattr(settings.layout, name), text, source))
    models = [name for name in settings.stacking_blocks if name in MODELS]
    if models and settings.layout.learned:
        values = JoinedBlocks([[_block(inputs, name, store.cutoff_s) for name in models]], [False] * len(models))
        columns = [f"{name}.{column}" for name in models for column in _names(inputs, name, store.cutoff_s)]
        text = "vectors of the trained models"
        parts.append(Part("learned", values, columns, settings.layout.learned, text, ", ".join(models)))
    return parts


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
    return past_cutoffs(store, windows.model_cutoffs, windows.stacking_cutoffs, windows.days)


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


def _names(inputs: Inputs, name: str, cutoff_s: int) -> list[str]:
    """Names of a block's columns; a model's vectors are numbered."""
    block = _block(inputs, name, cutoff_s)
    return list(map(str, range(block.shape[1]))) if isinstance(block, np.ndarray) else list(block.names)


def _is_summary(inputs: Inputs, blocks: Sequence[str], cutoff_s: int) -> np.ndarray:
    """Bool [F], columns of some blocks side by side that sum a client up instead of counting one label."""
    found = []
    for name in blocks:
        columns = _names(inputs, name, cutoff_s)
        found += [name == "static" or (name == "decayed" and OF_LABEL not in column) for column in columns]
    return np.array(found)
