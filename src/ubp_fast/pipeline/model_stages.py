"""The stages that train: contrastive and multi-task models on past cutoffs, the stacking model on later ones.

Each writes its model and losses into `training/`, its vectors at every later cutoff, and profiles at the last one. The
stacking stage lays the profile's blocks side by side and writes the model of the run, with which `Profiler` does the
same for other events.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch.distributed as dist

from ubp_fast.events.schema import EVENT_KINDS, LabelLists, UserError
from ubp_fast.events.split import utc_text
from ubp_fast.features.matrix import load_features
from ubp_fast.features.popular import lists_of_kinds
from ubp_fast.features.scaling import DayStatistics, MinMaxScaler, Rows
from ubp_fast.features.tastes import weights_of_arrays
from ubp_fast.files import complete_file, create_array, load_array, load_arrays, load_json, write_json
from ubp_fast.models.contrastive import PROBE_LABELS, ContrastiveModel
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.membership import weighted_views
from ubp_fast.models.multitask import MULTITASK_LABELS, MultitaskModel
from ubp_fast.models.near import NearModel
from ubp_fast.models.pair_scorer import PairScorer
from ubp_fast.models.reduced_rank import ReducedRankConfig, ReducedRankModel
from ubp_fast.models.stacking import JoinedBlocks, StackingModel
from ubp_fast.models.training import MODEL_FILE, fit, initialise, on_device
from ubp_fast.optim.ranks import divided_tables
from ubp_fast.pipeline.cache import key_of
from ubp_fast.pipeline.settings import ModelSettings, Settings
from ubp_fast.profiler.bundle import MODEL_FOLDER, load_network, save_bundle
from ubp_fast.profiler.parts import (
    NETWORKS,
    Block,
    Fitted,
    Made,
    Network,
    graded_blocks,
    graded_rank,
    is_summary,
    joined,
    near_parts,
    network_rows,
    own_blocks,
    parts_of,
)
from ubp_fast.profiler.profiler import Profiler
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.alignment import fit_alignment, without_turning
from ubp_fast.profiles.blocks import Layout, compose
from ubp_fast.profiles.matrix import EMBEDDINGS_FILE
from ubp_fast.progress import Progress
from ubp_fast.ranks.company import BACKENDS, Company, company_here
from ubp_fast.ranks.processes import Processes, deal_out
from ubp_fast.sequences import ViewLoader, Views, age_quantiles_days, past_cutoffs, views_at, window_labels
from ubp_fast.shards import stages as shard_stages
from ubp_fast.shards.engine import Engine, LocalEngine, RayEngine
from ubp_fast.shards.work import Shared
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.in_memory import Histories, Vocabulary

TRAINING, VECTORS = "training", "vectors-*"
INFERENCE_BATCH = 512
SCALER, OUTPUTS_FILE, TASTE_WEIGHTS = "scaler", "outputs.json", "taste_weights.safetensors"
# What stands beside vectors that were turned: those of the earlier model, and the new ones as they were.
OLD, UNALIGNED, EXPLAINED_FILE = "old_model", "unaligned", "explained_variance.json"
SCORED_SKUS = "scored_skus"
DAY_FILE, PAIRS_FILE, PROFILE_TABLE = "day.safetensors", "pairs.safetensors", "profiles.parquet"
Inputs = Mapping[str, Path]


class Training(NamedTuple):
    """An untrained network and what it learns from."""

    network: Network
    labels: tuple[str, ...]
    loader: ViewLoader
    store: EventStore


def make_contrastive(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Two-tower model on past cutoffs; its vectors at the stacking cutoffs and at the profiles' cutoff."""
    _make_network("contrastive", settings, inputs, directory, progress)


def _contrastive(settings: Settings, inputs: Inputs) -> Training:
    store = EventStore.open(inputs["store"])
    config, training = settings.contrastive.config, settings.contrastive.training
    model_cutoffs, _ = cutoffs_of(store, settings)
    views, weight = weighted_views(store, model_cutoffs, settings.contrastive.views, settings.seed)
    labels = _labels(store, views, inputs["features"], PROBE_LABELS) if config.probes else {}
    features = _network_rows("contrastive", None, settings, inputs, store, views)
    num_wide = 0 if features is None else features.shape[1]
    sizes = EventSizes.of(store)
    model = initialise(lambda: ContrastiveModel(config, sizes, _widths(labels), num_wide), settings.seed)
    edges = age_quantiles_days(store, views, max_length=config.history_length, bins=config.events.age_bins)
    model.set_age_edges(edges)
    loader = ViewLoader(
        store,
        views,
        batch_size=training.batch_size,
        history_length=config.history_length,
        drop_repeats=config.drop_repeats,
        future_length=config.future_length,
        features=features,
        labels=labels,
        weight=weight,
        shuffle_seed=settings.seed,
    )
    return Training(Network(model, sizes), tuple(labels), loader, store)


