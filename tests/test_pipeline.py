"""The whole way, small: events to scores, the same bytes again, no future in a profile, bad input refused."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
from support.runs import ALL_BLOCKS, NETWORK, SMALL, WIDE, contents, run_tiny

from ubp_fast.evaluation import build_targets
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.split import DAY_S
from ubp_fast.pipeline import model_stages, stages
from ubp_fast.profiles import Profiles, validate
from ubp_fast.sequences import Views
from ubp_fast.store.event_store import EventStore

SYNTHETIC = ("data=synthetic", "data.clients=200", "data.skus=60", "data.urls=80", ALL_BLOCKS)
WHOLE_REPORT = ("report.diagnosis=true", "report.clients=true")


@pytest.fixture(scope="module")
def synthetic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code, run, printed = run_tiny(tmp_path_factory.mktemp("synthetic"), *SYNTHETIC, *WHOLE_REPORT)
    assert code == 0
    assert "stacked" in printed and "baseline_log1p" in printed and "report.html" in printed
    return run


def test_run_directory_is_complete(synthetic_run: Path) -> None:
    names = {path.name for path in synthetic_run.iterdir()}
    assert names == {
        *("config.yaml", "environment.json", "model", "profiles", "profiles.parquet", "report.html", "scores.json"),
        *("stages", ".lock"),
    }
    scores = json.loads((synthetic_run / "scores.json").read_text())
    assert list(scores) == ["stacked", "baseline_log1p", "warnings"]
    assert scores["stacked"]["config"]["readers"] == ["network", "linear", "boosting", "neighbours"]
    assert list(scores["stacked"]["readers"]) == ["linear", "boosting", "neighbours"]
    assert 0.0 <= scores["stacked"]["tasks"]["churn"]["score"] <= 1.0
    assert json.loads((synthetic_run / "environment.json").read_text())["threads"] == 1
    report = (synthetic_run / "report.html").read_text()
    assert all(
        text in report
        for text in ("stacked", "baseline_log1p", "contrastive", "multitask", "AUROC by reader", "Time and memory")
    )
    for title in ("ROC", "Calibration", "Age of the profile", "Blocks", "Map", "Nearest clients", "What was left out"):
        assert f">{title}" in report
    assert len(report) < 3_000_000


def test_drift_against_an_earlier_run(synthetic_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (*SYNTHETIC, "data.seed=1", f"cache={tmp_path / 'cache'}", "stages=[drift]")
    code, run, _ = run_tiny(tmp_path / "runs", *settings, f"report.against={synthetic_run}")
    assert code == 0
    drift = json.loads((run / "stages" / "drift" / "facts.json").read_text())
    assert drift["clients"]["both"] > 100 and max(one["psi"] for one in drift["inputs"]) > 0
    assert "population stability index" in (run / "report.html").read_text()
    code, _, _ = run_tiny(tmp_path / "other", *settings, f"report.against={tmp_path}")
    assert code == 2 and "report.against must be the directory of a run" in capsys.readouterr().err


def test_profiles_pass_the_organisers_rules(synthetic_run: Path) -> None:
    events = EventDirectory.open(synthetic_run / "stages" / "events")
    verdict = validate(synthetic_run / "profiles", events.relevant_clients)
    assert verdict.passed, verdict.problems
    profiles = verdict.require()
    layout = Profiles.load(synthetic_run / "profiles").layout
    assert layout is not None and layout.width == profiles.dim > 500
    named = {block.name: block for block in layout.blocks}
    assert list(named) == ["strong", "graded", "near", "scores", "own", "tastes", "rhythm", "learned"]
    assert len(named["strong"].columns) == 7 and named["strong"].columns[-1] == "constant"
    assert (profiles.embeddings[:, 6] == 1).all()
    assert named["scores"].columns[:2] == ("buys", "carts") and isinstance(named["scores"].scale, tuple)
    assert named["scores"].scale[:3] == (0.005, 0.005, 0.0001), "what is said of a client alone is not lost"
    assert "contrastive.0" in named["learned"].columns and "aggregated.product_buy_count_7d" in named["own"].columns
    assert np.unique(profiles.embeddings, axis=0).shape[0] > profiles.num_clients // 2, (
        "profiles must tell clients apart"
    )


def test_the_most_bought_skus_are_scored_beside_the_lists(tmp_path: Path) -> None:
    source = (*(part for part in SYNTHETIC if part != ALL_BLOCKS), "windows.labels=5", "stages=[profiles]")
    code, run, printed = run_tiny(tmp_path, *source, "features.pairs.most_bought=12")
    assert code == 0, printed
    events, stage = EventDirectory.open(run / "stages" / "events"), run / "stages" / "features"
    end_s = events.split.input_end_s
    ranked = (
        events.purchases(end_s - 14 * DAY_S, end_s).group_by("sku").len().sort(["len", "sku"], descending=[True, False])
    )
    listed = [np.load(stage / f"propensity_{name}.npy").tolist() for name in ("sku", "new_sku")]
    wanted = {*ranked["sku"].head(12).to_list(), *listed[0], *listed[1]}
    layout = Profiles.load(run / "profiles").layout
    assert layout is not None
    (block,) = layout.select("scores").blocks
    scored = [name for name in block.columns if name.startswith("propensity_sku_")]
    assert sorted(scored) == sorted(f"propensity_sku_{sku}" for sku in wanted) and len(wanted) > 12
    (own,) = layout.select("own").blocks
    counted = {name for name in own.columns if "decayed_propensity_sku_" in name}
    assert len({name.split("_")[-1] for name in counted}) == 5, "what is counted is what the lists name"


def test_second_run_takes_everything_from_the_cache(synthetic_run: Path) -> None:
    before = contents(synthetic_run / "profiles")
    started_s = time.monotonic()
    code, run, printed = run_tiny(synthetic_run.parent, *SYNTHETIC, *WHOLE_REPORT)
    assert (code, run) == (0, synthetic_run)
    assert " ..." not in printed, "no stage may run again"
    assert contents(run / "profiles") == before
    assert time.monotonic() - started_s < 60


def test_another_place_gives_the_same_bytes(synthetic_run: Path, tmp_path: Path) -> None:
    code, run, _ = run_tiny(tmp_path, *SYNTHETIC, "stages=[profiles]")
    assert code == 0
    assert contents(run / "profiles") == contents(synthetic_run / "profiles")
    assert not (run / "scores.json").exists()


@pytest.mark.parametrize(
    ("stage", "module", "finishes"),
    [("features", stages, "complete_directory"), ("contrastive", model_stages, "complete_file")],
)
def test_a_stage_that_is_interrupted_makes_its_finished_parts_once(
    stage: str, module: ModuleType, finishes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, finished = getattr(module, finishes), []

    def counted(partial: Path, path: Path) -> None:
        if len(finished) == 2:
            finished.append("stopped")
            raise KeyboardInterrupt
        complete(partial, path)
        finished.append(path.name)

    monkeypatch.setattr(module, finishes, counted)
    settings = (*SYNTHETIC, "windows.stacking_cutoffs=2", f"stages=[{stage}]")
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "stopped", *settings)
    code, run, printed = run_tiny(tmp_path / "stopped", *settings)
    assert code == 0, printed
    names = [name for name in finished if name != "stopped"]
    assert len(names) == len({*names}) > 2, "each once"
    monkeypatch.undo()
    code, other, printed = run_tiny(tmp_path / "whole", *settings)
    assert code == 0, printed
    assert contents(run / "stages" / stage) == contents(other / "stages" / stage)


def test_models_that_nothing_needs_are_not_trained(tmp_path: Path) -> None:
    source = tuple(part for part in SYNTHETIC if part != ALL_BLOCKS)
    code, run, printed = run_tiny(tmp_path, *source, "stages=[profiles]")
    assert code == 0
    assert {path.name for path in (run / "stages").iterdir()} == {"events", "store", "features", "stacking"}
    assert "contrastive" not in printed
    code, run, _ = run_tiny(tmp_path, *source, "stages=[contrastive]")
    assert code == 0
    assert (run / "stages" / "contrastive").exists(), "asked for by name"


def test_block_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run_tiny(tmp_path, *SYNTHETIC, "stacking.blocks=[decayed,rich]")
    assert code == 2
    assert "stacking.blocks must be different ones of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wide", "more", "said"),
    [
        ("[decayed,tastes]", (), "multitask.config.wide must be different ones of ['static', 'aggregated', 'decayed']"),
        ("[decayed,decayed]", (), "multitask.config.wide must be different ones of"),
        ("[]", (WIDE[0], "store.all_clients=true"), "contrastive.config.wide must be [] with store.all_clients=true"),
    ],
)
def test_wide_features_that_cannot_be_are_refused(
    wide: str, more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = run_tiny(tmp_path, *SYNTHETIC, f"multitask.config.wide={wide}", *more)
    assert code == 2
    assert said in capsys.readouterr().err


def test_rich_features_reach_the_profile(synthetic_run: Path, tmp_path: Path) -> None:
    code, run, _ = run_tiny(tmp_path, *SYNTHETIC, "features=rich", "stages=[profiles]")
    assert code == 0
    kinds = {path.name.split("-")[0] for path in (run / "stages" / "features").iterdir() if path.is_dir()}
    assert kinds == {"static", "aggregated", "decayed", "scores", "rich", "rhythm", "tastes"}
    rich, plain = (Profiles.load(directory / "profiles") for directory in (run, synthetic_run))
    assert rich.num_clients == plain.num_clients and rich.dim > plain.dim
    assert np.isfinite(rich.embeddings).all()
    columns = next(block for block in rich.layout.blocks if block.name == "own").columns  # type: ignore[union-attr]
    assert any(column.startswith("rich.") for column in columns)


def test_blocks_are_left_out_by_their_scale(tmp_path: Path) -> None:
    source = tuple(part for part in SYNTHETIC if part != ALL_BLOCKS)
    none = [f"profile.{name}=0" for name in ("graded", "near", "scores", "own", "tastes", "rhythm")]
    code, run, _ = run_tiny(tmp_path, *source, *none, "stages=[profiles]")
    assert code == 0
    assert Profiles.load(run / "profiles").dim == 7
    assert {path.name.split("-")[0] for path in (run / "stages" / "features").iterdir() if path.is_dir()} == {"decayed"}


def test_submission_of_somebody_is_scored(synthetic_run: Path, tmp_path: Path) -> None:
    code, run, printed = run_tiny(
        tmp_path,
        *SYNTHETIC,
        "stages=[evaluate]",
        f"evaluation.profiles={synthetic_run / 'profiles'}",
        "evaluation.tasks=[churn,propensity_new_sku]",
    )
    assert code == 0
    # 60 products: all of them are asked for by propensity_sku.
    reason = "the purchases of the train window leave fewer than two values of 'sku' to ask for"
    note = f"propensity_new_sku: left out, {reason}"
    assert printed.count(f"note      {note}\n") == 1
    assert escape(note) in (run / "report.html").read_text()
    scores = json.loads((run / "scores.json").read_text())
    assert set(scores) == {"submission", "baseline_log1p", "warnings"}
    ours = json.loads((synthetic_run / "scores.json").read_text())["stacked"]
    assert scores["submission"]["tasks"]["churn"]["score"] == ours["tasks"]["churn"]["score"]
    assert "contrastive" not in printed


def test_another_reader_or_component_leaves_the_scores_that_are_there(tmp_path: Path) -> None:
    source = (*(part for part in SYNTHETIC if part != ALL_BLOCKS), "evaluation.tasks=[churn,propensity_category]")
    code, run, _ = run_tiny(tmp_path, *source, "evaluation.readers=[linear]")
    assert code == 0
    shutil.rmtree(run)
    more = ("evaluation.readers=[linear,neighbours]", "evaluation.components=[stacked,features,profile_features]")
    code, run, printed = run_tiny(tmp_path, *source, *more)
    assert code == 0
    made = [line.split()[-2] for line in printed.splitlines() if line.endswith(" ...")]
    assert made == [
        "raw_features",
        "evaluate-stacked-neighbours",
        *(
            f"evaluate-{name}-{reader}"
            for name in ("features", "profile_features")
            for reader in ("linear", "neighbours")
        ),
    ]
    scores = json.loads((run / "scores.json").read_text())
    assert list(scores) == ["stacked", "features", "profile_features", "warnings"]
    assert scores["features"]["tasks"] == {}, "the network was not asked"
    widths = json.loads((run / "stages" / "raw_features" / "values" / "names.json").read_text())["names"]
    assert {name.split(":")[0] for name in widths} == {"aggregated", "decayed", "static"}


def test_a_table_without_categories_has_no_category_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It had one with a single label, which asked for the same as conversion."""
    random_state = np.random.default_rng(0)
    count = 4000
    times = random_state.integers(0, 120 * 86_400, count)
    skus = random_state.integers(0, 40, count)
    rows = pl.DataFrame({"client_id": random_state.integers(0, 80, count), "timestamp": times, "sku": skus})
    rows.with_columns(price=1.0 + pl.col("sku")).write_parquet(tmp_path / "events.parquet")
    named = ("data.price_column=price", "data.timestamp_unit=s")
    source = ("data=table", f"data.path={tmp_path / 'events.parquet'}", *named)
    tasks = "evaluation.tasks=[churn,propensity_category,propensity_price]"
    code, run, printed = run_tiny(tmp_path / "runs", *source, tasks, "evaluation.readers=[linear]")
    assert code == 0, capsys.readouterr().err
    scores = json.loads((run / "scores.json").read_text())["stacked"]
    assert list(scores["readers"]["linear"]) == ["churn", "propensity_price"]
    assert list(scores["missing_tasks"]) == ["propensity_category"]
    note = "propensity_category: left out, the purchases of the train window leave fewer than two values of 'category'"
    assert note in printed and escape(note) in (run / "report.html").read_text()


