"""Whole runs on tables as shops bring them: short or odd ones end with vectors, or with a sentence that helps."""

from __future__ import annotations

import io
import json
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from support.runs import composed

from ubp_fast.events.split import DAY_S
from ubp_fast.pipeline import execute
from ubp_fast.profiles import Profiles

START_S = 1_704_067_200  # 2024-01-01
CHURN = ("evaluation.tasks=[churn]", "evaluation.precision=bf16", "evaluation.readers=[network,linear]")


def shop(days: int = 100, clients: int = 12, skus: int = 3) -> pl.DataFrame:
    """Client c buys something on a day with the chance (c + 1) / 30."""
    random = np.random.default_rng(0)
    day, client = (random.random((days, clients)) < (np.arange(clients) + 1) / 30).nonzero()
    sku = random.integers(0, skus, len(day))
    return pl.DataFrame({"client_id": client, "timestamp": START_S + day * DAY_S, "sku": sku})


def run(folder: Path, table: pl.DataFrame, *overrides: str) -> tuple[int, str]:
    """Exit code and what was printed of a run on this table."""
    table.write_parquet(folder / "events.parquet")
    text = io.StringIO()
    named = (f"data.path={folder / 'events.parquet'}", f"root={folder / 'runs'}", f"directory={folder / 'run'}")
    code = execute(composed("data=table", "compute.threads=1", *named, *overrides), Console(file=text, width=160))
    return code, text.getvalue()


def notes(folder: Path) -> list[str]:
    return json.loads((folder / "run/stages/events/dataset.json").read_text())["notes"]


@pytest.mark.parametrize(("days", "target_days"), [(21, 5), (30, 7), (45, 11), (60, None)])
def test_short_histories(tmp_path: Path, days: int, target_days: int | None) -> None:
    """Three weeks are enough: windows and the number of past cutoffs shrink, and the run says so."""
    code, _ = run(tmp_path, shop(days), "stages=[profiles]")
    assert code == 0
    vectors = Profiles.load(tmp_path / "run/profiles").embeddings
    assert np.isfinite(vectors).all() and len(np.unique(vectors, axis=0)) > 5
    told = [note for note in notes(tmp_path) if "history is short" in note]
    assert bool(told) == (target_days is not None)
    assert target_days is None or f"target windows are {target_days} days instead of 14" in told[0]


def test_less_than_three_weeks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, shop(18), "stages=[profiles]")[0] == 2
    assert "the history must span at least 20 days up to the last purchase, got 17" in capsys.readouterr().err


def test_short_windows_are_scored(tmp_path: Path) -> None:
    code, printed = run(tmp_path, shop(30, clients=30), *CHURN)
    assert code == 0
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert 0 < scores["stacked"]["readers"]["linear"]["churn"]["auroc"] <= 1
    assert "target windows are 7 days" in printed


def test_warnings_reach_screen_scores_and_report(tmp_path: Path) -> None:
    code, printed = run(tmp_path, shop(), *CHURN, "windows.days=30", "windows.labels=3")
    assert code == 0
    expected = (
        "column 'timestamp' holds moments, taken as the clock in UTC shows them",
        "target windows are 24 days instead of 30",
        "the newest vectors are of 2024-02-22 00:00:00, 47 days before the newest event; profiles.at=end",
        "propensity_sku: 3 of 3 labels that models learn have fewer than 10 buyers in the window from 2024-01-29",
        "churn: the label has fewer than 10 clients of one class",
    )
    warnings = json.loads((tmp_path / "run/scores.json").read_text())["warnings"]
    report = (tmp_path / "run/report.html").read_text()
    assert [line.removeprefix("note      ") for line in printed.splitlines() if line.startswith("note ")] == warnings
    for text in expected:
        assert [one for one in warnings if text in one], text
        assert escape(text) in report


def test_nothing_is_warned_of_without_reason(tmp_path: Path) -> None:
    table = shop(clients=40, skus=2).gather_every(8).with_columns(pl.from_epoch("timestamp"))
    code, printed = run(tmp_path, table, *CHURN)
    assert code == 0
    assert "note " not in printed, printed


