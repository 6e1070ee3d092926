"""The stages of a run: what each is made from, and how. Data only flows forward, each stage fills its own folder.

events -> store -> features -> contrastive, multitask -> stacking -> profiles
   └──> baselines                └─> raw_features     evaluate-<component>-<reader>, diagnosis -> report

The portrait of the clients and the drift are made from the profiles, for the report alone. The row from the store to
the profiles is the backtest's; `profiles.at` asks for a second one, of another moment.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from ubp_fast.evaluation import Scores, Targets, build_targets, evaluate
from ubp_fast.evaluation.diagnostics import diagnose
from ubp_fast.evaluation.evaluator import keep_share
from ubp_fast.evaluation.readers.linear import option_of
from ubp_fast.events.labels import make_label_lists, scored_skus
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError, LabelLists, UserError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.events.split import DAY_S, utc_text
from ubp_fast.features.decayed import decayed_features
from ubp_fast.features.matrix import Features, load_features
from ubp_fast.features.organisers import CountsConfig, count_features_once
from ubp_fast.features.popular import lists_of_kinds
from ubp_fast.features.rich import rich_features
from ubp_fast.features.scaling import DayStatistics
from ubp_fast.features.static import static_features
from ubp_fast.features.tastes import arrays_of_weights, fit_tastes, taste_features, weights_of_arrays
from ubp_fast.features.writing import in_client_blocks
from ubp_fast.files import (
    complete_directory,
    load_arrays,
    load_json,
    save_array,
    write_arrays,
    write_json,
)
from ubp_fast.models.pair_scorer import PairScorer
from ubp_fast.models.training import on_device
from ubp_fast.pipeline.identity import Place, targets
from ubp_fast.pipeline.model_stages import (
    DAY_FILE,
    EXPLAINED_FILE,
    OLD,
    PAIRS_FILE,
    SCORED_SKUS,
    TASTE_WEIGHTS,
    TRAINING,
    UNALIGNED,
    VECTORS,
    Inputs,
    cutoffs_of,
    deals_out,
    engine_of,
    load_lists,
    load_scored_lists,
    make_contrastive,
    make_multitask,
    make_sharded_stacking,
    make_stacking,
    processes_of,
    shared_by_tasks,
)
from ubp_fast.pipeline.settings import Settings
from ubp_fast.profiler.parts import NETWORKS, aggregated_block, graded_blocks
from ubp_fast.profiles import Profiles, validate
from ubp_fast.progress import Progress
from ubp_fast.ranks.processes import deal_out
from ubp_fast.report.clients import portray
from ubp_fast.report.drift import drift
from ubp_fast.sequences import training_cutoffs
from ubp_fast.shards import stages as shard_stages
from ubp_fast.store.build import build_store
from ubp_fast.store.clients import clients_of
from ubp_fast.store.event_store import EventStore

# Tasks of the challenge whose labels its participants knew.
GIVEN_LISTS = ("propensity_category", "propensity_sku")
# Feature sets that compare clients with each other.
OF_DAY = ("rich", "rhythm", "scores")
RAW_FEATURES = ("aggregated", "decayed", "static")
LATEST = "latest-"
ALIGNMENT, KEPT_FILE = "alignment", "alignment.json"
# What the report shows beside scores.
DIAGNOSIS, PORTRAIT, DRIFT, FACTS_FILE = "diagnosis", "portrait", "drift", "facts.json"
BASELINES = ("baseline_log1p", "baseline_raw")
# Stages whose folders a scored component is read from.
FOLDERS = {
    "stacked": ("stacking",),
    "contrastive": ("contrastive",),
    "multitask": ("multitask",),
    "features": ("raw_features",),
    "profile_features": ("stacking", "raw_features"),
    "baseline_log1p": ("baselines",),
    "baseline_raw": ("baselines",),
}
# Settings of the evaluation that change the scores of every reader, and of one.
ALL_READERS = ("tasks", "orders", "seed")
OF_READER = {"network": ("precision", "epochs", "batch_size", "learning_rate"), "boosting": ("labels_per_task",)}
# Of stages that are not complete yet: what has its name, tasks that were scored, parts of the scorer of pairs.
FINISHED, SCORED, LEARNED = "[!.]*", "scored", "pairs"
READER_COST = {"network": 60, "linear": 5, "boosting": 10, "neighbours": 2}


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: unique name, also of its folder.
        inputs: names of the stages whose folders it reads.
        config: everything of the configuration that can change its output.
        make: fills its folder: make(settings, folders of the inputs, own folder, progress).
        cost: rough share of a run's time; shapes the estimate of the remaining time only.
        keep: what in its folder an interrupted run continues from, names as of `clear_directory`.
        reaches: more places of the source than the function itself names.
    """

    name: str
    inputs: tuple[str, ...]
    config: Mapping[str, Any]
    make: Callable[[Settings, Inputs, Path, Progress], None]
    cost: float
    keep: tuple[str, ...] = ()
    reaches: tuple[Place, ...] = ()

    @property
    def begins(self) -> tuple[Place, ...]:
        """Where the source begins that its output follows from."""
        function: Any = getattr(self.make, "func", self.make)
        return ((function.__module__, function.__qualname__.partition(".")[0]), *self.reaches, *targets(self.config))


