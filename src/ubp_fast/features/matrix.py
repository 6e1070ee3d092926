"""One row of named features per client: `FeatureMatrix` with every number, `SparseFeatureMatrix` without the zeros."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ubp_fast.files import load_array, load_json
from ubp_fast.store.event_store import end_to_end

NAMES_FILE = "names.json"
ARRAYS = ("client_ids", "indptr", "indices", "values")
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
        threads = min(torch.get_num_threads(), len(starts))
        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
            for _ in (map if pool is None else pool.map)(self._require_finite, starts):
                pass

    def _require_finite(self, first: int) -> None:
        bad = ~np.isfinite(self.values[first : first + CHECKED_ROWS])
        if bad.any():
            row, column = (int(index[0]) for index in np.nonzero(bad))
            raise ValueError(
                f"FeatureMatrix: values must be finite, got {self.values[first + row, column]} for client"
                f" {self.client_ids[first + row]} in '{self.names[column]}' ({int(bad.sum())} values)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(clients, columns)."""
        return len(self.client_ids), len(self.names)

    def rows(self, chosen: slice | np.ndarray) -> np.ndarray:
        """Some rows (a slice or i64 positions [N]) as float32 [N, F]."""
        return np.asarray(self.values[chosen], np.float32)

    @classmethod
    def load(cls, directory: Path, memory_map: bool = False) -> FeatureMatrix:
        """Reads what `in_client_blocks` wrote; with `memory_map` the values stay in their file.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files do not fit together.
        """
        columns = load_json(directory / NAMES_FILE)
        client_ids = load_array(directory / "client_ids.npy")
        values = load_array(directory / "values.npy", memory_map)
        return cls(client_ids, values, tuple(columns["names"]), tuple(columns["units"]))


@dataclass(frozen=True)
class SparseFeatureMatrix:
    """Features of clients as compressed sparse rows; what is not stored is 0. `SparseWriter` makes it.

    Attributes:
        client_ids: int64 [U], each once.
        indptr: int64 [U + 1]; entries of client u are indptr[u]:indptr[u + 1].
        indices: int32 [entries], columns, ascending in every row.
        values: float32 [entries].
        names: F different names.
        units: F units.
    """

    client_ids: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    units: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.indptr) != len(self.client_ids) + 1 or self.indptr[-1] != len(self.indices):
            raise ValueError(
                f"SparseFeatureMatrix: indptr must end {len(self.client_ids)} rows at {len(self.indices)} entries,"
                f" got {len(self.indptr) - 1} rows and {self.indptr[-1] if len(self.indptr) else 'no'} entries"
            )
        if len(self.values) != len(self.indices) or len(self.units) != len(self.names):
            raise ValueError(
                f"SparseFeatureMatrix: values must be as many as indices and units as names, got {len(self.values)},"
                f" {len(self.indices)}, {len(self.units)}, {len(self.names)}"
            )
        if len(self.indices) and not 0 <= self.indices.min() <= self.indices.max() < len(self.names):
            raise ValueError(
                f"SparseFeatureMatrix: indices must lie in 0..{len(self.names) - 1}, got"
                f" {self.indices.min()}..{self.indices.max()}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(clients, columns)."""
        return len(self.client_ids), len(self.names)

    def rows(self, chosen: slice | np.ndarray) -> np.ndarray:
        """Some rows (a slice or i64 positions [N]) as float32 [N, F], every 0 written out."""
        entries, offsets = end_to_end(self.indptr[:-1][chosen], self.indptr[1:][chosen])
        values = np.zeros((len(offsets) - 1, len(self.names)), np.float32)
        values[np.repeat(np.arange(len(values)), np.diff(offsets)), self.indices[entries]] = self.values[entries]
        return values

    @classmethod
    def load(cls, directory: Path, memory_map: bool = False) -> SparseFeatureMatrix:
        """Reads what `SparseWriter` wrote; with `memory_map` indices and values stay in their files.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files do not fit together.
        """
        columns = load_json(directory / NAMES_FILE)
        arrays = (
            load_array(directory / f"{name}.npy", memory_map and name in ("indices", "values")) for name in ARRAYS
        )
        client_ids, indptr, indices, values = arrays
        return cls(client_ids, indptr, indices, values, tuple(columns["names"]), tuple(columns["units"]))


Features = FeatureMatrix | SparseFeatureMatrix


def load_features(directory: Path) -> Features:
    """A matrix of either kind from its directory; what is large stays in its file."""
    is_sparse = (directory / "indptr.npy").exists()
    return (SparseFeatureMatrix if is_sparse else FeatureMatrix).load(directory, memory_map=True)
