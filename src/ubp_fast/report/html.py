"""Turns the facts of a run into one HTML page with its figures, style and script inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any

from ubp_fast.evaluation.leaderboard import Difference
from ubp_fast.report import figures
from ubp_fast.report.figures import Scores, number_text, table_html

# What must be seen before the numbers are trusted, as a list among facts.
WARNINGS = "warnings"
READER_NOTE = (
    "What a model behind the vectors makes of them: it learns in the target window after the vectors' cutoff and is"
    " scored on the next one, mean AUROC of a task's labels. network: the challenge's, the best of its epochs;"
    " linear: ridge regression; boosting: LightGBM on a sample of the labels; neighbours: the share of the 50 nearest"
    " clients that have the label. ± is one standard error over row orders (network) or samples of labels."
)
CHALLENGE_NOTE = (
    "Churn and conversion: AUROC. Propensity: 0.8 AUROC + 0.1 diversity + 0.1 novelty. Best of three epochs of the"
    " organisers' fixed network. ± is one standard error over row orders."
)


@dataclass(frozen=True)
class Timing:
    """What one stage took.

    Attributes:
        stage: its name.
        seconds: None when it came from the cache.
        peak_bytes: most memory that the process had held when the stage was done; None when it came from the cache.
    """

    stage: str
    seconds: float | None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class RunSummary:
    """What a report shows; a part that is empty has no section.

    Attributes:
        title: name of the run.
        scores: component -> task -> (challenge's score, standard error over row orders or None).
        readers: component -> reader -> task -> (AUROC, standard error over repetitions or None).
        paired: reader -> task -> difference of the first two components.
        paired_notes: readers whose scores cannot be paired, and why.
        diagnosis: what `ubp_fast.evaluation.diagnostics.diagnose` has found.
        portrait: what `ubp_fast.report.clients.portray` has found.
        drift: what `ubp_fast.report.drift.drift` has found.
        data: what `ubp_fast.report.data.data_read` has found.
        losses: model -> mean loss terms of consecutive parts of its training, with the `epoch` where each ends.
        timings: of the stages, in order.
        facts: short facts such as the number of clients and the windows.
        environment: versions and machine.
        config_text: the resolved configuration as YAML.
        warnings: sentences the reader must see before trusting the numbers.
    """

    title: str
    scores: Mapping[str, Scores] = field(default_factory=dict)
    readers: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    paired: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    paired_notes: Sequence[str] = ()
    diagnosis: Mapping[str, Any] = field(default_factory=dict)
    portrait: Mapping[str, Any] = field(default_factory=dict)
    drift: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    timings: Sequence[Timing] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    config_text: str = ""
    warnings: Sequence[str] = ()


def render_report(summary: RunSummary) -> str:
    """The report as one HTML document that needs nothing beside it."""
    sections = {
        "Scores": _scores(summary),
        "Behind the scores": _diagnosis(summary.diagnosis),
        "Clients": _clients(summary.portrait),
        "Drift": [figures.drift_figure(summary.drift)] if summary.drift else [],
        "Data": _data(summary.data),
        "Training": [figures.loss_figure(summary.losses)] if summary.losses else [],
        "Time and memory": [_timing_table(summary.timings)] if summary.timings else [],
        "Made with": [_facts(summary.environment)] if summary.environment else [],
        "Configuration": _configuration(summary.config_text),
    }
    present = {name: parts for name, parts in sections.items() if parts}
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in present)
    body = [f"<h1>{escape(summary.title)}</h1>", f"<nav>{links}</nav>" if links else ""]
    if warnings := _warnings(summary):
        items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
        body.append(f'<div class="warnings"><strong>Before trusting the numbers</strong><ul>{items}</ul></div>')
    body.append(_facts({name: value for name, value in summary.facts.items() if name != WARNINGS}))
    for name, parts in present.items():
        body += [f'<h2 id="{_anchor(name)}">{escape(name)}</h2>', *parts]
    if "map" in summary.portrait:
        body.append(f'<script type="application/json" id="client-map-data">{_json(summary.portrait["map"])}</script>')
        body.append(f"<script>{_resource('page.js')}</script>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(summary.title)}</title><style>{_resource('page.css')}</style></head><body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _warnings(summary: RunSummary) -> list[str]:
    """Each once: those of the run, and those that stand among its facts."""
    found = [*summary.warnings]
    for facts in (summary.facts, summary.diagnosis):
        told: Any = facts.get(WARNINGS, ())
        found += told
    return list(dict.fromkeys(found))


def _scores(summary: RunSummary) -> list[str]:
    parts = []
    if summary.readers:
        by_reader: dict[str, dict[str, Scores]] = {}
        for component, found in summary.readers.items():
            for reader, tasks in found.items():
                by_reader.setdefault(reader, {})[component] = tasks
        parts += ["<h3>AUROC by reader</h3>", figures.score_figure(by_reader), f'<p class="note">{READER_NOTE}</p>']
        tables = "".join(_reader_table(component, found) for component, found in summary.readers.items())
        parts.append(f"<details><summary>As tables</summary>{tables}</details>")
    if summary.paired:
        first, second = list(summary.readers)[:2]
        parts += ["<h3>Paired differences</h3>", figures.difference_figure(summary.paired, first, second)]
        parts += [f'<p class="note">{escape(note)}</p>' for note in summary.paired_notes]
    if summary.scores:
        parts += ["<h3>Scores of the challenge</h3>", _score_table(summary.scores)]
        parts.append(f'<p class="note">{CHALLENGE_NOTE}</p>')
    return parts


def _diagnosis(found: Mapping[str, Any]) -> list[str]:
    if not found or not found["tasks"]:
        return []
    of = f"{found['clients']:,} of {found['of_clients']:,}" if found["clients"] < found["of_clients"] else "all"
    twins = "".join(f" {name} asks the same as {other} here." for name, other in found["same"].items())
    parts = [f'<p class="note">All of it is of the linear reader, on {of} clients.{escape(twins)}</p>']
    parts += ["<h3>ROC</h3>", figures.roc_figure(found["roc"])]
    parts += ["<h3>Calibration</h3>", figures.calibration_figure(found["calibration"])]
    if any(curve for curves in found["sizes"].values() for curve in curves.values()):
        parts += ["<h3>Size of the training sample</h3>", figures.size_figure(found["sizes"])]
    says = (
        "How much the vectors tell of new clients, and of those with a long history: AUROC by how many events a client"
        " has before the cutoff. Each group has labels of its own, those that at least ten of its clients have, and as"
        " many lack; without any it has no AUROC."
    )
    parts += [
        "<h3>Length of history</h3>",
        figures.group_figure(found["history"], "events before the cutoff", says),
    ]
    same = " Tasks without a label that enough clients of every group have, and lack, are left out."
    says = "AUROC by how long ago the newest event of a client was at the cutoff." + same
    parts += ["<h3>Recency</h3>", figures.group_figure(found["recency"], "days since the newest event", says)]
    says = (
        "How fast vectors grow old: the same vectors, asked about ever later parts of the time behind their cutoff, by"
        " models of other clients in that part." + same
    )
    parts += ["<h3>Age of the profile</h3>", figures.group_figure(found["age"], "days behind the cutoff", says)]
    if found["blocks"]:
        parts += ["<h3>Blocks</h3>", figures.block_figure(found["blocks"])]
    return parts


def _clients(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    tables = figures.neighbour_tables(found)
    return ["<h3>Map</h3>", figures.client_map(found), *(["<h3>Nearest clients</h3>", tables] if tables else [])]


def _data(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    notes = "".join(f"<li>{escape(note)}</li>" for note in found["notes"])
    told = f"<ul>{notes}</ul>" if notes else '<p class="note">Nothing was left out.</p>'
    return [figures.event_figure(found), "<h3>What was left out, and why</h3>", told]


def _configuration(text: str) -> list[str]:
    return [f"<details><summary>All settings</summary><pre>{escape(text)}</pre></details>"] if text else []


def _score_table(scores: Mapping[str, Scores]) -> str:
    tasks = list(dict.fromkeys(task for values in scores.values() for task in values))
    best = {task: max((values[task][0] or 0.0) for values in scores.values() if task in values) for task in tasks}
    head = "".join(f"<th>{escape(figures.short_name(task))}</th>" for task in tasks)
    rows = []
    for component, values in scores.items():
        cells = "".join(_score_cell(values.get(task, (None, None)), best[task]) for task in tasks)
        rows.append(f"<tr><td>{escape(component)}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr><th>vectors</th>{head}</tr>{"".join(rows)}</table></div>'


def _reader_table(component: str, readers: Mapping[str, Scores]) -> str:
    tasks = list(dict.fromkeys(task for values in readers.values() for task in values))
    rows = [
        [reader, *(_spread_text(values.get(task, (None, None))) for task in tasks)]
        for reader, values in readers.items()
    ]
    return f"<h3>{escape(component)}</h3>{table_html(['reader', *map(figures.short_name, tasks)], rows)}"


def _score_cell(value: tuple[float | None, float | None], best: float | None) -> str:
    is_best = value[0] is not None and value[0] == best
    return f"<td{' class=best' if is_best else ''}>{_spread_text(value)}</td>"


def _spread_text(value: tuple[float | None, float | None]) -> str:
    score, error = value
    if score is None:
        return "undefined"
    return number_text(score) + ("" if error is None else f" ± {error:.4f}")


def _timing_table(timings: Sequence[Timing]) -> str:
    rows = [
        [
            one.stage,
            "from the cache" if one.seconds is None else f"{one.seconds:.1f} s",
            "" if one.peak_bytes is None else f"{one.peak_bytes / 1e9:.2f} GB",
        ]
        for one in timings
    ]
    spent = sum(one.seconds or 0.0 for one in timings)
    note = f'<p class="note">{spent:.0f} s in all. Memory: the most that the process had held up to there.</p>'
    return table_html(["stage", "time", "memory"], rows) + note


def _facts(facts: Mapping[str, object]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_fact(value))}</td></tr>" for name, value in facts.items())
    return f'<div class="wide"><table class="facts">{rows}</table></div>' if rows else ""


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _json(value: object) -> str:
    """JSON that no text inside of it can end."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _resource(name: str) -> str:
    return resources.files("ubp_fast.report").joinpath(name).read_text(encoding="utf-8")
