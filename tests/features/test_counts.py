"""count_features: the organisers' columns from the store, dense or sparse, in memory or in a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ubp_fast.events.read import EventDirectory, stored_form
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.events.split import DAY_S
from ubp_fast.features import popular, writing
from ubp_fast.features.matrix import FeatureMatrix, SparseFeatureMatrix
from ubp_fast.features.organisers import CountsConfig, count_features
from ubp_fast.features.organisers.counts import MOST_DENSE_COLUMNS
from ubp_fast.features.writing import in_client_blocks
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
WIDE = CountsConfig(windows_days=(1, 7, 14, 30, 60, 90), top_values=100)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("events")
    Challenge(dir=str(GOLDEN / "small")).prepare(directory)
    return EventDirectory.open(directory)


def store_of(events: EventDirectory, path: Path, cutoff_s: int | None = None) -> EventStore:
    build_store(events, path, events.split.input_end_s if cutoff_s is None else cutoff_s)
    return EventStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    directory = tmp_path_factory.mktemp("shop") / "events"
    Synthetic(clients=150, days=70, skus=300, categories=20, urls=400, seed=3).prepare(directory)
    return store_of(EventDirectory.open(directory), tmp_path_factory.mktemp("store") / "store")


def test_the_golden_columns_from_the_store(golden: EventDirectory, tmp_path: Path) -> None:
    """Anchored at the last events these are the organisers' numbers of sorted files, but for ties in their lists."""
    theirs = np.load(GOLDEN / "c_baseline_time_sorted.npz")
    tops = json.loads((GOLDEN / "c_baseline_time_sorted.json").read_text())["top_values_in_column_order"]
    names: list[str] = []
    for kind in ("product_buy", "add_to_cart", "remove_from_cart", "page_visit"):
        lists = [f"{column}_{value}" for column, values in tops[kind].items() for value in values]
        names += [f"{kind}_count", *(f"{kind}_{name}_{days}d" for days in (1, 7, 30) for name in lists)]
    store = store_of(golden, tmp_path / "store")
    ours = count_features(store, store.cutoff_s, CountsConfig(anchor="last_event"))
    assert isinstance(ours, FeatureMatrix)
    assert ours.shape[1] == theirs["embeddings"].shape[1] == 320
    rows = np.searchsorted(ours.client_ids, theirs["client_ids"])
    np.testing.assert_array_equal(ours.client_ids[rows], theirs["client_ids"])
    shared = [name for name in names if name in ours.names]
    assert len(shared) > 280
    for name in shared:
        one, other = ours.values[rows, ours.names.index(name)], theirs["embeddings"][:, names.index(name)]
        np.testing.assert_array_equal(one.astype(np.float16), other, err_msg=name)
    assert not np.delete(ours.values, rows, axis=0).any(), "clients without events are zeros"


@st.composite
def shops(draw: st.DrawFn) -> tuple[dict[str, pl.DataFrame], pl.DataFrame, list[int]]:
    """Tables of visits and purchases with ids near 2^63, equal times, events on window edges, a client with all."""
    largest = 2**63 - 1
    clients = sorted({largest, largest - 1, *draw(st.lists(st.integers(0, 5), max_size=3))})
    skus = [largest, largest - 7, 3]
    edge = st.sampled_from([100 * DAY_S - days * DAY_S + step for days in (0, 1, 3) for step in (-1, 0, 1)])
    time = st.one_of(edge, st.integers(90 * DAY_S, 101 * DAY_S))
    who = st.just(clients[0]) if draw(st.booleans()) else st.sampled_from(clients)
    tables = {}
    for kind, item in (("product_buy", "sku"), ("page_visit", "url")):
        rows = draw(st.lists(st.tuples(who, time, st.sampled_from(skus)), max_size=25))
        schema = {"client_id": pl.Int64, "timestamp_s": pl.Int64, item: pl.Int64}
        tables[kind] = pl.DataFrame(rows, schema=schema, orient="row").sort("timestamp_s", maintain_order=True)
    products = pl.DataFrame({"sku": skus, "category": [largest, 5, 5], "price": [3, 3, 99]})
    return tables, products, clients


