"""What a run will take of disk and memory, said before the work: bounds from the numbers of clients, events and ids.

Memory is that of all processes of this host that train as one, or of one task on a shard of the clients.

The store's needs follow from the events, those of all later stages from the store, whose vocabularies decide how large
tables are. Tables are counted with their optimizer as if every row were in use.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, NUM_CODES, UserError
from ubp_fast.features import scaling
from ubp_fast.features.tastes import MOST_ITEMS, SPARE_FACTORS, TastesConfig, num_candidates
from ubp_fast.models.membership import MembershipConfig
from ubp_fast.models.pair_scorer import PairScorerConfig
from ubp_fast.models.training import on_device
from ubp_fast.pipeline.model_stages import cutoffs_of
from ubp_fast.pipeline.settings import ModelSettings, Settings
from ubp_fast.pipeline.stages import feature_sets, is_of_closed_forms, network_sets, profile_sets
from ubp_fast.ranks.company import Launch
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.shards import first_rows

# Interpreter, libraries and their threads.
BASE_BYTES = 700 << 20
# The organisers' network: 50.6 M parameters with AdamW's two moments and gradients in float32.
NETWORK_BYTES = 51_000_000 * 16
# The same with Lightning, compiled functions and a small model in training.
TRAINING_BYTES = 1300 << 20
# A weight, its gradient's share and two moments in float32.
BYTES_PER_WEIGHT = 16
# Of a network beside its tables, in float32.
DENSE_WEIGHTS_BYTES = 64 << 20
# Weight and two moments, twice; a row of a table adds its place and its last step.
CHECKPOINTS_PER_WEIGHT, CHECKPOINTS_PER_ROW = 2 * 12, 2 * 8
# Time, kind and row of the timeline, time and item of the kind.
BYTES_PER_EVENT, BYTES_PER_SEARCH, BYTES_PER_AMOUNT = 17, 29, 4
EVENTS_AT_ONCE_BYTES = 600 << 20
# Scores, rhythm and tastes of one client.
BYTES_OF_PROFILE_SETS = 4_000
# Of a sparse matrix and its transpose, sorted: indices and value. Narrow matrices that products and QR hold at once.
BYTES_PER_ENTRY, NARROW_MATRICES = 90, 4
# Of all lists that are scored, beside the most bought skus. A cosine in float64, its copy and what is kept of it.
LISTED_LABELS, BYTES_PER_COSINE = 400, 24
# Of a shard: what of a client is in memory at once, sums of regressions and near vectors, an event while it is sorted.
BYTES_OF_SHARD_PER_CLIENT, SUMS_BYTES, SORTED_BYTES_PER_EVENT = 20_000, 450 << 20, 60


class Need(NamedTuple):
    """Of one stage, in bytes.

    Attributes:
        stage: its name.
        disk: what it leaves there.
        disk_at_work: what it needs there while it runs.
        memory: of the machine.
        device: of the GPU.
        checkpoints: the share of `disk_at_work` that two checkpoints take, the last one and the one being written.
        remedy: what to do where the memory is too little.
    """

    stage: str
    disk: int
    disk_at_work: int = 0
    memory: int = 0
    device: int = 0
    checkpoints: int = 0
    remedy: str = "take smaller tables or a larger machine"


def needs_of_store(events: EventDirectory, store: Mapping[str, Any], shards: int = 1) -> Need:
    """Of the stage `store` by its configuration; a client counts once for every kind of event."""
    rows = {kind: events.num_rows(kind) for kind in events.kinds}
    relevant = events.relevant_clients
    if store["all_clients"] or relevant is None:
        found = pl.col("client_id").approx_n_unique()
        clients = sum(int(events.scan(kind).select(found).collect().item()) for kind in events.kinds)
        clients += 0 if relevant is None else len(relevant)
    else:
        clients = len(relevant)
    size = sum(
        count * (BYTES_PER_SEARCH if kind == "search_query" else BYTES_PER_EVENT) for kind, count in rows.items()
    )
    size += rows.get("product_buy", 0) * BYTES_PER_AMOUNT * len(events.amounts)
    size += clients * 8 * (len(EVENT_KINDS) + 2)
    of_shard = sum(rows.values()) // shards * SORTED_BYTES_PER_EVENT if shards > 1 else 0
    return Need("store", size, 2 * size, BASE_BYTES + EVENTS_AT_ONCE_BYTES + 16 * clients + of_shard)


def needs_of_models(store: EventStore, settings: Settings, stages: Iterable[str]) -> list[Need]:
    """Of the stages after the store, those of the given names."""
    relevant, clients = int(store.is_relevant.sum()), store.num_clients
    model_cutoffs, stacking = cutoffs_of(store, settings)
    on_gpu = on_device(settings.device).type == "cuda"
    launch = Launch.of_environment()
    here, everywhere = (settings.devices,) * 2 if launch is None else (launch.local_world, launch.world)
    length = store.num_events / max(clients, 1)
    found, in_bundle = {}, 0
    # A sparse set keeps what is not 0: at most some columns per event of a client.
    counts = int(min(900, 60 + 25 * length))
    of_profile = BYTES_OF_PROFILE_SETS if settings.layout.scores or settings.layout.own else 0
    with_counts = len(stacking) + 1 + (len(model_cutoffs) if set(network_sets(settings)) - {"static"} else 0)
    sets = of_profile + 46 * 4 * (len(model_cutoffs) + len(stacking) + 1) + counts * 8 * with_counts
    # Weights of items, of the profile's tastes and of the scorer; those of past windows lie on the disk meanwhile.
    fits, weights_of_items, of_past = [0], 0, 0
    if settings.layout.tastes:
        fits.append(bytes_of_tastes(store, settings.tastes))
        weights_of_items += _item_weights(store, settings.tastes)
    has_scores = "scores" in (*feature_sets(settings), *profile_sets(settings))
    if has_scores:
        fits.append(bytes_of_neighbours(store, settings.pairs))
    if has_scores and settings.pairs.tastes:
        of_scorer = _item_weights(store, settings.pairs.factors)
        fits.append(bytes_of_tastes(store, settings.pairs.factors) + 2 * of_scorer)
        weights_of_items += of_scorer
        of_past = (settings.pairs.windows + 1) * of_scorer
    in_bundle += weights_of_items
    disk = relevant * sets + weights_of_items
    memory = BASE_BYTES + EVENTS_AT_ONCE_BYTES + 24 * clients + max(fits)
    found["features"] = Need("features", disk, disk + of_past, memory)

    def of_shards(largest: int) -> int:
        """What the driver and a task take where shards have at most so many clients."""
        of_task = SUMS_BYTES + weights_of_items + largest * BYTES_OF_SHARD_PER_CLIENT
        return BASE_BYTES + 24 * clients + max(*fits, of_task)

    widths = (
        ("contrastive", settings.contrastive.config.events.width),
        ("multitask", settings.multitask.config.profile_width),
    )
    for name, width in widths:
        settings_of = getattr(settings, name)
        config = settings_of.config.events
        url_width = config.url_width if name == "contrastive" else config.content_width
        weights = store.num_skus * config.sku_width + store.num_urls * url_width
        views = relevant * len(model_cutoffs)
        per_client = 0
        if name == "contrastive":
            views = min(clients * len(model_cutoffs), settings_of.views or 2**62)
            # The classifier's columns and one cutoff's weights, and the clients that its fit looks at.
            per_client = 150 * clients + 450 * min(clients, MembershipConfig.clients)
        tables = weights * BYTES_PER_WEIGHT
        disk = DENSE_WEIGHTS_BYTES + weights * 4 + relevant * width * 2 * (len(stacking) + 2)
        rows = store.num_skus + store.num_urls
        checkpoints = (weights + DENSE_WEIGHTS_BYTES // 4) * CHECKPOINTS_PER_WEIGHT + rows * CHECKPOINTS_PER_ROW
        # The best epoch's weights, those of the checkpoint's best epoch, and the file that takes their place.
        best = 3 * (weights * 4 + DENSE_WEIGHTS_BYTES) if settings_of.training.validation_views else 0
        if name in settings.stacking_blocks:
            in_bundle += weights * 4
        work = TRAINING_BYTES + per_client + views * 120 + relevant * 40
        memory = here * (work + _activations(settings_of) // everywhere + (weights * 8 if on_gpu else tables))
        if launch is None and here > 1:  # the run itself waits beside the processes that train
            memory += work + weights * 4
        device = tables + (2 << 30) if on_gpu else 0
        found[name] = Need(name, disk, disk + checkpoints + best, memory, device, checkpoints)
    width = settings.layout.max_width if settings.layout.own else getattr(settings.stacking.config, "profile_width", 7)
    vectors = relevant * width * 2
    memory = TRAINING_BYTES + NETWORK_BYTES + 3 * vectors + relevant * 100 + weights_of_items
    # Vectors in two and in four bytes, the model of the run and its training; the run's folder holds copies.
    trained = 0 if settings.stacking.training is None else NETWORK_BYTES
    checkpoints = trained // BYTES_PER_WEIGHT * CHECKPOINTS_PER_WEIGHT
    disk = 6 * vectors + 2 * in_bundle + trained
    device = 2 * NETWORK_BYTES if on_gpu else 0
    found["stacking"] = Need("stacking", disk, disk + checkpoints, memory, device, checkpoints)
    if settings.is_sharded:
        largest = int(np.diff(first_rows(store)).max())
        for name in ("features", "stacking"):
            remedy = _more_shards(of_shards, relevant, settings.shards)
            found[name] = found[name]._replace(memory=of_shards(largest), remedy=remedy)
    elif is_of_closed_forms(settings):
        found["stacking"] = found["stacking"]._replace(remedy=_more_shards(of_shards, relevant, 1))
    found["baselines"] = Need("baselines", relevant * 320 * 8, 0, BASE_BYTES + EVENTS_AT_ONCE_BYTES + relevant * 400)
    scored = BASE_BYTES + 2 * NETWORK_BYTES + relevant * (2 * width + 6 * 100 * 4)
    found["evaluate"] = Need("evaluate", 0, 0, scored, scored if on_gpu else 0)
    groups = dict.fromkeys(name.removeprefix("latest-").split("-")[0] for name in stages)
    return [found[name] for name in groups if name in found]


def _more_shards(of_shards: Callable[[int], int], clients: int, shards: int) -> str:
    """How many shards of the clients fit into the memory that is there, the least power of two above what there are."""
    most = -(-clients // scaling.ROWS_AT_ONCE)  # shards hold whole parts of sums
    number = 2 << (shards.bit_length() - 1)
    while number < 2 * most:
        largest = -(-most // number) * scaling.ROWS_AT_ONCE
        if of_shards(largest) <= available_memory():
            return f"compute.shards={number} needs {_size(of_shards(largest))}"
        number *= 2
    return "take a larger machine: no number of shards fits"


def bytes_of_tastes(store: EventStore, config: TastesConfig) -> int:
    """What `fit_tastes` holds in memory at most, its result included."""
    relevant = np.asarray(store.is_relevant)
    clients = min(int(relevant.sum()), config.clients)
    kinds = [kind for kind in config.kinds if kind in store.kinds]
    if relevant.all():
        counts = {kind: int(store.item_counts(kind).sum()) for kind in store.kinds if ITEM_COLUMN[kind] != "query"}
        counts |= dict.fromkeys({*store.kinds} - {*counts}, store.num_events - sum(counts.values()))
    else:
        counts = {kind: int(np.diff(store.kind(kind).offsets)[relevant].sum()) for kind in kinds}
    entries = sum(counts[kind] * (NUM_CODES if ITEM_COLUMN[kind] == "query" else 1) for kind in kinds)
    entries = min(entries * clients // max(int(relevant.sum()), 1), config.entries)
    rows = _taste_items(store, config) + clients
    narrow = rows * 4 * (config.rank + NARROW_MATRICES * (config.rank + SPARE_FACTORS))
    return narrow + entries * BYTES_PER_ENTRY


def bytes_of_neighbours(store: EventStore, config: PairScorerConfig) -> int:
    """What `fit_neighbours` holds in memory at most: cosines of all pairs, twice where the nearest are chosen."""
    kinds = {*config.kinds} & {*store.kinds} if config.item_neighbours else ()
    return len(kinds) * min(store.num_skus, MOST_ITEMS) * (LISTED_LABELS + config.most_bought) * BYTES_PER_COSINE


def _item_weights(store: EventStore, config: TastesConfig) -> int:
    return _taste_items(store, config) * config.rank * 4


def _taste_items(store: EventStore, config: TastesConfig) -> int:
    """Items that have weights at most."""
    return sum(num_candidates(store, kind, config) for kind in {*config.kinds} & {*store.kinds})


def _activations(settings: ModelSettings) -> int:
    """What a step keeps for its gradients: some values per event, column and layer, in float32."""
    config = settings.config
    towers = [config.history, config.future] if hasattr(config, "future") else [config.encoder]
    width = config.events.width
    per_event = sum(12 * width + tower.layers * (16 * width + 4 * tower.feed_forward) for tower in towers)
    events: int = settings.training.batch_size * config.history_length
    return 4 * events * int(per_event)


def told(needs: list[Need], root: Path, settings: Settings) -> str:
    """One line on what is needed and what is there.

    Raises:
        UserError: there is too little, unless `compute.on_shortage` says to try.
    """
    free, memory = shutil.disk_usage(root).free, available_memory()
    disk = max(sum(need.disk for need in needs), *(need.disk_at_work for need in needs))
    most = max(needs, key=lambda need: need.memory)
    parts = [
        ("disk", disk, free, f"below {root}; free some, or take another root="),
        ("memory", most.memory, memory, f"for stage '{most.stage}'; {most.remedy}"),
    ]
    device = max(need.device for need in needs)
    if device and torch.cuda.is_available():
        remedy = "on the GPU; take table_dtype=bfloat16, smaller tables or a larger card"
        parts.append(("GPU memory", device, torch.cuda.mem_get_info()[0], remedy))
    short = [part for part in parts if part[1] > part[2]]
    text = ", ".join(f"{_size(wanted)} of {name} ({_size(there)} there)" for name, wanted, there, _ in parts)
    largest = max(needs, key=lambda need: need.checkpoints)
    if largest.checkpoints:
        text += f"; two checkpoints of '{largest.stage}' are {_size(largest.checkpoints)} of the disk"
    if short and settings.plain["compute"]["on_shortage"] != "try":
        name, wanted, there, remedy = short[0]
        raise UserError(
            f"run: {name} must be at least {_size(wanted)}, got {_size(there)} {remedy}, or compute.on_shortage=try"
        )
    return f"needs at most about {text}"


def available_memory() -> int:
    """Bytes that processes may still take, of the machine or of the container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    information = Path("/proc/meminfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        free = min(free, int(text) - int(used.read_text(encoding="utf-8")))
    return max(free, 0)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count, 1e6) / 1e6:.0f} MB"