def plan(settings: Settings) -> list[Stage]:
    """All stages of a run in order; scoring a finished submission needs only the events.

    A model is trained when the stacking model joins its vectors, when it is scored, or when it is asked for by name.
    """
    config = settings.data_part() | {"target_days": settings.windows.days}
    events = Stage("events", (), config, make_events, 3)
    baselines = Stage("baselines", ("events",), {}, make_baselines, 5)
    if settings.submission is not None:
        scored = ("submission", *(name for name in settings.components if name in BASELINES))
        return [events, baselines, *_scores(settings, scored), *_diagnosis(settings, scored)]
    newest = _profiles(settings, settings.align_to)
    latest = [] if settings.latest is None else [_latest(stage, settings) for stage in newest]
    backtest = _profiles(settings) if latest else newest
    if not settings.components:  # nothing to score: a backtest only where no other profiles are asked for
        return [events, *(latest or backtest), *_shown(settings, bool(latest))]
    stages = [events, *backtest, *latest, baselines]
    if settings.align_to is not None and not latest:
        config = {name: settings.plain["evaluation"][name] for name in (*ALL_READERS, *OF_READER["boosting"])}
        reaches = (*_reader("linear"), *_reader("boosting"))
        stages.append(Stage(ALIGNMENT, ("events", "stacking"), config, make_alignment_scores, 30, (), reaches))
    if set(settings.components) & {"features", "profile_features"}:
        config = _features_config(settings)
        stages.append(Stage("raw_features", ("store", "features"), config, make_raw_features, 5))
    stages += _scores(settings, settings.components)
    return stages + _diagnosis(settings, settings.components) + _shown(settings, False)


def _profiles(settings: Settings, align_to: Path | None = None) -> list[Stage]:
    """From events to the profiles of the backtest's cutoff, in the space of an earlier run if one is named."""
    if settings.is_sharded:
        return _of_shards(settings)
    aligned = {} if align_to is None else {"align_to": settings.content(align_to)}
    common = settings.part("seed", "windows")
    joined = tuple(name for name in NETWORKS if name in settings.stacking_blocks)
    return [
        Stage("store", ("events",), settings.part("store"), make_store, 2),
        Stage("features", ("events", "store"), _features_config(settings), make_features, 8, (FINISHED,)),
        *(
            Stage(
                name,
                ("store", "features"),
                common | _model(settings, name) | _of_vectors(settings, "at_once"),
                make,
                60,
                (TRAINING, VECTORS),
            )
            for name, make in (("contrastive", make_contrastive), ("multitask", make_multitask))
            if name in _trained(settings)
        ),
        Stage(
            "stacking",
            ("events", "store", "features", *joined),
            common
            | _model(settings, "stacking")
            | settings.part("profile")
            | _of_vectors(settings, "client_order", "at_once")
            | aligned,
            partial(make_stacking, align_to=align_to),
            30 if settings.stacking.training is not None else 1,
            (TRAINING,),
        ),
    ]


