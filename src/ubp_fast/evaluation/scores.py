"""Scores of a submission: by the challenge's rule per task, row order and epoch; by other readers per label.

The network's score in one row order is the best epoch's weighted score (the first one when epochs tie), rounded to four
digits. A score that is NaN never wins; when no epoch has a score, the task has none: null in JSON, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ubp_fast.evaluation.readers import EvaluationConfig, LabelScores, Sample, TaskScore
from ubp_fast.evaluation.readers.reader import mean_and_error
from ubp_fast.evaluation.tasks import Metrics
from ubp_fast.events.schema import DataError

FORMAT = 2
# Format 1 knew the network alone, and no reasons.
READABLE = (1, FORMAT)
NO_LABELS = "the data has no labels for it"
Spread = tuple[float | None, float | None]


@dataclass(frozen=True)
class Scores:
    """Scores of one submission.

    Attributes:
        tasks: the network's, by name; none when it was not asked.
        config: how they were made.
        order_digests: one text per row order that tells which clients were trained on in which order; scores are paired
            by it.
        num_clients: rows of the submission.
        missing: tasks that were asked for but left out, and why.
        others: the other readers' scores: reader -> task -> scores.
        remarks: what to know before trusting the scores of a task, or of all ("clients"), whoever reads.
    """

    tasks: dict[str, TaskScore]
    config: EvaluationConfig
    order_digests: tuple[str, ...]
    num_clients: int
    missing: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, LabelScores]] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Spread]:
        """Task -> (challenge's score, standard error over row orders); None where there is none."""
        return {name: (task.score, task.standard_error) for name, task in self.tasks.items()}

    def aurocs(self) -> dict[str, dict[str, Spread]]:
        """Reader -> task -> (mean AUROC of its labels, standard error over repetitions); None where there is none."""
        return {
            reader: {task: mean_and_error(values) for task, values in found.items()}
            for reader, found in self.repetitions().items()
        }

    def repetitions(self) -> dict[str, dict[str, tuple[float | None, ...]]]:
        """Reader -> task -> AUROC in every row order or sample."""
        readers: dict[str, Mapping[str, TaskScore | LabelScores]] = {"network": self.tasks, **self.others}
        return {
            reader: {name: task.aurocs for name, task in readers[reader].items()}
            for reader in self.config.readers
            if reader in readers
        }

    def warnings(self) -> list[tuple[str, str]]:
        """Reader, and which task's numbers are missing or labels left out; not the tasks that are `missing`."""
        found: list[tuple[str, str]] = []
        readers: dict[str, Mapping[str, TaskScore | LabelScores]] = {"network": self.tasks, **self.others}
        for reader, tasks in readers.items():
            found += [(reader, f"{name}: {text}") for name, task in tasks.items() for text in task.warnings]
        return found

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of one submission by several readers, each of which was asked alone.

        Raises:
            ValueError: they are of other clients, orders or tasks, or a reader occurs twice.
        """
        first = parts[0]
        names = tuple(reader for part in parts for reader in part.config.readers)
        facts = {(part.order_digests, part.num_clients, part.config.tasks) for part in parts}
        if len(facts) > 1 or len(set(names)) < len(names):
            raise ValueError(f"Scores.join: parts must be of the same clients and tasks by other readers, got {names}")
        network = next((part for part in parts if "network" in part.config.readers), first)
        config = replace(network.config, readers=names)
        others = {reader: tasks for part in parts for reader, tasks in part.others.items()}
        return replace(first, tasks=network.tasks, config=config, others=others)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able value without NaN; `from_json` reads it."""
        return {
            "format": FORMAT,
            "clients": self.num_clients,
            "config": {**asdict(self.config), "tasks": list(self.config.tasks), "readers": list(self.config.readers)},
            "orders": list(self.order_digests),
            "missing_tasks": dict(self.missing),
            "remarks": dict(self.remarks),
            "tasks": {name: task_to_json(task) for name, task in self.tasks.items()},
            "readers": {
                reader: {name: _labels_to_json(task) for name, task in tasks.items()}
                for reader, tasks in self.others.items()
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scores:
        """The scores that `to_json` has written, in this format or the one before.

        Raises:
            DataError: another format.
        """
        if value.get("format") not in READABLE:
            raise DataError(f"Scores: format must be 1 or {FORMAT}, got {value.get('format')}; evaluate again")
        tasks = {name: task_from_json(task) for name, task in value["tasks"].items()}
        others = {
            reader: {name: _labels_from_json(task) for name, task in found.items()}
            for reader, found in value.get("readers", {}).items()
        }
        missing = value["missing_tasks"]
        if not isinstance(missing, Mapping):
            missing = dict.fromkeys(missing, NO_LABELS)
        config = EvaluationConfig(**value["config"])
        return cls(
            tasks, config, tuple(value["orders"]), value["clients"], dict(missing), others, value.get("remarks", {})
        )


def task_to_json(task: TaskScore) -> dict[str, Any]:
    """A JSON-able value without NaN; `task_from_json` reads it."""
    orders = [
        {"score": score, "best_epoch": epoch, "epochs": [_metrics_to_json(metrics) for metrics in epochs]}
        for score, epoch, epochs in zip(task.best, task.best_epochs, task.orders, strict=True)
    ]
    return {
        "score": task.score,
        "standard_error": task.standard_error,
        "auroc": mean_and_error(task.aurocs)[0],
        "labels": task.num_labels,
        "skipped_labels": task.skipped,
        "orders": orders,
        "warnings": list(task.warnings),
    }


def task_from_json(value: Mapping[str, Any]) -> TaskScore:
    """What `task_to_json` has written."""
    return TaskScore(
        tuple(tuple(map(_metrics_from_json, order["epochs"])) for order in value["orders"]),
        value.get("labels", 1),
        value.get("skipped_labels", 0),
    )


def _labels_to_json(task: LabelScores) -> dict[str, Any]:
    auroc, error = mean_and_error(task.aurocs)
    samples = [{"auroc": sample.auroc, **asdict(sample)} for sample in task.samples]
    counts = {"labels": task.num_labels, "skipped_labels": task.skipped}
    return {"auroc": auroc, "standard_error": error, **counts, "samples": samples, "warnings": list(task.warnings)}


def _labels_from_json(value: Mapping[str, Any]) -> LabelScores:
    samples = (Sample(tuple(one["labels"]), tuple(one["aurocs"]), one["choice"]) for one in value["samples"])
    return LabelScores(tuple(samples), value["labels"], value["skipped_labels"])


def _metrics_to_json(metrics: Metrics) -> dict[str, float | None]:
    """A part that the task does not have is left out; one that is NaN is null."""
    parts = {name: value for name, value in asdict(metrics).items() if value is not None}
    parts["score"] = metrics.score
    return {name: None if math.isnan(value) else value for name, value in parts.items()}


def _metrics_from_json(value: Mapping[str, float | None]) -> Metrics:
    def part(name: str) -> float | None:
        return (math.nan if value[name] is None else value[name]) if name in value else None

    return Metrics(part("auroc"), part("diversity"), part("novelty"))  # type: ignore[arg-type]
