from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ubp_fast.events.schema import DataError
from ubp_fast.profiles import Profiles, validate

GOLDEN = Path(__file__).parents[1] / "golden"
SUBMISSIONS = GOLDEN / "e_validator"
CASES = {case["case"]: case for case in json.loads((GOLDEN / "e_validator.json").read_text())}
IDS, VECTORS = "client_ids.npy", "embeddings.npy"
# What the organisers' messages say, and the check that says it here.
CHECKS = {
    "client ids are missing": (IDS, "missing"),
    "client ids cannot be loaded \u2013 file is empty": (IDS, "empty_file"),
    "client ids cannot be loaded - file does not contain ndarray": (IDS, "not_array"),
    "client ids are 0 dimensional \u2013 should be one dimensional": (IDS, "not_1d"),
    "client_ids dtype is": (IDS, "dtype"),
    "client ids are not a permutation": (IDS, "not_permutation"),
    "embeddings do not exist": (VECTORS, "missing"),
    "embeddings cannot be loaded \u2013 file does not contain ndarray": (VECTORS, "not_array"),
    "embeddings have incorrect shape": (VECTORS, "not_2d"),
    "embeddings dtype should be float16 instead got": (VECTORS, "dtype"),
    "embeddings should not contain nans": (VECTORS, "nan"),
    "client ids and embeddings have different lengths": ("both", "length"),
}
# Row, id or value that the message has to name.
NAMED = {
    "float32": "got float32",
    "float64": "got float64",
    "float16_big_endian": "got >f2",
    "nan": r"got 1, the first in row 3 \(client \d+\), column 2",
    "nan_and_inf": r"hold no NaN, got 1, the first in row 3 \(client \d+\), column 2",
    "float32_with_nan": "got float32",
    "emb_1d": r"got \(\d+,\)",
    "emb_3d": r"got \(\d+, \d+, \d+\)",
    "ids_0d": r"got shape \(\)",
    "ids_int32": "got int32",
    "ids_float": "got float64",
    "ids_big_endian": "got >i8",
    "ids_missing_one": r"got 19 ids with 1 missing \(first: \d+\)",
    "ids_extra_one": r"got 21 ids with 1 unknown \(first: \d+ in row 20\)",
    "ids_duplicate_replaces": r"1 missing \(first: \d+\), 1 repeated \(first: \d+ in rows \d+ and \d+\)",
    "ids_all_plus_duplicate": r"got 21 ids with 1 repeated \(first: \d+ in rows \d+ and 20\)",
    "length_mismatch_nocheck": r"got \d+ and \d+",
    "length_mismatch_and_float32": "got float32",
    "emb_complex": "got complex64",
    "emb_str": "got <U4",
    "no_ids": "client_ids.npy: file must exist",
    "none": "client_ids.npy: file must exist, got none.*\n.*embeddings.npy: file must exist",
    "ids_empty_file": "got 0 bytes",
    "ids_text_file": "starts with b'",
    "emb_text_file": "starts with b'",
    "emb_truncated": r"complete array of numbers, got \d+ bytes",
    "emb_object": "Object arrays",
    "no_such_directory": "embeddings.npy: file must exist",
}


def relevant_clients() -> np.ndarray:
    return np.load(SUBMISSIONS / "input" / "relevant_clients.npy", allow_pickle=False)


def expected_checks(errors: list[str]) -> list[tuple[str, str]]:
    found = []
    for error in errors:
        found += [check for start, check in CHECKS.items() if error.startswith(start)]
    return found


@pytest.mark.parametrize("name", CASES)
def test_verdicts_equal_the_organisers(name):
    case = CASES[name]
    unchecked = case["disable_relevant_clients_check"]
    validation = validate(SUBMISSIONS / name, None if unchecked else relevant_clients())
    assert validation.passed == (case["verdict"] == "pass")
    assert [(problem.file, problem.check) for problem in validation.problems] == expected_checks(case["errors"])
    # Their last line says that the validator failed; every other error is one of ours.
    assert len(validation.problems) == max(0, len(case["errors"]) - 1)
    assert len(validation.warnings) == len(case["warnings"])
    if validation.passed:
        profiles = validation.require()
        assert [list(profiles.client_ids.shape), str(profiles.client_ids.dtype)] == case["returned"][:2]
        assert list(profiles.embeddings.shape) == case["returned"][2]
    else:
        with pytest.raises(DataError, match="(?s)" + NAMED[name]):
            validation.require()


def submission(directory: Path, ids: np.ndarray, vectors: np.ndarray) -> Path:
    np.save(directory / IDS, ids)
    np.save(directory / VECTORS, vectors)
    return directory


@pytest.mark.parametrize(
    ("vectors", "check"),
    [
        (np.zeros((3, 2049), np.float32), "too_wide"),  # before the dtype
        (np.full((3, 2), np.inf, np.float16), "infinite"),
        (np.zeros(2049, np.float16), "not_2d"),
        (np.zeros((3, 2048), np.float16), None),
    ],
)
def test_order_of_the_checks_of_vectors(tmp_path, vectors, check):
    ids = np.arange(3)
    problems = validate(submission(tmp_path, ids, vectors), ids).problems
    assert [problem.check for problem in problems] == ([] if check is None else [check])


def test_ids_of_two_dimensions_with_another_dtype_fail_on_their_shape(tmp_path):
    directory = submission(tmp_path, np.zeros((3, 1), np.int32), np.zeros((3, 2), np.float16))
    assert [problem.check for problem in validate(directory).problems] == ["not_1d"]


def test_both_sides_are_reported(tmp_path):
    directory = submission(tmp_path, np.arange(3, dtype=np.int32), np.zeros((4, 2), np.float64))
    found = [(problem.file, problem.check) for problem in validate(directory, np.arange(3)).problems]
    assert found == [(IDS, "dtype"), (VECTORS, "dtype")]


def test_nan_beyond_the_first_block_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("ubp_fast.profiles.validator.BLOCK_ROWS", 4)
    vectors = np.zeros((11, 3), np.float16)
    vectors[9, 2] = vectors[10, 0] = np.nan
    (problem,) = validate(submission(tmp_path, np.arange(100, 111), vectors)).problems
    assert problem.message.endswith("got 2, the first in row 9 (client 109), column 2")


def test_an_archive_is_not_an_array(tmp_path):
    np.savez(tmp_path / "archive.npz", a=np.zeros(3))
    (tmp_path / "archive.npz").rename(tmp_path / IDS)
    np.save(tmp_path / VECTORS, np.zeros((3, 2), np.float16))
    assert [problem.check for problem in validate(tmp_path).problems] == ["not_array"]


def test_saved_profiles_pass(tmp_path):
    ids = np.array([9, 2, 4])
    Profiles(ids, np.eye(3, 5, dtype=np.float32)).save(tmp_path)
    assert validate(tmp_path, np.sort(ids)).passed
