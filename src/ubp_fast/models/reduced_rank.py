"""Reduced-rank regression: the few directions of a client's blocks that say most about what comes next.

    X = weight * standardised(blocks),   C = argmin |X C - labels|^2 + ridge |C|^2      (every label its own regression)
    profile = [left singular vectors of the scaled X C, each with variance 1 | 1]

Many labels are predicted by few common causes; the first singular vectors of all predictions are these causes in the
order of their weight. Closed form, seconds, no random numbers: joined blocks [B, F] -> profile float32 [B, rank + 1].

Columns are standardised among the clients of one cutoff, while fitting and afterwards: histories grow and seasons
change, so a count or an age of the later cutoff lies elsewhere than where the regression has learned; a client's place
among all clients of the day stays comparable.

Why so few strong columns: on a few thousand clients the organisers' fixed network takes some sixty steps, and each of
them moves every weight by about the learning rate. What all labels have in common is learned first and overwrites the
rest; what a further direction adds grows with the square of its share in a client's vector, so each column more slows
the others down. The column of ones lets the network reach the base rates of the labels without spending its hidden
layers on it.

Source: Izenman, Reduced-rank regression for the multivariate linear model, 1975; the rest is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.schema import DataError
from ubp_fast.features.scaling import (
    ROWS_AT_ONCE,
    SMALLEST_DEVIATION,
    Rows,
    Sums,
    moments,
    one_blas_thread,
    parts_of_rows,
    products,
    standardised,
)
from ubp_fast.files import write_arrays
from ubp_fast.kernels.row_product import row_product


@dataclass(frozen=True)
class ReducedRankConfig:
    """How blocks become a profile; all constants are ours.

    Attributes:
        rank: strong directions.
        labels: names of `window_labels` that are predicted.
        ridge: penalty, as a share of the variance of a standardised column. Chosen on windows 28 and 84 days before
            the last one of Complete Journey, where 3 to 10 do equally well and 0.1 costs about .01 AUROC.
        summary_weight: how many times as large columns become that sum a client up (activity, recency) instead of
            counting one label; the penalty hardly touches them then.
    """

    rank: int = 6
    labels: tuple[str, ...] = ("churn", "buy_sku", "buy_category", "buy_price")
    ridge: float = 3.0
    summary_weight: float = 3.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"ReducedRankConfig: rank must be >= 1, got {self.rank}")
        if not self.ridge > 0:
            raise ValueError(f"ReducedRankConfig: ridge must be > 0, got {self.ridge}")
        if not self.summary_weight > 0:
            raise ValueError(f"ReducedRankConfig: summary_weight must be > 0, got {self.summary_weight}")


class RegressionSums(Sums[list[np.ndarray]]):
    """Number of rows; inputs [N, F] times themselves, float64 [F, F], and times every list of labels [N, L], [F, L].

    A part holds the rows of all cutoffs that have the same places: one pass over shards of clients gives them all.
    """

    def _of(self, *rows: Any) -> list[np.ndarray]:
        (of_cutoffs,) = rows
        total: list[np.ndarray] = []
        for inputs, labels in of_cutoffs:
            more = [np.array([len(inputs)], np.float64), *products(inputs, labels)]
            total = self._joined(total, more) if total else more
            del inputs, labels, more  # before the next ones are made
        return total

    def _result(self, part: list[np.ndarray]) -> list[np.ndarray]:
        return part


class ReducedRankModel:
    """The regression; `fit`, then `transform`.

    Attributes:
        directions: float64 [F, R] of the standardised columns, R <= rank (fewer when the labels have fewer causes).
        singular_values: float64 [R], descending: how much of all predictions each direction carries.
    """

    def __init__(self, config: ReducedRankConfig) -> None:
        self.config = config
        self.directions = np.zeros((0, 0))
        self.singular_values = np.zeros(0)

    def fit(
        self,
        blocks: Sequence[Rows],
        labels: Mapping[str, LabelMatrix | np.ndarray],
        is_summary: np.ndarray | None = None,
    ) -> ReducedRankModel:
        """Learns the directions and returns itself.

        Args:
            blocks: per past cutoff float [N_i, F], all clients of that day; read twice, 4,096 rows at once.
            labels: name -> 0/1 labels of the window after each row's cutoff, a LabelMatrix or one column [N], in the
                order of `blocks`: N = sum of N_i.
            is_summary: bool [F], columns that `summary_weight` is for; none by default.

        Raises:
            ValueError: no rows, other numbers of rows, values that are not finite, or no label that is predictable.
        """
        of_cutoffs = _checked(blocks, labels)
        return self.of_sums(self.sums(blocks, labels, of_cutoffs, is_summary), is_summary)

    def sums(
        self,
        blocks: Sequence[Rows],
        labels: Mapping[str, LabelMatrix | np.ndarray],
        of_cutoffs: Sequence[tuple[np.ndarray, np.ndarray]],
        is_summary: np.ndarray | None = None,
        first_part: int = 0,
    ) -> RegressionSums:
        """What `of_sums` needs of some clients.

        Args:
            blocks, labels, is_summary: as of `fit`, of these clients.
            of_cutoffs: mean and deviation float64 [F] of the columns at every cutoff among all clients.
            first_part: number of the first part of these clients, see `Statistic`.
        """
        sums, weight = RegressionSums(), self._weight(blocks[0].shape[1], is_summary)
        starts = np.cumsum([0, *map(len, blocks)])

        def of_cutoffs_in(part: slice) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
            """Inputs and labels of some clients, of one cutoff at a time: those of all would be most of the memory."""
            for values, (mean, deviation), start in zip(blocks, of_cutoffs, starts, strict=False):
                rows = values[part]
                for _, inputs in standardised(rows, mean, deviation, max(len(rows), 1)):
                    inputs *= weight
                    place = slice(start + part.start, start + part.start + len(inputs))
                    yield inputs, [_dense(labels[name], place) for name in sorted(labels)]
                    del inputs
                del rows

        for number, part in parts_of_rows(max(map(len, blocks))):
            sums.add(first_part + number, of_cutoffs_in(part))
        return sums

    @one_blas_thread()
    def of_sums(self, sums: RegressionSums, is_summary: np.ndarray | None = None) -> ReducedRankModel:
        """Learns the directions from the sums of all clients and returns itself."""
        num_rows, *totals = sums.finish()
        gram, *of_labels = (total / num_rows for total in totals)
        weight = self._weight(len(gram), is_summary)
        penalised = gram + self.config.ridge * np.eye(len(gram))
        coefficients = [_weighted(np.linalg.solve(penalised, product), gram) for product in of_labels]
        directions, self.singular_values = _leading(np.concatenate(coefficients, axis=1), gram, self.config.rank)
        self.directions = weight[:, None] * directions
        return self

    def _weight(self, width: int, is_summary: np.ndarray | None) -> np.ndarray:
        return np.ones(width) if is_summary is None else np.where(is_summary, self.config.summary_weight, 1.0)

    def transform(self, blocks: Rows, statistics: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """Directions and a one, float32 [N, R + 1], of clients of one cutoff.

        A row depends on the other rows only through the mean and deviation of their columns, not at all when these are
        given.

        Args:
            blocks: float [N, F].
            statistics: mean and deviation float64 [F] of the columns among all clients of the day; None: those of
                `blocks`.
        """
        if blocks.shape[1] != len(self.directions):
            raise ValueError(
                f"ReducedRankModel: blocks must have the {len(self.directions)} columns of the fit,"
                f" got {blocks.shape[1]}"
            )
        profiles = np.ones((len(blocks), self.directions.shape[1] + 1), np.float32)
        directions = self.directions.astype(np.float32)
        for part, inputs in standardised(blocks, *(statistics or moments(blocks)), dtype=np.float32):
            profiles[part, :-1] = row_product(inputs, directions)
        return profiles

    @property
    def importance(self) -> np.ndarray:
        """Float64 [F]: the part of each standardised column in all predictions."""
        return ((self.directions * self.singular_values) ** 2).sum(axis=1)

    def save(self, path: Path) -> None:
        """Writes the fitted arrays as safetensors."""
        arrays = {"directions": np.ascontiguousarray(self.directions), "singular_values": self.singular_values}
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path, config: ReducedRankConfig) -> ReducedRankModel:
        """Reads what `save` wrote."""
        model = cls(config)
        arrays = load_file(path)
        model.directions, model.singular_values = arrays["directions"], arrays["singular_values"]
        return model


def _checked(
    blocks: Sequence[Rows], labels: Mapping[str, LabelMatrix | np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and deviation of every cutoff's columns."""
    if not blocks or any(len(values.shape) != 2 or not len(values) for values in blocks):
        shapes = [list(values.shape) for values in blocks]
        raise ValueError(f"ReducedRankModel: blocks must have shape [N >= 1, F] for every cutoff, got {shapes}")
    num_rows = sum(map(len, blocks))
    for name, label in labels.items():
        rows = label.num_rows if isinstance(label, LabelMatrix) else len(label)
        if rows != num_rows:
            raise ValueError(f"ReducedRankModel: {name} must have {num_rows} rows, got {rows}")
    of_cutoffs = [moments(values) for values in blocks]
    for cutoff, (values, (mean, _)) in enumerate(zip(blocks, of_cutoffs, strict=True)):
        if not np.isfinite(mean).all():
            row, column = next(
                (int(row) + start, int(column))
                for start in range(0, len(values))
                for row, column in np.argwhere(~np.isfinite(values[start : start + ROWS_AT_ONCE]))
            )
            raise ValueError(
                f"ReducedRankModel: blocks must be finite, got {values[row : row + 1][0, column]} at [{row}, {column}]"
                f" of cutoff {cutoff}"
            )
    return of_cutoffs