def test_bad_submission_is_refused_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submission = tmp_path / "submission"
    submission.mkdir()
    np.save(submission / "client_ids.npy", np.arange(3))
    vectors = np.zeros((3, 4), np.float16)
    vectors[1, 2] = np.nan
    np.save(submission / "embeddings.npy", vectors)
    code, _, _ = run_tiny(tmp_path / "runs", *SYNTHETIC, "stages=[evaluate]", f"evaluation.profiles={submission}")
    assert code == 2
    assert "row 1" in capsys.readouterr().err


def challenge_directory(target: Path) -> Path:
    """The organisers' small data, writable; raw layout, so that the split is ours."""
    target.mkdir()
    for path in SMALL.glob("*.parquet"):
        shutil.copyfile(path, target / path.name)
    (target / "input").mkdir()
    shutil.copyfile(SMALL / "input" / "relevant_clients.npy", target / "input" / "relevant_clients.npy")
    return target


@pytest.mark.parametrize(
    "stacking", [(ALL_BLOCKS, *WIDE), (*NETWORK, "store.all_clients=true")], ids=["reduced rank", "network"]
)
def test_nothing_after_the_cutoff_moves_a_profile(stacking: tuple[str, ...], tmp_path: Path) -> None:
    data = challenge_directory(tmp_path / "data")
    common = ("data=challenge", "data.layout=raw", "stages=[profiles]")
    overrides = (f"data.dir={data}", *common, *stacking)
    code, run, _ = run_tiny(tmp_path / "first", *overrides)
    assert code == 0
    before = contents(run / "profiles")
    cutoff_s = EventDirectory.open(run / "stages" / "events").split.input_end_s
    changed = sum(change_future(data / f"{kind}.parquet", cutoff_s) for kind in ("product_buy", "add_to_cart"))
    for kind in ("remove_from_cart", "page_visit", "search_query"):
        changed += change_future(data / f"{kind}.parquet", cutoff_s)
    assert changed > 1000
    code, run, _ = run_tiny(tmp_path / "second", *overrides)
    assert code == 0
    assert contents(run / "profiles") == before