def test_what_a_run_is_about_is_told_before_the_work(tmp_path: Path) -> None:
    table = shop()
    code, printed = run(tmp_path, table, "stages=[profiles]")
    assert code == 0
    lines = printed.split("store done")[1].split("features ...")[0].splitlines()
    facts = {line[:42].strip(): line[42:].strip() for line in lines}
    seconds = table["timestamp"] - START_S
    learned, scored = (
        table.filter((seconds >= first * DAY_S) & (seconds < last * DAY_S))["client_id"].n_unique()
        for first, last in ((72, 86), (86, 100))
    )
    assert facts["clients with a profile"] == "12"
    assert facts["events"] == f"{len(table)} product_buy"
    assert facts["span"] == "2024-01-01 00:00:00 to 2024-04-09 00:00:00 (99 days)"
    assert facts["past windows learned from"] == "from 2024-02-28, 2024-02-14, 2024-01-31"
    assert facts["buyers in the window learned from"].startswith(f"{learned}, {(12 - learned) / 12:.0%} of those")
    assert facts["buyers in the window scored"].startswith(f"{scored}, ")
    assert facts["values bought in the window learned from"] == "1 of category, 3 of sku, 1 of price"


@pytest.mark.parametrize("at", ["2001-01-01", "2024-04-24", "2035-01-01"])
def test_a_moment_of_another_year_is_refused(at: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice was another data.end, or a cutoff in seconds."""
    assert run(tmp_path, shop(), "stages=[profiles]", "evaluation=off", f"profiles.at={at}")[0] == 2
    wanted = (
        "run: profiles.at must lie after the first event, 2024-01-01 00:00:00, and at most 14 days after the last one,"
        f" 2024-04-09 00:00:00, got {at} 00:00:00; ubp-fast embed makes vectors of later moments"
    )
    assert wanted in capsys.readouterr().err


def test_a_run_without_scores_tells_of_none(tmp_path: Path) -> None:
    """The README's command showed windows of a backtest that nobody had asked for."""
    table = shop().with_columns(pl.from_epoch("timestamp"))
    for at, moment in (("end", "2024-04-09 00:00:01"), ("2024-04-01", "2024-04-01 00:00:00")):
        (tmp_path / at).mkdir()
        code, printed = run(tmp_path / at, table, "evaluation=off", "report.clients=false", f"profiles.at={at}")
        assert code == 0 and re.search(f"latest profiles see events before +{moment}", printed)
        assert not re.search("^(profiles see|readers learn|scores are|buyers in|repetitions)", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("at", "told"),
    [
        (None, "1 client comes first at or after 2024-03-13 00:00:00, the moment of the newest vectors, and has none"),
        ("2024-03-20", "1 client comes first at or after 2024-03-20 00:00:00, the moment of the newest vectors"),
        ("2024-03-28", ""),
        ("end", ""),
    ],
)
def test_a_client_who_comes_after_the_moment_of_the_newest_vectors(tmp_path: Path, at: str | None, told: str) -> None:
    """`profiles.at=end` was advised to who had set it."""
    late = pl.DataFrame({"client_id": [99], "timestamp": [START_S + 85 * DAY_S], "sku": [1]})
    moment = [] if at is None else [f"profiles.at={at}", "evaluation=off"]
    code, printed = run(tmp_path, pl.concat([shop(), late]), "stages=[profiles]", "data.timezone=UTC", *moment)
    assert code == 0
    newest = Profiles.load(tmp_path / "run" / ("profiles" if at is None else "latest"))
    assert (99 in newest.client_ids) == (told == "")
    assert told in printed and ("profiles.at=end" in printed) == bool(told)


def test_one_client_is_told_in_words_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, shop(clients=1), "stages=[profiles]")[0] == 2
    message = capsys.readouterr().err
    assert "purchases must lie between 2024-02-21 00:00:00 and 2024-03-06 00:00:00" in message
    days = pl.DataFrame(
        {"client_id": [7] * 99, "timestamp": [START_S + day * DAY_S for day in range(1, 100)], "sku": [1] * 99}
    )
    assert run(tmp_path, days, "stages=[profiles]")[0] == 2
    message = capsys.readouterr().err
    assert "clients must differ in what they do" in message and "bring more clients or a longer history" in message


