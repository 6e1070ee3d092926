from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ubp_fast.events.read import EventDirectory, parquet_files
from ubp_fast.events.schema import EVENT_KINDS
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.events.sources.synthetic_world import (
    ADDS_PER_SESSION,
    Clients,
    draw_catalogue,
    draw_clients,
    label_shares,
    purchase_probability,
)

WINDOWS = ("train", "validation")


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("synthetic") / "events"
    Synthetic(clients=4000, block_clients=1500, seed=3).prepare(directory)
    return EventDirectory.open(directory)


def truth(events: EventDirectory, name: str) -> np.ndarray:
    return np.load(events.path / "truth" / f"{name}.npy", allow_pickle=False)


def window(events: EventDirectory, name: str) -> pl.DataFrame:
    split = events.split
    return events.purchases(*(split.train_window_s if name == "train" else split.validation_window_s))


def known_clients(events: EventDirectory) -> np.ndarray:
    """Clients that are not new in the windows."""
    before = pl.col("timestamp_s") < events.split.input_end_s
    seen = pl.concat([events.frame(kind).filter(before).select("client_id") for kind in events.kinds])
    return np.isin(truth(events, "client_ids"), seen["client_id"].unique().to_numpy())


def area_under_curve(positive: np.ndarray, score: np.ndarray) -> float:
    rank = pl.Series(score).rank("average").to_numpy()
    count = positive.sum()
    return float((rank[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def test_kinds_have_roughly_the_challenge_s_ratios(events: EventDirectory) -> None:
    rows = [events.info["rows"][kind] for kind in ("page_visit", "add_to_cart", "product_buy", "remove_from_cart")]
    assert events.kinds == EVENT_KINDS
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > 5 * rows[1]
    assert events.info["rows"]["search_query"] > 1000


def test_long_tails(events: EventDirectory) -> None:
    visits = events.frame("page_visit")
    for column in ("client_id", "url"):
        counts = np.sort(visits[column].value_counts()["count"].to_numpy())[::-1]
        assert counts[: len(counts) // 10].sum() > 0.3 * counts.sum()


def test_rows_are_in_order_of_time_and_inside_the_days(events: EventDirectory) -> None:
    for kind in EVENT_KINDS:
        for file in parquet_files(events.path / f"{kind}.parquet"):  # one per block of clients
            assert pl.read_parquet(file)["timestamp_s"].is_sorted()
        times = events.frame(kind)["timestamp_s"].to_numpy()
        assert np.ptp(times) < 140 * 86_400


def test_items_have_their_range(events: EventDirectory) -> None:
    assert events.frame("page_visit")["url"].is_between(1, 3000).all()
    products = events.products()
    assert products["price"].n_unique() == 100
    assert products["category"].n_unique() == 50


@pytest.mark.parametrize("name", WINDOWS)
def test_truth_is_calibrated(events: EventDirectory, name: str) -> None:
    """The mean probability is the share of buyers, within five standard errors, also in the upper and lower half."""
    known = known_clients(events)
    probability = truth(events, f"{name}_purchase")[known].astype(np.float64)
    bought = np.isin(truth(events, "client_ids")[known], window(events, name)["client_id"].to_numpy())
    for rows in (probability > np.median(probability), probability <= np.median(probability)):
        error = np.sqrt((probability[rows] * (1 - probability[rows])).sum())
        assert abs(bought[rows].sum() - probability[rows].sum()) < 5 * error + 1


def test_labels_can_be_learned(events: EventDirectory) -> None:
    known = known_clients(events)
    ids = truth(events, "client_ids")[known]
    purchases = window(events, "validation")
    assert (
        area_under_curve(np.isin(ids, purchases["client_id"].to_numpy()), truth(events, "validation_purchase")[known])
        > 0.85
    )
    assert events.label_lists is not None
    for name, column in (("propensity_category", "category"), ("propensity_sku", "sku"), ("propensity_price", "price")):
        labels = events.label_lists[name][0]
        probability = truth(events, f"validation_{name}")[known].astype(np.float64)
        assert probability.shape == (len(ids), len(labels))
        hits = [np.isin(ids, purchases.filter(pl.col(column) == label)["client_id"].to_numpy()) for label in labels]
        observed, expected = np.stack(hits, axis=1).sum(), probability.sum()
        assert abs(observed - expected) < 6 * np.sqrt(expected)
        assert area_under_curve(hits[0], probability[:, 0]) > 0.8


def test_past_purchases_hint_at_the_taste(events: EventDirectory) -> None:
    """A count of the past is far better than chance, and worse than the truth."""
    known = known_clients(events)
    ids = truth(events, "client_ids")
    category = events.label_lists["propensity_category"][0][0]  # type: ignore[index]
    past = events.purchases(0, events.split.validation_start_s).filter(pl.col("category") == category)
    counts = np.bincount(past["client_id"].to_numpy(), minlength=ids.max() + 1)[ids][known]
    bought = np.isin(
        ids[known], window(events, "validation").filter(pl.col("category") == category)["client_id"].to_numpy()
    )
    from_counts = area_under_curve(bought, counts)
    assert 0.65 < from_counts < area_under_curve(bought, truth(events, "validation_propensity_category")[known, 0])


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    small = {"clients": 300, "days": 60, "skus": 60, "categories": 10, "urls": 100}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        Synthetic(**small, seed=seed).prepare(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 7 + 2 * 3 + 1 + 2 * 4  # 60 skus: none is left for the list of new skus
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert (tmp_path / "a" / "page_visit.parquet").read_bytes() != (tmp_path / "c" / "page_visit.parquet").read_bytes()


def test_an_earlier_end_moves_the_windows(tmp_path: Path) -> None:
    Synthetic(clients=300, end="2022-09-30 12:00:00").prepare(tmp_path / "events")
    events = EventDirectory.open(tmp_path / "events")
    assert events.split.end_s < 1_664_539_201
    assert max(events.frame(kind)["timestamp_s"].to_list()[-1] for kind in events.kinds) < 1_664_539_201


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": 0}, "clients must be at least 1, got 0"),
        ({"days": 28}, "days must be at least 29, got 28"),
        ({"skus": 5}, "skus must be at least categories, got 5"),
        ({"start": "summer"}, "date-time"),
    ],
)
def test_configuration(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Synthetic(**changes).prepare(tmp_path / "events")
    assert not (tmp_path / "events").exists()


def test_shares_add_up() -> None:
    rng = np.random.default_rng(0)
    catalogue = draw_catalogue(rng, skus=80, categories=7)
    clients = draw_clients(rng, 50, 100, catalogue)
    everything = {"category": np.arange(7), "sku": np.arange(80), "price": np.arange(100)}
    for column, labels in everything.items():
        np.testing.assert_allclose(label_shares(clients, catalogue, column, labels).sum(axis=1), 1.0, rtol=1e-12)


def test_probability_equals_a_simulation() -> None:
    """One client, drawn 200,000 times."""
    rng = np.random.default_rng(0)
    rate, buy, hazard, share, days = 0.3, 0.4, 0.15, 0.5, 14
    one = Clients(*(np.array([value]) for value in (rate, buy, hazard, 0, 1000, 0)), category_share=np.ones((1, 1)))
    alive_days = np.minimum(1 + np.floor(rng.exponential(1 / hazard, 200_000)), days)
    sessions = rng.poisson(rate * alive_days)
    found = rng.poisson(ADDS_PER_SESSION * buy * share * sessions) > 0
    expected = purchase_probability(one, np.array([[share]]), 5, days)[0, 0]
    assert abs(found.mean() - expected) < 5 * np.sqrt(expected / 200_000)


def test_the_dead_buy_nothing_and_the_unborn_only_later() -> None:
    rng = np.random.default_rng(0)
    clients = draw_clients(rng, 400, 100, draw_catalogue(rng, skus=20, categories=3))
    probability = purchase_probability(clients, np.ones((400, 1)), 50, 14)[:, 0]
    dead, unborn = clients.death_day <= np.maximum(50, clients.birth_day), clients.birth_day >= 64
    assert dead.any()
    assert unborn.any()
    assert (probability[dead | unborn] == 0).all()
    assert (probability[~dead & ~unborn] > 0).all()


def test_blocks_and_relevant_clients(tmp_path: Path) -> None:
    """Parts instead of one table, and the truth of the clients that need a profile only."""
    whole, some = ({"clients": 500, "block_clients": 200, "seed": 5}, {"relevant": 60})
    Synthetic(**whole).prepare(tmp_path / "whole")
    Synthetic(**whole, **some).prepare(tmp_path / "some")
    one, other = EventDirectory.open(tmp_path / "whole"), EventDirectory.open(tmp_path / "some")
    assert (tmp_path / "whole" / "page_visit.parquet").is_dir()
    for kind in one.kinds:
        assert_frame_equal(one.frame(kind), other.frame(kind))
    chosen = other.relevant_clients
    assert chosen is not None
    assert len(chosen) == 60
    visits = one.frame("page_visit")["client_id"].value_counts()
    chosen_share = visits.filter(pl.col("client_id").is_in(chosen))["count"].sum() / visits["count"].sum()
    assert chosen_share > 1.5 * 60 / 500
    truth = {path.name: np.load(path) for path in (tmp_path / "some" / "truth").iterdir()}
    assert truth["client_ids.npy"].tolist() == chosen.tolist()
    for name, values in truth.items():
        np.testing.assert_array_equal(values, np.load(tmp_path / "whole" / "truth" / name)[chosen - 1])
    with pytest.raises(ValueError, match=r"relevant must be 1..clients = 500, got 501"):
        Synthetic(**whole, relevant=501).prepare(tmp_path / "none")


def test_the_best_possible_chances_are_right_on_average(
    events: EventDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the past alone: as high as the truth among all who look alike, below it where one of two is dead."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3] / "benchmarks")
    best_possible = importlib.import_module("best_possible")
    shop = Synthetic(clients=4000, block_clients=1500, seed=3)
    catalogue = draw_catalogue(np.random.default_rng([shop.seed, 0]), shop.skus, shop.categories)
    known, lists = known_clients(events), events.label_lists
    assert lists is not None
    past = best_possible.Past.of(events, truth(events, "client_ids")[known], shop, catalogue)
    columns = {name: (name.rsplit("_", 1)[1], lists[name][0]) for name in ("propensity_category", "propensity_price")}
    found = best_possible.chances_of(past, catalogue, columns, gap_days=14, num_days=14, draws=40)
    real = {name: truth(events, f"validation_{name}")[known].astype(np.float64) for name in ("purchase", *columns)}
    order = np.argsort(found["purchase"][:, 0])
    for part in np.array_split(order, 8):
        assert found["purchase"][part].mean() == pytest.approx(real["purchase"][part].mean(), abs=0.035)
    for name in columns:
        order = np.argsort(found[name].ravel())
        for part in np.array_split(order, 4):
            chance, of_truth = found[name].ravel()[part].mean(), real[name].ravel()[part].mean()
            assert chance == pytest.approx(of_truth, rel=0.15, abs=0.0005)
        assert np.corrcoef(found[name].ravel(), real[name].ravel())[0, 1] > 0.85
    bought = np.isin(truth(events, "client_ids")[known], window(events, "validation")["client_id"].to_numpy())
    possible, oracle = (
        area_under_curve(bought, chance[:, 0]) for chance in (found["purchase"], real["purchase"][:, None])
    )
    assert 0.8 < possible < oracle
