from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.schema import DataError
from ubp_fast.profiles import Profiles


def make(ids: list[int], dim: int = 3, dtype: type = np.float32) -> Profiles:
    client_ids = np.array(ids, np.int64)
    return Profiles(client_ids, (client_ids[:, None] + np.arange(dim) / 8).astype(dtype))


def test_saved_profiles_load_equal_and_leave_no_other_files(tmp_path):
    profiles = make([5, 1, 9])
    profiles.save(tmp_path / "half")
    profiles.save(tmp_path / "single", dtype="float32")
    for name, dtype in (("half", np.float16), ("single", np.float32)):
        loaded = Profiles.load(tmp_path / name)
        np.testing.assert_array_equal(loaded.client_ids, profiles.client_ids)
        np.testing.assert_array_equal(loaded.embeddings, profiles.embeddings)
        assert loaded.embeddings.dtype == dtype
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["client_ids.npy", "embeddings.npy"]


def test_values_that_overflow_float16_are_named_and_nothing_is_written(tmp_path):
    profiles = make([5, 1, 9])
    profiles.embeddings[1, 2] = 65_520
    with pytest.raises(DataError, match=r"column 2 must fit float16 .* got 65520.0 in row 1 \(client 1\)"):
        profiles.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    profiles.embeddings[1, 2] = 65_519
    profiles.save(tmp_path / "out")
    assert Profiles.load(tmp_path / "out").embeddings[1, 2] == 65_504


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_are_refused(tmp_path, dtype):
    profiles = make([5, 1, 9])
    profiles.embeddings[2, 0] = np.nan
    with pytest.raises(DataError, match=r"row 2 \(client 9\)"):
        profiles.save(tmp_path, dtype=dtype)


def test_overflow_beyond_the_first_block_names_the_right_row(monkeypatch):
    monkeypatch.setattr("ubp_fast.profiles.matrix.BLOCK_ROWS", 2)
    profiles = make([5, 1, 9, 7])
    profiles.embeddings[3, 1] = -1e6
    with pytest.raises(DataError, match=r"column 1 .* in row 3 \(client 7\)"):
        profiles.to_float16()


def test_align_reorders_and_selects():
    aligned = make([5, 1, 9]).align(np.array([9, 5]))
    np.testing.assert_array_equal(aligned.embeddings, make([9, 5]).embeddings)


def test_align_names_the_client_without_a_profile():
    with pytest.raises(DataError, match=r"got 2 without a profile, the first is 7 \(row 1\)"):
        make([5, 1, 9]).align(np.array([9, 7, 10**12]))
    with pytest.raises(DataError, match="got 1 repeats, the first of 5"):
        make([5, 1, 5]).align(np.array([1]))


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (np.arange(3, dtype=np.int32), np.zeros((3, 2), np.float32), "client_ids must be int64"),
        (np.arange(3), np.zeros((3, 2)), "embeddings must be float16 or float32"),
        (np.arange(3), np.zeros((2, 2), np.float32), "must have 3 rows like client_ids, got 2"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, ids, vectors, message):
    with pytest.raises(ValueError, match=message):
        Profiles(ids, vectors)
    np.save(tmp_path / "client_ids.npy", ids)
    np.save(tmp_path / "embeddings.npy", vectors)
    with pytest.raises(DataError, match=message):
        Profiles.load(tmp_path)


def test_a_table_of_many_clients_has_parts_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part takes while it is written is most of a run's memory at a million clients."""
    monkeypatch.setattr("ubp_fast.profiles.matrix.BLOCK_ROWS", 4)
    monkeypatch.setattr("ubp_fast.profiles.matrix.PART_ROWS", 2)
    few, many = make([5, 1, 9, 7]), make([5, 1, 9, 7, 3])
    few.write_parquet(tmp_path / "few.parquet")
    many.write_parquet(tmp_path / "many.parquet")
    assert pl.read_parquet(tmp_path / "few.parquet").equals(few.to_frame())
    parts = [pl.read_parquet(path) for path in sorted((tmp_path / "many.parquet").iterdir())]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert pl.concat(parts).equals(many.to_frame())
