"""Gradient-boosted trees per label (LightGBM): 100 trees of 7 leaves, learning rate 0.05, 30 % of the columns a tree,
an L2 penalty of 10.

Settings are fixed, so nothing is chosen. The penalty is for rare labels: the weight of a client in a leaf is p (1 -
p), a few thousandths where few buy; without it a split that isolates one buyer looks pure. A tree per label is slow
where a task has a hundred: `labels_per_task` evenly spaced labels of each task are read, others in every sample.
Columns are binned once for all labels of the same clients. Deterministic, whatever the number of threads.

Of a profile with blocks the trees of a label start where a logistic regression on one column ends: on that one of its
forecasts (`ReaderData.forecasts`) which says most of the label (`readers.forecasts`). Then half of them are enough: a
hundred small steps through hundreds of columns find less of a label that few clients have than its own forecast says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import lightgbm
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from ubp_fast.evaluation.readers.config import EvaluationConfig
from ubp_fast.evaluation.readers.forecasts import evidence, log_means
from ubp_fast.evaluation.readers.reader import LabelScores, ReaderData, Sample, by_clients, label_samples, scorable
from ubp_fast.evaluation.tasks import TaskTargets

# Of 0, 10, 25, 50 and 100 that start at a forecast 25 are best in the mean of four windows of two shops, and 50 lose
# least where they lose (churn, .0004).
TREES, STARTED_TREES = 100, 50
PARAMETERS = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 7,
    "feature_fraction": 0.3,
    "lambda_l2": 10.0,
    "deterministic": True,
    "force_col_wise": True,
    "feature_pre_filter": False,
    "verbosity": -1,
}
# Of the one slope of a start: a prior deviation of about three, per deviation of the forecast.
START_PENALTY = 0.1
EVERY = 10
THREADED_VALUES = 1 << 22
BLOCK_ROWS = 1 << 14


def cost(data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig) -> int:
    """Steps that `read` reports: one per label and sample."""
    return sum(_num_sampled(task.train.num_labels, config) for task in tasks) * config.orders


def read(
    data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig, report: Callable[[int], None]
) -> list[LabelScores]:
    """Grows trees for a sample of every task's labels and scores them."""
    results: dict[int, LabelScores] = {}
    for members in by_clients(tasks):
        rows = data.shuffle[tasks[members[0]].included[data.shuffle]]
        vectors = _rows(data.vectors, rows)
        read_vectors = vectors if data.read is None else _rows(data.read, rows)
        trees = _Trees(vectors, read_vectors, data.forecasts) if len(rows) else None
        for member in members:
            task = tasks[member]
            train, validation = task.train.take(rows), task.validation.take(rows)
            labels = scorable(validation)
            samples: list[Sample] = []
            for number in range(config.orders):
                chosen = _sampled(labels, task.train.num_labels, number, config)
                scores = np.empty((len(rows), len(chosen)), np.float32)
                for column, known in enumerate(train.columns(chosen).dense().T):
                    assert trees is not None, "labels that can be scored have clients"
                    scores[:, column] = trees.read(known.copy(), config.seed + number)
                    report(1)
                report(_num_sampled(task.train.num_labels, config) - len(chosen))
                samples += label_samples(torch.from_numpy(scores), validation, chosen)
            results[member] = LabelScores(tuple(samples), task.train.num_labels, task.train.num_labels - len(labels))
    return [results[position] for position in range(len(tasks))]


def _rows(vectors: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """Float32 [n, D] in memory of NumPy's own: of a view LightGBM makes a second copy."""
    found = np.empty((len(rows), vectors.shape[1]), np.float32)
    torch.from_numpy(found).copy_(vectors[torch.from_numpy(rows).to(vectors.device)])
    return found


class _Trees:
    """Trees on the columns of some clients, binned once; `read` are those that are scored, `forecasts` i64 columns."""

    def __init__(self, vectors: np.ndarray, read: np.ndarray, forecasts: np.ndarray | None) -> None:
        self._read = read
        # A split of few values is over before a second thread has woken up; beside other processes waiting for it costs
        # fifty times the work.
        self._threads = torch.get_num_threads() if vectors.size >= THREADED_VALUES else 1
        self._parameters = PARAMETERS | {"num_threads": self._threads}
        self._data = lightgbm.Dataset(vectors, params=self._parameters).construct()
        self._forecasts = np.empty(0, np.int64) if forecasts is None else forecasts
        if len(self._forecasts):
            self._learned = vectors[:, self._forecasts]
            self._mean = self._learned.mean(axis=0, dtype=np.float64)
            deviation = self._learned.std(axis=0, dtype=np.float64)
            self._deviation = np.where(deviation > 0, deviation, np.inf)
            self._log_means = log_means(
                torch.from_numpy((self._learned[rows] - self._mean) / self._deviation) for rows in self._blocks
            )

    @property
    def _blocks(self) -> Iterator[slice]:
        """Rows a few at a time."""
        return (slice(first, first + BLOCK_ROWS) for first in range(0, len(self._learned), BLOCK_ROWS))

    def read(self, known: np.ndarray, seed: int) -> np.ndarray:
        """Predicted scores f64 [n] of one label, float [n] of 0 and 1."""
        if known.min() == known.max():
            return np.zeros(len(known))
        self._data.set_label(known)
        start, trees = (self._start(known), STARTED_TREES) if len(self._forecasts) else (0.0, TREES)
        booster = lightgbm.train(self._parameters | {"seed": seed}, self._data, trees)
        return start + np.asarray(booster.predict(self._read, raw_score=True, num_threads=self._threads))

    def _start(self, known: np.ndarray) -> np.ndarray:
        """Where the trees of a label start, f64 [n] of what is read; of what is learned from, in the data."""
        away = sum(known[rows].astype(np.float64) @ (self._learned[rows] - self._mean) for rows in self._blocks)
        of_label = torch.from_numpy(away / self._deviation)[:, None]
        with_label = torch.tensor([float(known.sum(dtype=np.float64))], dtype=torch.float64)
        best = int(evidence(of_label, with_label, len(known), self._log_means).argmax())

        def standard(column: np.ndarray) -> np.ndarray:
            return (column[:, None].astype(np.float64) - self._mean[best]) / self._deviation[best]

        learned = standard(self._learned[:, best])
        model = LogisticRegression(C=1 / START_PENALTY).fit(learned, known)
        self._data.set_init_score(model.decision_function(learned))
        return np.asarray(model.decision_function(standard(self._read[:, self._forecasts[best]])))


def _num_sampled(num_labels: int, config: EvaluationConfig) -> int:
    """Labels of a task in one sample."""
    return min(num_labels, config.labels_per_task or math.ceil(num_labels / EVERY))


def _sampled(labels: np.ndarray, num_labels: int, number: int, config: EvaluationConfig) -> np.ndarray:
    """Sample `number` of the labels that can be scored: evenly spaced, the next sample one place further on."""
    wanted = min(len(labels), _num_sampled(num_labels, config))
    places = np.arange(wanted) * len(labels) // max(wanted, 1)
    return np.sort(labels[(places + number) % max(len(labels), 1)])
