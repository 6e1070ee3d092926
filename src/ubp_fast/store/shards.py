"""The store in shards: ranges of the clients in the order of their ids, each built from its own events alone.

    chunk of a table -> its events by range of client ids, how often each id came     `partition`
    all chunks       -> vocabularies, first moment, clients, bounds of the shards     `merge`
    shard            -> its events out of every chunk, sorted by client and time      `build_shard`

A sharded store is a directory like any other store, whose columns of events lie in `shards/<number>`, stores of their
own with the ids of all. Every event is read and written once on the way. Memory holds a chunk, the ids of all clients
and of all items, or a shard.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, SKU_KINDS
from ubp_fast.files import load_array, load_json, save_array, write_arrays, write_json
from ubp_fast.store import spill
from ubp_fast.store.build import Builder, count, places_of_skus
from ubp_fast.store.clients import no_history, require_few
from ubp_fast.store.event_store import (
    AMOUNTS,
    FIRST_ROWS,
    HEADER_FILE,
    TIMELINE,
    VOCABULARY,
    ColumnWriter,
    EventStore,
    columns_of,
    end_to_end,
)
from ubp_fast.store.ids import KnownIds, Numbering
from ubp_fast.store.spill import Events, keys_of, narrowest, sort_events
from ubp_fast.store.vocabulary import FIRST_ID

SHARDS = "shards"
CHUNK_ROWS = 1 << 21
# A shard reads the ranges that it touches: the more of them, the less is read twice at its ends.
RANGES_PER_SHARD = 8
# Places of every table at which ids are looked at, to cut the ranges; they decide the balance alone.
PEEKS, PEEK_ROWS = 16, 4_096
EVENTS_FILE, IDS_FILE = "events.safetensors", "ids.safetensors"


class Chunk(NamedTuple):
    """Some rows of the table of a kind."""

    kind: str
    first: int
    rows: int


def chunks_of(events: EventDirectory) -> list[Chunk]:
    """All tables in pieces, in the order in which ties of a store are kept."""
    found = []
    for kind in events.kinds:
        rows = events.num_rows(kind)
        found += [Chunk(kind, first, min(CHUNK_ROWS, rows - first)) for first in range(0, rows, CHUNK_ROWS)]
    return found


def edges_of(events: EventDirectory, shards: int) -> np.ndarray:
    """Ids i64 that cut all ids into ranges of about as many events: range r holds edges[r - 1] <= id < edges[r]."""
    ids = [np.zeros(0, np.int64)]
    for kind in events.kinds:
        rows, scan = events.num_rows(kind), events.scan(kind).select("client_id")
        for place in range(PEEKS):
            ids.append(scan.slice(rows * place // PEEKS, PEEK_ROWS).collect()["client_id"].to_numpy())
    seen = np.sort(np.concatenate(ids))
    ranges = RANGES_PER_SHARD * shards
    return np.unique(seen[len(seen) * np.arange(1, ranges) // ranges]) if len(seen) else seen


def partition(events: EventDirectory, chunk: Chunk, cutoff_s: int, edges: np.ndarray, folder: Path) -> None:
    """Writes the events of a chunk before the cutoff, grouped by range, and what occurs in them.

    Args:
        events: the canonical events.
        chunk: which of them.
        cutoff_s: seconds since 1970 UTC.
        edges: of the ranges, see `edges_of`.
        folder: exists.
    """
    client_id, timestamp_s, item, amounts = events.rows(chunk.kind, chunk.first, chunk.rows)
    seen = timestamp_s < cutoff_s
    relevant = events.relevant_clients
    if relevant is not None:
        seen &= KnownIds(np.sort(relevant)).find(client_id) >= 0
    client_id, timestamp_s, item = client_id[seen], timestamp_s[seen], item[seen]
    ids: dict[str, np.ndarray] = {"clients": np.unique(client_id)}
    if len(timestamp_s):
        ids["first_s"] = timestamp_s.min(keepdims=True)
    if chunk.kind in SKU_KINDS:
        skus = np.sort(events.products(["sku"])["sku"].to_numpy())
        item = places_of_skus(events, chunk.kind, KnownIds(skus), item)
        counts = np.zeros(len(skus), np.int64)
        count(item, counts)
        ids["item"] = np.flatnonzero(counts)
        ids["count"] = counts[ids["item"]]
    elif chunk.kind == "page_visit":
        urls = Numbering()
        urls.number(item, np.arange(len(item), dtype=np.int32))
        ids["item"], numbers = urls.counted(1)
        ids["count"] = urls.counts_of(numbers)
    of_range = np.searchsorted(edges, client_id, side="right").astype(np.int32)
    order = np.argsort(of_range, kind="stable")
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(np.bincount(of_range, minlength=len(edges) + 1))))
    columns = {"client_id": client_id[order], "timestamp_s": timestamp_s[order], "item": item[order]}
    columns |= {} if amounts is None else {AMOUNTS: amounts[seen][order]}
    write_arrays(folder / EVENTS_FILE, columns)
    write_arrays(folder / IDS_FILE, ids | {"offsets": offsets})


def merge(
    events: EventDirectory,
    chunks: Sequence[tuple[Chunk, Path]],
    edges: np.ndarray,
    cutoff_s: int,
    min_url_count: int,
    shards: int,
    rows_at_once: int,
    folder: Path,
) -> None:
    """Writes what a store has beside its columns of events: ids of clients and items, products, store.json.

    Args:
        events: the canonical events.
        chunks: all of them, with the folders that `partition` has filled.
        edges: of the ranges.
        cutoff_s: seconds since 1970 UTC.
        min_url_count: see `build_store`.
        shards: how many at most; there are fewer where the clients are few.
        rows_at_once: shards begin at multiples of so many clients.
        folder: exists; of the store.

    Raises:
        DataError: no event before the cutoff, or too many clients.
    """
    builder = Builder(events, folder, cutoff_s, np.zeros(0, np.int64), None, None)
    first_s, kinds, of_ranges = cutoff_s, set(), np.zeros(len(edges) + 1, np.int64)
    handles = []
    for chunk, path in chunks:
        handle = safe_open(path / IDS_FILE, "np")
        handles.append(handle)
        of_ranges += np.diff(handle.get_tensor("offsets"))
        if "first_s" in handle.keys():  # noqa: SIM118 - no dict
            first_s = min(first_s, int(handle.get_tensor("first_s")[0]))
            kinds.add(chunk.kind)
        if ITEM_COLUMN[chunk.kind] != "query":
            builder.add_counts(chunk.kind, handle.get_tensor("item"), handle.get_tensor("count"))
    if not kinds:
        raise no_history(events, cutoff_s)
    relevant = events.relevant_clients
    if relevant is None:
        client_ids = np.concatenate([np.zeros(0, np.int64), *_clients_by_range(handles, edges)])
    else:
        client_ids = np.sort(relevant)
    require_few(events, len(client_ids))
    ends = np.searchsorted(client_ids, edges)
    bounds = _bounds(np.concatenate(([0], ends, [len(client_ids)])), of_ranges, shards, rows_at_once)
    builder.write_vocabularies(min_url_count)
    save_array(folder / "client_ids.npy", client_ids)
    save_array(folder / "is_relevant.npy", np.ones(len(client_ids), bool))
    save_array(folder / "dense_skus.npy", builder.dense_skus)
    builder.header |= {"num_clients": len(client_ids), "first_timestamp_s": first_s, "all_clients": False}
    builder.header |= {"kinds": [kind for kind in EVENT_KINDS if kind in kinds], "min_url_count": min_url_count}
    builder.header |= {"target_days": events.target_days, FIRST_ROWS: bounds.tolist()}
    write_json(folder / HEADER_FILE, builder.header)


def _clients_by_range(handles: Sequence[safe_open], edges: np.ndarray) -> Iterator[np.ndarray]:
    """Ids of the clients of some ranges after the other, each once, ascending."""
    groups = np.concatenate(([np.iinfo(np.int64).min], edges[RANGES_PER_SHARD - 1 :: RANGES_PER_SHARD]))
    places = []
    for handle in handles:
        ids = handle.get_tensor("clients")
        places.append(np.append(np.searchsorted(ids, groups), len(ids)).tolist())
    for group in range(len(groups)):
        found = [np.zeros(0, np.int64)]
        for handle, at in zip(handles, places, strict=True):
            if at[group] < at[group + 1]:
                found.append(handle.get_slice("clients")[at[group] : at[group + 1]])
        yield np.unique(np.concatenate(found))


def _bounds(ends: np.ndarray, events: np.ndarray, shards: int, rows_at_once: int) -> np.ndarray:
    """First rows i64 of the shards and the number of clients: about as many events each, whole parts of clients.

    Args:
        ends: i64 [ranges + 1] rows at which ranges begin.
        events: i64 [ranges].
        shards: at most.
        rows_at_once: clients of a part.
    """
    clients = int(ends[-1])
    parts = -(-clients // rows_at_once)
    # Sums of a power of two of parts are one sum.
    step = rows_at_once << max(0, (parts // (4 * shards)).bit_length() - 1)
    wanted = events.sum() * np.arange(1, shards) / shards
    rows = np.interp(wanted, np.concatenate(([0], np.cumsum(events))), ends)
    inside = np.unique(np.round(rows / step).astype(np.int64) * step)
    return np.concatenate(([0], inside[(inside > 0) & (inside < clients)], [clients]))


def build_shard(
    store: Path, number: int, chunks: Sequence[tuple[Chunk, Path]], edges: np.ndarray, folder: Path
) -> None:
    """Writes the store of one shard.

    Args:
        store: folder that `merge` has filled.
        number: of the shard.
        chunks: all of them, with the folders that `partition` has filled.
        edges: of the ranges.
        folder: exists.
    """
    whole = load_json(store / HEADER_FILE)
    first, last = whole[FIRST_ROWS][number : number + 2]
    client_ids = np.array(load_array(store / "client_ids.npy", memory_map=True)[first:last])
    clients = KnownIds(client_ids)
    dense_skus = load_array(store / "dense_skus.npy", memory_map=True)
    urls = KnownIds(load_array(store / "url_ids.npy", memory_map=True)[FIRST_ID:])
    low, high = np.searchsorted(edges, client_ids[[0, -1]], side="right")
    time = narrowest(whole["first_timestamp_s"], whole["cutoff_s"])
    kinds, width = [], len(whole.get(AMOUNTS, ()))
    for kind in EVENT_KINDS:
        of_query = ITEM_COLUMN[kind] == "query"
        keys, items = [np.zeros(0, np.int64)], [np.zeros((0, 16), np.uint8) if of_query else np.zeros(0, np.int32)]
        amounts = [np.zeros((0, width), np.float32)] if width and kind == "product_buy" else []
        paths = [path for one, path in chunks if one.kind == kind]
        for client_id, timestamp_s, item, more in _of_ranges(paths, low, high, bool(amounts)):
            rows = clients.find(client_id)
            here = rows >= 0
            item = item[here]
            amounts += [one[here] for one in more]
            if kind == "page_visit":
                item = urls.find(item) + np.int32(FIRST_ID)
            elif not of_query:
                item = dense_skus[item]
            keys.append(keys_of(rows[here], timestamp_s[here]))
            items.append(item)
        of_kind = np.concatenate(amounts) if amounts else None
        kinds.append(sort_events(np.concatenate(keys), np.concatenate(items), 0, last - first, time, of_kind))
    _write(folder, whole | {VOCABULARY: "../.."}, client_ids, kinds)


def _of_ranges(
    paths: Sequence[Path], low: int, high: int, has_amounts: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Clients, times, items and, where there are any, amounts of the ranges low..high, chunk by chunk."""
    names = ("client_id", "timestamp_s", "item", *((AMOUNTS,) if has_amounts else ()))
    for path in paths:
        with safe_open(path / IDS_FILE, "np") as ids:
            offsets = ids.get_tensor("offsets")
        start, end = int(offsets[low]), int(offsets[high + 1])
        if start < end:
            with safe_open(path / EVENTS_FILE, "np") as columns:
                client_id, timestamp_s, item, *amounts = (columns.get_slice(name)[start:end] for name in names)
            yield client_id, timestamp_s, item, amounts


