"""`SparseFeatureMatrix`: named features of clients as compressed sparse rows, for thousands of columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ubp_fast.features.matrix import NAMES_FILE, FeatureMatrix
from ubp_fast.files import load_array, write_array, write_json

ARRAYS = ("client_ids", "indptr", "indices", "values")


@dataclass(frozen=True)
class SparseFeatureMatrix:
    """Features of clients; what is not stored is 0.

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

    def dense(self, first: int = 0, last: int | None = None) -> FeatureMatrix:
        """Rows first..last (all by default) with every 0 written out."""
        last = len(self.client_ids) if last is None else last
        indptr = self.indptr[first : last + 1]
        rows = np.repeat(np.arange(last - first), np.diff(indptr))
        values = np.zeros((last - first, len(self.names)), np.float32)
        values[rows, self.indices[indptr[0] : indptr[-1]]] = self.values[indptr[0] : indptr[-1]]
        return FeatureMatrix(self.client_ids[first:last], values, self.names, self.units)

    def save(self, directory: Path) -> None:
        """Writes one npy file per array and, last, names.json; each one complete or not there."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in ARRAYS:
            write_array(directory / f"{name}.npy", np.asarray(getattr(self, name)))
        write_json(directory / NAMES_FILE, {"names": self.names, "units": self.units})

    @classmethod
    def load(cls, directory: Path, memory_map: bool = False) -> SparseFeatureMatrix:
        """Reads what `save` wrote; with `memory_map` indices and values stay in their files.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files do not fit together.
        """
        columns = json.loads((directory / NAMES_FILE).read_text(encoding="utf-8"))
        arrays = (
            load_array(directory / f"{name}.npy", memory_map and name in ("indices", "values")) for name in ARRAYS
        )
        client_ids, indptr, indices, values = arrays
        return cls(client_ids, indptr, indices, values, tuple(columns["names"]), tuple(columns["units"]))


class RowPart(Protocol):
    """Some columns of every row, ready to be written side by side with others."""

    lengths: np.ndarray

    def fill(self, places: np.ndarray, first_column: int, indices: np.ndarray, values: np.ndarray) -> None:
        """Writes the entries of row u to places[u] and the places after it."""
        ...


class DenseColumns:
    """A dense float [U, C] block as a part of sparse rows: its entries that are not 0."""

    def __init__(self, block: np.ndarray) -> None:
        self._rows, self._columns = np.nonzero(block)
        self._values = block[self._rows, self._columns]
        self.lengths = np.bincount(self._rows, minlength=len(block))

    def fill(self, places: np.ndarray, first_column: int, indices: np.ndarray, values: np.ndarray) -> None:
        """See `RowPart`."""
        before = np.cumsum(self.lengths) - self.lengths
        target = (places - before)[self._rows] + np.arange(len(self._rows))
        indices[target] = self._columns + first_column
        values[target] = self._values


def side_by_side(parts: Sequence[tuple[RowPart, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices and values of rows made of parts in order, each with the number of its first column."""
    lengths = np.sum([part.lengths for part, _ in parts], axis=0)
    indptr = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
    indices, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    places = indptr[:-1].copy()
    for part, first_column in parts:
        part.fill(places, first_column, indices, values)
        places += part.lengths
    return indptr, indices, values