def _width(label: LabelMatrix | np.ndarray) -> int:
    return label.num_labels if isinstance(label, LabelMatrix) else 1


def _dense(label: LabelMatrix | np.ndarray, rows: slice) -> np.ndarray:
    return label.dense(rows) if isinstance(label, LabelMatrix) else label[rows, None]


def _weighted(coefficients: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Scales predictions: equal variance inside a list, and every list counts as much as churn alone.

    A churn of one label among lists of a hundred once weighed a tenth: its direction came last, if it came at all.
    """
    variance = np.einsum("fl,fl->l", coefficients, gram @ coefficients)
    is_predicted = variance > SMALLEST_DEVIATION**2
    scale = np.where(is_predicted, 1.0 / np.sqrt(np.where(is_predicted, variance, 1.0)), 0.0)
    return coefficients * scale * max(int(is_predicted.sum()), 1) ** -0.5


def _leading(coefficients: np.ndarray, gram: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions [F, R] of the leading singular vectors of inputs @ coefficients, variance 1; their values [R]."""
    covariance = coefficients.T @ gram @ coefficients
    variance, vectors = np.linalg.eigh(covariance)
    leading = np.argsort(-variance, kind="stable")[:rank]
    if not variance[leading[0]] > 0:
        raise DataError(
            "model: clients must differ in what they do and in what they buy later, got none of whom anything can be"
            " told apart in the windows learned from; bring more clients or a longer history"
        )
    leading = leading[variance[leading] > variance[leading[0]] * 1e-9]
    chosen = vectors[:, leading]
    # A singular vector has no sign of its own: its largest entry is made positive.
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(len(leading))])
    values = np.sqrt(variance[leading])
    return coefficients @ (chosen / values), values