def _write(folder: Path, whole: Mapping[str, object], client_ids: np.ndarray, kinds: Sequence[Events]) -> None:
    """Columns and header of some clients of a store, whose header is given."""
    of_all = (FIRST_ROWS, "num_events", "num_empty")
    header = {name: value for name, value in whole.items() if name not in of_all} | {"num_clients": len(client_ids)}
    save_array(folder / "client_ids.npy", client_ids)
    save_array(folder / "is_relevant.npy", np.ones(len(client_ids), bool))
    number = max(len(events.timestamp_s) for events in kinds)
    row = narrowest(0, number)
    columns = {kind: events.columns for kind, events in zip(EVENT_KINDS, kinds, strict=True)}
    columns = {TIMELINE: [*spill.merge(list(kinds), [0] * len(kinds), row)], **columns}
    amounts: Sequence[str] = header.get(AMOUNTS, ())  # type: ignore[assignment]
    for name, arrays in columns.items():
        names = ["timestamp_s", "kind", "row"] if name == TIMELINE else columns_of(name, amounts)
        writer = ColumnWriter(folder, name, names, len(client_ids), len(arrays[1]))
        writer.append(*arrays)
        writer.close()
    write_json(folder / HEADER_FILE, header)


def vocabulary_files(store: Path) -> list[Path]:
    """What all shards of a store have in common."""
    patterns = ("products.*.npy", "url_ids.npy", "category_ids.npy", "*.item_counts.npy")
    return sorted(path for pattern in patterns for path in store.glob(pattern))


