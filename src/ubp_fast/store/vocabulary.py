"""Dense ids: 0 is padding, 1 is unknown, real ids start at 2, in ascending order of the original ids."""

from __future__ import annotations

import numpy as np

PAD, UNKNOWN, FIRST_ID = 0, 1, 2


def vocabulary(ids: np.ndarray) -> np.ndarray:
    """Original id of every dense id.

    Args:
        ids: i64 [N], no id twice.

    Returns:
        i64 [N + 2], entries 0 and 1 are -1.
    """
    return np.concatenate([np.full(FIRST_ID, -1, np.int64), np.sort(ids).astype(np.int64)])


def encode(ids: np.ndarray, vocabulary_ids: np.ndarray) -> np.ndarray:
    """Dense ids i32 [N] of original ids i64 [N]; what the vocabulary does not hold becomes `UNKNOWN`."""
    known = vocabulary_ids[FIRST_ID:]
    if not len(known):
        return np.full(len(ids), UNKNOWN, np.int32)
    position = np.searchsorted(known, ids)
    position[position == len(known)] = 0
    found = known[position] == ids
    return np.where(found, position + FIRST_ID, UNKNOWN).astype(np.int32)
