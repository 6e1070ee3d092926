"""count_features_once: the same matrices without a store."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shops import END_S, Rows, product_frame, write_rows, write_shop

from ubp_fast.events.read import EventDirectory, stored_form
from ubp_fast.events.schema import EVENT_KINDS, DataError
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import Features, SparseFeatureMatrix
from ubp_fast.features.organisers import CountsConfig, count_features, count_features_once, counts
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.ids import DIRECT_IDS

CUTOFF_S = 100 * DAY_S
# Close together and far apart: a bitmap knows the former, a hash table the latter.
CLIENTS = st.sampled_from([3, 4, 5, 260]) | st.sampled_from([-(2**63), -1, 7, 2**63 - 1])
EDGES = [CUTOFF_S - days * DAY_S + step for days in (0, 1, 3) for step in (-1, 0, 1)]
TIMES = st.sampled_from(EDGES) | st.integers(90 * DAY_S, CUTOFF_S + DAY_S)
ITEMS = st.sampled_from([0, 1, 2, DIRECT_IDS - 1, DIRECT_IDS, 2**63 - 1, -1, -(2**63)])
ROWS = st.fixed_dictionaries(
    {kind: st.lists(st.tuples(CLIENTS, TIMES, ITEMS), max_size=20) for kind in EVENT_KINDS},
)
CONFIGS = st.builds(
    CountsConfig,
    windows_days=st.sampled_from([(1, 3), (2,)]),
    top_values=st.integers(0, 3),
    anchor=st.sampled_from(["cutoff", "last_event"]),
    price_bins=st.sampled_from([0, 3]),
    dtype=st.sampled_from(["float32", "float16"]),
)


def through_store(events: EventDirectory, cutoff_s: int, config: CountsConfig, path: Path) -> Features:
    build_store(events, path, cutoff_s)
    return count_features(EventStore.open(path), cutoff_s, config)


def assert_same(one: Features | str, other: Features | str) -> None:
    """Same bytes, or the same words of an error."""
    assert type(one) is type(other)
    if isinstance(one, str):
        assert one == other
        return
    assert (one.names, one.units) == (other.names, other.units)
    for name in ("client_ids", "values", *(("indptr", "indices") if isinstance(one, SparseFeatureMatrix) else ())):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
        assert mine.tobytes() == theirs.tobytes(), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=ROWS,
    relevant=st.none() | st.lists(CLIENTS, unique=True, min_size=1),
    config=CONFIGS,
    most_dense=st.sampled_from([0, 1_000]),
    batch_rows=st.sampled_from([3, 1 << 20]),
)
def test_random_shops_give_the_bytes_of_the_store(
    rows: Rows, relevant: list[int] | None, config: CountsConfig, most_dense: int, batch_rows: int
) -> None:
    """Rows in any order, equal times, window edges, all 64-bit ids, empty kinds, dense and sparse, batches of three."""
    rows["page_visit"] = [(3, 0, 3), *rows["page_visit"]]  # the directory needs an event before its windows
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "MOST_DENSE_COLUMNS", most_dense)
        patch.setattr("ubp_fast.events.read.BATCH_ROWS", batch_rows)
        events = write_rows(Path(folder) / "events", rows, relevant)
        results = []
        for make in (count_features_once, partial(through_store, path=Path(folder) / "store")):
            try:
                results.append(make(events, CUTOFF_S, config))
            except DataError as error:
                results.append(str(error))
        assert_same(*results)


@pytest.mark.parametrize("anchor", ["cutoff", "last_event"])
def test_nothing_from_the_cutoff_on(tmp_path: Path, anchor: str) -> None:
    """Other items, times and codes from the cutoff on change no byte."""
    cutoff_s = END_S - 30 * DAY_S
    config = CountsConfig(top_values=3, anchor=anchor)
    one, other = (
        count_features_once(write_shop(tmp_path / name, scrambled_from_s=from_s), cutoff_s, config)
        for name, from_s in (("as_it_was", None), ("scrambled", cutoff_s))
    )
    assert_same(one, other)
    assert one.values.any()


@pytest.mark.parametrize("most_dense", [0, 1_000])
def test_result_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_dense: int) -> None:
    monkeypatch.setattr(counts, "MOST_DENSE_COLUMNS", most_dense)
    events = write_shop(tmp_path / "events")
    wanted = through_store(events, END_S, CountsConfig(), tmp_path / "store")
    made = count_features_once(events, END_S, CountsConfig(), tmp_path / "features")
    assert_same(made, wanted)
    assert_same(type(made).load(tmp_path / "features", memory_map=True), wanted)


def test_only_some_kinds(tmp_path: Path) -> None:
    events = write_shop(tmp_path / "events", kinds=("product_buy", "search_query"))
    matrix = count_features_once(events, END_S, CountsConfig(top_values=1))
    assert {name.split("_")[0] for name in matrix.names} == {"product", "search"}
    assert_same(matrix, through_store(events, END_S, CountsConfig(top_values=1), tmp_path / "store"))


def test_too_many_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows would not fit the keys that events are sorted by."""
    events = write_rows(tmp_path / "events", {"page_visit": [(client, 5, 2) for client in range(4)]})
    monkeypatch.setattr("ubp_fast.store.clients.MAX_CLIENTS", 4)
    count_features_once(events, 10)
    monkeypatch.setattr("ubp_fast.store.clients.MAX_CLIENTS", 3)
    for make in (count_features_once, partial(build_store, path=tmp_path / "store")):
        with pytest.raises(DataError, match="clients must be at most 3, got 4; split them"):
            make(events, cutoff_s=10)


def test_a_sku_without_properties(tmp_path: Path) -> None:
    events = write_rows(tmp_path / "events", {"add_to_cart": [(1, 5, 41), (1, 6, 7)], "page_visit": [(1, 5, 2)]})
    stored_form(product_frame([0, 7])).write_parquet(events.path / "product_properties.parquet")
    with pytest.raises(DataError, match="column 'sku' of add_to_cart must occur in the product table, got 41"):
        count_features_once(events, 10)
