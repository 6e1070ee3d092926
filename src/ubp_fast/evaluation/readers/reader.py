"""What all readers have in common: what they are given, and what they answer."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, cast

import numpy as np
import torch

from ubp_fast.evaluation.readers.config import EvaluationConfig
from ubp_fast.evaluation.tasks import Metrics, TaskTargets
from ubp_fast.evaluation.tasks.metrics import auroc_per_label, has_both_classes
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.schema import UserError

DIGITS = 4
EXTRAS = {"boosting": "evaluate"}
NOT_SCORABLE = (
    "no label has clients with it and clients without it in the validation window (all of them buy, or nobody does):"
    " there is no score"
)
TOO_FEW = "the linear reader chooses by folds and needs 10 clients, there are fewer: it gives no score"


@dataclass(frozen=True)
class ReaderData:
    """What every reader of a profile sees.

    Attributes:
        vectors: float16 or float32 [U, D] on the device.
        orders: i64 [U] each, rows of `vectors` in the order in which the network takes them; as many as repetitions.
        shuffle: i64 [U], a seeded order of the clients whatever the order of `vectors`; folds are dealt along it.
        has_units: columns are measurements in units of their own, so that lengths and angles mean something only after
            they are standardised.
        read: float16 or float32 [U, D] on the device, which `linear` and `boosting` read after they have learned from
            `vectors`; None: the same.
        forecasts: i64, columns of the blocks `profiles.blocks.FORECASTS`; None where the vectors have no such columns.
    """

    vectors: torch.Tensor
    orders: tuple[np.ndarray, ...]
    shuffle: np.ndarray
    has_units: bool = False
    read: torch.Tensor | None = None
    forecasts: np.ndarray | None = None


@dataclass(frozen=True)
class TaskScore:
    """Scores of one task by the challenge's rule: what the network gives.

    Attributes:
        orders: metrics of every epoch, one tuple per row order; empty without clients, or where no label can be scored.
        num_labels: length of the task's list of labels.
        skipped: labels that cannot be scored: all clients of the validation window have them, or none has. The
            challenge's rule counts them as 0.
    """

    orders: tuple[tuple[Metrics, ...], ...]
    num_labels: int = 1
    skipped: int = 0

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
        return _mean(self.best)

    @property
    def standard_error(self) -> float | None:
        """Of the score's mean over row orders; None with fewer than two."""
        return _standard_error(self.best)

    @property
    def aurocs(self) -> tuple[float | None, ...]:
        """AUROC of the epoch that counts in each row order: the mean over the labels that can be scored."""
        best = zip(self.orders, self.best_epochs, strict=True)
        return tuple(None if epoch is None else epochs[epoch].auroc * self._share for epochs, epoch in best)

    @property
    def _share(self) -> float:
        """From the mean that counts some labels as 0 to the one without them."""
        return self.num_labels / (self.num_labels - self.skipped) if self.skipped < self.num_labels else 1.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is not a number, and where; labels that cannot be scored."""
        if self.skipped == self.num_labels:
            return (NOT_SCORABLE,)
        found = []
        if self.skipped:
            found.append(
                f"{self.skipped} of {self.num_labels} labels have one class in the validation window: the challenge's"
                " rule counts them as 0 in the score, its AUROC is that of the others"
            )
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
class Sample:
    """Some labels of one task, as one reader reads them.

    Attributes:
        labels: positions in the task's list of labels.
        aurocs: AUROC of each of them in the validation window.
        choice: what the reader chose in the train window; "" when there is nothing to choose.
    """

    labels: tuple[int, ...]
    aurocs: tuple[float, ...]
    choice: str = ""

    @property
    def auroc(self) -> float | None:
        """Mean over labels; None without any."""
        return _mean(self.aurocs)


@dataclass(frozen=True)
class LabelScores:
    """AUROC of one task's labels: what readers other than the network give.

    Attributes:
        samples: one per repetition; without labels where a reader that chooses by folds has too few clients.
        num_labels: length of the task's list of labels.
        skipped: labels that cannot be scored: all clients of the validation window have them, or none has.
    """

    samples: tuple[Sample, ...]
    num_labels: int
    skipped: int

    @property
    def aurocs(self) -> tuple[float | None, ...]:
        """Mean over the labels of each sample."""
        return tuple(sample.auroc for sample in self.samples)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is left out."""
        if self.skipped == self.num_labels:
            return (NOT_SCORABLE,)
        if not any(sample.labels for sample in self.samples):
            return (TOO_FEW,)
        if self.skipped:
            return (f"{self.skipped} of {self.num_labels} labels have one class in the validation window, left out",)
        return ()


class Reader(Protocol):
    """A module of this folder."""

    def cost(self, data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig) -> int:
        """Steps that `read` reports."""
        ...

    def read(
        self,
        data: ReaderData,
        tasks: Sequence[TaskTargets],
        config: EvaluationConfig,
        report: Callable[[int], None],
    ) -> Sequence[TaskScore | LabelScores]:
        """Learns and scores every task; `report` is called with the steps done since the last call."""
        ...


def reader_named(name: str) -> Reader:
    """The reader of this name.

    Raises:
        UserError: a package that it needs is not installed; names the extra that brings it.
    """
    try:
        return cast(Reader, importlib.import_module(f"ubp_fast.evaluation.readers.{name}"))
    except ImportError as error:
        if name not in EXTRAS:
            raise
        raise UserError(
            f"evaluation: reader '{name}' is unavailable: {error}; pip install 'ubp_fast[{EXTRAS[name]}]', or name"
            " evaluation.readers without it"
        ) from error


def mean_and_error(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean of the repetitions that have a value, and its standard error; None where there is none."""
    return _mean(values), _standard_error(values)


def by_clients(tasks: Sequence[TaskTargets]) -> list[list[int]]:
    """Positions of the tasks, those with the same clients together: what is made from vectors alone is made once."""
    groups: list[list[int]] = []
    for position, task in enumerate(tasks):
        for group in groups:
            if np.array_equal(tasks[group[0]].included, task.included):
                group.append(position)
                break
        else:
            groups.append([position])
    return groups


def label_samples(
    scores: torch.Tensor, labels: LabelMatrix, chosen: np.ndarray, number: int = 1, choice: str = ""
) -> tuple[Sample, ...]:
    """AUROC of the chosen labels of the validation window, dealt into samples.

    Args:
        scores: float [n, len(chosen)].
        labels: n rows.
        chosen: i64 positions of labels with both classes.
        number: of samples; there are fewer when there are fewer labels, and at least one.
        choice: see `Sample`.
    """
    areas = auroc_per_label(scores, labels.columns(chosen))
    number = max(1, min(number, len(chosen)))
    deals = [slice(first, None, number) for first in range(number)]
    return tuple(Sample(tuple(chosen[deal].tolist()), tuple(areas[deal].tolist()), choice) for deal in deals)


def scorable(labels: LabelMatrix) -> np.ndarray:
    """Positions i64 of the labels that some clients have and others have not."""
    return np.flatnonzero(has_both_classes(labels))


def _best_epoch(epochs: tuple[Metrics, ...]) -> int | None:
    present = [index for index, metrics in enumerate(epochs) if not math.isnan(metrics.score)]
    return max(present, key=lambda index: epochs[index].score) if present else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _standard_error(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.std(present, ddof=1) / math.sqrt(len(present))) if len(present) > 1 else None