def change_future(path: Path, cutoff_s: int) -> int:
    """Every event at or after the cutoff goes to another client with another item; half of them disappear.

    The last purchase keeps its time: it is what the cutoff is made from.
    """
    table = pl.read_parquet(path)
    seconds = table["timestamp"].cast(pl.String).str.slice(0, 19).str.to_datetime().dt.epoch("s")
    past, future = (
        table.filter(seconds < cutoff_s),
        table.filter(seconds >= cutoff_s).sort("timestamp", descending=True),
    )
    item = table.columns[2]
    future = future.with_columns(pl.col("client_id").reverse(), pl.col(item).shuffle(seed=1))
    kept = pl.concat([future.head(1), future.tail(len(future) - 1).gather_every(2)])
    pl.concat([past, kept]).write_parquet(path)
    return len(future)


def test_other_configuration_does_not_overwrite_a_run(synthetic_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(synthetic_run / "profiles")
    code, _, _ = run_tiny(synthetic_run.parent, *SYNTHETIC, "seed=5", f"directory={synthetic_run}")
    assert code == 2
    assert "seed" in capsys.readouterr().err
    assert contents(synthetic_run / "profiles") == before


def test_probes_are_recorded_and_change_no_vector(synthetic_run: Path, tmp_path: Path) -> None:
    code, run, _ = run_tiny(tmp_path, *SYNTHETIC, "contrastive.config.probes=true", "stages=[contrastive]")
    assert code == 0
    watched, plain = run / "stages" / "contrastive", synthetic_run / "stages" / "contrastive"
    (epoch,) = json.loads((watched / "training" / "losses.json").read_text())["epochs"]
    assert {"auroc_churn", "auroc_buy_category", "auroc_buy_sku"} < set(epoch)
    vectors = {path.name: path.read_bytes() for path in watched.glob("vectors-*.npy")}
    assert len(vectors) == 2
    assert vectors == {path.name: path.read_bytes() for path in plain.glob("vectors-*.npy")}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.days=20", "Synthetic: days must be at least 29, got 20"),
        ("data.days=40", "training_cutoffs: the store must reach back more than 14 days"),
        ("multitask.config.encoder.heads=7", "EncoderLayer: heads must divide the width"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tiny(tmp_path, *SYNTHETIC, override, "stages=[profiles]")[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback_and_asks_for_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake(*_: object, **__: object) -> None:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("ubp_fast.pipeline.stages.build_store", mistake)
    assert run_tiny(tmp_path, *SYNTHETIC, "stages=[store]")[0] == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in make_store" in said
    assert said.splitlines()[-2] == "ValueError: operands could not be broadcast together"
    assert said.splitlines()[-1].endswith("Please report it, with the lines above and what `ubp-fast doctor` prints.")


@pytest.mark.parametrize("days", [7, 30])
def test_windows_of_any_length_decide_every_label(days: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the evaluation, the networks, the joining model, the scorer and the generator's truth ask for."""
    seen: dict[str, list[tuple[Views, np.ndarray]]] = {}
    for module in ("pipeline.model_stages", "models.pair_scorer"):
        found = importlib.import_module(f"ubp_fast.{module}")

        def watched(store, views, lists, module=module, true=found.window_labels):  # type: ignore[no-untyped-def]
            labels = true(store, views, lists)
            seen.setdefault(module, []).append((views, labels["churn"]))
            return labels

        monkeypatch.setattr(found, "window_labels", watched)
    only = ("evaluation.readers=[linear]", "evaluation.components=[stacked]", f"data.days={max(140, 7 * days)}")
    code, run, printed = run_tiny(tmp_path, *SYNTHETIC, *only, f"windows.days={days}", "windows.stacking_cutoffs=2")
    assert code == 0, printed

    events, store = EventDirectory.open(run / "stages" / "events"), EventStore.open(run / "stages" / "store")
    purchases = events.scan("product_buy").collect()
    last_s, window_s = int(purchases["timestamp_s"].max()), days * DAY_S  # type: ignore[arg-type]
    input_end_s = (last_s // DAY_S - (2 * days - 1)) * DAY_S
    assert (events.split.input_end_s, events.split.validation_start_s) == (input_end_s, input_end_s + window_s)

    def bought(start_s: int, clients: np.ndarray) -> np.ndarray:
        inside = purchases.filter((pl.col("timestamp_s") >= start_s) & (pl.col("timestamp_s") < start_s + window_s))
        return np.isin(clients, inside["client_id"].to_numpy())

    assert set(seen) == {"pipeline.model_stages", "models.pair_scorer"}
    moments = set()
    for views, churn in (one for found in seen.values() for one in found):
        for cutoff_s in np.unique(views.cutoff_s).tolist():
            moments.add((input_end_s - cutoff_s) / window_s)
            chosen = views.cutoff_s == cutoff_s
            clients = np.asarray(store.client_ids)[views.row[chosen]]
            np.testing.assert_array_equal(churn[chosen] == 0, bought(cutoff_s, clients))
    assert {1, 2, 3} <= moments and all(moment == int(moment) for moment in moments)

    everybody = np.asarray(store.client_ids)
    targets = build_targets(events, everybody, ("conversion",)).tasks["conversion"]
    for labels, start_s in ((targets.train, input_end_s), (targets.validation, input_end_s + window_s)):
        np.testing.assert_array_equal(labels.dense()[:, 0] == 0, bought(start_s, everybody))
    truth = events.path / "truth"
    chance = np.load(truth / "train_purchase.npy").mean()
    share = bought(input_end_s, np.load(truth / "client_ids.npy")).mean()
    assert abs(chance - share) < 0.1


def test_longer_windows_are_another_data_set(tmp_path: Path) -> None:
    """A run with other windows makes everything anew, the events included."""
    for days in (14, 10):
        code, _, printed = run_tiny(tmp_path / "shared", *SYNTHETIC, f"windows.days={days}", "stages=[store]")
        assert code == 0
        assert "events done" in printed


def test_unknown_stage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tiny(tmp_path, *SYNTHETIC, "stages=[trian]")[0] == 2
    assert "'trian'" in capsys.readouterr().err


def test_command_line_names_an_unknown_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ubp_fast.run", "data=synthetic", "data.clinets=5"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "no setting 'data.clinets', did you mean data.clients" in answer.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: (data / "product_buy.parquet").unlink(), r"product_buy\.parquet: table must exist"),
        (lambda data: truncate(data / "page_visit.parquet"), r"page_visit\.parquet: file must be a complete Parquet"),
        (lambda data: null_id(data / "add_to_cart.parquet"), r"add_to_cart\.parquet: column 'client_id'.*row 7"),
    ],
    ids=["missing table", "truncated table", "null id"],
)
def test_bad_input_leaves_nothing_half_written(change, message, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    data = challenge_directory(tmp_path / "data")
    change(data)
    code, run, _ = run_tiny(tmp_path / "runs", "data=challenge", f"data.dir={data}", "data.layout=raw")
    assert code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (run / "profiles").exists()
    assert not [path for path in (tmp_path / "runs" / "cache").glob("events-*") if not path.name.endswith(".partial")]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def null_id(path: Path) -> None:
    table = pl.read_parquet(path).with_row_index("row")
    ids = pl.when(pl.col("row") == 7).then(None).otherwise(pl.col("client_id")).alias("client_id")
    table.with_columns(ids).drop("row").write_parquet(path)