def _of_shards(settings: Settings) -> list[Stage]:
    """The same row where clients are worked on in shards."""
    _require_closed_forms(settings)
    shards = {"shards": settings.shards}
    profiles = settings.part("seed", "windows", "stacking", "profile") | shards
    return [
        Stage("store", ("events",), settings.part("store") | shards, make_sharded_store, 2, (FINISHED,)),
        Stage(
            "features", ("events", "store"), _features_config(settings) | shards, make_sharded_features, 8, (FINISHED,)
        ),
        Stage("stacking", ("events", "store", "features"), profiles, make_sharded_stacking, 3, (FINISHED,)),
    ]


def is_of_closed_forms(settings: Settings) -> bool:
    """Whether tasks on shards of the clients can make all that the settings ask for."""
    return not _refused_in_shards(settings)


def _refused_in_shards(settings: Settings) -> list[str]:
    """What no task of a shard does."""
    rich = settings.plain["features"].get("rich")
    refused = {
        f"the networks {list(_trained(settings))}, which learn from all clients at once": _trained(settings),
        "the stacking network": settings.stacking.training is not None,
        "features=rich, whose propensities are learned from all clients at once": rich is not None,
        "store.all_clients=true, which only networks look at": settings.plain["store"]["all_clients"],
        "profiles.align_to": settings.align_to is not None,
        "profiles.client_order=baseline": settings.client_order != "ids",
        "report.against": settings.report.against is not None,
        "features as a scored component": set(settings.components) & {"features", "profile_features"},
    }
    return [what for what, is_asked in refused.items() if is_asked]


def _require_closed_forms(settings: Settings) -> None:
    """Refuses what no task of a shard does.

    Raises:
        UserError: says what to change.
    """
    if found := _refused_in_shards(settings):
        raise UserError(
            f"run: compute.shards={settings.shards} with compute.engine={settings.engine} works with closed forms alone"
            f" (experiment=demo), got {'; '.join(found)}; leave that out, or take compute.shards=1 and"
            " compute.engine=local"
        )


def _model(settings: Settings, name: str) -> dict[str, Any]:
    """The configuration of a model; how often it is saved while it trains changes nothing of it."""
    group = dict(settings.plain[name])
    if group["training"] is not None:
        group["training"] = {key: value for key, value in group["training"].items() if key != "checkpoint_every_s"}
    return {name: group}


def _of_vectors(settings: Settings, *names: str) -> dict[str, Any]:
    return {name: settings.plain["profiles"][name] for name in names}


def _features_config(settings: Settings) -> dict[str, Any]:
    sets = feature_sets(settings) + profile_sets(settings)
    seed = settings.part("seed") if "scores" in sets else {}
    return seed | settings.part("windows", "features") | {"sets": sets, "of_networks": network_sets(settings)}


