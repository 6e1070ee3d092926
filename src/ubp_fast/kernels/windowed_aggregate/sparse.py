"""Windowed counts of wide lists as compressed sparse rows: time and memory follow the events, not clients x columns.

Two passes over the events of the longest window. The first one finds every row's length: newest first, a slot's first
sighting lies in the smallest window that contains the slot, and so the slot has an entry in each window from there on.
The second one counts into one [W, num_slots] scratch table per thread, of which only the client's own slots are cleared
and read, and writes the row in ascending order of columns. No list grows, and each thread owns its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

from ubp_fast.kernels.windowed_aggregate._numba import end_of_history, over_clients, read_only
from ubp_fast.kernels.windowed_aggregate.api import checked_problem
from ubp_fast.kernels.windowed_aggregate.reference import ALL_HISTORY


class SparseCounts(NamedTuple):
    """Compressed sparse rows: entries of client u are indptr[u]:indptr[u + 1].

    Attributes:
        indptr: [U + 1] int64.
        indices: [entries] int32, window * num_slots + slot, ascending in every row.
        counts: [entries] float32, > 0; exact up to 2^24 events.
    """

    indptr: np.ndarray
    indices: np.ndarray
    counts: np.ndarray


def windowed_counts_csr(
    offsets: np.ndarray,
    timestamp_s: np.ndarray,
    codes: np.ndarray,
    *,
    anchor_s: int,
    windows_s: Sequence[int | None],
    slots: np.ndarray,
    num_slots: int,
    include_anchor: bool = False,
) -> SparseCounts:
    """The entries of `windowed_aggregate(...).counts.reshape(U, W * num_slots)` that are not 0; arguments as there.

    Raises:
        ValueError: an argument breaks the rules of `windowed_aggregate`, or there are 2^31 columns or more.
        TypeError: an argument has a wrong dtype.
    """
    windows = [ALL_HISTORY if window is None else int(window) for window in windows_s]
    if len(windows) * num_slots >= 2**31:
        raise ValueError(f"windowed_counts_csr: columns must be below 2**31, got {len(windows)} x {num_slots}")
    problem = checked_problem(
        offsets, timestamp_s, codes, slots, None, None, int(anchor_s), windows, int(num_slots), [], [], include_anchor
    )
    starts_s = np.array([problem.start_s(window) for window in range(len(windows))], np.int64)
    inputs = [
        read_only(array) for array in (problem.offsets, problem.timestamp_s, problem.codes, problem.slots, starts_s)
    ]
    indptr = np.zeros(len(problem.offsets), np.int64)
    limit_s = problem.limit_s

    def measure(first: int, last: int) -> None:
        _lengths(first, last, *inputs, limit_s, num_slots, indptr[1:])  # type: ignore[call-arg]

    over_clients(problem.offsets, measure)
    np.cumsum(indptr, out=indptr)
    indices, counts = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)

    def fill(first: int, last: int) -> None:
        _fill(first, last, *inputs, limit_s, num_slots, indptr, indices, counts)  # type: ignore[call-arg]

    over_clients(problem.offsets, fill)
    return SparseCounts(indptr, indices, counts)


@numba.njit(cache=True, nogil=True)
def _lengths(first, last, offsets, timestamp_s, codes, slots, starts_s, limit_s, num_slots, lengths):
    """Number of entries of each row."""
    num_windows = starts_s.size
    seen = np.zeros(num_slots, np.int32)
    for client in range(first, last):
        mark, start = client - first + 1, offsets[client]
        end = end_of_history(timestamp_s, start, offsets[client + 1], limit_s)
        band, entries = 0, 0
        for row in range(end - 1, start - 1, -1):
            while band < num_windows and timestamp_s[row] < starts_s[band]:
                band += 1
            if band == num_windows:
                break
            for column in range(slots.shape[1]):
                slot = slots[codes[row], column]
                if slot >= 0 and seen[slot] != mark:
                    seen[slot] = mark
                    entries += num_windows - band
        lengths[client] = entries


@numba.njit(cache=True, nogil=True)
def _fill(first, last, offsets, timestamp_s, codes, slots, starts_s, limit_s, num_slots, indptr, indices, counts):
    """Entries of the rows [first, last)."""
    num_windows = starts_s.size
    seen, table = np.zeros(num_slots, np.int32), np.zeros((num_windows, num_slots), np.int32)
    found = np.empty(num_slots, np.int32)
    for client in range(first, last):
        mark, start = client - first + 1, offsets[client]
        if indptr[client] == indptr[client + 1]:
            continue
        end = end_of_history(timestamp_s, start, offsets[client + 1], limit_s)
        band, different = 0, 0
        for row in range(end - 1, start - 1, -1):
            while band < num_windows and timestamp_s[row] < starts_s[band]:
                band += 1
            if band == num_windows:
                break
            for column in range(slots.shape[1]):
                slot = slots[codes[row], column]
                if slot < 0:
                    continue
                if seen[slot] != mark:
                    seen[slot] = mark
                    found[different] = slot
                    different += 1
                table[band, slot] += 1
        found[:different].sort()
        place = indptr[client]
        for window in range(num_windows):
            for index in range(different):
                slot = found[index]
                if window > 0:
                    table[window, slot] += table[window - 1, slot]
                if table[window, slot] > 0:
                    indices[place] = window * num_slots + slot
                    counts[place] = table[window, slot]
                    place += 1
        for window in range(num_windows):
            for index in range(different):
                table[window, found[index]] = 0
