from __future__ import annotations

import io

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
