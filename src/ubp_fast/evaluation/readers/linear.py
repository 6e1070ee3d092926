"""Ridge regression of all labels at once, in closed form; scaling and penalty of a task chosen by folds.

With columns and labels centred, W(p) = (X'X + p n S)^-1 X'Y. S is the identity times the mean variance (columns as they
are: their scale says how much each may say), the diagonal of the variances (columns standardised), or, a label at a
time, those variances with a hundredth for the three columns that correlate most with the label. A penalty that holds
hundreds of columns of which a rare label's few buyers tell next to nothing holds the few that do tell as well. Of a
profile with blocks it is one column, that of those that forecast (`ReaderData.forecasts`) which says most of the label
(`readers.forecasts`), and the variances of columns that do not forecast count 20 times. Five folds of the clients in
the train window choose S and p of each task by the mean AUROC of what is predicted for clients that were held out; the
labels of the validation window are used for the score alone.

Sums are float64. Memory is [D, D] per fold, and the vectors a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch

from ubp_fast.evaluation.readers.config import EvaluationConfig
from ubp_fast.evaluation.readers.forecasts import evidence, log_means
from ubp_fast.evaluation.readers.reader import LabelScores, ReaderData, Sample, by_clients, label_samples, scorable
from ubp_fast.evaluation.tasks import TaskTargets
from ubp_fast.evaluation.tasks.metrics import auroc_per_label
from ubp_fast.events.labels import LabelMatrix

FOLDS = 5
BLOCK_VALUES = 1 << 23
FEW_FIRST = "standardised, few first"
# How many columns come first, of all and of forecasts, their penalty and that of columns that do not forecast, in that
# of a forecast. Tried on two windows each of two shops: 1 to 10 columns, a tenth to a thousandth; 5 to 100.
FIRST_COLUMNS, FIRST_FORECASTS = 3, 1
FIRST = 0.01
OTHERS = 20.0
# Half decades. Columns as they are may differ in scale by many decades; standardised ones do not.
PENALTIES = {
    "absolute": tuple(10.0 ** (exponent / 2) for exponent in range(-14, 5)),
    "standardised": tuple(10.0 ** (exponent / 2) for exponent in range(-6, 5)),
    FEW_FIRST: tuple(10.0 ** (exponent / 2) for exponent in range(-2, 6)),
}
Option = tuple[str, float]
OPTIONS: tuple[Option, ...] = tuple((scaling, one) for scaling, penalties in PENALTIES.items() for one in penalties)


def choice_text(option: Option) -> str:
    """How a chosen option is told among the scores."""
    return f"{option[0]}, penalty {option[1]:.3g}"


def option_of(text: str) -> Option | None:
    """The option that `choice_text` tells; None where nothing was chosen."""
    return next((option for option in OPTIONS if choice_text(option) == text), None)


def cost(data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig) -> int:
    """Steps that `read` reports: one per system of equations."""
    return len(by_clients(tasks)) * FOLDS * len(OPTIONS)


def read(
    data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig, report: Callable[[int], None]
) -> list[LabelScores]:
    """Fits and scores every task."""
    results: dict[int, LabelScores] = {}
    for members in by_clients(tasks):
        rows = data.shuffle[tasks[members[0]].included[data.shuffle]]
        found = _read_together(data, rows, [tasks[member] for member in members], config.orders, report)
        results |= zip(members, found, strict=True)
    return [results[position] for position in range(len(tasks))]


@dataclass(frozen=True)
class Sums:
    """What ridge regression needs to know of some clients, of vectors less a shift; sums add up over clients.

    Attributes:
        count: clients.
        vectors: f64 [D], products: f64 [D, D], labels: f64 [L], cross: f64 [D, L].
    """

    count: int
    vectors: torch.Tensor
    products: torch.Tensor
    labels: torch.Tensor
    cross: torch.Tensor

    def plus(self, part: Sums) -> Sums:
        """The sums of both."""
        return Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(part).values(), strict=True)))

    def minus(self, part: Sums) -> Sums:
        """The sums without some of the clients."""
        return Sums(*(mine - theirs for mine, theirs in zip(vars(self).values(), vars(part).values(), strict=True)))

    def of_labels(self, labels: slice) -> Sums:
        """The sums of some labels alone."""
        return replace(self, labels=self.labels[labels], cross=self.cross[:, labels])


class Regression:
    """Ridge regressions of one set of clients and labels, with any option: the sums are taken once.

    Args:
        vectors: [U, D] on the device.
        rows: i64 [n], the clients to learn from, in the order that folds are dealt in; at least 2 * `FOLDS`.
        labels: float32 [n, L].
        forecasts: i64, the columns among which that which comes first is chosen, at least one; None: three of all.
    """

    def __init__(
        self, vectors: torch.Tensor, rows: np.ndarray, labels: np.ndarray, forecasts: np.ndarray | None = None
    ) -> None:
        self._vectors, self._rows, self._num_labels = vectors, rows, labels.shape[1]
        self._forecasts = None if forecasts is None else torch.from_numpy(forecasts).to(vectors.device)
        self._shift = _mean(vectors, rows)
        self._folds = [np.arange(fold, len(rows), FOLDS) for fold in range(FOLDS)]
        parts = [_sums(vectors, rows[fold], labels[fold], self._shift) for fold in self._folds]
        self._whole = reduce(Sums.plus, parts)
        self._rests = [self._whole.minus(part) for part in parts]
        self._logarithms: torch.Tensor | None = None

    def held_out(
        self, option: Option, labels: slice = slice(None), report: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """What is predicted for every client by those of the other folds, float32 [n, labels]."""
        predicted = np.empty((len(self._rows), self._width(labels)), np.float32)
        for fold, rest in zip(self._folds, self._rests, strict=True):
            rest = rest.of_labels(labels)
            for at, values in _predict(self._vectors, self._rows[fold], self._shift, rest, *self._fit(rest, option)):
                predicted[fold[at]] = values
            if report is not None:
                report(1)
        return predicted

    def predicted(
        self, option: Option, vectors: torch.Tensor, rows: np.ndarray, labels: slice = slice(None)
    ) -> np.ndarray:
        """What all clients predict for some rows of some vectors, float32 [len(rows), labels]."""
        predicted = np.empty((len(rows), self._width(labels)), np.float32)
        whole = self._whole.of_labels(labels)
        for at, values in _predict(vectors, rows, self._shift, whole, *self._fit(whole, option)):
            predicted[at] = values
        return predicted

    def weights(self, option: Option, labels: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights f64 [D, labels], and the means f64 [D] that they are of."""
        weight, mean = self._fit(self._whole.of_labels(labels), option)
        return weight, mean + self._shift

    def _fit(self, sums: Sums, option: Option) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights f64 [D, L] and the means f64 [D] that belong to them."""
        scaling, penalty = option
        if scaling != FEW_FIRST:
            return _fit(sums, scaling, penalty)
        return _fit_few_first(sums, penalty, self._forecasts, self._log_means())

    def _log_means(self) -> torch.Tensor | None:
        """Of the forecasts; they know no labels, so those of all clients are as good as those of some folds."""
        if self._forecasts is not None and self._logarithms is None:
            _, _, mean, scale = _centred(self._whole)
            mean, deviation = (mean + self._shift)[self._forecasts], scale.sqrt()[self._forecasts]
            blocks = (block[:, self._forecasts] for _, block in _blocks(self._vectors, self._rows))
            self._logarithms = log_means((block - mean) / deviation for block in blocks)
        return self._logarithms

    def _width(self, labels: slice) -> int:
        return len(range(*labels.indices(self._num_labels)))

    def choose(
        self,
        train: Sequence[LabelMatrix],
        report: Callable[[int], None] | None = None,
        options: Sequence[Option] = OPTIONS,
    ) -> list[Option]:
        """For each task the option that ranks held-out clients best; the tasks' labels are the L columns in turn."""
        bounds = np.cumsum([0, *(labels.num_labels for labels in train)])
        best: list[tuple[float, int]] = [(-1.0, 0)] * len(train)
        learnable = [scorable(labels) for labels in train]
        for number, option in enumerate(options):
            held_out = self.held_out(option, report=report)
            for position, labels in enumerate(train):
                chosen = learnable[position]
                if len(chosen):
                    own = torch.from_numpy(held_out[:, bounds[position] + chosen])
                    area = float(auroc_per_label(own, labels.columns(chosen)).mean())
                    best[position] = max(best[position], (area, -number))
        return [options[-number] for _, number in best]


