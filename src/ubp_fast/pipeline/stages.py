"""The stages of a run: what each is made from, and how. Data only flows forward; every stage writes files into its folder.

    events -> store -> features -> contrastive, multitask -> stacking -> profiles
       └──> baselines                                            evaluate:<component> -> report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ubp_fast.evaluation import build_targets, evaluate
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.targets import make_label_lists
from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.features.scaling import Scaler
from ubp_fast.features.windows import (
    aggregated_features,
    decayed_features,
    organisers_features,
    static_features,
)
from ubp_fast.models.contrastive import ContrastiveModel
from ubp_fast.models.event_embedding import EventSizes
from ubp_fast.models.multitask import MULTITASK_LABELS, MultitaskModel
from ubp_fast.models.stacking import StackingModel, join_blocks
from ubp_fast.models.training import embed, fit
from ubp_fast.pipeline.progress import ProgressCallback
from ubp_fast.pipeline.settings import Settings
from ubp_fast.profiles.matrix import Profiles
from ubp_fast.sequences import ViewLoader, Views, age_quantiles_days, training_cutoffs, views_at, window_labels
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

TRAINING = "training"
INFERENCE_BATCH = 512
BASELINES = ("baseline_log1p", "baseline_raw")
Inputs = Mapping[str, Path]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique name, also of its folder.
        inputs: names of the stages whose folders it reads.
        config: everything of the configuration that can change its output.
        make: fills its folder: make(settings, folders of the inputs, own folder, progress).
        cost: rough share of a run's time; shapes the estimate of the remaining time only.
        keep: names in its folder from which an interrupted run continues.
    """

    name: str
    inputs: tuple[str, ...]
    config: Mapping[str, Any]
    make: Callable[[Settings, Inputs, Path, ProgressCallback], None]
    cost: float
    keep: tuple[str, ...] = ()


def plan(settings: Settings) -> list[Stage]:
    """All stages of a run in order; scoring a finished submission needs only the events."""
    events = Stage("events", (), settings.data_part(), make_events, 3)
    if settings.submission is not None:
        config = settings.part("evaluation") | {"files": settings.content(settings.submission)}
        score = Stage("evaluate-submission", ("events",), config, evaluate_submission, 60)
        return [events, _baselines(settings), score, *_baseline_scores(settings)]
    common = settings.part("seed", "windows")
    trained = common | settings.part("optimizer")
    stages = [
        events,
        Stage("store", ("events",), {}, make_store, 2),
        Stage("features", ("events", "store"), common | settings.part("features"), make_features, 8),
        Stage(
            "contrastive",
            ("store", "features"),
            trained | settings.part("contrastive"),
            make_contrastive,
            60,
            (TRAINING,),
        ),
        Stage("multitask", ("store", "features"), trained | settings.part("multitask"), make_multitask, 60, (TRAINING,)),
        Stage(
            "stacking",
            ("store", "features", "contrastive", "multitask"),
            trained | settings.part("stacking"),
            make_stacking,
            30,
            (TRAINING,),
        ),
        _baselines(settings),
    ]
    components = ("stacked", BASELINES[0])
    if settings.components == "all":
        components = ("stacked", "contrastive", "multitask", *BASELINES)
    return stages + [_score(settings, component) for component in components]


def _baselines(settings: Settings) -> Stage:
    return Stage("baselines", ("events",), {}, make_baselines, 5)


def _baseline_scores(settings: Settings) -> list[Stage]:
    chosen = BASELINES if settings.components == "all" else BASELINES[:1]
    return [_score(settings, component) for component in chosen]


