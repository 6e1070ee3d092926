"""The stages of a run whose clients are worked on shard by shard; each fills one folder, see `ubp_fast.shards`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ubp_fast.events.read import EventDirectory
from ubp_fast.features import scaling
from ubp_fast.features.matrix import NAMES_FILE
from ubp_fast.features.scaling import NUM_CLIENTS, DayStatistics
from ubp_fast.features.tastes import arrays_of_weights, fit_tastes
from ubp_fast.files import (
    complete_directory,
    complete_file,
    create_array,
    load_array,
    load_json,
    write_array,
    write_arrays,
    write_json,
)
from ubp_fast.models.near import NearModel
from ubp_fast.models.pair_scorer import PairScorer
from ubp_fast.models.reduced_rank import ReducedRankConfig, ReducedRankModel
from ubp_fast.profiler.parts import Fitted, is_summary
from ubp_fast.profiles.blocks import Layout
from ubp_fast.progress import Progress, Steps
from ubp_fast.shards import work
from ubp_fast.shards.engine import Engine, Task
from ubp_fast.shards.work import Shared
from ubp_fast.store import shards
from ubp_fast.store.event_store import HEADER_FILE, EventStore
from ubp_fast.store.ids import drawn

PARTITION, VOCABULARY = "partition", "vocabulary"
EDGES_FILE = "edges.npy"


def make_store(
    events: EventDirectory,
    cutoff_s: int,
    min_url_count: int,
    number: int,
    engine: Engine,
    directory: Path,
    progress: Progress,
) -> None:
    """Writes a sharded store, see `ubp_fast.store.shards`; called again, it goes on.

    Args:
        events: the canonical events.
        cutoff_s: events before it are seen, seconds since 1970 UTC.
        min_url_count: see `build_store`.
        number: of shards, at most.
        engine: where tasks run.
        directory: exists.
        progress: called with (tasks done, tasks in all).
    """
    scratch = directory / PARTITION
    scratch.mkdir(exist_ok=True)
    chunks = shards.chunks_of(events)
    steps = Steps(progress, len(chunks) + number)
    if not (scratch / EDGES_FILE).exists():
        write_array(scratch / EDGES_FILE, shards.edges_of(events, number))
    edges = load_array(scratch / EDGES_FILE)
    placed = [(chunk, scratch / f"{chunk.kind}-{chunk.first:012d}") for chunk in chunks]
    if not (directory / HEADER_FILE).exists():
        tasks = [Task(folder, partial(shards.partition, events, chunk, cutoff_s, edges)) for chunk, folder in placed]
        engine.run("partition", tasks, steps.done)
        shards.merge(events, placed, edges, cutoff_s, min_url_count, number, scaling.ROWS_AT_ONCE, directory)
    store = EventStore.open(directory)
    tasks = [
        Task(shards.shard_folder(directory, place), partial(shards.build_shard, directory, place, placed, edges))
        for place in _numbers(store)
    ]
    engine.run("build", tasks, steps.done)
    of_clients = [np.diff(EventStore.open(task.folder).timeline.offsets) for task in tasks]
    header = store.header | {
        "num_events": sum(int(counts.sum()) for counts in of_clients),
        "num_empty": sum(int((counts == 0).sum()) for counts in of_clients),
    }
    write_json(directory / HEADER_FILE, header)
    shutil.rmtree(scratch)


def make_features(shared: Shared, wanted: Sequence[tuple[str, int]], engine: Engine, progress: Progress) -> None:
    """Writes the feature sets at cutoffs of every shard, and what was learned for them; called again, it goes on.

    Args:
        shared: of the run; its folder `features` exists.
        wanted: (name of a set, cutoff).
        engine: where tasks run.
        progress: called with (tasks done, tasks in all).
    """
    store, recipe, directory = shared.whole, shared.recipe, shared.features
    has_scores = any(name == "scores" for name, _ in wanted)
    has_tastes = any(name == "tastes" for name, _ in wanted)
    rounds = 2 + has_scores
    steps = Steps(progress, rounds * len(_numbers(store)))
    (directory / work.DAYS).mkdir(exist_ok=True)
    if has_scores:
        _measure(shared, engine, "popularity", work.popularity, (), directory, steps)
    if (has_scores or has_tastes) and not (directory / work.SAMPLE).exists():
        partial_folder = directory / f".{work.SAMPLE}.partial"
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
        shards.some_clients(store, _drawn(shared, has_tastes, has_scores), partial_folder)
        complete_directory(partial_folder, directory / work.SAMPLE)
    if has_tastes and not (directory / work.TASTES_FILE).exists():
        sample = EventStore.open(directory / work.SAMPLE)
        found = arrays_of_weights(fit_tastes(sample, store.cutoff_s, recipe.tastes))
        write_arrays(directory / work.TASTES_FILE, found)
        del found  # as much as all shards may have; tasks map the file
    if has_scores:
        sample = EventStore.open(directory / work.SAMPLE)
        days = {cutoff_s: DayStatistics(shared.known_at(cutoff_s)) for cutoff_s in shared.scorer_cutoffs()}
        cutoffs, folder = shared.scorer_cutoffs(), directory / work.LEARNED
        PairScorer.fit(sample, cutoffs, shared.scored, recipe.pairs, shared.seed, folder, days)
    _measure(shared, engine, work.FEATURES, work.features, (wanted,), directory, steps)
    first = directory / work.FEATURES / f"{0:05d}"
    lacking = [
        (name, cutoff_s) for name, cutoff_s in wanted if not (first / str(cutoff_s) / name / NAMES_FILE).exists()
    ]
    if lacking:
        _measure(shared, engine, work.FILLED, work.features, (lacking,), directory, steps)


def _drawn(shared: Shared, has_tastes: bool, has_scores: bool) -> np.ndarray:
    """Rows i64, ascending, of all clients from whose events something is learned that does not add up."""
    client_ids, recipe = np.asarray(shared.whole.client_ids), shared.recipe
    found = []
    if has_tastes:
        found.append(drawn(client_ids, recipe.tastes.clients, recipe.tastes.seed))
    if has_scores:
        found.append(drawn(client_ids, recipe.pairs.factors.clients, recipe.pairs.factors.seed))
        for window in range(len(shared.scorer_cutoffs())):
            found.append(drawn(client_ids, recipe.pairs.clients, shared.seed, window))
    return np.unique(np.concatenate(found))


def make_profiles(
    shared: Shared, engine: Engine, vectors: Path, progress: Progress
) -> tuple[Fitted, Layout, DayStatistics]:
    """Fits the models on all shards and writes the vectors of all clients; called again, it goes on.

    Args:
        shared: of the run; its folder `models` exists.
        engine: where tasks run.
        vectors: npy file for float16 [U, D], clients in the order of the store.
        progress: called with (tasks done, tasks in all).

    Returns:
        What was learned, the layout of the vectors and what is compared among all clients.
    """
    store, recipe, models = shared.whole, shared.recipe, shared.models
    assert isinstance(recipe.stacking, ReducedRankConfig)
    number, cutoff_s = len(_numbers(store)), store.cutoff_s
    steps = Steps(progress, 4 * number)
    _measure(shared, engine, "moments", work.moments, (), models, steps)
    found = _measure(shared, engine, "sums", work.sums, (), models, steps)
    made = shared.made(0, shared.cutoffs[0])
    for names, _, blocks in work.regressions(recipe):
        is_strong = names == work.STRONG
        model = ReducedRankModel(recipe.stacking if is_strong else shared.graded_config())
        model.of_sums(found[cutoff_s, names], is_summary(made, blocks))  # type: ignore[arg-type]
        model.save(models / ("strong.safetensors" if is_strong else "graded.safetensors"))
    found = _measure(shared, engine, "directions", work.directions, (), models, steps)
    if (cutoff_s, work.NEAR) in found:
        near = NearModel.of_sums(found[cutoff_s, work.NEAR], recipe.layout.near_width)  # type: ignore[arg-type]
        write_arrays(models / "near.safetensors", {"mean": near.mean, "directions": near.directions})
    tasks = [
        Task(models / "embed" / f"{place:05d}", work.of_shard(work.embed, shared, place)) for place in range(number)
    ]
    engine.run("embed", tasks, steps.done)
    layout = Layout.from_json(load_json(tasks[0].folder / work.LAYOUT_FILE))
    unfinished = vectors.with_name(f".{vectors.name}.partial")
    joined, first = create_array(unfinished, np.float16, (store.num_clients, layout.width)), 0
    for task in tasks:
        part = np.load(task.folder / work.VECTORS_FILE, mmap_mode="r", allow_pickle=False)
        joined[first : first + len(part)] = part
        first += len(part)
    joined.flush()
    complete_file(unfinished, vectors)
    return shared.fitted(shared.scorer()), layout, DayStatistics(shared.known_at(cutoff_s))


def _numbers(store: EventStore) -> range:
    return range(len(shards.first_rows(store)) - 1)


def _measure(
    shared: Shared, engine: Engine, step: str, function: object, more: tuple[object, ...], directory: Path, steps: Steps
) -> work.Measured:
    """Lets every shard measure; what that says of all clients is known from then on, sums are given back."""
    tasks = [
        Task(directory / step / f"{place:05d}", work.of_shard(function, shared, place, *more))  # type: ignore[arg-type]
        for place in _numbers(shared.whole)
    ]
    engine.run(step, tasks, steps.done)
    found = work.measured_of_all([task.folder for task in tasks])
    sums = {key: found.pop(key) for key in list(found) if key[1] in (work.STRONG, work.GRADED, work.NEAR)}
    of_days: dict[int, dict[str, np.ndarray]] = {}
    for (cutoff_s, names), statistic in found.items():
        of_days.setdefault(cutoff_s, {}).update(zip(names, statistic.finish(), strict=True))
    for cutoff_s, arrays in of_days.items():
        known = shared.known_at(cutoff_s) | arrays
        if cutoff_s == shared.whole.cutoff_s:
            known[NUM_CLIENTS] = np.array([shared.whole.num_clients])
        write_arrays(shared.days_file(cutoff_s), known)
    return sums
