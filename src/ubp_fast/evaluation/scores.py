"""Scores of a submission: per task, per row order, per epoch.

A task's score in one row order is the best epoch's weighted score (the first one when epochs tie), rounded to four
digits. A score that is NaN never wins; when no epoch has a score, the task has none: null in JSON, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ubp_fast.evaluation.metrics import Metrics
from ubp_fast.evaluation.probe import EvaluationConfig
from ubp_fast.events.schema import DataError

DIGITS = 4
FORMAT = 1


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task.

    Attributes:
        orders: metrics of every epoch, one tuple per row order; without clients the tuples are empty.
    """

    orders: tuple[tuple[Metrics, ...], ...]

    @property
    def best(self) -> tuple[float | None, ...]:
        """Score of each row order, rounded; None when no epoch has one."""
        return tuple(
            None if epoch is None else round(epochs[epoch].score, DIGITS)
            for epochs, epoch in zip(self.orders, self.best_epochs, strict=True)
        )

    @property
    def best_epochs(self) -> tuple[int | None, ...]:
        """Index of the epoch that counts in each row order."""
        return tuple(_best_epoch(epochs) for epochs in self.orders)

    @property
    def score(self) -> float | None:
        """Mean over the row orders that have a score."""
        present = [value for value in self.best if value is not None]
        return float(np.mean(present)) if present else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean over row orders; None with fewer than two."""
        return _standard_error([value for value in self.best if value is not None])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is not a number, and where."""
        found = []
        for order, epochs in enumerate(self.orders):
            if not epochs:
                found.append(f"order {order}: no client takes part, there is no score")
            for epoch, metrics in enumerate(epochs):
                names = [name for name, value in asdict(metrics).items() if value is not None and math.isnan(value)]
                if names:
                    found.append(
                        f"order {order}, epoch {epoch}: {' and '.join(names)} is NaN, the epoch does not count"
                    )
        return tuple(found)


@dataclass(frozen=True)
class Scores:
    """Scores of one submission.

    Attributes:
        tasks: by name.
        config: how they were made.
        order_digests: one text per row order that tells which clients were trained on in which order; scores are paired
            by it.
        num_clients: rows of the submission.
        missing: tasks that were asked for but have no labels.
    """

    tasks: dict[str, TaskScore]
    config: EvaluationConfig
    order_digests: tuple[str, ...]
    num_clients: int
    missing: tuple[str, ...] = ()

    def summary(self) -> dict[str, tuple[float | None, float | None]]:
        """Task -> (score, standard error over row orders); None where there is none."""
        return {name: (task.score, task.standard_error) for name, task in self.tasks.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON-able value without NaN; `from_json` reads it."""
        return {
            "format": FORMAT,
            "clients": self.num_clients,
            "config": {**asdict(self.config), "tasks": list(self.config.tasks)},
            "orders": list(self.order_digests),
            "missing_tasks": list(self.missing),
            "tasks": {name: _task_to_json(task) for name, task in self.tasks.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scores:
        """The scores that `to_json` has written.

        Raises:
            DataError: another format.
        """
        if value.get("format") != FORMAT:
            raise DataError(f"Scores: format must be {FORMAT}, got {value.get('format')}; evaluate the profiles again")
        tasks = {
            name: TaskScore(tuple(tuple(map(_metrics_from_json, order["epochs"])) for order in task["orders"]))
            for name, task in value["tasks"].items()
        }
        config = EvaluationConfig(**value["config"])
        return cls(tasks, config, tuple(value["orders"]), value["clients"], tuple(value["missing_tasks"]))


def _best_epoch(epochs: tuple[Metrics, ...]) -> int | None:
    present = [index for index, metrics in enumerate(epochs) if not math.isnan(metrics.score)]
    return max(present, key=lambda index: epochs[index].score) if present else None


def _standard_error(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _task_to_json(task: TaskScore) -> dict[str, Any]:
    orders = [
        {"score": score, "best_epoch": epoch, "epochs": [_metrics_to_json(metrics) for metrics in epochs]}
        for score, epoch, epochs in zip(task.best, task.best_epochs, task.orders, strict=True)
    ]
    return {
        "score": task.score,
        "standard_error": task.standard_error,
        "orders": orders,
        "warnings": list(task.warnings),
    }


def _metrics_to_json(metrics: Metrics) -> dict[str, float | None]:
    """A part that the task does not have is left out; one that is NaN is null."""
    parts = {name: value for name, value in asdict(metrics).items() if value is not None}
    parts["score"] = metrics.score
    return {name: None if math.isnan(value) else value for name, value in parts.items()}


def _metrics_from_json(value: Mapping[str, float | None]) -> Metrics:
    def part(name: str) -> float | None:
        return (math.nan if value[name] is None else value[name]) if name in value else None

    return Metrics(part("auroc"), part("diversity"), part("novelty"))  # type: ignore[arg-type]
