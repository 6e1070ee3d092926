from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore, rows_before

Write = Callable[..., EventDirectory]


@given(st.lists(st.lists(st.integers(-5, 5), max_size=12), max_size=8), st.integers(-7, 7))
@settings(max_examples=200, deadline=None)
def test_rows_before_is_a_binary_search_per_client(lists: list[list[int]], cutoff_s: int) -> None:
    times = [sorted(times) for times in lists]
    offsets = np.concatenate([[0], np.cumsum([len(client) for client in times])]).astype(np.int64)
    flat = np.array([time for client in times for time in client], np.int64)
    expected = [int(offsets[u]) + int(np.searchsorted(client, cutoff_s)) for u, client in enumerate(times)]
    assert rows_before(offsets, flat, cutoff_s).tolist() == expected


def test_columns_are_mapped_read_only(write_events: Write, tmp_path: Path) -> None:
    events = write_events(tmp_path / "events", {"page_visit": [(1, 10, 5)]})
    build_store(events, tmp_path / "store", 100)
    store = EventStore.open(tmp_path / "store")
    assert isinstance(store.timeline.timestamp_s, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.timeline.timestamp_s[0] = 1


def test_kinds_without_rows_have_empty_columns(write_events: Write, tmp_path: Path) -> None:
    events = write_events(tmp_path / "events", {"product_buy": [(4, 10, 2)]})
    build_store(events, tmp_path / "store", 100)
    store = EventStore.open(tmp_path / "store")
    assert store.kinds == ("product_buy",)
    for kind in ("page_visit", "search_query"):
        columns = store.kind(kind)
        assert columns.offsets.tolist() == [0, 0]
        assert len(columns.timestamp_s) == 0
        assert store.rows_before(kind, 50).tolist() == [0]
    assert store.kind("search_query").codes.shape == (0, 16)  # type: ignore[union-attr]
    assert store.num_urls == 2
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'visit'"):
        store.kind("visit")


def test_open_refuses_what_is_no_store(write_events: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold store.json"):
        EventStore.open(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(DataError, match=r"must hold store.json"):
        EventStore.open(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(DataError, match="must have format 3, got 0"):
        EventStore.open(tmp_path)
    build_store(write_events(tmp_path / "events", {"page_visit": [(1, 10, 5)]}), tmp_path / "store", 100)
    (tmp_path / "store" / "url_ids.npy").unlink()
    with pytest.raises(DataError, match=r"url_ids.npy: column must exist"):
        EventStore.open(tmp_path / "store").url_ids  # noqa: B018
