"""Ridge regression of all labels at once, in closed form; scaling and penalty of a task chosen by folds.

With columns and labels centred, W(p) = (X'X + p n S)^-1 X'Y. S is the identity times the mean variance (columns as they
are: their scale says how much each may say) or the diagonal of the variances (columns standardised). Five folds of the
clients in the train window choose S and p of each task by the mean AUROC of what is predicted for clients that were
held out; the labels of the validation window are used for the score alone.

Sums are float64. Memory is [D, D] per fold, and the vectors a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from ubp_fast.evaluation.readers.config import EvaluationConfig
from ubp_fast.evaluation.readers.reader import LabelScores, ReaderData, Sample, by_clients, label_samples, scorable
from ubp_fast.evaluation.tasks import TaskTargets
from ubp_fast.evaluation.tasks.metrics import auroc_per_label

FOLDS = 5
BLOCK_VALUES = 1 << 23
# Half decades. Columns as they are may differ in scale by many decades; standardised ones do not.
PENALTIES = {
    "absolute": tuple(10.0 ** (exponent / 2) for exponent in range(-14, 5)),
    "standardised": tuple(10.0 ** (exponent / 2) for exponent in range(-6, 5)),
}
OPTIONS = tuple((scaling, penalty) for scaling, penalties in PENALTIES.items() for penalty in penalties)


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
        return [LabelScores((Sample((), ()),), task.train.num_labels, task.train.num_labels) for task in tasks]
    vectors, read_vectors = data.vectors, data.vectors if data.read is None else data.read
    train = [task.train.take(rows) for task in tasks]
    bounds = np.concatenate([[0], np.cumsum([labels.num_labels for labels in train])])
    known = np.concatenate([labels.dense() for labels in train], axis=1)
    shift = _mean(vectors, rows)
    folds = [np.arange(fold, len(rows), FOLDS) for fold in range(FOLDS)]
    parts = [_sums(vectors, rows[fold], known[fold], shift) for fold in folds]
    whole = reduce(Sums.plus, parts)
    rests = [whole.minus(part) for part in parts]
    best: list[tuple[float, int]] = [(-1.0, 0)] * len(tasks)
    learnable = [scorable(labels) for labels in train]
    for number, option in enumerate(OPTIONS):
        held_out = np.empty(known.shape, np.float32)
        for fold, rest in zip(folds, rests, strict=True):
            for at, predicted in _predict(vectors, rows[fold], shift, rest, *_fit(rest, *option)):
                held_out[fold[at]] = predicted
            report(1)
        for position, labels in enumerate(train):
            chosen = learnable[position]
            if len(chosen):
                own = torch.from_numpy(held_out[:, bounds[position] + chosen])
                area = float(auroc_per_label(own, labels.columns(chosen)).mean())
                best[position] = max(best[position], (area, -number))
    chosen_options = [OPTIONS[-number] for _, number in best]
    predictions = {}
    for option in dict.fromkeys(chosen_options):
        predictions[option] = np.empty(known.shape, np.float32)
        for at, predicted in _predict(read_vectors, rows, shift, whole, *_fit(whole, *option)):
            predictions[option][at] = predicted
    found = []
    for position, (task, option) in enumerate(zip(tasks, chosen_options, strict=True)):
        validation = task.validation.take(rows)
        columns = scorable(validation)
        own = torch.from_numpy(predictions[option][:, bounds[position] + columns])
        samples = label_samples(own, validation, columns, num_samples, f"{option[0]}, penalty {option[1]:.3g}")
        found.append(LabelScores(samples, task.train.num_labels, task.train.num_labels - len(columns)))
    return found


def _fit(sums: Sums, scaling: str, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights f64 [D, L] and the means f64 [D] that belong to them."""
    mean = sums.vectors / sums.count
    matrix = sums.products - torch.outer(mean, sums.vectors)
    variance = matrix.diagonal().clamp_min(0) / sums.count
    if scaling == "absolute":
        scale = torch.full_like(variance, float(variance.mean()) or 1.0)
    else:
        # Of a column that is constant among these clients only roundings are left: any scale holds its weight near 0.
        is_constant = variance <= 1e-12 * sums.products.diagonal() / sums.count + 1e-30
        scale = torch.where(is_constant, 1.0, variance)
    matrix.diagonal().add_(penalty * sums.count * scale)
    cross = sums.cross - torch.outer(mean, sums.labels)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(matrix)), mean


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
