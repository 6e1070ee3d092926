from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from ubp_fast.progress import RunProgress, duration


def test_log_lines_name_every_stage_and_the_share_done() -> None:
    text = io.StringIO()
    progress = RunProgress(Console(file=text, width=120), [("events", 1.0), ("store", 3.0)])
    with progress.display():
        for name in ("events", "store"):
            with progress.stage(name) as update:
                update(1, 2)
    lines = text.getvalue().splitlines()
    assert lines[0].split()[:2] == ["0%", "events"]
    assert any("25%" in line and "store ..." in line for line in lines)
    assert "100%" in lines[-1] and "store done" in lines[-1]


def test_live_display_runs_on_a_terminal() -> None:
    text = io.StringIO()
    progress = RunProgress(Console(file=text, force_terminal=True, width=120), [("events", 1.0)])
    with progress.display(), progress.stage("events") as update:
        update(0, 0)
        update(5, 4)
    assert "whole run" in text.getvalue()
    assert "100%" in text.getvalue()


def test_duration_text() -> None:
    assert [duration(value) for value in (4.4, 65, 3599.7, 7500)] == ["4 s", "1 min 05 s", "1 h 00 min", "2 h 05 min"]


def test_machines_read_a_json_object_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter(range(0, 1000, 6))
    monkeypatch.setattr("ubp_fast.progress.time.monotonic", lambda: float(next(now_s)))
    text = io.StringIO()
    progress = RunProgress(Console(file=text, width=20), [("events", 1.0), ("[red]store", 3.0)], "json")
    with progress.display():
        for name in ("events", "[red]store"):
            with progress.stage(name) as update:
                update(2, 4)
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["stage_started", "stage_progress", "stage_finished"] * 2
    assert [line["stage"] for line in lines] == ["events"] * 3 + ["[red]store"] * 3
    assert [line["share"] for line in lines] == [0, 0.125, 0.25, 0.25, 0.625, 1]
    assert lines[1]["stage_share"] == 0.5 and lines[2]["seconds"] > 0
    assert lines[0]["remaining_s"] is None and lines[4]["remaining_s"] > 0


def test_a_log_has_a_line_a_minute_also_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter(range(0, 100_000, 20))
    monkeypatch.setattr("ubp_fast.progress.time.monotonic", lambda: float(next(now_s)))
    text = io.StringIO()
    progress = RunProgress(Console(file=text, force_terminal=True, width=120), [("events", 1.0)], "lines")
    with progress.display(), progress.stage("events") as update:
        for done in range(30):
            update(done, 30)
    assert "whole run" not in text.getvalue()
    spoken = text.getvalue().count("events ") - 2  # but for the first and the last line
    assert 8 <= spoken <= 15, "every third to fourth of the updates, twenty to forty seconds apart"