def write(shop: tuple[dict[str, pl.DataFrame], pl.DataFrame, list[int]], source: EventDirectory, path: Path) -> None:
    """A canonical directory: the tables of the shop, everything else from another one."""
    tables, products, clients = shop
    path.mkdir()
    for kind, table in tables.items():
        table.write_parquet(path / f"{kind}.parquet")
    names = source.products()["name"].head(len(products))
    stored_form(products.with_columns(names.alias("name"))).write_parquet(path / "product_properties.parquet")
    np.save(path / "relevant_clients.npy", np.array(clients))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shop=shops())
def test_random_shops_equal_plain_polars(
    shop: tuple, store: EventStore, golden: EventDirectory, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, cutoff_s = tmp_path_factory.mktemp("random") / "events", 100 * DAY_S
    write(shop, golden, path)
    tables, products, clients = shop
    before = {kind: table.filter(pl.col("timestamp_s") < cutoff_s) for kind, table in tables.items()}
    if not sum(map(len, before.values())):
        return
    events = EventDirectory(path, tuple(tables), golden.split, golden.info)
    small = store_of(events, path.parent / "store", 101 * DAY_S)
    matrix = count_features(small, cutoff_s, CountsConfig(windows_days=(1, 3), top_values=2))
    assert isinstance(matrix, FeatureMatrix)
    assert matrix.client_ids.tolist() == clients
    wanted: dict[str, list[int]] = {}
    for kind in small.kinds:
        table = before[kind].join(products, left_on="sku", right_on="sku") if kind == "product_buy" else before[kind]
        wanted[f"{kind}_count"] = [table.filter(pl.col("client_id") == client).height for client in clients]
        for days in (1, 3):
            inside = table.filter(pl.col("timestamp_s") >= cutoff_s - days * DAY_S)
            for column in table.columns[2:]:
                top = table.group_by(column).len().sort(["len", column], descending=[True, False]).head(2)
                for value in top[column].to_list():
                    rows = inside.filter(pl.col(column) == value)
                    wanted[f"{kind}_{column}_{value}_{days}d"] = [
                        rows.filter(pl.col("client_id") == client).height for client in clients
                    ]
    assert matrix.names == tuple(wanted)
    np.testing.assert_array_equal(matrix.values, np.array(list(wanted.values()), np.float32).T)


def test_sparse_above_a_thousand_columns(store: EventStore, tmp_path: Path) -> None:
    sparse = count_features(store, store.cutoff_s, WIDE, tmp_path / "sparse")
    assert isinstance(sparse, SparseFeatureMatrix)
    assert sparse.shape[1] > MOST_DENSE_COLUMNS
    narrow = count_features(store, store.cutoff_s, CountsConfig(windows_days=(7,), top_values=100))
    assert isinstance(narrow, FeatureMatrix)
    columns = [sparse.names.index(name) for name in narrow.names]
    np.testing.assert_array_equal(sparse.rows(slice(None))[:, columns], narrow.values)
    loaded = SparseFeatureMatrix.load(tmp_path / "sparse", memory_map=True)
    np.testing.assert_array_equal(loaded.rows(slice(20, 90)), sparse.rows(slice(None))[20:90])
    assert (loaded.names, loaded.units) == (sparse.names, sparse.units)
    assert isinstance(loaded.values, np.memmap)
    for row in range(sparse.shape[0]):
        assert (np.diff(sparse.indices[sparse.indptr[row] : sparse.indptr[row + 1]]) > 0).all()


def test_sparse_matrices_that_do_not_fit() -> None:
    ids, indptr, indices = np.array([1, 2]), np.array([0, 1, 2]), np.array([0, 1], np.int32)
    values = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="indptr must end 2 rows at 2 entries, got 1 rows and 2 entries"):
        SparseFeatureMatrix(ids, np.array([0, 2]), indices, values, ("a", "b"), ("", ""))
    with pytest.raises(ValueError, match=r"indices must lie in 0..0, got 0..1"):
        SparseFeatureMatrix(ids, indptr, indices, values, ("a",), ("",))
    with pytest.raises(ValueError, match="values must be as many as indices"):
        SparseFeatureMatrix(ids, indptr, indices, values[:1], ("a", "b"), ("", ""))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_file_and_memory_hold_the_same(store: EventStore, tmp_path: Path, dtype: str, threads: int) -> None:
    wanted = count_features(store, store.cutoff_s)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made = count_features(store, store.cutoff_s, CountsConfig(dtype=dtype), tmp_path)
    finally:
        torch.set_num_threads(before)
    loaded = FeatureMatrix.load(tmp_path, memory_map=True)
    for matrix in (made, loaded):
        assert isinstance(matrix, FeatureMatrix)
        assert isinstance(matrix.values, np.memmap)
        assert matrix.values.dtype == dtype
        np.testing.assert_array_equal(matrix.values, wanted.values.astype(dtype))
        assert (matrix.names, matrix.units) == (wanted.names, wanted.units)
    assert {file.name for file in tmp_path.iterdir()} == {"client_ids.npy", "values.npy", "names.json"}


