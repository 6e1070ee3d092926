"""Scales of columns: `moments` and `standardised`, a few rows at a time; `MinMaxScaler`, fitted once for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ubp_fast.files import load_array, write_array

ROWS_AT_ONCE = 4_096
SMALLEST_DEVIATION = 1e-6


class Rows(Protocol):
    """A float matrix that gives some of its rows at a time: an array, or what makes them when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Any, /) -> np.ndarray: ...


def moments(values: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every column, float64 [F] each; not finite where a value is not."""
    parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(values), ROWS_AT_ONCE)]
    total, squares = np.zeros((2, values.shape[1]))
    for part in parts:
        total += values[part].sum(axis=0, dtype=np.float64)
    mean = total / len(values)
    for part in parts:
        difference = values[part] - mean
        difference *= difference
        squares += difference.sum(axis=0)
    return mean, np.sqrt(squares / len(values))


def standardised(values: Rows, mean: np.ndarray, deviation: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of `values` and, float64, their columns with mean 0 and deviation 1; what hardly varies becomes 0."""
    scale = np.where(deviation > SMALLEST_DEVIATION, 1.0 / np.maximum(deviation, SMALLEST_DEVIATION), 0.0)
    for start in range(0, len(values), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        inputs = values[part] - mean
        inputs *= scale
        yield part, inputs


@dataclass(frozen=True)
class MinMaxScaler:
    """(x - min) / (max - min) of every column; values beyond the fitted range leave [0, 1], constants become 0.

    Attributes:
        shift, scale: float64 [F]; the result is (x - shift) * scale.
    """

    shift: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray) -> MinMaxScaler:
        """Learns from the columns of `values` float [N, F].

        Raises:
            ValueError: no rows, or values that are not finite.
        """
        if values.ndim != 2 or not len(values):
            raise ValueError(f"MinMaxScaler: values must have shape [N >= 1, F], got {list(values.shape)}")
        shift = values.min(axis=0).astype(np.float64)
        spread = values.max(axis=0) - shift
        if not np.isfinite(spread).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"MinMaxScaler: values must be finite, got {values[row, column]} in row {row}, column {column}"
            )
        return cls(shift, 1 / np.where(spread > 0, spread, 1))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Scaled values, float32 [N, F].

        Raises:
            ValueError: another number of columns.
        """
        if values.ndim != 2 or values.shape[1] != len(self.shift):
            raise ValueError(f"MinMaxScaler: values must have shape [N, {len(self.shift)}], got {list(values.shape)}")
        return ((values - self.shift) * self.scale).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Writes shift.npy and scale.npy."""
        directory.mkdir(parents=True, exist_ok=True)
        write_array(directory / "shift.npy", self.shift)
        write_array(directory / "scale.npy", self.scale)

    @classmethod
    def load(cls, directory: Path) -> MinMaxScaler:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
        """
        return cls(*(load_array(directory / f"{name}.npy", False) for name in ("shift", "scale")))
