"""`FeatureMatrix`: one row of named features per client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ubp_fast.files import load_array, load_json, write_array, write_json

NAMES_FILE = "names.json"
CHECKED_ROWS = 1 << 13


@dataclass(frozen=True)
class FeatureMatrix:
    """Features of clients.

    Attributes:
        client_ids: int64 [U], each once.
        values: float32 or float16 [U, F], finite.
        names: F different names.
        units: F units such as "events", "days", "log1p events"; "" where none is known, all of them if none is given.
    """

    client_ids: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.client_ids.ndim != 1 or self.client_ids.dtype != np.int64:
            raise ValueError(
                f"FeatureMatrix: client_ids must be int64 [U], got {self.client_ids.dtype}"
                f" {list(self.client_ids.shape)}"
            )
        wanted = [len(self.client_ids), len(self.names)]
        if self.values.dtype not in (np.float32, np.float16) or list(self.values.shape) != wanted:
            raise ValueError(
                f"FeatureMatrix: values must be float32 {wanted}, got {self.values.dtype} {list(self.values.shape)};"
                " float16 is possible too"
            )
        object.__setattr__(self, "units", self.units or ("",) * len(self.names))
        if len(self.units) != len(self.names):
            raise ValueError(f"FeatureMatrix: units must be {len(self.names)} like names, got {len(self.units)}")
        if len(set(self.names)) != len(self.names):
            repeated = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"FeatureMatrix: names must differ, got '{repeated}' more than once")
        starts = range(0, len(self.values), CHECKED_ROWS)
        with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(starts)))) as pool:
            for _ in pool.map(self._require_finite, starts):
                pass

    def _require_finite(self, first: int) -> None:
        bad = ~np.isfinite(self.values[first : first + CHECKED_ROWS])
        if bad.any():
            row, column = (int(index[0]) for index in np.nonzero(bad))
            raise ValueError(
                f"FeatureMatrix: values must be finite, got {self.values[first + row, column]} for client"
                f" {self.client_ids[first + row]} in '{self.names[column]}' ({int(bad.sum())} values)"
            )

    def save(self, directory: Path) -> None:
        """Writes client_ids.npy, values.npy and, last, names.json; each one complete or not there."""
        directory.mkdir(parents=True, exist_ok=True)
        write_array(directory / "client_ids.npy", np.asarray(self.client_ids))
        write_array(directory / "values.npy", self.values)
        write_json(directory / NAMES_FILE, {"names": self.names, "units": self.units})

    @classmethod
    def load(cls, directory: Path, memory_map: bool = False) -> FeatureMatrix:
        """Reads what `save` wrote; with `memory_map` the values stay in their file.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files do not fit together.
        """
        columns = load_json(directory / NAMES_FILE)
        client_ids = load_array(directory / "client_ids.npy")
        values = load_array(directory / "values.npy", memory_map)
        return cls(client_ids, values, tuple(columns["names"]), tuple(columns["units"]))