def shard_folder(store: Path, number: int) -> Path:
    """Where a shard lies."""
    return store / SHARDS / f"{number:05d}"


def first_rows(store: EventStore) -> list[int]:
    """Rows of all clients at which the shards begin, and the number of clients; two numbers where there are none."""
    return list(store.header.get(FIRST_ROWS, (0, store.num_clients)))


def some_clients(store: EventStore, rows: np.ndarray, folder: Path) -> None:
    """Writes the store of some clients of a sharded one.

    Args:
        store: the sharded one.
        rows: i64 ascending.
        folder: exists.
    """
    bounds = first_rows(store)
    parts: list[list[Events]] = []
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        shard = EventStore.open(shard_folder(store.path, number))
        here = rows[(rows >= first) & (rows < last)] - first
        parts.append([])
        for kind in EVENT_KINDS:
            offsets, timestamp_s, item, codes, amounts = shard.kind(kind)
            chosen, starts = end_to_end(offsets[here], offsets[here + 1])
            values = codes if item is None else item
            assert values is not None
            of_these = None if amounts is None else amounts[chosen]
            parts[-1].append(Events(starts, timestamp_s[chosen], values[chosen], of_these))
    kinds = []
    for of_kind in zip(*parts, strict=True):
        ends = np.cumsum([0, *(events.offsets[-1] for events in of_kind)])
        following = [events.offsets[1:] + start for events, start in zip(of_kind, ends[:-1], strict=True)]
        columns = (np.concatenate(column) for column in zip(*(events.columns[1:] for events in of_kind), strict=True))
        kinds.append(Events(np.concatenate([np.zeros(1, np.int64), *following]), *columns))
    _write(folder, store.header, np.asarray(store.client_ids)[rows], kinds)
    for path in vocabulary_files(store.path):
        try:
            os.link(path, folder / path.name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, folder / path.name)