@pytest.mark.parametrize("in_file", [False, True])
def test_blocks_and_float16_without_infinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool) -> None:
    monkeypatch.setattr(writing, "BLOCK_CLIENTS", 3)
    monkeypatch.setattr(writing, "SMALLEST_BLOCK", 3)
    ids = np.arange(10)

    def fill(block: np.ndarray, first: int, last: int) -> None:
        assert not block.any(), "a block begins with zeros"
        block[:, 0] = ids[first:last]
        block[:, 1] = (-1.0) ** ids[first:last] * 70_000

    matrix = in_client_blocks(ids, ("a", "b"), ("", ""), fill, tmp_path if in_file else None, "float16")
    np.testing.assert_array_equal(matrix.values[:, 0], ids)
    np.testing.assert_array_equal(matrix.values[:, 1], np.tile([65_504, -65_504], 5))


def test_nothing_from_the_cutoff_on(store: EventStore, golden: EventDirectory, tmp_path: Path) -> None:
    """A store that ends at the cutoff gives the same as a later one, for both anchors."""
    cutoff_s = golden.split.input_end_s - 10 * DAY_S
    early, late = store_of(golden, tmp_path / "early", cutoff_s), store_of(golden, tmp_path / "late")
    for anchor in ("cutoff", "last_event"):
        one, other = (count_features(each, cutoff_s, CountsConfig(anchor=anchor)) for each in (early, late))
        assert one.names == other.names
        np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows_days": ()}, "windows_days must be > 0 and ascending"),
        ({"windows_days": (7, 1)}, "windows_days must be > 0 and ascending"),
        ({"top_values": -1}, "top_values must be >= 0, got -1"),
        ({"anchor": "today"}, "anchor must be one of"),
        ({"price_bins": 101}, "price_bins must be in 0..100, got 101"),
        ({"dtype": "float64"}, "dtype must be one of"),
    ],
)
def test_bad_configurations(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CountsConfig(**change)


def test_a_store_has_no_file_order(store: EventStore) -> None:
    with pytest.raises(ValueError, match="anchor must be 'cutoff' or 'last_event', got 'file_order'"):
        count_features(store, store.cutoff_s, CountsConfig(anchor="file_order"))


@pytest.mark.parametrize("number", [0, 1, 3, 10, 6_000])
def test_largest_counts_in_many_chunks(number: int) -> None:
    """More values than chunks, ties across chunks, empty chunks; ties go to the smaller original id."""
    random = np.random.default_rng(1)
    counts = random.integers(0, 30, 5_000) * (random.random(5_000) < 0.3)
    counts[3_000:] = 0
    counts[:2] = 100
    originals = random.permutation(5_000)
    real = [index for index in range(2, 5_000) if counts[index]]
    wanted = sorted(real, key=lambda index: (-counts[index], originals[index]))[:number]
    assert popular._largest(counts, originals, number).tolist() == wanted