def _read_together(
    data: ReaderData,
    rows: np.ndarray,
    tasks: Sequence[TaskTargets],
    num_samples: int,
    report: Callable[[int], None],
) -> list[LabelScores]:
    """Tasks of the same clients; `rows` in the order that folds are dealt in."""
    if len(rows) < 2 * FOLDS:
        report(FOLDS * len(OPTIONS))
        skipped = [task.train.num_labels - len(scorable(task.validation.take(rows))) for task in tasks]
        nothing = (Sample((), ()),)
        return [LabelScores(nothing, task.train.num_labels, one) for task, one in zip(tasks, skipped, strict=True)]
    train = [task.train.take(rows) for task in tasks]
    bounds = np.cumsum([0, *(labels.num_labels for labels in train)])
    dense = np.concatenate([labels.dense() for labels in train], axis=1)
    regression = Regression(data.vectors, rows, dense, data.forecasts)
    options = regression.choose(train, report)
    read_vectors = data.vectors if data.read is None else data.read
    predictions = {option: regression.predicted(option, read_vectors, rows) for option in dict.fromkeys(options)}
    found = []
    for position, (task, option) in enumerate(zip(tasks, options, strict=True)):
        validation = task.validation.take(rows)
        columns = scorable(validation)
        own = torch.from_numpy(predictions[option][:, bounds[position] + columns])
        samples = label_samples(own, validation, columns, num_samples, choice_text(option))
        found.append(LabelScores(samples, task.train.num_labels, task.train.num_labels - len(columns)))
    return found


