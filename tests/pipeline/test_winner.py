"""`experiment=winner`, small: what of the winner's system reaches its models, and what its profiles are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.runs import SMALL, run_tiny

from ubp_fast.events.read import EventDirectory
from ubp_fast.features.matrix import load_features
from ubp_fast.features.organisers import CountsConfig, count_features_once
from ubp_fast.profiler.profiler import Profiler
from ubp_fast.profiles import Profiles, validate
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.in_memory import Histories

NARROW = (
    "experiment=winner",
    "multitask.training.epochs=1",
    "multitask.config.events.sku_width=32",
    "multitask.config.events.content_width=40",
    "multitask.config.encoder.feed_forward=64",
    "contrastive.config.events.sku_width=32",
    "contrastive.config.events.code_width=32",
    "stacking.config.profile_width=64",
)


def challenge_directory(target: Path) -> Path:
    """The organisers' small data with lists of its own: rare values that no window's purchases would choose."""
    shutil.copytree(SMALL, target, ignore=shutil.ignore_patterns("target"))
    bought = pl.read_parquet(target / "product_buy.parquet")
    rare = bought.group_by("sku").len().sort("len", "sku")["sku"].head(9)
    products = pl.read_parquet(target / "product_properties.parquet").filter(pl.col("sku").is_in(rare.implode()))
    (target / "target").mkdir()
    for name, values in (("sku", rare), ("category", products["category"].unique().sort())):
        np.save(target / "target" / f"propensity_{name}.npy", values.to_numpy())
        np.save(target / "target" / f"popularity_propensity_{name}.npy", np.full(len(values), 0.01, np.float32))
    return target


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return challenge_directory(tmp_path_factory.mktemp("challenge") / "data")


@pytest.fixture(scope="module")
def winner_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = ("data=challenge", f"data.dir={data}", "data.layout=raw", "stages=[profiles]")
    code, run, printed = run_tiny(tmp_path_factory.mktemp("winner"), *NARROW, *source, "profiles.at=end")
    assert code == 0, printed
    return run


def test_models_learn_the_lists_that_were_given(winner_run: Path, data: Path) -> None:
    features = winner_run / "stages" / "features"
    for name in ("sku", "category"):
        given = np.load(data / "target" / f"propensity_{name}.npy")
        np.testing.assert_array_equal(np.load(features / f"propensity_{name}.npy"), given)
    # What nobody was told is made from the newest window.
    assert len(np.load(features / "propensity_price.npy")) > 9
    heads = (winner_run / "stages" / "multitask" / "outputs.json").read_text()
    assert '"buy_sku": 9' in heads


def test_lists_stay_unseen_unless_asked_for(data: Path, tmp_path: Path) -> None:
    source = ("data=challenge", f"data.dir={data}", "data.layout=raw", "stages=[features]")
    code, run, _ = run_tiny(tmp_path, *NARROW, *source, "windows.given_lists=false")
    assert code == 0
    made = np.load(run / "stages" / "features" / "propensity_sku.npy")
    assert not np.isin(np.load(data / "target" / "propensity_sku.npy"), made).all()


def test_lists_of_other_sources_stay_unseen(tmp_path: Path) -> None:
    """Those of the synthetic shop are made from the target window."""
    source = ("data=synthetic", "data.clients=200", "data.skus=300", "data.urls=80", "stages=[features]")
    code, run, _ = run_tiny(tmp_path, *NARROW, *source)
    assert code == 0
    given = EventDirectory.open(run / "stages" / "events").label_lists
    assert given is not None
    made = np.load(run / "stages" / "features" / "propensity_sku.npy")
    assert made.tolist() != given["propensity_sku"][0].tolist()


def test_aggregated_block_is_the_organisers_counts(winner_run: Path) -> None:
    store = EventStore.open(winner_run / "stages" / "store")
    block = load_features(winner_run / "stages" / "features" / f"aggregated-{store.cutoff_s}")
    assert block.shape == (int(store.is_relevant.sum()), 320 + 3 * 3 * 5)
    values = block.rows(slice(None))
    assert values.max() > 10, "counts, not their logarithms"
    names = list(block.names)
    ranges = [names.index(f"product_buy_price_range_{place}_30d") for place in range(5)]
    kind = store.kind("product_buy")
    price = store.products.price[kind.item] - 2
    client = np.repeat(np.arange(store.num_clients), np.diff(kind.offsets))
    recent = kind.timestamp_s >= store.cutoff_s - 30 * 86_400
    wanted = np.zeros((store.num_clients, 5))
    np.add.at(wanted, (client[recent], price[recent] // 20), 1)
    np.testing.assert_array_equal(values[:, ranges], wanted[store.is_relevant])


def test_clients_are_in_the_order_of_the_baseline(winner_run: Path, data: Path, tmp_path: Path) -> None:
    events = EventDirectory.open(winner_run / "stages" / "events")
    baseline = count_features_once(events, events.split.input_end_s, CountsConfig(anchor="file_order"))
    ids = Profiles.load(winner_run / "profiles").client_ids
    np.testing.assert_array_equal(ids, baseline.client_ids)
    assert (np.diff(ids) < 0).any()
    stacked = Profiles.load(winner_run / "profiles")
    table = pl.read_parquet(winner_run / "profiles.parquet")
    np.testing.assert_array_equal(table["profile"].to_numpy(), stacked.embeddings.astype(np.float32))
    # The vectors moved with their clients: the model of the run makes the same from the events alone.
    run = winner_run / "latest"
    profiler = Profiler.load(winner_run)
    store = EventStore.open(winner_run / "stages" / "latest-store")
    again = profiler.of_histories(Histories.of_store(store), np.sort(Profiles.load(run).client_ids), store.cutoff_s)
    np.testing.assert_allclose(again, Profiles.load(run).align(np.sort(ids)).embeddings, rtol=0, atol=2e-3)


def test_training_is_validated_on_the_window_after_it(winner_run: Path) -> None:
    for name in ("contrastive", "multitask"):
        (epoch,) = json.loads((winner_run / "stages" / name / "training" / "losses.json").read_text())["epochs"]
        assert epoch["valid_score"] == pytest.approx(
            sum(epoch[f"valid_auroc_{label}"] for label in ("churn", "buy_sku", "buy_category"))
        )
    assert "auroc_buy_sku" in epoch or "valid_auroc_buy_price" in epoch


def test_vectors_of_past_cutoffs_take_two_bytes(winner_run: Path) -> None:
    for name in ("contrastive", "multitask"):
        files = [*(winner_run / "stages" / name).glob("vectors-*.npy")]
        assert len(files) == 2
        assert {np.load(path, mmap_mode="r").dtype for path in files} == {np.dtype(np.float16)}


def test_profiles_are_the_activations_of_both_sets(winner_run: Path) -> None:
    events = EventDirectory.open(winner_run / "stages" / "events")
    for name in ("profiles", "latest"):
        assert validate(winner_run / name, events.relevant_clients).passed
        layout = Profiles.load(winner_run / name).layout
        assert layout is not None and [(block.name, len(block.columns)) for block in layout.blocks] == [("strong", 64)]
    assert {path.name.split("-")[0] for path in (winner_run / "stages" / "features").iterdir() if path.is_dir()} == {
        "static",
        "aggregated",
    }