def _score(settings: Settings, component: str) -> Stage:
    folder = {"stacked": "stacking", "contrastive": "contrastive", "multitask": "multitask"}.get(component, "baselines")

    def make(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
        _write_scores(settings, inputs["events"], Profiles.load(inputs[folder] / component), directory, progress)

    return Stage(f"evaluate-{component}", ("events", folder), settings.part("evaluation"), make, 60)


def make_events(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
    """Raw tables, checked and in canonical form."""
    settings.source.prepare(directory, progress)


def make_store(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
    """Client-sorted columns of everything before the profiles' cutoff, and nothing after it."""
    events = EventDirectory.open(inputs["events"])
    build_store(events, directory, events.split.input_end_s, progress=progress)


def make_features(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
    """Label lists of the newest known window, and feature matrices at every cutoff that a model looks at."""
    store = EventStore.open(inputs["store"])
    lists = make_label_lists(
        EventDirectory.open(inputs["events"]), store.cutoff_s - settings.windows.days * 86_400, store.cutoff_s
    )
    for name, (ids, popularity) in lists.items():
        np.save(directory / f"{name}.npy", ids)
        np.save(directory / f"popularity_{name}.npy", popularity)
    model, stacking = _cutoffs(store, settings)
    cutoffs = (*model, *stacking, store.cutoff_s)
    for done, cutoff_s in enumerate(cutoffs):
        static_features(store, cutoff_s).save(directory / f"static-{cutoff_s}")
        if cutoff_s not in model:
            aggregated_features(store, cutoff_s, settings.features).save(directory / f"aggregated-{cutoff_s}")
            decayed_features(store, cutoff_s, lists).save(directory / f"decayed-{cutoff_s}")
        progress(done + 1, len(cutoffs))


def make_contrastive(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
    """Two-tower model on past cutoffs; its vectors at the stacking cutoffs and at the profiles' cutoff."""
    store = EventStore.open(inputs["store"])
    config, training = settings.contrastive.config, settings.contrastive.training
    model_cutoffs, _ = _cutoffs(store, settings)
    views = views_at(store, model_cutoffs, with_history=True)
    torch.manual_seed(settings.seed)
    model = ContrastiveModel(config, EventSizes.of(store))
    edges = age_quantiles_days(store, views, max_length=config.history_length, bins=config.events.age_bins)
    model.set_age_edges(edges)
    loader = ViewLoader(
        store,
        views,
        batch_size=training.batch_size,
        history_length=config.history_length,
        future_length=config.future_length,
        shuffle_seed=settings.seed,
    )
    fit(model, loader, settings.optimizer, training, directory / TRAINING, progress)

    def loader_at(views: Views, cutoff_s: int) -> ViewLoader:
        return ViewLoader(store, views, batch_size=INFERENCE_BATCH, history_length=config.history_length)

    _write_vectors("contrastive", model, loader_at, store, settings, directory)


def make_multitask(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
    """Multi-task model on past cutoffs; its vectors at the stacking cutoffs and at the profiles' cutoff."""
    store = EventStore.open(inputs["store"])
    config, training = settings.multitask.config, settings.multitask.training
    model_cutoffs, _ = _cutoffs(store, settings)
    views = views_at(store, model_cutoffs, with_history=True)
    static = {
        cutoff_s: FeatureMatrix.load(inputs["features"] / f"static-{cutoff_s}").values for cutoff_s in model_cutoffs
    }
    features = _rows_of(views, static)
    scaler = Scaler("minmax").fit(features)
    scaler.save(directory / "scaler")
    labels = _labels(store, views, inputs["features"], MULTITASK_LABELS)
    torch.manual_seed(settings.seed)
    model = MultitaskModel(config, EventSizes.of(store), features.shape[1], _widths(labels))
    loader = ViewLoader(
        store,
        views,
        batch_size=training.batch_size,
        history_length=config.history_length,
        features=scaler.transform(features),
        labels=labels,
        shuffle_seed=settings.seed,
    )
    fit(model, loader, settings.optimizer, training, directory / TRAINING, progress)

    def loader_at(views: Views, cutoff_s: int) -> ViewLoader:
        values = FeatureMatrix.load(inputs["features"] / f"static-{cutoff_s}").values
        return ViewLoader(
            store,
            views,
            batch_size=INFERENCE_BATCH,
            history_length=config.history_length,
            features=scaler.transform(values),
        )

    _write_vectors("multitask", model, loader_at, store, settings, directory)


def make_stacking(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
    """Stacking model on later cutoffs than its parts learned from; its activations are the final profiles."""
    store = EventStore.open(inputs["store"])
    config, training = settings.stacking.config, settings.stacking.training
    _, cutoffs = _cutoffs(store, settings)
    views = views_at(store, cutoffs)
    joined = _rows_of(views, {cutoff_s: _blocks_at(inputs, cutoff_s) for cutoff_s in cutoffs})
    labels = _labels(store, views, inputs["features"], config.labels)
    torch.manual_seed(settings.seed)
    model = StackingModel(config, joined.shape[1], _widths(labels))
    model.fit_scaling(joined)
    loader = ViewLoader(
        None, views, batch_size=training.batch_size, features=joined, labels=labels, shuffle_seed=settings.seed
    )
    fit(model, loader, settings.optimizer, training, directory / TRAINING, progress)
    final = ViewLoader(
        None,
        views_at(store, [store.cutoff_s]),
        batch_size=INFERENCE_BATCH,
        features=_blocks_at(inputs, store.cutoff_s),
    )
    Profiles(np.asarray(store.client_ids), embed(model, final).astype(np.float16)).save(directory / "stacked")


def make_baselines(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
    """The organisers' aggregated features, raw and as log1p."""
    raw = organisers_features(EventDirectory.open(inputs["events"]))
    progress(1, 2)
    limit = float(np.finfo(np.float16).max)
    Profiles(raw.client_ids, raw.values.clip(-limit, limit).astype(np.float16)).save(directory / "baseline_raw")
    Profiles(raw.client_ids, np.log1p(raw.values).astype(np.float16)).save(directory / "baseline_log1p")


def evaluate_submission(settings: Settings, inputs: Inputs, directory: Path, progress: ProgressCallback) -> None:
    """Scores somebody's `client_ids.npy` and `embeddings.npy`, after the organisers' checks."""
    assert settings.submission is not None
    profiles = Profiles.load(settings.submission)
    _write_scores(settings, inputs["events"], profiles, directory, progress)


def _write_scores(
    settings: Settings, events: Path, profiles: Profiles, directory: Path, progress: ProgressCallback
) -> None:
    targets = build_targets(EventDirectory.open(events), profiles.client_ids)
    scores = evaluate(profiles, targets, settings.evaluation, progress)
    (directory / "scores.json").write_text(json.dumps(scores.to_json(), indent=2, allow_nan=False), encoding="utf-8")


def _cutoffs(store: EventStore, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cutoffs of the contrastive and multi-task models, and the later ones of the stacking model."""
    windows = settings.windows
    newest_days = windows.days * (windows.stacking_cutoffs + 1)
    model = training_cutoffs(store, windows.model_cutoffs, newest_days=newest_days, step_days=windows.days)
    stacking = training_cutoffs(store, windows.stacking_cutoffs, newest_days=windows.days, step_days=windows.days)
    return model, stacking


def _labels(store: EventStore, views: Views, features: Path, wanted: Sequence[str]) -> dict[str, Any]:
    lists = {
        path.stem: (np.load(path, allow_pickle=False), np.load(features / f"popularity_{path.name}", allow_pickle=False))
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
    _, stacking = _cutoffs(store, settings)
    for cutoff_s in (*stacking, store.cutoff_s):
        vectors = embed(model, loader_at(views_at(store, [cutoff_s]), cutoff_s))
        np.save(directory / f"vectors-{cutoff_s}.npy", vectors)
    Profiles(np.asarray(store.client_ids), vectors.astype(np.float16)).save(directory / name)


def _blocks_at(inputs: Inputs, cutoff_s: int) -> np.ndarray:
    """Everything that is known about the clients at a cutoff, side by side, float32 [U, F]."""
    vectors = [np.load(inputs[name] / f"vectors-{cutoff_s}.npy", allow_pickle=False) for name in ("contrastive", "multitask")]
    aggregated = FeatureMatrix.load(inputs["features"] / f"aggregated-{cutoff_s}").values
    decayed = FeatureMatrix.load(inputs["features"] / f"decayed-{cutoff_s}").values
    return join_blocks([*vectors, np.log1p(aggregated), decayed], [False, False, True, False])
