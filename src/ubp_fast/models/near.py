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
from typing import NamedTuple

import numpy as np

from ubp_fast.features.scaling import CACHED_ROWS, ROWS_AT_ONCE, Rows, projected, standardised

# Of the largest eigenvalue: a direction with less is made of roundings.
SMALLEST_SHARE = 1e-12


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
        columns = sum(part.values.shape[1] for part in parts)
        total, products, clients = np.zeros(columns), np.zeros((columns, columns)), 0
        for rows in _unit_rows(parts, ROWS_AT_ONCE):
            total += rows.sum(axis=0)
            products += rows.T @ rows
            clients += len(rows)
        mean = total / max(clients, 1)
        values, vectors = np.linalg.eigh(products - np.outer(mean, total))
        leading = vectors[:, values > values[-1] * SMALLEST_SHARE][:, ::-1][:, :width]
        # An eigenvector has no sign of its own: its largest entry is made positive.
        sign = np.sign(leading[np.abs(leading).argmax(axis=0), np.arange(leading.shape[1])])
        return cls(mean, np.ascontiguousarray(leading * sign))

    def transform(self, parts: Sequence[NearPart]) -> np.ndarray:
        """Vectors float32 [N, R] of length one; a row depends on its own client alone."""
        found = [np.zeros((0, self.directions.shape[1]))]
        found += [projected(rows - self.mean, self.directions) for rows in _unit_rows(parts, CACHED_ROWS)]
        return np.concatenate([_of_length_one(rows) for rows in found]).astype(np.float32)


def _of_length_one(rows: np.ndarray) -> np.ndarray:
    """Rows float64 over their lengths; a row of zeros stays."""
    length = np.sqrt(projected(rows * rows, np.ones((rows.shape[1], 1))))
    return rows / np.maximum(length, np.finfo(np.float32).tiny)


def _unit_rows(parts: Sequence[NearPart], rows_at_once: int) -> Iterator[np.ndarray]:
    """All parts side by side, float64 [n, F], a few clients at a time."""
    total = sum(part.weight for part in parts)
    for together in zip(*(standardised(*part[:3], rows_at_once) for part in parts), strict=True):
        found = []
        for part, (_, rows) in zip(parts, together, strict=True):
            found.append(_of_length_one(rows) * (part.weight / total) ** 0.5)
        yield np.concatenate(found, axis=1)