def _latest(stage: Stage, settings: Settings) -> Stage:
    """A stage of the profiles once more, with everything before another moment; `LATEST` stands before its name."""

    def make(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
        latest = make_latest_sharded_store if settings.is_sharded else make_latest_store
        make_one = latest if stage.name == "store" else stage.make
        make_one(settings, {name.removeprefix(LATEST): path for name, path in inputs.items()}, directory, progress)

    inputs = tuple(name if name == "events" else LATEST + name for name in stage.inputs)
    config = {**stage.config, "at": settings.latest} if stage.name == "store" else stage.config
    return replace(stage, name=LATEST + stage.name, inputs=inputs, config=config, make=make, reaches=stage.begins)


def _trained(settings: Settings) -> tuple[str, ...]:
    """Models that the stacking model joins, that are scored, or that are asked for by name."""
    wanted = (*settings.stacking_blocks, *(settings.stages or ()), *settings.components)
    return tuple(name for name in NETWORKS if name in wanted)


def feature_sets(settings: Settings) -> list[str]:
    """Features that the stacking model, the graded directions or a trained model look at."""
    looked_at = {*settings.stacking_blocks, *graded_blocks(settings.recipe), *network_sets(settings)}
    return [name for name in ("static", "aggregated", "decayed", "scores", "rich") if name in looked_at]


def network_sets(settings: Settings) -> list[str]:
    """Features that the trained models read beside events."""
    trained = _trained(settings)
    sets = {name for network in trained for name in getattr(settings, network).config.wide}
    return sorted(sets | ({"static"} if "multitask" in trained else set()))


def profile_sets(settings: Settings) -> list[str]:
    """Features that no model looks at: the profile takes them as they are."""
    sets = [name for name in ("tastes", "rhythm") if getattr(settings.layout, name)]
    has_scores = "scores" in feature_sets(settings) or not settings.layout.scores
    return sets if has_scores else ["scores", *sets]


def _scores(settings: Settings, components: Sequence[str]) -> list[Stage]:
    """One stage per component and reader: another reader or component leaves the scores that are there."""
    return [_score(settings, component, reader) for component in components for reader in settings.evaluation.readers]


def _diagnosis(settings: Settings, scored: Sequence[str]) -> list[Stage]:
    """What lies behind the scores of the first component, with the baseline beside it."""
    if not settings.report.diagnosis:
        return []
    components = tuple(dict.fromkeys((*scored[:1], *(name for name in scored if name == BASELINES[0]))))
    folders = dict.fromkeys(folder for name in components for folder in FOLDERS.get(name, ()))
    if "linear" in settings.evaluation.readers:
        folders |= dict.fromkeys(f"evaluate-{name}-linear" for name in components)
    config = {name: settings.plain["evaluation"][name] for name in ("tasks", "seed")} | {"components": components}
    if settings.submission is not None:
        config |= {"common_clients": settings.common_clients, "files": settings.content(settings.submission)}
    make = partial(make_diagnosis, components=components)
    return [Stage(DIAGNOSIS, ("events", *folders), config, make, 10)]


def _shown(settings: Settings, is_latest: bool) -> list[Stage]:
    """The portrait of the clients, and the drift against an earlier run where one is named."""
    report, stages = settings.report, []
    if report.clients:
        config = {"seed": settings.seed, "show_ids": report.show_ids}
        stages.append(Stage(PORTRAIT, ("events", "store", "stacking"), config, make_portrait, 10))
    if report.against is not None:
        earlier = {"against": settings.content(Path(report.against) / "profiles"), "seed": settings.seed}
        stages.append(Stage(DRIFT, ("store", "stacking"), earlier, make_drift, 2))
    return [_latest(stage, settings) for stage in stages] if is_latest else stages


def _score(settings: Settings, component: str, reader: str) -> Stage:
    config = {name: settings.plain["evaluation"][name] for name in (*ALL_READERS, *OF_READER.get(reader, ()))}
    if settings.submission is not None and (component == "submission" or settings.common_clients):
        config["common_clients"] = settings.common_clients
        config["files"] = settings.content(settings.submission, "*")
    folders = FOLDERS.get(component, ())

    def make(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
        _write_scores(settings, component, reader, inputs, directory, progress)

    name, cost = f"evaluate-{component}-{reader}", READER_COST[reader]
    return Stage(name, ("events", *folders), config, make, cost, (SCORED,), _reader(reader))


def _reader(name: str) -> tuple[Place, ...]:
    """The source of a reader, which is imported by its name."""
    return ((f"ubp_fast.evaluation.readers.{name}", None),)


def make_events(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Raw tables, checked and in canonical form."""
    settings.source.prepare(directory, progress, settings.windows.days)


def make_store(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Client-sorted columns of everything before the profiles' cutoff, and nothing after it."""
    events = EventDirectory.open(inputs["events"])
    build_store(events, directory, events.split.input_end_s, **settings.plain["store"], progress=progress)


def make_latest_store(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """The same of everything before the moment that the settings name, the end of the data included."""
    events = EventDirectory.open(inputs["events"])
    build_store(events, directory, _latest_s(settings, events), **settings.plain["store"], progress=progress)


def make_sharded_store(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """`make_store` in shards of the clients."""
    events = EventDirectory.open(inputs["events"])
    _build_shards(settings, events, events.split.input_end_s, directory, progress)


def make_latest_sharded_store(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """`make_latest_store` in shards of the clients."""
    events = EventDirectory.open(inputs["events"])
    _build_shards(settings, events, _latest_s(settings, events), directory, progress)


def _latest_s(settings: Settings, events: EventDirectory) -> int:
    """The moment of the newest vectors.

    Raises:
        UserError: nothing happened before it, or in the window before it that models learn from.
    """
    first_s, last_s = int(events.info["first_s"]), events.last_s
    at_s = last_s + 1 if settings.latest == "end" else settings.latest
    assert isinstance(at_s, int)
    if not first_s < at_s <= last_s + events.target_days * DAY_S:
        raise UserError(
            f"run: profiles.at must lie after the first event, {utc_text(first_s)}, and at most"
            f" {events.target_days} days after the last one, {utc_text(last_s)}, got {utc_text(at_s)};"
            " ubp-fast embed makes vectors of later moments"
        )
    return at_s


def _build_shards(
    settings: Settings, events: EventDirectory, cutoff_s: int, directory: Path, progress: Progress
) -> None:
    min_url_count = settings.plain["store"]["min_url_count"]
    shard_stages.make_store(events, cutoff_s, min_url_count, settings.shards, engine_of(settings), directory, progress)


def make_sharded_features(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """`make_features` of a sharded store, shard by shard."""
    store = EventStore.open(inputs["store"])
    _label_lists(settings, inputs, store, directory)
    shared = shared_by_tasks(settings, {**inputs, "features": directory}, directory)
    wanted = [(name, cutoff_s) for cutoff_s in (*shared.cutoffs, store.cutoff_s) for name in feature_sets(settings)]
    wanted += [(name, store.cutoff_s) for name in profile_sets(settings)]
    shard_stages.make_features(shared, wanted, engine_of(settings), progress)


def make_features(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Label lists of the newest known window, and feature matrices at every cutoff that a model looks at."""
    store = EventStore.open(inputs["store"])
    lists = _label_lists(settings, inputs, store, directory)
    model, stacking = cutoffs_of(store, settings)
    make = _feature_makers(settings, store, lists)
    if settings.layout.tastes:
        if not (directory / TASTE_WEIGHTS).exists():
            found = fit_tastes(store, store.cutoff_s, settings.tastes)
            write_arrays(directory / TASTE_WEIGHTS, arrays_of_weights(found))
        weights = weights_of_arrays(load_arrays(directory / TASTE_WEIGHTS, memory_map=True))
        make["tastes"] = partial(make["tastes"], weights=weights)
    if "scores" in (*feature_sets(settings), *profile_sets(settings)):
        scorer = _fit_scorer(settings, store, load_scored_lists(directory), directory / LEARNED)
        write_arrays(directory / PAIRS_FILE, scorer.arrays)
        make["scores"] = scorer.transform
    of_networks = network_sets(settings)
    wanted = [(name, cutoff_s) for cutoff_s in model for name in of_networks]
    wanted += [(name, cutoff_s) for cutoff_s in (*stacking, store.cutoff_s) for name in feature_sets(settings)]
    wanted += [(name, store.cutoff_s) for name in profile_sets(settings)]
    day = DayStatistics()
    if (directory / DAY_FILE).exists():
        day.arrays |= load_arrays(directory / DAY_FILE)
    for done, (name, cutoff_s) in enumerate(wanted):
        made = directory / f"{name}-{cutoff_s}"
        if not made.exists():
            unfinished = made.with_name(f".{made.name}.partial")
            kept = {"day": day} if name in OF_DAY and cutoff_s == store.cutoff_s else {}
            make[name](store, cutoff_s, directory=unfinished, **kept)
            write_arrays(directory / DAY_FILE, day.arrays)
            complete_directory(unfinished, made)
        progress(done + 1, len(wanted))
    if (directory / LEARNED).exists():
        shutil.rmtree(directory / LEARNED)


def _label_lists(settings: Settings, inputs: Inputs, store: EventStore, directory: Path) -> LabelLists:
    """Those of the newest window before the store's cutoff, written into the folder."""
    events, start_s = EventDirectory.open(inputs["events"]), store.cutoff_s - store.target_days * DAY_S
    lists = make_label_lists(events, start_s, store.cutoff_s, settings.windows.labels)
    if settings.windows.given_lists:
        lists |= _given_lists(settings, events)
    saved = dict(lists)
    if "propensity_sku" in lists:
        window = events.purchases(start_s, store.cutoff_s)
        saved[SCORED_SKUS] = scored_skus(window, lists, settings.pairs.most_bought)
    for name, (ids, popularity) in saved.items():
        save_array(directory / f"{name}.npy", ids)
        save_array(directory / f"popularity_{name}.npy", popularity)
    return load_lists(directory)  # in one order wherever columns are made of them


def _given_lists(settings: Settings, events: EventDirectory) -> LabelLists:
    """What the organisers' directory asks for by name; popularity as it says, too."""
    given = events.label_lists if isinstance(settings.source, Challenge) else None
    return {name: values for name, values in (given or {}).items() if name in GIVEN_LISTS}


def _fit_scorer(settings: Settings, store: EventStore, lists: LabelLists, folder: Path) -> PairScorer:
    """Learned from the newest windows before the profiles' cutoff."""
    cutoffs = training_cutoffs(store, settings.pairs.windows, 1)
    return PairScorer.fit(store, cutoffs, lists, settings.pairs, settings.seed, folder)


def _feature_makers(settings: Settings, store: EventStore, lists: LabelLists) -> dict[str, Callable[..., Features]]:
    """Name of a feature set -> make(store, cutoff, directory=folder)."""
    return {
        "static": static_features,
        "aggregated": partial(
            aggregated_block,
            config=settings.aggregated,
            lists=lists_of_kinds(store, store.cutoff_s, settings.aggregated.top_values),
        ),
        "decayed": partial(decayed_features, lists=lists, config=settings.decayed),
        "rich": partial(rich_features, lists=lists, config=settings.rich),
        "tastes": partial(taste_features, config=settings.tastes),
        "rhythm": partial(rich_features, lists=lists, config=settings.rhythm, name="rhythm"),
    }


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


def make_raw_features(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """What models look at, side by side at the profiles' cutoff: log1p aggregated, decayed and static features."""
    store = EventStore.open(inputs["store"])
    make = _feature_makers(settings, store, load_lists(inputs["features"]))
    with TemporaryDirectory(dir=directory) as folder:
        sets = []
        for done, name in enumerate(RAW_FEATURES):
            made = inputs["features"] / f"{name}-{store.cutoff_s}"
            if not made.is_dir():
                made = Path(folder) / name
                make[name](store, store.cutoff_s, directory=made)
            sets.append(load_features(made))
            progress(done + 1, len(RAW_FEATURES) + 1)
        names = tuple(f"{kind}:{name}" for kind, one in zip(RAW_FEATURES, sets, strict=True) for name in one.names)
        units = tuple(unit for one in sets for unit in one.units)

        def fill(block: np.ndarray, first: int, last: int) -> None:
            np.concatenate([one.rows(slice(first, last)) for one in sets], axis=1, out=block)

        in_client_blocks(sets[0].client_ids, names, units, fill, directory / "values")


def make_alignment_scores(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """What models keep that have learned from the vectors of the earlier model, when they read the new ones."""
    events = EventDirectory.open(inputs["events"])
    folders = {"old": OLD, "aligned": "stacked", "unaligned": UNALIGNED}
    vectors = {name: Profiles.load(inputs["stacking"] / folder) for name, folder in folders.items()}
    targets = build_targets(events, vectors["old"].client_ids, settings.evaluation.tasks)
    readers = tuple(name for name in ("linear", "boosting") if name == "linear" or find_spec("lightgbm") is not None)
    config = replace(settings.evaluation, readers=readers)
    areas: dict[str, dict[str, dict[str, float]]] = {name: {} for name in readers}
    for done, (name, read) in enumerate(vectors.items()):
        found = evaluate(vectors["old"], targets, config, on_device(settings.device), read=read).aurocs()
        for reader, tasks in found.items():
            areas[reader][name] = {task: area for task, (area, _) in tasks.items() if area is not None}
        progress(done + 1, len(vectors))
    kept = {
        reader: {name: _lead(found[name]) / _lead(found["old"]) for name in ("aligned", "unaligned")}
        for reader, found in areas.items()
        if found["old"] and _lead(found["old"]) > 0
    }
    explained = load_json(inputs["stacking"] / EXPLAINED_FILE)
    write_json(directory / KEPT_FILE, {"kept": kept, "auroc": areas, "explained_variance": explained})


def _lead(areas: Mapping[str, float]) -> float:
    """Mean AUROC over chance."""
    return float(np.mean(list(areas.values()))) - 0.5


def _write_scores(
    settings: Settings, component: str, reader: str, inputs: Inputs, directory: Path, progress: Progress
) -> None:
    config = replace(settings.evaluation, readers=(reader,))
    has_units = component in ("features", "profile_features")
    keep, device = directory / SCORED, on_device(settings.device)
    told: Progress | None = progress
    if deals_out(settings) and reader == "network":
        load = partial(_to_score, settings, component, inputs)
        work = partial(keep_share, load, config, device.type, has_units, keep)
        deal_out(work, processes_of(settings), progress, f"evaluate-{component}", "with the next task")
        told = None  # what is left is to read the scores
    events = EventDirectory.open(inputs["events"])
    profiles, remark = _scored(settings, component, inputs, events)
    targets = build_targets(events, profiles.client_ids, settings.evaluation.tasks)
    scores = evaluate(profiles, targets, config, device, told, has_units, keep=keep)
    scores = replace(scores, remarks={**scores.remarks, **({"clients": remark} if remark else {})})
    write_json(directory / "scores.json", scores.to_json())


def _to_score(settings: Settings, component: str, inputs: Inputs) -> tuple[Profiles, Targets]:
    """Vectors and the labels of their clients."""
    events = EventDirectory.open(inputs["events"])
    profiles, _ = _scored(settings, component, inputs, events)
    return profiles, build_targets(events, profiles.client_ids, settings.evaluation.tasks)


def make_diagnosis(
    settings: Settings, inputs: Inputs, directory: Path, progress: Progress, components: Sequence[str]
) -> None:
    """What lies behind the scores, by the options that the linear reader has chosen where it was asked."""
    events = EventDirectory.open(inputs["events"])
    vectors = {name: _scored(settings, name, inputs, events)[0] for name in components}
    choices = {}
    for name in components:
        if (scored := inputs.get(f"evaluate-{name}-linear")) is not None:
            tasks = Scores.from_json(load_json(scored / "scores.json")).others["linear"]
            found = {task: option_of(one.samples[0].choice) for task, one in tasks.items() if one.samples}
            choices[name] = {task: option for task, option in found.items() if option is not None}
    write_json(directory / FACTS_FILE, diagnose(vectors, events, settings.evaluation, choices, progress))


def make_portrait(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """A map of the clients, and a few of them beside their nearest."""
    events, store = EventDirectory.open(inputs["events"]), EventStore.open(inputs["store"])
    profiles = Profiles.load(inputs["stacking"] / "stacked")
    found = portray(profiles, events, store.cutoff_s, settings.seed, settings.report.show_ids, progress)
    write_json(directory / FACTS_FILE, found)


def make_drift(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """How far inputs and vectors have moved from those of an earlier run."""
    assert settings.report.against is not None
    earlier = Path(settings.report.against)
    profiles = Profiles.load(inputs["stacking"] / "stacked")
    before = (EventStore.open(earlier / "stages" / "store"), Profiles.load(earlier / "profiles"))
    write_json(directory / FACTS_FILE, drift(EventStore.open(inputs["store"]), profiles, *before, settings.seed))


def _scored(settings: Settings, component: str, inputs: Inputs, events: EventDirectory) -> tuple[Profiles, str]:
    """Vectors that are scored, and what is said of their clients."""
    profiles = _submitted(settings, events) if component == "submission" else _component(component, inputs)
    if settings.common_clients and settings.submission is not None:
        return _common(settings, events, profiles)
    return profiles, ""


def _submitted(settings: Settings, events: EventDirectory) -> Profiles:
    """Somebody's vectors of the clients that the baselines are scored on, or of any where the common ones count.

    Raises:
        DataError: they break a rule of the organisers, or are of other clients.
    """
    assert settings.submission is not None
    path = events.path / "maps" / "client_id.parquet"
    names = dict(pl.read_parquet(path).select("value", "id").iter_rows()) if path.exists() else None
    if settings.common_clients:
        return validate(settings.submission, None, names).require()
    verdict = validate(settings.submission, _scored_clients(events), names)
    if any(problem.check == "not_permutation" for problem in verdict.problems):
        message = "\n".join(problem.message for problem in verdict.problems)
        raise DataError(f"{message}; bring all, or score everything on the common ones: evaluation.common_clients=true")
    return verdict.require()


def _scored_clients(events: EventDirectory) -> np.ndarray:
    return clients_of(events, events.split.input_end_s, False, None)[0]


def _common(settings: Settings, events: EventDirectory, profiles: Profiles) -> tuple[Profiles, str]:
    """The profiles of the clients that the submission and the baselines share, and what is said of it.

    Raises:
        DataError: they share none.
    """
    submitted, scored = _submitted(settings, events).client_ids, _scored_clients(events)
    common = submitted[np.isin(submitted, scored)]
    if not len(common):
        raise DataError(f"{settings.submission}: submission must hold clients of the data, got none of {len(scored)}")
    remark = (
        f"all scores are of the {len(common)} clients that the submission ({len(submitted)}) and the baselines"
        f" ({len(scored)}) share"
    )
    return profiles.align(common), remark


def _component(name: str, inputs: Inputs) -> Profiles:
    """Vectors that are scored."""
    if name not in ("features", "profile_features"):
        return Profiles.load(inputs[FOLDERS[name][0]] / name)
    features = load_features(inputs["raw_features"] / "values")
    if name == "features":
        return Profiles(features.client_ids, features.rows(slice(None)))
    profile = Profiles.load(inputs["stacking"] / "stacked").align(features.client_ids)
    joined = np.concatenate([profile.embeddings, features.rows(slice(None))], axis=1, dtype=np.float32)
    return Profiles(features.client_ids, joined)