def test_a_label_of_one_class_has_no_score(tmp_path: Path) -> None:
    """Everybody buys once: nobody with a vector buys in the validation window. The AUROC was 0 without a word."""
    day = np.arange(100)
    code, printed = run(
        tmp_path, pl.DataFrame({"client_id": day, "timestamp": START_S + day * DAY_S, "sku": day % 2}), *CHURN
    )
    assert code == 0
    found = json.loads((tmp_path / "run/scores.json").read_text())["stacked"]
    assert found["tasks"]["churn"]["score"] is None and found["readers"]["linear"]["churn"]["auroc"] is None
    assert "note      churn: no label has clients with it and clients without it" in printed
    assert any(line.startswith("│ stacked") and line.split("│")[2].strip() == "-" for line in printed.splitlines())


def submission(folder: Path, ids: np.ndarray) -> str:
    (folder / "mine").mkdir()
    np.save(folder / "mine/client_ids.npy", ids)
    vectors = np.random.default_rng(0).normal(size=(len(ids), 2)).astype(np.float16)
    np.save(folder / "mine/embeddings.npy", vectors)
    return f"evaluation.profiles={folder / 'mine'}"


def test_vectors_of_other_clients_than_the_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = submission(tmp_path, np.arange(5, 50))
    assert run(tmp_path, shop(clients=40), *CHURN, mine)[0] == 2
    message = capsys.readouterr().err
    assert "40 relevant clients" in message and "5 missing (first: 0), 10 unknown (first: 40 in row 35)" in message
    assert "evaluation.common_clients=true" in message
    shared = ("evaluation.common_clients=true", f"directory={tmp_path / 'shared'}")
    code, printed = run(tmp_path, shop(clients=40), *CHURN, mine, *shared)
    assert code == 0
    scores = json.loads((tmp_path / "shared/scores.json").read_text())
    assert [scores[name]["clients"] for name in ("submission", "baseline_log1p")] == [35, 35]
    assert "clients: all scores are of the 35 clients that the submission (45) and the baselines (40) share" in printed


def test_text_ids_of_a_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = shop(clients=30).with_columns(client_id=pl.format("u{}", "client_id"))
    mine = submission(tmp_path, np.array([f"u{number}" for number in range(30)]))
    assert run(tmp_path, table, *CHURN, mine)[0] == 0
    assert json.loads((tmp_path / "run/scores.json").read_text())["submission"]["clients"] == 30
    np.save(tmp_path / "mine/client_ids.npy", np.array([f"v{number}" for number in range(30)]))
    assert run(tmp_path, table, *CHURN, mine)[0] == 2
    assert "got 30 unknown ones, the first 'v0' in row 0; the data's ids look like 'u" in capsys.readouterr().err


@pytest.mark.parametrize("paths", ["[{0}]", "{0}/../*.parquet"])
def test_another_file_of_a_list_or_a_pattern_is_another_run(tmp_path: Path, paths: str) -> None:
    """Outputs are found again by the content of the files, however they are named."""
    named = "data.path=" + paths.format(tmp_path / "events.parquet")
    (tmp_path / "events").mkdir()
    for clients in (12, 13):
        table = shop(clients=clients)
        named = f"data.path={paths.format(tmp_path / 'events.parquet')}".replace("events.parquet/..", "events/..")
        directory = f"directory={tmp_path / str(clients)}"
        assert run(tmp_path, table, "stages=[events]", named, directory)[0] == 0
        info: dict[str, Any] = json.loads((tmp_path / str(clients) / "stages/events/dataset.json").read_text())
        assert info["rows"] == {"product_buy": len(table)}
