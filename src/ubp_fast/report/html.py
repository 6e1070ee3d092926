"""Turns the facts of a run into one HTML page with its figures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from ubp_fast.report.figures import loss_figure, score_figure

Scores = Mapping[str, tuple[float | None, float | None]]
READER_NOTE = (
    "What a model behind the vectors makes of them: it learns in the target window after the vectors' cutoff and is"
    " scored on the next one, mean AUROC of a task's labels. network: the challenge's, the best of its epochs;"
    " linear: ridge regression; boosting: LightGBM on a sample of the labels; neighbours: the share of the 50 nearest"
    " clients that have the label. ± is one standard error over row orders (network) or samples of labels."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } td.best { font-weight: 700; } img { max-width: 100%; }
.note { color: #666; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 12px; }
"""


@dataclass(frozen=True)
class RunSummary:
    """What a report shows.

    Attributes:
        title: name of the run.
        scores: component -> task -> (challenge's score, standard error over row orders or None).
        readers: component -> reader -> task -> (AUROC, standard error over repetitions or None).
        losses: model -> mean loss terms of consecutive parts of its training, with the `epoch` where each ends.
        timings: (stage, seconds or None when it came from the cache), in order.
        facts: short facts such as the number of clients and the windows.
        environment: versions and machine.
        config_text: the resolved configuration as YAML.
        warnings: sentences the reader must see before trusting the numbers.
    """

    title: str
    scores: Mapping[str, Scores]
    readers: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)
    losses: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    timings: Sequence[tuple[str, float | None]] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    config_text: str = ""
    warnings: Sequence[str] = ()


def render_report(summary: RunSummary) -> str:
    """The report as one HTML document."""
    sections = [f"<h1>{escape(summary.title)}</h1>", _facts(summary.facts)]
    sections += [f"<p><strong>Note:</strong> {escape(text)}</p>" for text in summary.warnings]
    if summary.scores:
        sections += [
            "<h2>Scores of the challenge</h2>",
            _score_table(summary.scores),
            '<p class="note">Churn and conversion: AUROC. Propensity: 0.8 AUROC + 0.1 diversity + 0.1 novelty. '
            "Best of three epochs of the organisers' fixed network. ± is one standard error over row orders.</p>",
            _image(score_figure(summary.scores), "scores per task and component"),
        ]
    if summary.readers:
        sections += [
            "<h2>AUROC by reader</h2>",
            *(_reader_table(component, found) for component, found in summary.readers.items()),
            f'<p class="note">{READER_NOTE}</p>',
        ]
    if summary.losses:
        sections.append("<h2>Training</h2>")
        sections += [_image(loss_figure(epochs, model), f"loss of {model}") for model, epochs in summary.losses.items()]
    if summary.timings:
        sections += ["<h2>Where the time went</h2>", _timing_table(summary.timings)]
    if summary.environment:
        sections += ["<h2>Made with</h2>", _facts(summary.environment)]
    if summary.config_text:
        sections += ["<h2>Configuration</h2>", f"<pre>{escape(summary.config_text)}</pre>"]
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(summary.title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _score_table(scores: Mapping[str, Scores]) -> str:
    tasks = list(dict.fromkeys(task for values in scores.values() for task in values))
    best = {task: max((values[task][0] or 0.0) for values in scores.values() if task in values) for task in tasks}
    head = "".join(f"<th>{escape(task)}</th>" for task in tasks)
    rows = []
    for component, values in scores.items():
        cells = "".join(_score_cell(values.get(task, (None, None)), best[task]) for task in tasks)
        rows.append(f"<tr><td>{escape(component)}</td>{cells}</tr>")
    return f"<table><tr><th>profile</th>{head}</tr>{''.join(rows)}</table>"


def _reader_table(component: str, readers: Mapping[str, Scores]) -> str:
    tasks = list(dict.fromkeys(task for values in readers.values() for task in values))
    head = "".join(f"<th>{escape(task)}</th>" for task in tasks)
    rows = "".join(
        f"<tr><td>{escape(reader)}</td>"
        + "".join(_score_cell(values.get(task, (None, None)), None) for task in tasks)
        + "</tr>"
        for reader, values in readers.items()
    )
    return f"<h3>{escape(component)}</h3><table><tr><th>reader</th>{head}</tr>{rows}</table>"


def _score_cell(value: tuple[float | None, float | None], best: float | None) -> str:
    score, error = value
    if score is None:
        return "<td>undefined</td>"
    spread = "" if error is None else f" ± {error:.4f}"
    return f"<td{' class=best' if score == best else ''}>{score:.4f}{spread}</td>"


def _timing_table(timings: Sequence[tuple[str, float | None]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(stage)}</td><td>{'from the cache' if seconds is None else f'{seconds:.1f} s'}</td></tr>"
        for stage, seconds in timings
    )
    return f"<table><tr><th>stage</th><th>time</th></tr>{rows}</table>"


def _facts(facts: Mapping[str, object]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_fact(value))}</td></tr>" for name, value in facts.items())
    return f"<table>{rows}</table>" if rows else ""


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _image(png: bytes, description: str) -> str:
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
