"""`FeatureMatrix`: one row of named features per client."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMES_FILE = "names.json"


@dataclass(frozen=True)
class FeatureMatrix:
    """Features of clients.

    Attributes:
        client_ids: int64 [U], each once.
        values: float32 [U, F], finite.
        names: F different names; units are part of a name ("..._days").
    """

    client_ids: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.client_ids.ndim != 1 or self.client_ids.dtype != np.int64:
            raise ValueError(
                f"FeatureMatrix: client_ids must be int64 [U], got {self.client_ids.dtype}"
                f" {list(self.client_ids.shape)}"
            )
        wanted = [len(self.client_ids), len(self.names)]
        if self.values.dtype != np.float32 or list(self.values.shape) != wanted:
            raise ValueError(
                f"FeatureMatrix: values must be float32 {wanted}, got {self.values.dtype} {list(self.values.shape)}"
            )
        if len(set(self.names)) != len(self.names):
            repeated = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"FeatureMatrix: names must differ, got '{repeated}' more than once")
        bad = ~np.isfinite(self.values)
        if bad.any():
            row, column = (int(index[0]) for index in np.nonzero(bad))
            raise ValueError(
                f"FeatureMatrix: values must be finite, got {self.values[row, column]} for client"
                f" {self.client_ids[row]} in '{self.names[column]}' ({int(bad.sum())} values)"
            )

    @classmethod
    def join(cls, blocks: Sequence[FeatureMatrix]) -> FeatureMatrix:
        """Blocks of the same clients side by side.

        Raises:
            ValueError: no block, or other clients (or another order) in one of them.
        """
        if not blocks:
            raise ValueError("FeatureMatrix: blocks must hold at least one matrix, got none")
        first = blocks[0]
        for index, block in enumerate(blocks):
            if not np.array_equal(block.client_ids, first.client_ids):
                raise ValueError(
                    f"FeatureMatrix: blocks must have the same clients in the same order, got others in block {index}"
                )
        values = np.concatenate([block.values for block in blocks], axis=1)
        return cls(first.client_ids, values, tuple(name for block in blocks for name in block.names))

    def save(self, directory: Path) -> None:
        """Writes client_ids.npy, values.npy and, last, names.json; each one complete or not there."""
        directory.mkdir(parents=True, exist_ok=True)
        write_array(directory / "client_ids.npy", np.asarray(self.client_ids))
        write_array(directory / "values.npy", self.values)
        write_json(directory / NAMES_FILE, list(self.names))

    @classmethod
    def load(cls, directory: Path) -> FeatureMatrix:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files do not fit together.
        """
        names = json.loads((directory / NAMES_FILE).read_text(encoding="utf-8"))
        client_ids, values = (
            np.load(directory / name, allow_pickle=False) for name in ("client_ids.npy", "values.npy")
        )
        return cls(client_ids, values, tuple(names))


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an npy file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(temporary, path)
