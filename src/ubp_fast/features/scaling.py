"""`Scaler`: column-wise scaling that is fitted once and then applied to every cutoff.

    none             x
    log1p            log(1 + x)
    standard         (x - mean) / standard deviation
    minmax           (x - min) / (max - min); values beyond the fitted range leave [0, 1]
    log1p_standard   standard of log1p

A column that was constant while fitting is only shifted: it becomes 0 there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ubp_fast.files import write_array, write_json

KINDS = ("none", "log1p", "standard", "minmax", "log1p_standard")


class Scaler:
    """Column-wise scaling.

    Args:
        kind: one of `KINDS`.

    Attributes:
        shift, scale: float64 [F] after `fit`; the result is (f(x) - shift) * scale.

    Raises:
        ValueError: no such kind.
    """

    def __init__(self, kind: str = "log1p_standard") -> None:
        if kind not in KINDS:
            raise ValueError(f"Scaler: kind must be one of {list(KINDS)}, got '{kind}'")
        self.kind = kind
        self.shift: np.ndarray | None = None
        self.scale: np.ndarray | None = None

    def fit(self, values: np.ndarray) -> Scaler:
        """Learns shift and scale from the columns of `values` [N, F] and returns itself.

        Raises:
            ValueError: no rows, or values that are not finite, or not above -1 for log1p.
        """
        if values.ndim != 2 or not len(values):
            raise ValueError(f"Scaler: values must have shape [N >= 1, F], got {list(values.shape)}")
        prepared = self._prepare(values)
        if self.kind == "minmax":
            shift = prepared.min(axis=0)
            spread = prepared.max(axis=0) - shift
        elif self.kind in ("standard", "log1p_standard"):
            shift, spread = prepared.mean(axis=0), prepared.std(axis=0)
            # The mean of equal values is rounded: their spread is that rounding, not information.
            spread[prepared.max(axis=0) == prepared.min(axis=0)] = 0
        else:
            shift, spread = np.zeros(prepared.shape[1]), np.ones(prepared.shape[1])
        self.shift, self.scale = shift, 1 / np.where(spread > 0, spread, 1)
        return self

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Scaled values, float32 [N, F].

        Raises:
            ValueError: not fitted, another number of columns, or values as in `fit`.
        """
        if self.shift is None or self.scale is None:
            raise ValueError("Scaler: fit must come before transform, got a scaler without statistics")
        if values.ndim != 2 or values.shape[1] != len(self.shift):
            raise ValueError(f"Scaler: values must have shape [N, {len(self.shift)}], got {list(values.shape)}")
        return ((self._prepare(values) - self.shift) * self.scale).astype(np.float32)

    def _prepare(self, values: np.ndarray) -> np.ndarray:
        bad = ~np.isfinite(values)
        if self.kind.startswith("log1p"):
            bad |= ~(values > -1)
        if bad.any():
            row, column = (int(index[0]) for index in np.nonzero(bad))
            rule = "finite and above -1" if self.kind.startswith("log1p") else "finite"
            raise ValueError(f"Scaler: values must be {rule}, got {values[row, column]} in row {row}, column {column}")
        values = values.astype(np.float64)
        return np.log1p(values) if self.kind.startswith("log1p") else values

    def save(self, directory: Path) -> None:
        """Writes shift.npy, scale.npy and, last, scaler.json.

        Raises:
            ValueError: not fitted.
        """
        if self.shift is None or self.scale is None:
            raise ValueError("Scaler: fit must come before save, got a scaler without statistics")
        directory.mkdir(parents=True, exist_ok=True)
        write_array(directory / "shift.npy", self.shift)
        write_array(directory / "scale.npy", self.scale)
        write_json(directory / "scaler.json", {"kind": self.kind})

    @classmethod
    def load(cls, directory: Path) -> Scaler:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
        """
        scaler = cls(json.loads((directory / "scaler.json").read_text(encoding="utf-8"))["kind"])
        scaler.shift = np.load(directory / "shift.npy", allow_pickle=False)
        scaler.scale = np.load(directory / "scale.npy", allow_pickle=False)
        return scaler
