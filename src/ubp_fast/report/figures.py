"""Figures of the report, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

INK = "#222222"
PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")


def score_figure(scores: Mapping[str, Mapping[str, tuple[float | None, float | None]]]) -> bytes:
    """Grouped bars: one group per task, one bar per component, whiskers of one standard error.

    Args:
        scores: component -> task -> (score, standard error); either may be None when there is none.
    """
    components = list(scores)
    tasks = list(dict.fromkeys(task for values in scores.values() for task in values))
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(len(components), 1)
    for position, component in enumerate(components):
        values = [scores[component].get(task, (None, None)) for task in tasks]
        axes.bar(
            [index + (position - (len(components) - 1) / 2) * width for index in range(len(tasks))],
            [value or 0.0 for value, _ in values],
            width * 0.92,
            yerr=[error or 0.0 for _, error in values],
            color=PALETTE[position % len(PALETTE)],
            error_kw={"ecolor": INK, "elinewidth": 1.0},
            label=component,
        )
    axes.set_xticks(range(len(tasks)), [task.removeprefix("propensity_") for task in tasks])
    axes.set_ylabel("score")
    axes.set_ylim(*_score_limits(scores))
    axes.legend(frameon=False, ncols=max(len(components), 1), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return _png(figure)


def loss_figure(history: Sequence[Mapping[str, float]], title: str) -> bytes:
    """One line per loss term over the training.

    Args:
        history: mean loss terms of consecutive parts of the training; `epoch` says where each ends.
        title: the model's name.
    """
    figure = Figure(figsize=(4.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    epochs = [part["epoch"] for part in history]
    for position, term in enumerate(dict.fromkeys(term for part in history for term in part if term != "epoch")):
        values = [part.get(term, float("nan")) for part in history]
        axes.plot(epochs, values, marker="o", markersize=2, color=PALETTE[position % len(PALETTE)], label=term)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=7)
    return _png(figure)


def _score_limits(scores: Mapping[str, Mapping[str, tuple[float | None, float | None]]]) -> tuple[float, float]:
    present = [value for values in scores.values() for value, _ in values.values() if value is not None]
    if not present:
        return 0.0, 1.0
    return max(0.0, min(present) - 0.05), min(1.0, max(present) + 0.05)


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()
