"""How long work tells how far it is, and the display of a whole run: overall share, remaining time, stage in hand.

For people on a terminal two live bars; for a log one line when a stage starts, ends, or has gone on for a minute; for
machines the same as JSON, one object per line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Literal

from rich import progress as rich_progress
from rich.console import Console

# Between two lines of one stage; machines do not tire.
LOG_INTERVAL_S = {"lines": 60.0, "json": 5.0}
Style = Literal["auto", "bars", "lines", "json"]

Progress = Callable[[int, int], None]
"""`progress(steps done, steps in all)`"""


class Steps:
    """Counts steps and reports each."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._count = progress, total, 0

    def done(self, steps: int = 1) -> None:
        """So many more steps are finished."""
        self._count += steps
        if self._progress is not None:
            self._progress(self._count, self._total)


class RunProgress:
    """Progress over stages of known relative cost.

    Args:
        console: where to draw.
        stages: (name, relative cost) of every stage that will run; the costs only shape the estimate.
        style: "bars"; "lines"; "json": `{"event": "stage_started" | "stage_progress" | "stage_finished", "time",
            "stage", "share" of the whole, "remaining_s" or null}`, with `stage_share` or `seconds`; "auto": bars on a
            terminal, else lines.
    """

    def __init__(self, console: Console, stages: Sequence[tuple[str, float]], style: Style = "auto") -> None:
        self.console = console
        self._style = ("bars" if console.is_terminal else "lines") if style == "auto" else style
        self._weights = dict(stages)
        self._total = sum(self._weights.values()) or 1.0
        self._finished = 0.0
        self._started_s = time.monotonic()
        self._live: rich_progress.Progress | None = None

    @contextmanager
    def display(self) -> Iterator[RunProgress]:
        """Shows the bars while the block runs."""
        if self._style != "bars":
            yield self
            return
        columns = (
            rich_progress.TextColumn("{task.description:<34}"),
            rich_progress.BarColumn(),
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
        )
        with rich_progress.Progress(*columns, console=self.console) as live:
            self._live = live
            self._overall = live.add_task("whole run", total=self._total, note="")
            yield self
        self._live = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Runs one stage; yields the callback `progress(done, total)` to hand to it."""
        started_s = time.monotonic()
        last_line_s = started_s
        task = self._live.add_task(name, total=1.0, note="") if self._live else None
        self._tell("stage_started", name, "...", self._finished)

        def update(done: int, total: int) -> None:
            nonlocal last_line_s
            share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
            overall = self._finished + share * self._weights.get(name, 0.0)
            now_s = time.monotonic()
            if self._live is not None:
                self._live.update(task, completed=share)  # type: ignore[arg-type]
                self._live.update(self._overall, completed=overall, note=self._remaining_text(overall))
            elif now_s - last_line_s >= LOG_INTERVAL_S[self._style]:
                last_line_s = now_s
                self._tell("stage_progress", name, f"{share:.0%}", overall, stage_share=share)

        yield update
        self._finished += self._weights.get(name, 0.0)
        elapsed_s = time.monotonic() - started_s
        if self._live is not None:
            self._live.update(task, completed=1.0)  # type: ignore[arg-type]
            self._live.update(self._overall, completed=self._finished, note=self._remaining_text(self._finished))
        self._tell("stage_finished", name, f"done in {elapsed_s:.1f} s", self._finished, seconds=elapsed_s)

    def _tell(self, event: str, stage: str, text: str, finished: float, **more: float) -> None:
        """One line of a log, for people or machines; nothing beside bars."""
        if self._style == "json":
            remaining_s = self._remaining_s(finished)
            facts = {"stage": stage, "share": finished / self._total, "remaining_s": remaining_s, **more}
            print_json(self.console, event, **facts)
        elif self._style == "lines":
            self.console.print(f"{self._overall_text(finished):>24}  {stage} {text}", highlight=False)

    def _remaining_s(self, finished: float) -> float | None:
        elapsed_s = time.monotonic() - self._started_s
        if finished <= 0.02 * self._total or elapsed_s < 2.0:
            return None
        return elapsed_s * (self._total - finished) / finished

    def _remaining_text(self, finished: float) -> str:
        remaining_s = self._remaining_s(finished)
        return "" if remaining_s is None else f"about {duration(remaining_s)} left"

    def _overall_text(self, finished: float) -> str:
        return f"{finished / self._total:4.0%} {self._remaining_text(finished)}"


def print_json(console: Console, event: str, **facts: object) -> None:
    """One JSON object on a line of its own, whatever the width of the console."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = json.dumps({"event": event, "time": now, **facts}, ensure_ascii=False, allow_nan=False)
    console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


def duration(seconds: float) -> str:
    """Seconds as a short text: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
