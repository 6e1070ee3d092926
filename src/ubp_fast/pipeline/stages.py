"""The stages of a run: what each is made from, and how. Data only flows forward, each stage fills its own folder.

events -> store -> features -> contrastive, multitask -> stacking -> profiles
   └──> baselines                                            evaluate:<component> -> report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ubp_fast.evaluation import build_targets, evaluate
from ubp_fast.events.labels import make_label_lists
from ubp_fast.events.read import EventDirectory
from ubp_fast.features.aggregated import aggregated_features
from ubp_fast.features.decayed import decayed_features
from ubp_fast.features.organisers import CountsConfig, count_features_once
from ubp_fast.features.rich import rich_features
from ubp_fast.features.static import static_features
from ubp_fast.features.tastes import taste_features
from ubp_fast.features.writing import in_client_blocks
from ubp_fast.pipeline.model_stages import (
    MODELS,
    TRAINING,
    Inputs,
    cutoffs_of,
    make_contrastive,
    make_multitask,
    make_stacking,
    own_blocks,
)
from ubp_fast.pipeline.settings import Settings
from ubp_fast.profiles import Profiles, validate
from ubp_fast.progress import Progress
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

BASELINES = ("baseline_log1p", "baseline_raw")


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
    make: Callable[[Settings, Inputs, Path, Progress], None]
    cost: float
    keep: tuple[str, ...] = ()


def plan(settings: Settings) -> list[Stage]:
    """All stages of a run in order; scoring a finished submission needs only the events.

    A model is trained when the stacking model joins its vectors, when it is scored, or when it is asked for by name.
    """
    events = Stage("events", (), settings.data_part(), make_events, 3)
    baselines = Stage("baselines", ("events",), {}, make_baselines, 5)
    if settings.submission is not None:
        config = _evaluation_part(settings) | {"files": settings.content(settings.submission)}
        score = Stage("evaluate-submission", ("events",), config, evaluate_submission, 60)
        return [events, baselines, score, *(_score(settings, name) for name in BASELINES)]
    common = settings.part("seed", "windows")
    sets = _feature_sets(settings) + _profile_sets(settings)
    features = settings.part("windows", "features") | {"sets": sets, "multitask": "multitask" in _trained(settings)}
    joined = tuple(name for name in MODELS if name in settings.stacking_blocks)
    parts = MODELS if settings.components == "all" else ()
    stages = [
        events,
        Stage("store", ("events",), settings.part("store"), make_store, 2),
        Stage("features", ("events", "store"), features, make_features, 8),
        *(
            Stage(name, ("store", "features"), common | settings.part(name), make, 60, (TRAINING,))
            for name, make in (("contrastive", make_contrastive), ("multitask", make_multitask))
            if name in _trained(settings)
        ),
        Stage(
            "stacking",
            ("store", "features", *joined),
            common | settings.part("stacking", "profile"),
            make_stacking,
            30 if settings.stacking.training is not None else 1,
            (TRAINING,),
        ),
        baselines,
    ]
    components = ("stacked", *parts, *BASELINES)
    return stages + [_score(settings, component) for component in components]


def _trained(settings: Settings) -> tuple[str, ...]:
    """Models that the stacking model joins, that are scored, or that are asked for by name."""
    wanted = (*settings.stacking_blocks, *(settings.stages or ()), *(MODELS if settings.components == "all" else ()))
    return tuple(name for name in MODELS if name in wanted)


def _feature_sets(settings: Settings) -> list[str]:
    """Features that the stacking model, the graded directions or a trained model look at."""
    looked_at = {*settings.stacking_blocks, *own_blocks(settings)}
    if "multitask" in _trained(settings):
        looked_at.add("static")
    return [name for name in ("static", "aggregated", "decayed", "rich") if name in looked_at]


def _profile_sets(settings: Settings) -> list[str]:
    """Features that no model looks at: the profile takes them as they are."""
    return [name for name in ("tastes", "rhythm") if getattr(settings.layout, name)]


def _evaluation_part(settings: Settings) -> dict[str, Any]:
    """What can change a score: not which other components are scored beside it."""
    return {
        name: value for name, value in settings.plain["evaluation"].items() if name not in ("components", "profiles")
    }


def _score(settings: Settings, component: str) -> Stage:
    folder = {"stacked": "stacking", "contrastive": "contrastive", "multitask": "multitask"}.get(component, "baselines")

    def make(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
        _write_scores(settings, inputs["events"], Profiles.load(inputs[folder] / component), directory, progress)

    return Stage(f"evaluate-{component}", ("events", folder), _evaluation_part(settings), make, 60)


def make_events(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Raw tables, checked and in canonical form."""
    settings.source.prepare(directory, progress)


