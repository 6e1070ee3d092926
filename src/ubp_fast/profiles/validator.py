"""The organisers' checks of a submission, with messages that say which row, column or client is wrong.

The order of the checks is theirs, and so is what is reported: the first failure of client_ids.npy, the first of
embeddings.npy, and different lengths only when both sides pass.

    client_ids.npy   missing, empty_file, not_array, not_1d, dtype (int64), not_permutation
    embeddings.npy   missing, empty_file, not_array, not_2d, too_wide (more than 2048), dtype (float16), nan, infinite
    both             length

Vectors of width 0 pass; without relevant clients repeated ids, unknown ids and empty arrays pass.
Source: Synerise/recsys2025, validator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ubp_fast.events.read import ArrayError, read_array
from ubp_fast.events.schema import DataError
from ubp_fast.profiles.matrix import BLOCK_ROWS, EMBEDDINGS_FILE, IDS_FILE, MAX_DIM, Profiles

UNCHECKED_WARNING = (
    "client_ids.npy is not compared with the relevant clients: the submission may lack clients or hold others"
)


@dataclass(frozen=True)
class Problem:
    """One failed check.

    Attributes:
        file: "client_ids.npy", "embeddings.npy" or "both".
        check: which check, see the module's text.
        message: what is wrong and where.
    """

    file: str
    check: str
    message: str


@dataclass(frozen=True)
class Validation:
    """Verdict on a submission.

    Attributes:
        problems: empty when it passes.
        warnings: remarks that do not fail it.
        profiles: its content, None when it fails.
    """

    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    profiles: Profiles | None

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return not self.problems

    def require(self) -> Profiles:
        """The profiles of a submission that passed.

        Raises:
            DataError: it failed; the message lists every problem.
        """
        if self.profiles is None:
            raise DataError("\n".join(problem.message for problem in self.problems))
        return self.profiles


def require_vectors(directory: Path) -> None:
    """Refuses a place without vectors; names a folder of it that holds some, as that of a run does.

    Raises:
        DataError: neither of the two files is there.
    """
    names = (IDS_FILE, EMBEDDINGS_FILE)
    if any((directory / name).is_file() for name in names):
        return
    found = "neither" if directory.is_dir() else "a file" if directory.exists() else "no such directory"
    inside = sorted(folder.parent for folder in directory.glob(f"*/{EMBEDDINGS_FILE}"))
    remedy = f"did you mean {' or '.join(map(str, inside))}?" if inside else "check the path"
    raise DataError(f"{directory}: directory must hold {' and '.join(names)}, got {found}; {remedy}")


def validate(
    directory: Path | str, relevant_clients: np.ndarray | None = None, names: Mapping[str, int] | None = None
) -> Validation:
    """Checks a directory with client_ids.npy and embeddings.npy by the organisers' rules.

    Args:
        directory: of the submission.
        relevant_clients: i64, the ids that must be there in any order; None switches that check off, with a warning.
        names: number of each text id of the data, so that client_ids.npy may hold text, too.
    """
    directory = Path(directory)
    ids, id_problem = _load(directory / IDS_FILE)
    vectors, vector_problem = _load(directory / EMBEDDINGS_FILE)
    if ids is not None and ids.ndim == 1 and ids.dtype.kind == "U" and names is not None:
        ids, id_problem = _numbered(directory / IDS_FILE, ids, names)
    if ids is not None:
        id_problem = _check_ids(directory / IDS_FILE, ids, relevant_clients)
    if vectors is not None:
        vector_problem = _check_vectors(directory / EMBEDDINGS_FILE, vectors, ids)
    problems = [problem for problem in (id_problem, vector_problem) if problem is not None]
    if ids is not None and vectors is not None and not problems and len(ids) != len(vectors):
        message = (
            f"{directory}: {IDS_FILE} and {EMBEDDINGS_FILE} must have the same number of rows,"
            f" got {len(ids)} and {len(vectors)}"
        )
        problems.append(Problem("both", "length", message))
    warnings = () if relevant_clients is not None else (UNCHECKED_WARNING,)
    passed = ids is not None and vectors is not None and not problems
    return Validation(tuple(problems), warnings, Profiles(ids, vectors) if passed else None)  # type: ignore[arg-type]


def _load(path: Path) -> tuple[np.ndarray | None, Problem | None]:
    try:
        return read_array(path), None
    except ArrayError as error:
        return None, Problem(path.name, error.reason, str(error))


def _numbered(path: Path, ids: np.ndarray, names: Mapping[str, int]) -> tuple[np.ndarray | None, Problem | None]:
    """Text ids as the numbers that the data gave them."""
    unknown = [row for row, name in enumerate(ids.tolist()) if name not in names]
    if unknown:
        message = (
            f"{path}: text ids must be clients of the data, got {len(unknown)} unknown ones, the first"
            f" '{ids[unknown[0]]}' in row {unknown[0]}; the data's ids look like '{next(iter(names), '')}'"
        )
        return None, Problem(IDS_FILE, "dtype", message)
    return np.array([names[name] for name in ids.tolist()], np.int64), None


def _check_ids(path: Path, ids: np.ndarray, relevant: np.ndarray | None) -> Problem | None:
    if ids.ndim != 1:
        return Problem(IDS_FILE, "not_1d", f"{path}: ids must be one-dimensional, got shape {ids.shape}")
    if ids.dtype != np.int64:
        message = f"{path}: ids must be int64 in this machine's byte order, got {_dtype_name(ids.dtype)}"
        return Problem(IDS_FILE, "dtype", message + "; convert with .astype(np.int64)")
    if relevant is None:
        return None
    difference = _id_difference(ids, np.asarray(relevant, np.int64))
    if not difference:
        return None
    message = (
        f"{path}: ids must be the {len(relevant)} relevant clients in any order, got {len(ids)} ids with {difference}"
    )
    return Problem(IDS_FILE, "not_permutation", message)


def _id_difference(ids: np.ndarray, relevant: np.ndarray) -> str:
    """How two lists of ids differ as multisets, in words; empty when they do not."""
    if len(ids) == len(relevant) and np.array_equal(np.sort(ids), np.sort(relevant)):
        return ""
    parts = []
    distinct, first_row, counts = np.unique(ids, return_index=True, return_counts=True)
    wanted = np.unique(relevant)
    missing = wanted[~np.isin(wanted, distinct)]
    if len(missing):
        parts.append(f"{len(missing)} missing (first: {missing[0]})")
    unknown = np.sort(first_row[~np.isin(distinct, wanted)])
    if len(unknown):
        parts.append(f"{len(unknown)} unknown (first: {ids[unknown[0]]} in row {unknown[0]})")
    repeated = distinct[counts > 1]
    if len(repeated):
        rows = np.flatnonzero(ids == repeated[0])
        parts.append(f"{len(repeated)} repeated (first: {repeated[0]} in rows {rows[0]} and {rows[1]})")
    return ", ".join(parts) or f"another number of repeats than the {len(relevant)} relevant clients have"


def _check_vectors(path: Path, vectors: np.ndarray, ids: np.ndarray | None) -> Problem | None:
    if vectors.ndim != 2:
        message = f"{path}: embeddings must have shape [clients, width], got {vectors.shape}"
        return Problem(EMBEDDINGS_FILE, "not_2d", message)
    if vectors.shape[1] > MAX_DIM:
        message = f"{path}: vectors must have at most {MAX_DIM} numbers, got {vectors.shape[1]}"
        return Problem(EMBEDDINGS_FILE, "too_wide", message)
    if vectors.dtype != np.float16:
        message = f"{path}: embeddings must be float16 in this machine's byte order, got {_dtype_name(vectors.dtype)}"
        return Problem(EMBEDDINGS_FILE, "dtype", message + "; Profiles.save converts and checks the range")
    for check, is_bad in (("nan", np.isnan), ("infinite", np.isinf)):
        count, first = 0, None
        for start in range(0, len(vectors), BLOCK_ROWS):
            bad = is_bad(vectors[start : start + BLOCK_ROWS])
            count += int(bad.sum())
            if first is None and count:
                row, column = np.argwhere(bad)[0]
                first = (start + int(row), int(column))
        if first is not None:
            client = f" (client {ids[first[0]]})" if ids is not None and ids.ndim == 1 and first[0] < len(ids) else ""
            message = (
                f"{path}: embeddings must hold no {'NaN' if check == 'nan' else 'infinity'}, got {count},"
                f" the first in row {first[0]}{client}, column {first[1]}"
            )
            return Problem(EMBEDDINGS_FILE, check, message)
    return None


def _dtype_name(dtype: np.dtype) -> str:
    return dtype.str if not dtype.isnative or dtype.kind in "US" else str(dtype)