def make_multitask(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Multi-task model on past cutoffs; its vectors at the stacking cutoffs and at the profiles' cutoff."""
    _make_network("multitask", settings, inputs, directory, progress)


def _multitask(settings: Settings, inputs: Inputs) -> Training:
    store = EventStore.open(inputs["store"])
    config, training = settings.multitask.config, settings.multitask.training
    model_cutoffs, _ = cutoffs_of(store, settings)
    views = views_at(store, model_cutoffs, with_history=True)
    static = ViewRows(store, views, lambda cutoff_s: joined(_made(inputs, cutoff_s), ("static",), unit_length=False))
    scaler = MinMaxScaler.fit(static)
    features = _network_rows("multitask", scaler, settings, inputs, store, views)
    assert features is not None
    labels = _labels(store, views, inputs["features"], MULTITASK_LABELS)
    sizes, widths = EventSizes.of(store), _widths(labels)
    num_static, num_wide = static.shape[1], features.shape[1] - static.shape[1]
    model = initialise(lambda: MultitaskModel(config, sizes, num_static, widths, num_wide), settings.seed)
    loader = ViewLoader(
        store,
        views,
        batch_size=training.batch_size,
        history_length=config.history_length,
        drop_repeats=config.drop_repeats,
        features=features,
        labels=labels,
        shuffle_seed=settings.seed,
    )
    return Training(Network(model, sizes, scaler, widths), tuple(labels), loader, store)


PARTS = {"contrastive": _contrastive, "multitask": _multitask}


def _make_network(name: str, settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Trains a network, on several devices where asked for, and writes its vectors."""
    store = EventStore.open(inputs["store"])
    batches, steps = sum(_inference_batches(store, settings).values()), 0

    def told(done: int, total: int) -> None:
        nonlocal steps
        steps = total
        progress(done, total + batches)

    if (company := company_here()) is not None:
        made = _made_by_all(name, settings, inputs)
        company.begin(key_of(directory))
        with company.training(name) as group:
            _train(name, made, settings, inputs, directory, told, group)
    elif deals_out(settings):
        _train_on_devices(name, settings, inputs, directory, told)
    if company is None or settings.tables == "sharded":  # what several devices have trained is only loaded, and whole
        made = PARTS[name](settings, inputs)
        _train(name, made, settings, inputs, directory, told)
    network = made.network
    if network.scaler is not None and network.outputs is not None:
        network.scaler.save(directory / SCALER)
        write_json(directory / OUTPUTS_FILE, network.outputs)
    _write_vectors(name, network, store, settings, inputs, directory, steps, progress)


def _made_by_all(name: str, settings: Settings, inputs: Inputs) -> Training:
    """What one of all processes trains."""
    group = dist.group.WORLD
    assert group is not None
    with divided_tables(group) if settings.tables == "sharded" else nullcontext():
        return PARTS[name](settings, inputs)


def take_part(settings: Settings, company: Company, needed: Callable[[str], tuple[str, Inputs, Path]]) -> None:
    """What every process but the first does in a run of several: it trains with the others until there is no more.

    Args:
        settings: those of the run.
        company: all processes.
        needed: makes what the training with a key needs where that is missing; its network, inputs and folder.
    """
    while (key := company.following()) is not None:
        name, inputs, directory = needed(key)
        made = _made_by_all(name, settings, inputs)
        company.begin(key)
        with company.training(name) as group:
            _train(name, made, settings, inputs, directory, None, group)


def _train(
    name: str,
    made: Training,
    settings: Settings,
    inputs: Inputs,
    directory: Path,
    progress: Progress | None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Trains a network and validates it where asked for, on the window that follows those of the training."""
    part: ModelSettings = getattr(settings, name)
    network, labels, loader, store = made
    validation, config = None, part.config
    if part.training.validation_views and labels:
        views = views_at(store, cutoffs_of(store, settings)[1][:1], with_history=True)
        if len(views.row) > part.training.validation_views:
            draw = np.random.default_rng(settings.seed).permutation(len(views.row))
            chosen = np.sort(draw[: part.training.validation_views])
            views = Views(views.row[chosen], views.cutoff_s[chosen])
        validation = ViewLoader(
            store,
            views,
            batch_size=INFERENCE_BATCH,
            history_length=config.history_length,
            drop_repeats=config.drop_repeats,
            features=_network_rows(name, network.scaler, settings, inputs, store, views),
            labels=_labels(store, views, inputs["features"], labels),
        )
    place = directory / TRAINING
    fit(network.model, loader, part.optimizer, part.training, place, progress, validation, group)


def _train_on_devices(name: str, settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """Trains with `settings.devices` processes, each on a GPU of its own or on a part of the CPU's threads.

    Raises:
        UserError: fewer GPUs than that, or a process that ended.
    """
    processes = processes_of(settings, getattr(settings, name).training.device)
    with tempfile.TemporaryDirectory() as meeting:
        work = partial(_train_on_one, Path(meeting) / "store", name, settings, dict(inputs), directory)
        deal_out(work, processes, progress, name, "from the last checkpoint")


def _train_on_one(
    meeting: Path,
    name: str,
    settings: Settings,
    inputs: Inputs,
    directory: Path,
    rank: int,
    world: int,
    progress: Progress,
) -> None:
    """What each of the processes does."""
    is_cuda = on_device(getattr(settings, name).training.device).type == "cuda"
    dist.init_process_group(
        BACKENDS if is_cuda else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=settings.wait_s),
    )
    try:
        made = _made_by_all(name, settings, inputs)
        _train(name, made, settings, inputs, directory, progress if rank == 0 else None, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def make_stacking(
    settings: Settings, inputs: Inputs, directory: Path, progress: Progress, align_to: Path | None = None
) -> None:
    """Joins all blocks at later cutoffs than its parts learned from; writes the profiles and the model of the run.

    With `align_to`, an earlier run, the vectors are turned into those that its model gives.
    """
    store = EventStore.open(inputs["store"])
    recipe, config = settings.recipe, settings.stacking.config
    _, cutoffs = cutoffs_of(store, settings)
    views = views_at(store, cutoffs)
    labels = _labels(store, views, inputs["features"], config.labels)
    strong: ReducedRankModel | StackingModel
    if isinstance(config, ReducedRankConfig):
        strong = _fit_regression(config, inputs, labels, cutoffs, recipe.joined, True, recipe.raw_counts)
    else:
        strong = _train_stacking(settings, store, inputs, labels, views, directory, progress)
    own, graded = own_blocks(recipe), None
    if own:
        base = config if isinstance(config, ReducedRankConfig) else ReducedRankConfig(labels=config.labels)
        graded_config = replace(base, rank=graded_rank(recipe))
        graded = _fit_regression(graded_config, inputs, labels, cutoffs, graded_blocks(recipe), unit_length=False)
    fitted = Fitted(
        recipe,
        store.cutoff_s,
        len(cutoffs),
        Vocabulary.of(store),
        load_lists(inputs["features"]),
        lists_of_kinds(store, store.cutoff_s, recipe.aggregated.top_values),
        weights_of_arrays(load_arrays(inputs["features"] / TASTE_WEIGHTS, memory_map=True))
        if recipe.layout.tastes
        else None,
        {name: _trained(name, settings, store, inputs) for name in NETWORKS if name in recipe.joined},
        _scorer(settings, inputs),
        strong,
        graded,
    )
    day = DayStatistics(num_clients=int(store.is_relevant.sum()))
    day.arrays |= load_arrays(inputs["features"] / DAY_FILE)
    made = _made(inputs, store.cutoff_s)
    for name, network in fitted.networks.items():  # for whoever is embedded later
        network_rows(name, network.scaler, network.model.config.wide, made, day, recipe.raw_counts)
    if recipe.layout.near:
        fitted = replace(fitted, near=NearModel.fit(near_parts(fitted, made, day), recipe.layout.near_width))
    if isinstance(strong, StackingModel):
        strong.to(on_device(settings.device))
    parts = parts_of(fitted, made, day)
    halves, layout = compose(parts, recipe.layout.max_width, day)
    tables = _maps(inputs)
    if align_to is not None:
        old = Profiler.load(align_to)
        _require_same_numbers(old, tables)
        fitted, halves, layout = _aligned(fitted, halves, layout, store, old, directory)
    client_ids = store.client_ids[store.is_relevant]
    profiles = Profiles(client_ids, halves, layout, _own_ids(client_ids, tables))
    if settings.client_order == "baseline":
        profiles = profiles.align(client_ids[_order_of_baseline(store)])
    if isinstance(strong, StackingModel):
        strong.to("cpu")
    profiles.save(directory / "stacked")
    profiles.write_parquet(directory / PROFILE_TABLE)
    save_bundle(directory / MODEL_FOLDER, fitted, layout, day, tables)


def make_sharded_stacking(settings: Settings, inputs: Inputs, directory: Path, progress: Progress) -> None:
    """`make_stacking` of a sharded store, shard by shard."""
    models, stacked = directory / "models", directory / "stacked"
    for folder in (models, stacked):
        folder.mkdir(exist_ok=True)
    shared, vectors = shared_by_tasks(settings, inputs, models), stacked / EMBEDDINGS_FILE
    fitted, layout, day = shard_stages.make_profiles(shared, engine_of(settings), vectors, progress)
    tables, client_ids = _maps(inputs), shared.whole.client_ids
    profiles = Profiles(client_ids, load_array(vectors, memory_map=True), layout, _own_ids(client_ids, tables))
    profiles.save_beside(stacked)
    profiles.write_parquet(directory / PROFILE_TABLE)
    save_bundle(directory / MODEL_FOLDER, fitted, layout, day, tables)
    shutil.rmtree(models)


def shared_by_tasks(settings: Settings, inputs: Inputs, models: Path) -> Shared:
    """What all tasks on shards know; inputs: folders of store and features, whose label lists are there."""
    store = EventStore.open(inputs["store"])
    return Shared(
        inputs["store"].resolve(),
        inputs["features"].resolve(),
        models.resolve(),
        settings.recipe,
        cutoffs_of(store, settings)[1],
        load_lists(inputs["features"]),
        load_scored_lists(inputs["features"]),
        lists_of_kinds(store, store.cutoff_s, settings.recipe.aggregated.top_values),
        settings.seed,
    )


def engine_of(settings: Settings) -> Engine:
    """Where tasks on shards run."""
    if settings.engine == "local":
        return LocalEngine()
    return RayEngine(settings.address, settings.threads or 1, lambda text: print(text, file=sys.stderr))


def _maps(inputs: Inputs) -> dict[str, pl.DataFrame]:
    """How text ids were numbered."""
    maps = inputs["events"] / "maps"
    return {path.stem: pl.read_parquet(path) for path in sorted(maps.glob("*.parquet"))}


def _own_ids(client_ids: np.ndarray, tables: dict[str, pl.DataFrame]) -> pl.Series | None:
    """The shop's own ids of clients, where they are text; their table is taken out."""
    if (numbers := tables.pop("client_id", None)) is None:
        return None
    return pl.DataFrame({"id": client_ids}).join(numbers, on="id", how="left", maintain_order="left")["value"]


def _order_of_baseline(store: EventStore) -> np.ndarray:
    """Places int64 of the relevant clients in the order of the organisers' baseline: buyers first, ids ascending.

    Then come those who put something into a cart but bought nothing, and so on through the kinds; those without any
    event are last. docs/winner.md 2.3.
    """
    first_kind = np.full(store.num_clients, len(EVENT_KINDS))
    for index, kind in reversed([*enumerate(EVENT_KINDS)]):
        if kind in store.kinds:
            first_kind[np.diff(store.kind(kind).offsets) > 0] = index
    return np.argsort(first_kind[store.is_relevant], kind="stable")


def _aligned(
    fitted: Fitted, vectors: np.ndarray, layout: Layout, store: EventStore, old: Profiler, directory: Path
) -> tuple[Fitted, np.ndarray, Layout]:
    """The model, its vectors and their layout in the space of an earlier run; says how near they come."""
    if old.fitted.cutoff_s > store.cutoff_s:
        raise UserError(
            f"profiles.align_to: the old run must end before the new profiles ({utc_text(store.cutoff_s)}), got"
            f" {utc_text(old.fitted.cutoff_s)}; its model has seen what these must not"
        )
    client_ids = np.asarray(store.client_ids)[np.asarray(store.is_relevant)]
    there = old.of_histories(Histories.of_store(store), client_ids, store.cutoff_s)
    alignment, explained = fit_alignment(vectors, layout, there, old.layout)
    write_json(directory / EXPLAINED_FILE, explained)
    for name, values in ((OLD, there), (UNALIGNED, without_turning(alignment).apply(vectors))):
        Profiles(client_ids, values, old.layout).save(directory / name)
    return replace(fitted, alignment=alignment), alignment.apply(vectors), old.layout


def _require_same_numbers(old: Profiler, tables: Mapping[str, pl.DataFrame]) -> None:
    """Text ids are numbered as they appear: another beginning of the log numbers them otherwise."""
    for name, known in old.maps.items():
        if "value" in known.columns and name in tables:
            both = known.join(tables[name], on="value", suffix="_new").filter(pl.col("id") != pl.col("id_new"))
            if len(both):
                raise UserError(
                    f"profiles.align_to: '{name}' must have the numbers of the old run, got other ones for {len(both)}"
                    " texts; begin the log where that of the old run begins"
                )


def _fit_regression(
    config: ReducedRankConfig,
    inputs: Inputs,
    labels: dict[str, Any],
    cutoffs: Sequence[int],
    names: tuple[str, ...],
    unit_length: bool,
    raw_counts: bool = False,
) -> ReducedRankModel:
    """The regression of past windows' labels on some blocks."""
    made = [_made(inputs, cutoff_s) for cutoff_s in cutoffs]
    blocks = [joined(one, names, unit_length, raw_counts) for one in made]
    return ReducedRankModel(config).fit(blocks, labels, is_summary(made[0], names))


def _scorer(settings: Settings, inputs: Inputs) -> PairScorer | None:
    """That of the features' folder, where one was learned."""
    path = inputs["features"] / PAIRS_FILE
    return PairScorer.of_arrays(load_arrays(path, memory_map=True), settings.pairs) if path.exists() else None


def _trained(name: str, settings: Settings, store: EventStore, inputs: Inputs) -> Network:
    """A network from the folder of its stage."""
    scaler, outputs = None, None
    if name == "multitask":
        scaler, outputs = MinMaxScaler.load(inputs[name] / SCALER), load_json(inputs[name] / OUTPUTS_FILE)
    path = inputs[name] / TRAINING / MODEL_FILE
    return load_network(path, settings.recipe, EventSizes.of(store), scaler, outputs)


def _train_stacking(
    settings: Settings,
    store: EventStore,
    inputs: Inputs,
    labels: dict[str, Any],
    views: Views,
    directory: Path,
    progress: Progress,
) -> StackingModel:
    """The winner's stacking network."""
    config, training = settings.stacking.config, settings.stacking.training
    names = settings.stacking_blocks
    # Rows in the order of the views.
    cutoffs = cutoffs_of(store, settings)[1]
    blocks = [[_block(inputs, name, cutoff_s) for name in names] for cutoff_s in cutoffs]
    features = JoinedBlocks(blocks, [name == "aggregated" for name in names], raw_counts=settings.recipe.raw_counts)
    model = initialise(lambda: StackingModel(config, features.shape[1], _widths(labels)), settings.seed)
    model.fit_scaling(features)
    loader = ViewLoader(
        None, views, batch_size=training.batch_size, features=features, labels=labels, shuffle_seed=settings.seed
    )
    fit(model, loader, settings.stacking.optimizer, training, directory / TRAINING, progress)
    return model


def cutoffs_of(store: EventStore, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cutoffs of the contrastive and multi-task models, and the later ones of the stacking model."""
    windows = settings.windows
    return past_cutoffs(store, windows.model_cutoffs, windows.stacking_cutoffs)


def _labels(store: EventStore, views: Views, features: Path, wanted: Sequence[str]) -> dict[str, Any]:
    labels = window_labels(store, views, load_lists(features))
    return {name: labels[name] for name in wanted if name in labels}


def load_lists(features: Path) -> LabelLists:
    """The label lists of the features' folder."""
    return {
        path.stem: (load_array(path), load_array(path.with_name(f"popularity_{path.name}")))
        for path in sorted(features.glob("propensity_*.npy"))
    }


def load_scored_lists(features: Path) -> LabelLists:
    """The lists whose labels the scorer of pairs predicts: those of `load_lists`, with more skus."""
    skus = features / f"{SCORED_SKUS}.npy"
    if not skus.exists():
        return load_lists(features)
    scored = load_array(skus), load_array(skus.with_name(f"popularity_{skus.name}"))
    return {**load_lists(features), "propensity_sku": scored}


def _widths(labels: Mapping[str, Any]) -> dict[str, int]:
    return {name: getattr(label, "num_labels", 1) for name, label in labels.items()}


class ViewRows:
    """Features of views at their cutoffs, float32 [N, F], read from their files when they are asked for.

    Args:
        store: event store.
        views: N views of relevant clients.
        of_cutoff: cutoff -> features of all relevant clients at it.
    """

    def __init__(self, store: EventStore, views: Views, of_cutoff: Callable[[int], Rows]) -> None:
        place = (np.cumsum(store.is_relevant) - 1).astype(np.int32)
        self._place, self._cutoff_s = place[views.row], views.cutoff_s
        self._found = {cutoff_s: of_cutoff(cutoff_s) for cutoff_s in np.unique(views.cutoff_s).tolist()}
        columns = next(iter(self._found.values())).shape[1] if self._found else 0
        self.shape = (len(views.row), columns)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        place, cutoffs = self._place[chosen], self._cutoff_s[chosen]
        rows = np.empty((len(place), self.shape[1]), np.float32)
        for cutoff_s, matrix in self._found.items():
            if (here := cutoffs == cutoff_s).any():
                rows[here] = matrix[place[here]]
        return rows


def _made(inputs: Inputs, cutoff_s: int) -> Made:
    """Features and vectors of a cutoff, from the folders of their stages."""
    return partial(_block, inputs, cutoff_s=cutoff_s)


def _network_rows(
    name: str, scaler: MinMaxScaler | None, settings: Settings, inputs: Inputs, store: EventStore, views: Views
) -> ViewRows | None:
    """What a network reads of views beside their events; None where it reads nothing."""
    wide = getattr(settings, name).config.wide
    if scaler is None and not wide:
        return None

    def of_cutoff(cutoff_s: int) -> Rows:
        made = _made(inputs, cutoff_s)
        rows = network_rows(name, scaler, wide, made, DayStatistics(), settings.recipe.raw_counts)
        assert rows is not None
        return rows

    return ViewRows(store, views, of_cutoff)


def _clients_at_once(store: EventStore, settings: Settings) -> dict[int, int]:
    """Cutoff -> clients of a batch: many at the stacking cutoffs, which only a regression looks at."""
    _, stacking = cutoffs_of(store, settings)
    return {**dict.fromkeys(stacking, INFERENCE_BATCH), store.cutoff_s: settings.recipe.at_once}


def _inference_batches(store: EventStore, settings: Settings) -> dict[int, int]:
    relevant = int(store.is_relevant.sum())
    return {cutoff_s: -(-relevant // size) for cutoff_s, size in _clients_at_once(store, settings).items()}


def _write_vectors(
    name: str,
    network: Network,
    store: EventStore,
    settings: Settings,
    inputs: Inputs,
    directory: Path,
    steps: int,
    progress: Progress,
) -> None:
    """A network's vectors at the stacking cutoffs, then at the profiles'; `steps` of the stage are done already."""
    network.model.to(on_device(settings.device))
    batches = _inference_batches(store, settings)
    total = steps + sum(batches.values())
    if deals_out(settings):
        _write_on_devices(name, store, settings, inputs, directory, lambda done: progress(steps + done, total))
    for cutoff_s, at_once in _clients_at_once(store, settings).items():

        def told(done: int, of: int, before: int = steps, number: int = batches[cutoff_s]) -> None:
            progress(before + done * number // of, total)

        made = _vectors_file(directory, cutoff_s)
        if not made.exists():  # by a run that was interrupted, or by several processes
            unfinished = made.with_name(f".{made.name}.partial")
            rows = _network_rows(name, network.scaler, settings, inputs, store, views_at(store, [cutoff_s]))
            network.vectors(store, cutoff_s, rows, at_once, unfinished, told)
            complete_file(unfinished, made)
        for part in directory.glob(f"{made.stem}-*"):
            part.unlink()
        steps += batches[cutoff_s]
        if not deals_out(settings):
            progress(steps, total)
    vectors = load_array(made, memory_map=True)
    Profiles(store.client_ids[store.is_relevant], vectors).save(directory / name)


def deals_out(settings: Settings) -> bool:
    """Whether work goes to processes of its own; those that torchrun has started take part in trainings alone."""
    return settings.devices > 1 and company_here() is None


def processes_of(settings: Settings, device: str | None = None) -> Processes:
    """Those of `compute.devices`, on the device of the run or another."""
    kind = on_device(settings.device if device is None else device).type
    return Processes(settings.devices, kind, settings.threads or os.cpu_count() or 1)


def _vectors_file(directory: Path, cutoff_s: int, part: str = "") -> Path:
    return directory / f"vectors-{cutoff_s}{part}.npy"


def _part_file(directory: Path, cutoff_s: int, rank: int, world: int) -> Path:
    return _vectors_file(directory, cutoff_s, f"-{rank}-of-{world}")


def _write_on_devices(
    name: str,
    store: EventStore,
    settings: Settings,
    inputs: Inputs,
    directory: Path,
    told: Callable[[int], None],
) -> None:
    """All vectors that are missing, by the processes of `compute.devices`; `told` is called with the batches done."""
    missing = {
        cutoff_s: at_once
        for cutoff_s, at_once in _clients_at_once(store, settings).items()
        if not _vectors_file(directory, cutoff_s).exists()
    }
    batches = _inference_batches(store, settings)
    before, number = (sum(batches[one] for one in batches if (one in missing) == here) for here in (False, True))
    told(before)
    if not missing:
        return

    def progress(done: int, of: int) -> None:
        told(before + done * number // max(of, 1))

    work = partial(_write_parts, name, settings, dict(inputs), directory, missing)
    deal_out(work, processes_of(settings), progress, name, "with the vectors that are missing")
    for cutoff_s in missing:
        made = _vectors_file(directory, cutoff_s)
        unfinished = made.with_name(f".{made.name}.partial")
        ranks = range(settings.devices)
        _join_parts([_part_file(directory, cutoff_s, rank, settings.devices) for rank in ranks], unfinished)
        complete_file(unfinished, made)


def _write_parts(
    name: str,
    settings: Settings,
    inputs: Inputs,
    directory: Path,
    cutoffs: Mapping[int, int],
    rank: int,
    world: int,
    progress: Progress,
) -> None:
    """Vectors of one of `world` parts of the clients at cutoffs -> clients of a batch; parts are whole batches."""
    store = EventStore.open(inputs["store"])
    network = _trained(name, settings, store, {name: directory})
    network.model.to(on_device(settings.device))
    for number, (cutoff_s, at_once) in enumerate(cutoffs.items()):

        def told(done: int, of: int, before: int = number) -> None:
            progress(1_000 * before + 1_000 * done // of, 1_000 * len(cutoffs))

        made = _part_file(directory, cutoff_s, rank, world)
        if not made.exists():  # by a run that was interrupted
            batches = -(-int(store.is_relevant.sum()) // at_once)
            part = slice(at_once * (batches * rank // world), at_once * (batches * (rank + 1) // world))
            views = views_at(store, [cutoff_s])
            views = Views(views.row[part], views.cutoff_s[part])
            rows = _network_rows(name, network.scaler, settings, inputs, store, views)
            unfinished = made.with_name(f".{made.name}.partial")
            network.vectors(store, cutoff_s, rows, at_once, unfinished, told, part)
            complete_file(unfinished, made)
        told(1, 1)


def _join_parts(files: Sequence[Path], whole: Path) -> None:
    """One file of the vectors of all processes."""
    parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    joined, first = create_array(whole, parts[0].dtype, (sum(map(len, parts)), parts[0].shape[1])), 0
    for part in parts:
        joined[first : first + len(part)] = part
        first += len(part)
    joined.flush()


def _block(inputs: Inputs, name: str, cutoff_s: int) -> Block:
    if name in NETWORKS:
        return np.load(inputs[name] / f"vectors-{cutoff_s}.npy", mmap_mode="r", allow_pickle=False)
    return load_features(inputs["features"] / f"{name}-{cutoff_s}")
