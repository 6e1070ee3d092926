"""Near: a short dense vector whose angle says who will behave alike, made for vector indexes.

    near(client) = [ sqrt(w_1) x_1 / |x_1| | sqrt(w_2) x_2 / |x_2| | ... ] P,     P: leading principal directions

The parts x (graded directions, scores of pairs, decayed counts, rhythm) have length one each, so that a heavy buyer is
near a light one with the same habits and no part drowns another; the cosine of two vectors is about the weighted mean
of the cosines of their parts. P [F, R] is fitted on all clients of a day, without a mean: angles are seen from 0.
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
        directions: float64 [F, R].
    """

    def __init__(self, directions: np.ndarray) -> None:
        self.directions = directions

    @classmethod
    def fit(cls, parts: Sequence[NearPart], width: int) -> NearModel:
        """The `width` leading directions of all clients of a day, fewer where the parts have fewer."""
        columns = sum(part.values.shape[1] for part in parts)
        products = np.zeros((columns, columns))
        for rows in _unit_rows(parts, ROWS_AT_ONCE):
            products += rows.T @ rows
        values, vectors = np.linalg.eigh(products)
        leading = vectors[:, values > values[-1] * SMALLEST_SHARE][:, ::-1][:, :width]
        # An eigenvector has no sign of its own: its largest entry is made positive.
        sign = np.sign(leading[np.abs(leading).argmax(axis=0), np.arange(leading.shape[1])])
        return cls(np.ascontiguousarray(leading * sign))

    def transform(self, parts: Sequence[NearPart]) -> np.ndarray:
        """Vectors float32 [N, R] of length at most one; a row depends on its own client alone."""
        found = [projected(rows, self.directions).astype(np.float32) for rows in _unit_rows(parts, CACHED_ROWS)]
        return np.concatenate([np.zeros((0, self.directions.shape[1]), np.float32), *found])


def _unit_rows(parts: Sequence[NearPart], rows_at_once: int) -> Iterator[np.ndarray]:
    """All parts side by side, float64 [n, F], a few clients at a time."""
    total = sum(part.weight for part in parts)
    for together in zip(*(standardised(*part[:3], rows_at_once) for part in parts), strict=True):
        found = []
        for part, (_, rows) in zip(parts, together, strict=True):
            length = np.sqrt(projected(rows * rows, np.ones((rows.shape[1], 1))))
            found.append(rows * ((part.weight / total) ** 0.5 / np.maximum(length, np.finfo(np.float32).tiny)))
        yield np.concatenate(found, axis=1)
