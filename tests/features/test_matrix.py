"""FeatureMatrix: what it refuses, and that files give back what was saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ubp_fast.features.matrix import FeatureMatrix

CLIENTS = np.array([7, 3], np.int64)
VALUES = np.array([[1.5, 2], [3, 4]], np.float32)


def test_round_trip(tmp_path: Path) -> None:
    matrix = FeatureMatrix(CLIENTS, VALUES, ("a", "b"))
    matrix.save(tmp_path / "features")
    loaded = FeatureMatrix.load(tmp_path / "features")
    np.testing.assert_array_equal(loaded.client_ids, CLIENTS)
    np.testing.assert_array_equal(loaded.values, VALUES)
    assert loaded.names == ("a", "b")
    assert {file.name for file in (tmp_path / "features").iterdir()} == {"client_ids.npy", "values.npy", "names.json"}


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    FeatureMatrix(CLIENTS, VALUES, ("a", "b")).save(tmp_path)
    np.save(tmp_path / "values.npy", VALUES[:, :1])
    with pytest.raises(ValueError, match=r"values must be float32 \[2, 2\], got float32 \[2, 1\]"):
        FeatureMatrix.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client_ids": CLIENTS.astype(np.int32)}, "client_ids must be int64"),
        ({"values": VALUES.astype(np.float64)}, "values must be float32"),
        ({"values": np.array([[1, 2], [np.nan, 4]], np.float32)}, r"got nan for client 3 in 'a' \(1 values\)"),
        ({"names": ("a", "a")}, "got 'a' more than once"),
        ({"names": ("a",)}, r"values must be float32 \[2, 1\]"),
    ],
)
def test_bad_matrices(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureMatrix(**{"client_ids": CLIENTS, "values": VALUES, "names": ("a", "b"), **change})
