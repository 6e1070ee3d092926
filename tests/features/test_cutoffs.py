"""Features at a cutoff: against counts made row by row, named columns, nothing from the cutoff on, any set of kinds."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.read import EventDirectory, stored_form
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.events.split import DAY_S
from ubp_fast.features.aggregated import AggregatedConfig, aggregated_features
from ubp_fast.features.decayed import DecayedConfig, decayed_features
from ubp_fast.features.matrix import Features
from ubp_fast.features.static import static_features
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

ACTIVITY = DecayedConfig(activity_half_lives_days=(2.0, 60.0))
Lists = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("shop") / "events"
    Synthetic(clients=60, days=70, skus=40, categories=8, urls=50, seed=3).prepare(directory)
    return EventDirectory.open(directory)


@pytest.fixture(scope="module")
def store(events: EventDirectory, tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    path = tmp_path_factory.mktemp("store") / "store"
    build_store(events, path, events.split.input_end_s)
    return EventStore.open(path)


@pytest.fixture(scope="module")
def lists(events: EventDirectory) -> Lists:
    products = events.products()
    skus = products["sku"].head(7).to_numpy()
    categories = products["category"].unique().sort().to_numpy()
    unseen = np.array([2**62], np.int64)
    return {
        "propensity_category": (np.concatenate((categories, unseen)), np.ones(len(categories) + 1)),
        "propensity_new_sku": (skus, np.ones(7)),
        "propensity_price": (np.arange(100), np.ones(100)),
    }


def table(events: EventDirectory, kind: str, cutoff_s: int) -> pl.DataFrame:
    frame = events.frame(kind).filter(pl.col("timestamp_s") < cutoff_s)
    return frame.join(events.products(), on="sku", how="left") if "sku" in frame.columns else frame


def column(matrix: Features, name: str) -> np.ndarray:
    return matrix.rows(slice(None))[:, matrix.names.index(name)]


def per_client(matrix: Features, frame: pl.DataFrame, value: pl.Expr) -> np.ndarray:
    """`value` per client in the order of the matrix, 0 for clients without rows."""
    grouped = dict(frame.group_by("client_id").agg(value.alias("value")).iter_rows())
    return np.array([grouped.get(client) or 0 for client in matrix.client_ids.tolist()], np.float32)


@pytest.mark.parametrize("earlier_days", [0, 14])
def test_static_features_equal_group_bys(events: EventDirectory, store: EventStore, earlier_days: int) -> None:
    cutoff_s = store.cutoff_s - earlier_days * DAY_S
    matrix = static_features(store, cutoff_s)
    assert matrix.shape == (store.num_clients, 46)
    tables = {
        short: table(events, kind, cutoff_s)
        for short, kind in (
            ("add", "add_to_cart"),
            ("buy", "product_buy"),
            ("remove", "remove_from_cart"),
            ("visit", "page_visit"),
            ("search", "search_query"),
        )
    }
    tables["all"] = pl.concat([frame.select("client_id", "timestamp_s") for frame in tables.values()])
    wanted: dict[str, np.ndarray] = {}
    for short in ("add", "buy", "remove"):
        frame = tables[short]
        wanted[f"{short}_flag"] = per_client(matrix, frame, pl.len()) > 0
        for name in ("sku", "category", "price"):
            wanted[f"unique_{short}_{name}"] = per_client(matrix, frame, pl.col(name).n_unique())
        wanted[f"unique_{short}_name"] = per_client(matrix, frame, pl.col("name").arr.to_struct().n_unique())
        wanted[f"{short}_price_mean"] = per_client(matrix, frame, pl.col("price").mean())
    wanted["page_visit_flag"] = per_client(matrix, tables["visit"], pl.len()) > 0
    wanted["unique_url"] = per_client(matrix, tables["visit"], pl.col("url").n_unique())
    wanted["search_query_flag"] = per_client(matrix, tables["search"], pl.len()) > 0
    wanted["unique_search_query"] = per_client(matrix, tables["search"], pl.col("query").arr.to_struct().n_unique())
    history = (cutoff_s - store.first_timestamp_s) // DAY_S
    time = pl.col("timestamp_s")
    for short in ("all", "add", "buy", "remove", "visit", "search"):
        frame = tables[short]
        some = per_client(matrix, frame, pl.len()) > 0
        last = per_client(matrix, frame, (cutoff_s - time.max()) // DAY_S)
        first = per_client(matrix, frame, (cutoff_s - time.min()) // DAY_S)
        wanted[f"{short}_from_last_to_end_days"] = np.where(some, last, history)
        wanted[f"min_{short}_from_first_to_end_days"] = np.where(some, first, history)
        wanted[f"{short}_duration_days"] = per_client(matrix, frame, (time.max() - time.min()) // DAY_S)
        wanted[f"unique_{short}_timestamp"] = per_client(matrix, frame, time.n_unique())
    assert matrix.names == tuple(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(column(matrix, name), values.astype(np.float32), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("earlier_days", [0, 14])
def test_aggregated_features_equal_group_bys(events: EventDirectory, store: EventStore, earlier_days: int) -> None:
    cutoff_s = store.cutoff_s - earlier_days * DAY_S
    matrix = aggregated_features(store, cutoff_s, AggregatedConfig(windows_days=(3, 30), top_values=4))
    for kind, names in (("product_buy", ("sku", "category", "price")), ("page_visit", ("url",))):
        frame = table(events, kind, cutoff_s).filter(pl.col("client_id").is_in(matrix.client_ids.tolist()))
        for window, start_s in (("3d", cutoff_s - 3 * DAY_S), ("30d", cutoff_s - 30 * DAY_S), ("all", 0)):
            inside = frame.filter(pl.col("timestamp_s") >= start_s)
            wanted = {
                "count": pl.len(),
                "active_days": (pl.col("timestamp_s") // DAY_S).n_unique(),
                f"different_{'skus' if kind == 'product_buy' else 'urls'}": pl.col(names[0]).n_unique(),
            }
            if kind == "product_buy":
                wanted |= {"mean_price": pl.col("price").mean(), "different_categories": pl.col("category").n_unique()}
            for name, value in wanted.items():
                found = column(matrix, f"{kind}_{name}_{window}")
                np.testing.assert_allclose(found, per_client(matrix, inside, value), rtol=1e-6, err_msg=name)
            if window == "all":
                continue
            for name in names:
                top = frame.group_by(name).len().sort(["len", name], descending=[True, False]).head(4)[name].to_list()
                for value in top:
                    found = column(matrix, f"{kind}_{name}_{value}_{window}")
                    wanted_counts = per_client(matrix, inside.filter(pl.col(name) == value), pl.len())
                    np.testing.assert_array_equal(found, wanted_counts, err_msg=f"{name} {value} {window}")


def test_never_happened_is_the_whole_history(store: EventStore) -> None:
    matrix = aggregated_features(store, store.cutoff_s)
    never = column(matrix, "product_buy_count_all") == 0
    assert never.any()
    history = np.float32((store.cutoff_s - store.first_timestamp_s) / DAY_S)
    assert (column(matrix, "product_buy_last_days")[never] == history).all()
    assert (column(matrix, "product_buy_last_days")[~never] <= history).all()


def test_decayed_features_equal_sums_of_weights(events: EventDirectory, store: EventStore, lists: Lists) -> None:
    cutoff_s = store.cutoff_s - 14 * DAY_S
    matrix = decayed_features(store, cutoff_s, lists, ACTIVITY)
    frame = table(events, "product_buy", cutoff_s)
    age_days = (cutoff_s - pl.col("timestamp_s")) / DAY_S
    for name, column_name in (("category", "category"), ("new_sku", "sku"), ("price", "price")):
        for value in lists[f"propensity_{name}"][0].tolist():
            found = column(matrix, f"product_buy_decayed_propensity_{name}_{value}")
            rows = frame.filter(pl.col(column_name) == value)
            wanted = per_client(matrix, rows, (age_days / -60 * math.log(2)).exp().sum())
            np.testing.assert_allclose(found, np.log1p(wanted), rtol=1e-5, err_msg=f"{name} {value}")
    for days in (2, 60):
        wanted = per_client(matrix, frame, (age_days / -days * math.log(2)).exp().sum())
        np.testing.assert_allclose(column(matrix, f"product_buy_activity_{days}d"), np.log1p(wanted), rtol=1e-5)
    wanted = per_client(matrix, frame, (pl.col("timestamp_s") // DAY_S).n_unique())
    np.testing.assert_allclose(column(matrix, "product_buy_active_days_all"), np.log1p(wanted), rtol=1e-6)


def make_all(store: EventStore, cutoff_s: int, lists: Lists) -> list[Features]:
    return [
        static_features(store, cutoff_s),
        aggregated_features(store, cutoff_s, AggregatedConfig(top_values=4)),
        decayed_features(store, cutoff_s, lists, ACTIVITY),
    ]


@pytest.mark.parametrize("what", ["removed", "other items", "other clients"])
def test_events_from_the_cutoff_on_change_nothing(
    events: EventDirectory, store: EventStore, lists: Lists, tmp_path: Path, what: str
) -> None:
    """The store ends later than the cutoff of the features; its later events are replaced."""
    cutoff_s = store.cutoff_s - 14 * DAY_S
    changed = tmp_path / "events"
    changed.mkdir()
    for file in events.path.iterdir():
        if file.is_file():
            (changed / file.name).write_bytes(file.read_bytes())
    np.save(changed / "relevant_clients.npy", np.array(store.client_ids))
    later = pl.col("timestamp_s") >= cutoff_s
    for kind in events.kinds:
        frame = events.frame(kind)
        first = pl.first("sku") if "sku" in frame.columns else pl.first("url") if "url" in frame.columns else None
        if what == "removed":
            frame = frame.filter(~later)
        elif what == "other clients":
            frame = frame.with_columns(pl.when(later).then(pl.first("client_id")).otherwise("client_id"))
        elif first is not None:
            name = first.meta.output_name()
            frame = frame.with_columns(pl.when(later).then(first).otherwise(name).alias(name))
        stored_form(frame).write_parquet(changed / f"{kind}.parquet")
    build_store(EventDirectory.open(changed), tmp_path / "store", store.cutoff_s)
    other = EventStore.open(tmp_path / "store")
    for one, two in zip(make_all(store, cutoff_s, lists), make_all(other, cutoff_s, lists), strict=True):
        assert one.names == two.names
        np.testing.assert_array_equal(one.rows(slice(None)), two.rows(slice(None)))


def test_shop_with_purchases_only(events: EventDirectory, store: EventStore, lists: Lists, tmp_path: Path) -> None:
    alone = EventDirectory(events.path, ("product_buy",), events.split, events.info)
    build_store(alone, tmp_path / "store", store.cutoff_s)
    few = EventStore.open(tmp_path / "store")
    for one, many in zip(make_all(few, store.cutoff_s, lists), make_all(store, store.cutoff_s, lists), strict=True):
        rows = np.isin(many.client_ids, one.client_ids)
        kept = [name for name in one.names if "buy" in name]
        assert kept
        for name in kept:
            np.testing.assert_array_equal(column(one, name), column(many, name)[rows], err_msg=name)
    static = static_features(few, store.cutoff_s)
    assert static.shape[1] == 46
    assert not column(static, "add_flag").any()
    assert not column(static, "unique_url").any()


def test_widths(store: EventStore, lists: Lists) -> None:
    item_kind, visits, searches = 3 * (5 + 3 * 4) + 5 + 2, 3 * (3 + 4) + 3 + 2, 3 * 3 + 3 + 2
    matrix = aggregated_features(store, store.cutoff_s, AggregatedConfig(top_values=4))
    assert matrix.shape[1] == 3 * item_kind + visits + searches
    labels = sum(len(ids) for ids, _ in lists.values())
    assert decayed_features(store, store.cutoff_s, lists).shape[1] == 2 * labels + 5 * (6 + 2 + 4)


@pytest.mark.parametrize("windows", [(), (0,), (7, 7), (7, 1)], ids=str)
def test_windows_must_ascend(windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="windows_days must be > 0 and ascending"):
        AggregatedConfig(windows_days=windows)


def test_bad_configurations_and_lists(store: EventStore) -> None:
    with pytest.raises(ValueError, match="top_values must be >= 0, got -1"):
        AggregatedConfig(top_values=-1)
    with pytest.raises(ValueError, match=r"label_kinds must be among .* got \['page_visit'\]"):
        DecayedConfig(label_kinds=("page_visit",))
    with pytest.raises(ValueError, match="must end in _category, _sku or _price, got 'propensity_url'"):
        decayed_features(store, store.cutoff_s, {"propensity_url": (np.arange(3), np.ones(3))})