def make_store(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Client-sorted columns of everything before the profiles' cutoff, and nothing after it."""
    events = EventDirectory.open(inputs["events"])
    build_store(events, directory, events.split.input_end_s, **settings.plain["store"], progress=progress)


def make_features(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Label lists of the newest known window, and feature matrices at every cutoff that a model looks at."""
    store = EventStore.open(inputs["store"])
    lists = make_label_lists(
        EventDirectory.open(inputs["events"]),
        store.cutoff_s - settings.windows.days * 86_400,
        store.cutoff_s,
        settings.windows.labels,
    )
    for name, (ids, popularity) in lists.items():
        np.save(directory / f"{name}.npy", ids)
        np.save(directory / f"popularity_{name}.npy", popularity)
    model, stacking = cutoffs_of(store, settings)
    make: dict[str, Callable[..., object]] = {
        "static": static_features,
        "aggregated": partial(aggregated_features, config=settings.aggregated, lists_cutoff_s=store.cutoff_s),
        "decayed": partial(decayed_features, lists=lists, config=settings.decayed),
        "rich": partial(rich_features, lists=lists, config=settings.rich),
        "tastes": partial(taste_features, config=settings.tastes),
        "rhythm": partial(rich_features, lists=lists, config=settings.rhythm),
    }
    of_multitask = model if "multitask" in _trained(settings) else ()
    wanted = [
        (name, cutoff_s)
        for cutoff_s in (*of_multitask, *stacking, store.cutoff_s)
        for name in _feature_sets(settings)
        if name == "static" or cutoff_s not in model
    ]
    wanted += [(name, store.cutoff_s) for name in _profile_sets(settings)]
    for done, (name, cutoff_s) in enumerate(wanted):
        make[name](store, cutoff_s, directory=directory / f"{name}-{cutoff_s}")
        progress(done + 1, len(wanted))


def make_baselines(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """The organisers' aggregated features, raw and as log1p; relevant clients without events follow with zeros."""
    events = EventDirectory.open(inputs["events"])
    with TemporaryDirectory(dir=directory) as folder:
        config = CountsConfig(anchor="file_order")
        counts = count_features_once(events, events.split.input_end_s, config, Path(folder) / "counts")
        for done, (name, scaled) in enumerate((("baseline_raw", np.positive), ("baseline_log1p", np.log1p))):
            progress(1 + done, 3)

            def fill(block: np.ndarray, first: int, last: int, scaled: np.ufunc = scaled) -> None:
                scaled(counts.rows(slice(first, last)), out=block)

            columns = (counts.client_ids, counts.names, counts.units)
            halves = in_client_blocks(*columns, fill, Path(folder) / name, "float16")
            Profiles(halves.client_ids, halves.values).save(directory / name)


def evaluate_submission(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Scores somebody's `client_ids.npy` and `embeddings.npy`, after the organisers' checks."""
    assert settings.submission is not None
    relevant = EventDirectory.open(inputs["events"]).relevant_clients
    profiles = validate(settings.submission, relevant).require()
    _write_scores(settings, inputs["events"], profiles, directory, progress)


def _write_scores(settings: Settings, events: Path, profiles: Profiles, directory: Path, progress: Progress) -> None:
    targets = build_targets(EventDirectory.open(events), profiles.client_ids, settings.evaluation.tasks)
    scores = evaluate(profiles, targets, settings.evaluation, settings.device, progress)
    (directory / "scores.json").write_text(json.dumps(scores.to_json(), indent=2, allow_nan=False), encoding="utf-8")
