"""A sharded store: its shards end to end are the store that one pass builds, whatever their number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, DataError
from ubp_fast.store import shards
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import TIMELINE, EventStore

Write = Callable[..., EventDirectory]
CUTOFF_S = 90


@pytest.fixture(params=["everybody", "relevant"])
def events(request: pytest.FixtureRequest, write_events: Write, tmp_path: Path) -> EventDirectory:
    """Times repeat, ids are far apart, kinds differ in size, and one has nothing before the cutoff."""
    random = np.random.default_rng(0)
    ids = np.unique(random.integers(-(2**40), 2**40, 60))
    rows = {
        kind: list(
            zip(
                ids[random.integers(0, len(ids), number) ** 2 // len(ids)].tolist(),
                random.integers(first_s, 100, number).tolist(),
                random.integers(0, 7, number).tolist(),
                strict=True,
            )
        )
        for kind, number, first_s in zip(EVENT_KINDS, (300, 200, 20, 700, 100), (0, 0, 95, 0, 3), strict=True)
    }
    relevant = None if request.param == "everybody" else sorted({*ids[::2].tolist(), 2**50})
    amounts = ("quantity", "spend") if request.param == "relevant" else ()
    return write_events(tmp_path / "events", rows, relevant, amounts)


def sharded(events: EventDirectory, path: Path, number: int, min_url_count: int = 1) -> EventStore:
    """Built shard by shard."""
    path.mkdir()
    edges, chunks = shards.edges_of(events, number), []
    for place, chunk in enumerate(shards.chunks_of(events)):
        folder = path / f"chunk-{place}"
        folder.mkdir()
        shards.partition(events, chunk, CUTOFF_S, edges, folder)
        chunks.append((chunk, folder))
    shards.merge(events, chunks, edges, CUTOFF_S, min_url_count, number, 4, path)
    for shard in range(len(shards.first_rows(EventStore.open(path))) - 1):
        folder = shards.shard_folder(path, shard)
        folder.mkdir(parents=True)
        shards.build_shard(path, shard, chunks, edges, folder)
    return EventStore.open(path)


def columns_of(store: EventStore) -> dict[str, np.ndarray]:
    """Columns of events without the offsets; rows of the timeline counted from those of the first client."""
    found = {"length": np.diff(store.timeline.offsets), "client_ids": store.client_ids}
    found |= {f"timeline.{name}": column for name, column in store.timeline._asdict().items() if name != "offsets"}
    for kind in EVENT_KINDS:
        offsets, timestamp_s, item, codes, amounts = store.kind(kind)
        found |= {f"{kind}.length": np.diff(offsets), f"{kind}.time": timestamp_s}
        found[f"{kind}.item"] = codes if item is None else item
        found |= {} if amounts is None else {f"{kind}.amounts": amounts}
    return found


@pytest.mark.parametrize("number", [1, 3, 8])
@pytest.mark.parametrize("min_url_count", [1, 110])
def test_shards_are_the_rows_of_one_pass(
    events: EventDirectory, number: int, min_url_count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK_ROWS", 64)
    build_store(events, tmp_path / "whole", CUTOFF_S, min_url_count)
    whole, store = EventStore.open(tmp_path / "whole"), sharded(events, tmp_path / "store", number, min_url_count)
    bounds = shards.first_rows(store)
    assert number - 2 <= len(bounds) - 1 <= number and not np.any(np.array(bounds[:-1]) % 4)
    assert {name: store.header[name] for name in whole.header} == whole.header
    for path in [*shards.vocabulary_files(whole.path), whole.path / "client_ids.npy"]:
        assert (store.path / path.name).read_bytes() == path.read_bytes(), path.name
    parts = []
    for shard in range(len(bounds) - 1):
        parts.append(EventStore.open(shards.shard_folder(store.path, shard)))
        assert parts[-1].header == {
            **whole.header,
            "num_clients": bounds[shard + 1] - bounds[shard],
            "vocabulary": "../..",
        }
        np.testing.assert_array_equal(parts[-1].url_ids, whole.url_ids)
    found, rows = [columns_of(part) for part in parts], np.zeros(len(EVENT_KINDS), np.int64)
    for part, columns in zip(parts, found, strict=True):
        columns[f"{TIMELINE}.row"] = columns[f"{TIMELINE}.row"] + rows[columns[f"{TIMELINE}.kind"] - 1]
        rows += [len(part.kind(kind).timestamp_s) for kind in EVENT_KINDS]
    assert (f"{EVENT_KINDS[0]}.amounts" in found[0]) is bool(events.amounts)
    for name, column in columns_of(whole).items():
        together = np.concatenate([columns[name] for columns in found])
        np.testing.assert_array_equal(together, column, err_msg=name)
    sizes = [len(part.timeline.row) for part in parts]
    assert number > 3 or min(sizes) > sum(sizes) / (4 * number), "shards have about as many events each"


def test_clients_of_several_shards_make_a_store(events: EventDirectory, tmp_path: Path) -> None:
    build_store(events, tmp_path / "whole", CUTOFF_S)
    whole, store = EventStore.open(tmp_path / "whole"), sharded(events, tmp_path / "store", 3)
    rows = np.arange(1, store.num_clients, 3)
    (tmp_path / "some").mkdir()
    shards.some_clients(store, rows, tmp_path / "some")
    some = EventStore.open(tmp_path / "some")
    np.testing.assert_array_equal(some.client_ids, whole.client_ids[rows])
    for kind in EVENT_KINDS:
        (mine, times, *items), (all_of, all_times, *all_items) = some.kind(kind), whole.kind(kind)
        for place, row in enumerate(rows):
            here, there = slice(*mine[place : place + 2]), slice(*all_of[row : row + 2])
            np.testing.assert_array_equal(times[here], all_times[there])
            for values, others in zip(items, all_items, strict=True):
                if values is not None:
                    np.testing.assert_array_equal(values[here], others[there])


def test_nothing_before_the_cutoff(write_events: Write, tmp_path: Path) -> None:
    events = write_events(tmp_path / "events", {"page_visit": [(1, 95, 1)]})
    with pytest.raises(DataError, match="cutoff must lie after the first event of a client"):
        sharded(events, tmp_path / "store", 2)
