"""`experiment=winner`, small: what of the winner's system reaches its models, and what its profiles are."""

from __future__ import annotations

import importlib.util
import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from schedulefree import RAdamScheduleFree
from support.runs import SMALL, composed, run_tiny

from ubp_fast.events.read import EventDirectory
from ubp_fast.features.matrix import load_features
from ubp_fast.features.organisers import CountsConfig, count_features_once
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.pipeline.stages import plan
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


def test_published_constants_reach_the_models() -> None:
    """docs/winner.md 3 to 6; on a GPU, too."""
    settings = read_settings(composed("experiment=winner", "data=challenge", "data.dir=somewhere", "compute=gpu"))
    contrastive, multitask, stacking = settings.contrastive, settings.multitask, settings.stacking
    assert settings.stacking_blocks == ("contrastive", "multitask", "aggregated")
    assert settings.recipe.raw_counts and settings.aggregated.price_bins == 5
    assert (contrastive.config.temperature, contrastive.config.negatives, contrastive.config.probes) == (
        *(0.02, "cross"),
        True,
    )
    assert multitask.config.encoder.heads == 1 and multitask.config.events.width == 412
    assert multitask.config.drop_repeats and not contrastive.config.drop_repeats
    assert (multitask.training.epochs, multitask.training.batch_size) == (25, 128)
    assert multitask.training.validation_views >= 1_000_000
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert isinstance(multitask.optimizer(weights), torch.optim.AdamW)
    assert multitask.optimizer(weights).defaults["weight_decay"] == 0.01
    for model in (contrastive, stacking):
        assert isinstance(model.optimizer(weights), RAdamScheduleFree)
        assert model.optimizer(weights).defaults["lr"] == 1e-3
    assert stacking.config.labels == ("churn", "buy_sku", "buy_category") and stacking.config.profile_width == 512
    assert (contrastive.training.precision, stacking.training.precision) == ("bf16", "fp32")
    layout = settings.layout
    assert not any(
        (layout.graded, layout.near, layout.scores, layout.own, layout.tastes, layout.rhythm, layout.learned)
    )


def test_the_rehearsal_is_the_experiment_made_small() -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "rehearsal.py"
    spec = importlib.util.spec_from_file_location("rehearsal", path)
    assert spec is not None and spec.loader is not None
    rehearsal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rehearsal)
    found = {}
    for full in (False, True):
        options = Namespace(share=0.1, steps=7, full_widths=full, files=False, overrides=["seed=3"])
        found[full] = read_settings(composed(*rehearsal._command(options)[3:]))
        assert (found[full].source.clients, found[full].source.relevant, found[full].seed) == (1_900_000, 100_000, 3)
        assert {getattr(found[full], name).training.max_steps for name in ("contrastive", "multitask", "stacking")} == {
            7
        }
    winner = read_settings(composed("experiment=winner"))
    assert found[True].contrastive.config == winner.contrastive.config
    assert found[False].contrastive.config.events.width < 512
    assert found[False].recipe.joined == winner.recipe.joined
    assert set(rehearsal.STAGES) <= {stage.name for stage in plan(found[True])} | {"evaluate"}


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