def _fit(sums: Sums, scaling: str, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights f64 [D, L] and the means f64 [D] that belong to them."""
    matrix, cross, mean, scale = _centred(sums)
    if scaling == "absolute":
        variance = matrix.diagonal().clamp_min(0) / sums.count
        scale = torch.full_like(variance, float(variance.mean()) or 1.0)
    matrix.diagonal().add_(penalty * sums.count * scale)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(matrix)), mean


def _fit_few_first(
    sums: Sums, penalty: float, forecasts: torch.Tensor | None, logarithms: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where each label has a matrix of its own: A less E R E' of its few columns E, whose penalty is R less.

    One factor of A serves all: (A - E R E')^-1 = A^-1 + A^-1 E (R^-1 - E' A^-1 E)^-1 E' A^-1.
    """
    matrix, cross, mean, scale = _centred(sums)
    relevance = cross / scale.sqrt()[:, None]
    ridge = penalty * sums.count * scale
    if forecasts is None or logarithms is None:
        first = relevance.abs().topk(min(FIRST_COLUMNS, len(mean)), dim=0).indices.t()
    else:
        says = evidence(relevance[forecasts], sums.labels, sums.count, logarithms)
        first = forecasts[says.topk(min(FIRST_FORECASTS, len(forecasts)), dim=0).indices.t()]
        is_other = torch.ones_like(mean, dtype=torch.bool)
        is_other[forecasts] = False
        ridge[is_other] *= OTHERS
    matrix.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(matrix)
    weight = torch.cholesky_solve(cross, factor)
    columns, place = first.unique(return_inverse=True)
    units = torch.zeros((len(mean), len(columns)), dtype=matrix.dtype, device=matrix.device)
    units[columns, torch.arange(len(columns), device=matrix.device)] = 1.0
    inverse = torch.cholesky_solve(units, factor)
    among = inverse[columns][place[:, :, None], place[:, None, :]]
    relief = torch.diag_embed(1 / ((1 - FIRST) * ridge[first]))
    own = weight.t().gather(1, first)
    steps = torch.linalg.solve(relief - among, own[:, :, None])[:, :, 0]
    spread = torch.zeros((cross.shape[1], len(columns)), dtype=matrix.dtype, device=matrix.device)
    return weight + inverse @ spread.scatter_add_(1, place, steps).t(), mean


def _centred(sums: Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """X'X [D, D] and X'Y [D, L] of centred columns and labels, the means [D], and the variances [D]; all f64.

    Of a column that is constant among these clients only roundings are left: any variance holds its weight near 0.
    """
    mean = sums.vectors / sums.count
    matrix = sums.products - torch.outer(mean, sums.vectors)
    variance = matrix.diagonal().clamp_min(0) / sums.count
    is_constant = variance <= 1e-12 * sums.products.diagonal() / sums.count + 1e-30
    cross = sums.cross - torch.outer(mean, sums.labels)
    return matrix, cross, mean, torch.where(is_constant, 1.0, variance)


def _predict(
    vectors: torch.Tensor, rows: np.ndarray, shift: torch.Tensor, sums: Sums, weight: torch.Tensor, mean: torch.Tensor
) -> Iterator[tuple[slice, np.ndarray]]:
    """Predicted labels f64 [rows, L], a block after the other, and where it belongs."""
    constant = sums.labels / sums.count
    for at, block in _blocks(vectors, rows):
        yield at, ((block - shift - mean) @ weight + constant).cpu().numpy()


def _sums(vectors: torch.Tensor, rows: np.ndarray, labels: np.ndarray, shift: torch.Tensor) -> Sums:
    found = []
    for at, block in _blocks(vectors, rows):
        block = block - shift
        known = torch.from_numpy(labels[at]).to(block)
        found.append(Sums(len(block), block.sum(dim=0), block.t() @ block, known.sum(dim=0), block.t() @ known))
    return reduce(Sums.plus, found)


def _mean(vectors: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Of every column, f64 [D]; sums of what is left after it lose no digits to a large part that all clients share."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for _, block in _blocks(vectors, rows):
        total += block.sum(dim=0)
    return total / len(rows)


def _blocks(vectors: torch.Tensor, rows: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows as float64, a few at a time."""
    step = max(1, BLOCK_VALUES // vectors.shape[1])
    places = torch.from_numpy(rows).to(vectors.device)
    for start in range(0, len(rows), step):
        at = slice(start, min(start + step, len(rows)))
        yield at, vectors[places[at]].double()
