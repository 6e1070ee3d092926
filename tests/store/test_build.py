from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.shops import amounts_of

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, DataError
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

Write = Callable[..., EventDirectory]
Rows = dict[str, list[tuple[int, int, int]]]
CLIENTS = st.sampled_from([-(2**63), -1, 0, 7, 2**63 - 1])
TIMES = st.integers(0, 12)
ROWS = st.fixed_dictionaries(
    {kind: st.lists(st.tuples(CLIENTS, TIMES, st.integers(0, 7)), max_size=15) for kind in EVENT_KINDS}
)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def expected_sorted(rows: list[tuple[int, int, int]], client: int, cutoff_s: int) -> list[tuple[int, int]]:
    """(time, item) of one client before the cutoff, by time; Python's sort keeps the file order of ties."""
    return sorted(((t, item) for c, t, item in rows if c == client and t < cutoff_s), key=lambda event: event[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, cutoff_s=st.integers(0, 13), relevant=st.none() | st.lists(CLIENTS, unique=True, min_size=1))
def test_equals_a_plain_reference(
    write_events: Write, rows: dict[str, list[tuple[int, int, int]]], cutoff_s: int, relevant: list[int] | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows["page_visit"] = [(0, 0, 3), *rows["page_visit"]]  # the directory needs an event before its windows
        events = write_events(Path(folder) / "events", rows, relevant)
        history = [row for kind in EVENT_KINDS for row in rows[kind] if row[1] < cutoff_s]
        clients = sorted({row[0] for row in history} if relevant is None else relevant)
        kept = [row for row in history if row[0] in clients]
        if not kept:
            with pytest.raises(DataError, match="cutoff must lie after the first event of a client"):
                build_store(events, Path(folder) / "store", cutoff_s)
            assert not (Path(folder) / "store").exists()
            return
        build_store(events, Path(folder) / "store", cutoff_s)
        store = EventStore.open(Path(folder) / "store")
        assert store.client_ids.tolist() == clients
        assert store.num_clients == len(clients)
        assert store.first_timestamp_s == min(t for _, t, _ in kept)
        check_kinds(store, rows, clients, cutoff_s)
        check_timeline(store, clients)


def check_kinds(
    store: EventStore, rows: dict[str, list[tuple[int, int, int]]], clients: list[int], cutoff_s: int
) -> None:
    for kind in EVENT_KINDS:
        columns = store.kind(kind)
        for u, client in enumerate(clients):
            inside = slice(columns.offsets[u], columns.offsets[u + 1])
            if columns.item is None:
                items = columns.codes[inside, 0].tolist()  # type: ignore[index]
            else:
                ids = store.url_ids if kind == "page_visit" else store.sku_ids
                items = ids[columns.item[inside]].tolist()
            found = list(zip(columns.timestamp_s[inside].tolist(), items, strict=True))
            assert found == expected_sorted(rows[kind], client, cutoff_s), (kind, client)
        if columns.item is not None:
            wanted = np.bincount(columns.item, minlength=store.num_urls if kind == "page_visit" else store.num_skus)
            np.testing.assert_array_equal(store.item_counts(kind), wanted)
        for earlier_s in (0, 5, cutoff_s):
            counts = store.rows_before(kind, earlier_s) - columns.offsets[:-1]
            assert counts.tolist() == [len(expected_sorted(rows[kind], c, min(earlier_s, cutoff_s))) for c in clients]


def check_timeline(store: EventStore, clients: list[int]) -> None:
    timeline = store.timeline
    for u in range(len(clients)):
        merged = []
        for index, kind in enumerate(EVENT_KINDS):
            columns = store.kind(kind)
            for row in range(columns.offsets[u], columns.offsets[u + 1]):
                merged.append((int(columns.timestamp_s[row]), index + 1, row))
        inside = slice(timeline.offsets[u], timeline.offsets[u + 1])
        columns_of = (timeline.timestamp_s, timeline.kind, timeline.row)
        assert list(zip(*(column[inside].tolist() for column in columns_of), strict=True)) == sorted(merged)
    counts = sum(store.rows_before(kind, 5) - store.kind(kind).offsets[:-1] for kind in EVENT_KINDS)
    np.testing.assert_array_equal(store.rows_before("timeline", 5) - timeline.offsets[:-1], counts)


def test_dtypes(write_events: Write, tmp_path: Path) -> None:
    rows = {kind: [(3, 5, 2), (1, 4, 2)] for kind in EVENT_KINDS}
    build_store(write_events(tmp_path / "events", rows), tmp_path / "store", 100)
    store = EventStore.open(tmp_path / "store")
    timeline, products, visits = store.timeline, store.products, store.kind("page_visit")
    assert [column.dtype for column in timeline] == [np.int64, np.int32, np.uint8, np.int32]
    assert [column.dtype for column in products] == [np.int64, np.int32, np.int32, np.uint8]
    assert visits.item is not None
    assert visits.item.dtype == np.int32
    assert store.client_ids.dtype == store.url_ids.dtype == store.category_ids.dtype == np.int64


@pytest.mark.parametrize(
    ("first_s", "last_s", "dtype"),
    [
        (-(2**31), 2**31 - 2, np.int32),
        (-(2**31) - 1, 5, np.int64),  # 1901
        (5, 2**31 - 1, np.int64),  # the cutoff after it no longer fits
        (5, 2**32 + 5, np.int64),
    ],
)
def test_times_take_eight_bytes_where_four_are_too_few(
    write_events: Write, tmp_path: Path, first_s: int, last_s: int, dtype: type
) -> None:
    rows = {kind: [(3, last_s, 2), (1, first_s, 2), (3, first_s, 4)] for kind in EVENT_KINDS}
    build_store(write_events(tmp_path / "events", rows, [1, 3]), tmp_path / "store", last_s + 1)
    store = EventStore.open(tmp_path / "store")
    assert {store.timeline.timestamp_s.dtype, *(store.kind(kind).timestamp_s.dtype for kind in EVENT_KINDS)} == {
        np.dtype(dtype)
    }
    assert store.first_timestamp_s == first_s
    check_kinds(store, rows, [1, 3], last_s + 1)
    check_timeline(store, [1, 3])


def test_products_by_dense_id(write_events: Write, tmp_path: Path) -> None:
    rows = {"product_buy": [(1, 5, 30), (1, 6, 10)], "add_to_cart": [(2, 50, 20), (1, 2, 40)]}
    build_store(write_events(tmp_path / "events", rows), tmp_path / "store", 10)
    store = EventStore.open(tmp_path / "store")
    assert store.sku_ids.tolist() == [-1, -1, 10, 30, 40]  # 20 comes after the cutoff
    assert store.category_ids[store.products.category[2:]].tolist() == [1001, 1000, 1001]
    assert store.products.price.tolist() == [0, 1, 70 + 2, 10 + 2, 80 + 2]
    assert store.products.name[:, 0].tolist() == [0, 0, 10, 30, 40]
    assert store.products.category[:2].tolist() == [0, 1]
    assert (store.num_skus, store.num_categories, store.num_prices) == (5, 4, 83)


def test_rare_urls_are_unknown(write_events: Write, tmp_path: Path) -> None:
    visits = [(1, time, url) for time, url in enumerate([5, 5, 5, 9, 9, 7])] + [(1, 50, 9)]
    build_store(write_events(tmp_path / "events", {"page_visit": visits}), tmp_path / "store", 10, min_url_count=3)
    store = EventStore.open(tmp_path / "store")
    assert store.url_ids.tolist() == [-1, -1, 5]
    assert store.kind("page_visit").item.tolist() == [2, 2, 2, 1, 1, 1]  # type: ignore[union-attr]
    assert store.item_counts("page_visit").tolist() == [0, 3, 3]


def test_visits_of_clients_without_a_profile_make_no_url_frequent(write_events: Write, tmp_path: Path) -> None:
    visits = [(1, time, url) for time, url in enumerate([5, 5, 9, 2**62])] + [(2, 5, 9), (2, 6, 9), (2, 7, 2**62)]
    events = write_events(tmp_path / "events", {"page_visit": visits}, relevant=[1])
    build_store(events, tmp_path / "store", 10, min_url_count=2, all_clients=True)
    store = EventStore.open(tmp_path / "store")
    assert store.url_ids.tolist() == [-1, -1, 5]
    assert store.kind("page_visit").item.tolist() == [2, 2, 1, 1, 1, 1, 1]  # type: ignore[union-attr]
    assert store.item_counts("page_visit").tolist() == [0, 5, 2]


def test_clients_without_events_keep_a_row(write_events: Write, tmp_path: Path) -> None:
    events = write_events(tmp_path / "events", {"page_visit": [(5, 1, 1), (8, 1, 1)]}, relevant=[9, 5, 2])
    build_store(events, tmp_path / "store", 10)
    store = EventStore.open(tmp_path / "store")
    assert store.client_ids.tolist() == [2, 5, 9]
    assert store.timeline.offsets.tolist() == [0, 0, 1, 1]


def test_all_clients_keeps_those_that_need_no_profile(write_events: Write, tmp_path: Path) -> None:
    buys = [(3, 1, 0), (9, 2, 1), (11, 8, 0)]
    events = write_events(tmp_path / "events", {"product_buy": buys}, relevant=[9, 4])
    for all_clients, ids, relevant in ((False, [4, 9], [True, True]), (True, [3, 4, 9], [False, True, True])):
        build_store(events, tmp_path / f"store-{all_clients}", 5, all_clients=all_clients)
        store = EventStore.open(tmp_path / f"store-{all_clients}")
        assert store.client_ids.tolist() == ids
        assert store.is_relevant.tolist() == relevant


def test_nothing_after_the_cutoff_matters(write_events: Write, tmp_path: Path) -> None:
    """Every event at or after the cutoff is changed, added or removed: the files have the same bytes."""
    rng = np.random.default_rng(0)
    cutoff_s = 60
    rows = {kind: [tuple(row) for row in rng.integers(0, 100, (200, 3)).tolist()] for kind in EVENT_KINDS}
    changed = {
        kind: [row if row[1] < cutoff_s else (row[0] + 300, row[1] + 1, row[2] + 500) for row in table] + [(1, 60, 77)]
        for kind, table in rows.items()
    }
    rows["remove_from_cart"], changed["remove_from_cart"] = [], [(1, 70, 3)]  # not even which kinds there are
    changed["search_query"] = [row for row in changed["search_query"] if row[1] < 90]
    build_store(write_events(tmp_path / "events_a", rows), tmp_path / "a", cutoff_s)
    build_store(write_events(tmp_path / "events_b", changed), tmp_path / "b", cutoff_s)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    earlier = dict(rows, page_visit=[(1, 59, 3), *rows["page_visit"]])
    build_store(write_events(tmp_path / "events_c", earlier), tmp_path / "c", cutoff_s)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_progress(write_events: Write, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    events = write_events(tmp_path / "events", {"page_visit": [(1, 1, 1)]})
    build_store(events, tmp_path / "store", 10, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 4) for done in range(1, 5)]  # a batch of two kinds each, vocabularies, one block


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three rows, spilled two by two, blocks of one or two clients."""
    monkeypatch.setattr("ubp_fast.events.read.BATCH_ROWS", 3)
    monkeypatch.setattr("ubp_fast.store.spill.RUN_EVENTS", 6)
    monkeypatch.setattr("ubp_fast.store.build.BLOCK_EVENTS", 20)


def random_rows(seed: int, count: int = 200) -> Rows:
    """Unsorted rows of ten clients at 100 times, of all kinds; urls below 2^25, above, and negative."""
    rng = np.random.default_rng(seed)
    rows: Rows = {kind: [tuple(row) for row in rng.integers(0, 100, (count, 3)).tolist()] for kind in EVENT_KINDS}
    far = {0: 2**25, 1: 2**62, 2: -(2**63)}
    rows["page_visit"] = [(c, t, item + far.get(item % 5, 0)) for c, t, item in rows["page_visit"]]
    return {kind: [(c // 10 * 7, t, item) for c, t, item in table] for kind, table in rows.items()}


BOTH = ("quantity", "spend")


@pytest.mark.parametrize("amounts", [(), ("spend",), BOTH])
def test_same_bytes_in_small_steps(
    write_events: Write, tmp_path: Path, request: pytest.FixtureRequest, amounts: tuple[str, ...]
) -> None:
    events = write_events(tmp_path / "events", random_rows(0), amounts=amounts)
    for least in (1, 4):
        build_store(events, tmp_path / f"a{least}", 90, min_url_count=least)
    request.getfixturevalue("small_steps")
    for least in (1, 4):
        build_store(events, tmp_path / f"b{least}", 90, min_url_count=least)
        assert contents(tmp_path / f"a{least}") == contents(tmp_path / f"b{least}")
    check_kinds(EventStore.open(tmp_path / "b1"), random_rows(0), list(range(0, 70, 7)), 90)
    assert 2 < EventStore.open(tmp_path / "b4").num_urls < EventStore.open(tmp_path / "b1").num_urls
    check_amounts(EventStore.open(tmp_path / "b1"), random_rows(0)["product_buy"], amounts, 90)


def check_amounts(store: EventStore, rows: list[tuple[int, int, int]], amounts: tuple[str, ...], cutoff_s: int) -> None:
    """Every purchase has the amounts of its row in the file; other kinds have none."""
    assert store.amounts == amounts and (("amounts" in store.header) is bool(amounts))
    assert all(store.kind(kind).amounts is None for kind in EVENT_KINDS[1:])
    found = store.kind("product_buy").amounts
    if not amounts:
        assert found is None
        return
    of_row = amounts_of(len(rows), amounts)
    order = sorted((client, time, row) for row, (client, time, _) in enumerate(rows) if time < cutoff_s)
    assert found is not None and found.dtype == np.float32 and len(order) > 100
    np.testing.assert_array_equal(found, of_row[[row for _, _, row in order]])


def test_a_store_without_amounts_is_that_of_older_versions(write_events: Write, tmp_path: Path) -> None:
    """Files and header alike: what was built before stays readable, and is built again to the same bytes."""
    build_store(write_events(tmp_path / "events", random_rows(4)), tmp_path / "store", 90)
    build_store(write_events(tmp_path / "priced", random_rows(4), amounts=BOTH), tmp_path / "more", 90)
    plain, priced = contents(tmp_path / "store"), contents(tmp_path / "more")
    assert priced.keys() - plain.keys() == {"product_buy.amounts.npy"}
    assert {name for name in plain if plain[name] != priced[name]} == {"store.json"}


def test_long_histories_out_of_order(write_events: Write, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = {
        kind: [(client, int(t), n % 7) for n, t in enumerate(rng.integers(0, 50, 300))]
        for client, kind in enumerate(EVENT_KINDS)
    }
    build_store(write_events(tmp_path / "events", rows), tmp_path / "store", 40)
    store = EventStore.open(tmp_path / "store")
    check_kinds(store, rows, list(range(len(EVENT_KINDS))), 40)
    check_timeline(store, list(range(len(EVENT_KINDS))))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(("relevant", "all_clients"), [(None, False), ([0, 14, 999], False), ([0, 999], True)])
@pytest.mark.parametrize("base_cutoff_s", [1, 40, 89, 90])
@pytest.mark.parametrize("amounts", [(), BOTH])
def test_another_day_on_a_base_gives_the_same_bytes(
    write_events: Write,
    tmp_path: Path,
    relevant: list[int] | None,
    all_clients: bool,
    base_cutoff_s: int,
    amounts: tuple[str, ...],
) -> None:
    rows = random_rows(1) | {"remove_from_cart": [(777, 80, 5)]}  # a client, a sku and a kind of the last days only
    events = write_events(tmp_path / "events", rows, relevant, amounts)
    build_store(events, tmp_path / "base", base_cutoff_s, all_clients=all_clients)
    base = EventStore.open(tmp_path / "base")
    build_store(events, tmp_path / "more", 90, all_clients=all_clients, base=base)
    build_store(events, tmp_path / "whole", 90, all_clients=all_clients)
    assert contents(tmp_path / "more") == contents(tmp_path / "whole")


def test_a_base_spares_reading_what_it_holds(write_events: Write, tmp_path: Path) -> None:
    rows = {"page_visit": [(1, 5, 1), (2, 6, 2), (1, 20, 3)]}
    build_store(write_events(tmp_path / "events", rows), tmp_path / "base", 10)
    later = write_events(tmp_path / "later", {"page_visit": [(1, 5, 8), (1, 20, 3)]})
    build_store(later, tmp_path / "more", 30, base=EventStore.open(tmp_path / "base"))
    check_kinds(EventStore.open(tmp_path / "more"), {key: rows.get(key, []) for key in EVENT_KINDS}, [1, 2], 30)


def test_a_base_that_does_not_fit(write_events: Write, tmp_path: Path) -> None:
    events = write_events(tmp_path / "events", {"page_visit": [(1, 5, 1), (2, 6, 2)]}, relevant=[1])
    build_store(events, tmp_path / "base", 10)
    build_store(events, tmp_path / "rare", 10, min_url_count=2)
    base, rare = EventStore.open(tmp_path / "base"), EventStore.open(tmp_path / "rare")
    with pytest.raises(ValueError, match="base must have a cutoff up to 9, got 10"):
        build_store(events, tmp_path / "more", 9, base=base)
    for store, arguments in ((base, {"all_clients": True}), (base, {"min_url_count": 2}), (rare, {"min_url_count": 2})):
        with pytest.raises(ValueError, match="base must have the same all_clients and min_url_count = 1"):
            build_store(events, tmp_path / "more", 20, base=store, **arguments)
    other = write_events(tmp_path / "other", {"page_visit": [(1, 5, 1), (2, 6, 2)]}, relevant=[1, 2])
    priced = write_events(tmp_path / "priced", {"page_visit": [(1, 5, 1)]}, relevant=[1], amounts=("spend",))
    with pytest.raises(ValueError, match=r"base must have the amounts of the events, \['spend'\], got \[\]"):
        build_store(priced, tmp_path / "more", 20, base=base)
    with pytest.raises(ValueError, match="base must hold the relevant clients, got others"):
        build_store(other, tmp_path / "more", 20, base=base)
    assert not (tmp_path / "more").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import ubp_fast.events.read, ubp_fast.store.build, ubp_fast.store.spill
from ubp_fast.events.read import EventDirectory

ubp_fast.events.read.BATCH_ROWS, ubp_fast.store.spill.RUN_EVENTS, ubp_fast.store.build.BLOCK_EVENTS = 3, 6, 20

def kill(done, total):
    if done == int(sys.argv[3]) * total // 4:
        os.kill(os.getpid(), signal.SIGKILL)

ubp_fast.store.build.build_store(EventDirectory.open(sys.argv[1]), Path(sys.argv[2]), 90, progress=kill)
"""


@pytest.mark.parametrize("quarter", [1, 3, 4])
def test_killed_while_building(write_events: Write, tmp_path: Path, quarter: int) -> None:
    """While events are spilled, while columns are written, and just before the store appears."""
    events = write_events(tmp_path / "events", random_rows(2, 60))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-c", KILLED, str(events.path), str(tmp_path / "store"), str(quarter)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    assert (tmp_path / ".store.partial").exists()
    build_store(events, tmp_path / "store", 90)
    build_store(events, tmp_path / "again", 90)
    assert contents(tmp_path / "store") == contents(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "events", "store"]


def test_duplicate_relevant_clients(write_events: Write, tmp_path: Path) -> None:
    events = write_events(tmp_path / "events", {"page_visit": [(5, 1, 1)]}, relevant=[5, 6, 5])
    with pytest.raises(DataError, match=r"relevant_clients.npy: .* got 5 \(seen before\) in row 2"):
        build_store(events, tmp_path / "store", 10)
    assert not (tmp_path / "store").exists()
