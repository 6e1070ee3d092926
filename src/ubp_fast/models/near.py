"""Near: a short dense vector whose angle says who will behave alike, made for vector indexes.

    x(client)    = [ sqrt(w_1) x_1 / |x_1| | sqrt(w_2) x_2 / |x_2| | ... ]
    near(client) = (x - mean x) P / |(x - mean x) P|,     P: leading principal directions

The parts x_i (graded directions, how far along the first of them, scores of pairs, decayed counts, rhythm) have length
one each, so that a heavy buyer is near a light one with the same habits and no part drowns another. What all clients
have in common is taken away before angles are measured, because it makes everybody a little alike and some clients the
neighbours of all. Mean and P [F, R] are fitted on all clients of a day.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ubp_fast.compiled import njit
from ubp_fast.features import scaling
from ubp_fast.features.scaling import CACHED_ROWS, Rows, Sums, in_parts, one_blas_thread, products, standardised
from ubp_fast.kernels.row_product import row_product

# Of the largest eigenvalue: a direction with less is made of roundings.
SMALLEST_SHARE = 1e-12
# A shorter row is one of zeros.
SHORTEST = float(np.finfo(np.float32).tiny)
LANES = 16


class NearPart(NamedTuple):
    """One part of the vectors before they are shortened.

    Attributes:
        values: float [N, F].
        mean, deviation: float64 [F] of the columns among all clients of the day.
        weight: share in the cosine, before the shares are brought to a sum of one.
    """

    values: Rows
    mean: np.ndarray
    deviation: np.ndarray
    weight: float


class NearSums(Sums[list[np.ndarray]]):
    """How many rows [N, F] of length one there are, their sum [F] and their products [F, F], float64."""

    def _of(self, *rows: Any) -> list[np.ndarray]:
        (values,) = rows
        return [np.array([len(values)], np.float64), values.sum(axis=0), *products(values)]

    def _result(self, part: list[np.ndarray]) -> list[np.ndarray]:
        return part


def near_sums(parts: Sequence[NearPart], first_part: int = 0) -> NearSums:
    """Those of the clients at hand; `first_part`: see `DayStatistics`."""
    sums = NearSums()
    blocks = in_parts(parts[0].values)
    for (number, _), rows in zip(blocks, _unit_rows(parts, scaling.ROWS_AT_ONCE, np.float64), strict=True):
        sums.add(first_part + number, rows)
    return sums


class NearModel:
    """The principal directions; `fit`, then `transform`.

    Attributes:
        mean: float64 [F] of the parts, of length one each.
        directions: float64 [F, R].
    """

    def __init__(self, mean: np.ndarray, directions: np.ndarray) -> None:
        self.mean, self.directions = mean, directions

    @classmethod
    def fit(cls, parts: Sequence[NearPart], width: int) -> NearModel:
        """The `width` leading directions of all clients of a day, fewer where the parts have fewer."""
        return cls.of_sums(near_sums(parts), width)

    @classmethod
    @one_blas_thread()
    def of_sums(cls, sums: NearSums, width: int) -> NearModel:
        """`fit` from the sums of all clients."""
        clients, total, squares = sums.finish()
        mean = total / clients
        values, vectors = np.linalg.eigh(squares - np.outer(mean, total))
        leading = vectors[:, values > values[-1] * SMALLEST_SHARE][:, ::-1][:, :width]
        # An eigenvector has no sign of its own: its largest entry is made positive.
        sign = np.sign(leading[np.abs(leading).argmax(axis=0), np.arange(leading.shape[1])])
        return cls(mean, np.ascontiguousarray(leading * sign))

    def transform(self, parts: Sequence[NearPart]) -> np.ndarray:
        """Vectors float32 [N, R] of length one; a row depends on its own client alone."""
        directions = self.directions.astype(np.float32)
        found = [np.zeros((0, directions.shape[1]), np.float32)]
        for rows in _unit_rows(parts, CACHED_ROWS, np.float32):
            rows -= self.mean.astype(np.float32)
            found.append(row_product(rows, directions))
        vectors = np.concatenate(found)
        _bring_to_length(vectors, 1.0)
        return vectors


def _unit_rows(parts: Sequence[NearPart], rows_at_once: int, dtype: type) -> Iterator[np.ndarray]:
    """All parts side by side, [n, F], a few clients at a time."""
    total = sum(part.weight for part in parts)
    scaled = (standardised(*part[:3], rows_at_once, dtype=dtype) for part in parts)
    for together in zip(*scaled, strict=True):
        rows: np.ndarray = np.concatenate([values for _, values in together], axis=1)
        first = 0
        for part, (_, values) in zip(parts, together, strict=True):
            _bring_to_length(rows[:, first : first + values.shape[1]], (part.weight / total) ** 0.5)
            first += values.shape[1]
        yield rows


@njit
def _bring_to_length(rows, length):  # pragma: no cover - compiled
    """In place; a row of zeros stays. Squares add up in sixteen sums, each in the order of the columns."""
    sums = np.zeros(LANES)
    for row in range(rows.shape[0]):
        values = rows[row]
        sums[:] = 0
        whole = len(values) - len(values) % LANES
        for start in range(0, whole, LANES):
            for lane in range(LANES):
                sums[lane] += np.float64(values[start + lane]) * np.float64(values[start + lane])
        for column in range(whole, len(values)):
            sums[column - whole] += np.float64(values[column]) * np.float64(values[column])
        total = 0.0
        for lane in range(LANES):
            total += sums[lane]
        factor = length / max(np.sqrt(total), SHORTEST)
        for column in range(len(values)):
            values[column] *= factor
