"""FeatureMatrix: what it refuses, and that files give back what was saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ubp_fast.features.matrix import FeatureMatrix, end_to_end
from ubp_fast.features.writing import in_client_blocks, in_sparse_blocks

CLIENTS = np.array([7, 3], np.int64)
VALUES = np.array([[1.5, 2], [3, 4]], np.float32)


def write(directory: Path) -> None:
    def fill(block: np.ndarray, first: int, last: int) -> None:
        block[:] = VALUES[first:last]

    in_client_blocks(CLIENTS, ("a", "b"), ("events", ""), fill, directory)


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "features")
    loaded = FeatureMatrix.load(tmp_path / "features")
    np.testing.assert_array_equal(loaded.client_ids, CLIENTS)
    np.testing.assert_array_equal(loaded.values, VALUES)
    assert (loaded.names, loaded.units) == (("a", "b"), ("events", ""))
    assert {file.name for file in (tmp_path / "features").iterdir()} == {"client_ids.npy", "values.npy", "names.json"}


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    write(tmp_path)
    np.save(tmp_path / "values.npy", VALUES[:, :1])
    with pytest.raises(ValueError, match=r"values must be float32 \[2, 2\], got float32 \[2, 1\]"):
        FeatureMatrix.load(tmp_path)


def test_neighbours_are_a_slice_and_others_are_not() -> None:
    for start, end, rows in (
        ([2, 5, 5], [5, 5, 9], slice(2, 9)),
        ([2, 7], [5, 9], [2, 3, 4, 7, 8]),
        ([7, 2], [9, 5], [7, 8, 2, 3, 4]),
        ([2, 10, 5], [3, 12, 6], [2, 10, 11, 5]),
        ([4, 4], [4, 4], slice(0, 0)),
    ):
        found, offsets = end_to_end(np.array(start), np.array(end))
        assert offsets.tolist() == [0, *np.cumsum(np.subtract(end, start)).tolist()]
        assert found == rows if isinstance(rows, slice) else found.tolist() == rows  # type: ignore[union-attr]


@pytest.mark.parametrize("in_file", [False, True])
def test_sparse_rows_of_any_choice(tmp_path: Path, in_file: bool) -> None:
    random = np.random.default_rng(0)
    dense = (random.normal(size=(50, 9)) * (random.random((50, 9)) < 0.2)).astype(np.float32)
    dense[7] = 0

    def fill(block: np.ndarray, first: int, last: int) -> None:
        block[:] = dense[first:last]

    names, units = tuple("abcdefghi"), ("",) * 9
    matrix = in_sparse_blocks(np.arange(50), names, units, fill, tmp_path if in_file else None)
    for chosen in (slice(None), slice(5, 9), slice(7, 8), np.array([3, 7, 3, 49]), np.zeros(0, np.int64)):
        np.testing.assert_array_equal(matrix.rows(chosen), dense[chosen])
    assert len(matrix.values) == np.count_nonzero(dense)
    dense[30, 2] = np.inf
    with pytest.raises(ValueError, match=r"got inf for client 30 in 'c' \(1 values\)"):
        in_sparse_blocks(np.arange(50), names, units, fill)


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
