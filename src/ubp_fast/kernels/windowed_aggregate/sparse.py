"""Windowed counts of wide lists as compressed sparse rows: time and memory follow events, not clients x columns.

Two passes over the events of the longest window. The first one finds every row's length: newest first, a slot's first
sighting lies in the smallest window that contains the slot, and so the slot has an entry in each window from there on.
The second one counts into one [W, num_slots] scratch table per thread, of which only the client's own slots are cleared
and read, and writes the row in ascending order of columns. No list grows, and each thread owns its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ubp_fast.compiled import njit
from ubp_fast.kernels.windowed_aggregate._numba import (
    decay_tables,
    decay_weight,
    end_of_history,
    over_clients,
    read_only,
)
from ubp_fast.kernels.windowed_aggregate.api import checked_problem
from ubp_fast.kernels.windowed_aggregate.reference import ALL_HISTORY


class SparseCounter:
    """The entries of `windowed_aggregate(...).counts` that are not 0; arguments as there.

    Columns are window * num_slots + slot; counts are float32, exact up to 2^24 events. Two steps, first the lengths of
    the rows and then their entries, let several lists share the rows of one matrix.

    Attributes:
        lengths: [U] int64, entries of each row.
        num_events: [U] int64, all events before the anchor.

    Raises:
        ValueError: an argument breaks the rules of `windowed_aggregate`, or there are 2^31 columns or more.
        TypeError: an argument has a wrong dtype.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        timestamp_s: np.ndarray,
        codes: np.ndarray,
        *,
        anchor_s: int,
        windows_s: Sequence[int | None],
        slots: np.ndarray,
        num_slots: int,
        include_anchor: bool = False,
    ) -> None:
        windows = [ALL_HISTORY if window is None else int(window) for window in windows_s]
        if len(windows) * num_slots >= 2**31:
            raise ValueError(f"SparseCounter: columns must be below 2**31, got {len(windows)} x {num_slots}")
        problem = checked_problem(
            offsets, timestamp_s, codes, slots, None, None,
            int(anchor_s), windows, int(num_slots), [], [], include_anchor,
        )  # fmt: skip
        starts_s = np.array([problem.start_s(window) for window in range(len(windows))], np.int64)
        arrays = (problem.offsets, problem.timestamp_s, problem.codes, problem.slots, starts_s)
        self._inputs = [read_only(array) for array in arrays]
        self._limits = (problem.limit_s, problem.num_slots)
        self.lengths, self.num_events = np.zeros((2, len(problem.offsets) - 1), np.int64)
        over_clients(problem.offsets, self._measure)

    def _measure(self, first: int, last: int) -> None:
        _lengths(first, last, *self._inputs, *self._limits, self.lengths, self.num_events)

    def fill(self, places: np.ndarray, first_column: int, indices: np.ndarray, counts: np.ndarray) -> None:
        """Writes the entries of row u to places[u], places[u] + 1, ... of indices (plus `first_column`) and counts."""

        def work(first: int, last: int) -> None:
            targets = (self.lengths, places, first_column, indices, counts)
            _fill(first, last, *self._inputs, *self._limits, *targets)

        over_clients(self._inputs[0], work)


class SparseDecay(NamedTuple):
    """Decayed counts (U clients, H half-lives) without the slots in which a client has nothing.

    Attributes:
        offsets: [U + 1] int64; entries of client u are rows offsets[u]..offsets[u + 1].
        slots: [entries] int32, ascending for each client.
        counts: [entries, H] float64.
        totals: [U, H] float64, of all events.
    """

    offsets: np.ndarray
    slots: np.ndarray
    counts: np.ndarray
    totals: np.ndarray


def sparse_decay(
    offsets: np.ndarray,
    timestamp_s: np.ndarray,
    codes: np.ndarray,
    *,
    anchor_s: int,
    half_lives_s: Sequence[float],
    slots: np.ndarray,
    num_slots: int,
) -> SparseDecay:
    """`decayed_counts` and `decayed_totals` of `windowed_aggregate`, bit by bit, as sparse rows; arguments as there.

    In the calling thread. Raises as `windowed_aggregate`.
    """
    problem = checked_problem(
        offsets, timestamp_s, codes, slots, None, None, int(anchor_s), [], int(num_slots), list(half_lives_s), [], False
    )
    arrays = (problem.offsets, problem.timestamp_s, problem.codes, problem.slots)
    inputs = [read_only(array) for array in arrays]
    clients, half_lives = len(problem.offsets) - 1, len(problem.half_lives_s)
    # Room for what there can be at most; of memory that nobody writes to there is none.
    most = np.minimum(np.diff(problem.offsets) * problem.slots.shape[1], problem.num_slots).sum()
    places, found, counts = np.zeros(clients + 1, np.int64), np.empty(most, np.int32), np.empty((most, half_lives))
    totals = np.zeros((clients, half_lives))
    tables = [read_only(array) for array in (problem.half_lives_s, *decay_tables(problem))]
    limits = (problem.anchor_s, problem.limit_s, problem.num_slots)
    _fill_decay(*inputs, *tables, *limits, places, found, counts, totals)
    return SparseDecay(places, found[: places[-1]], counts[: places[-1]], totals)


@njit
def _fill_decay(
    offsets, timestamp_s, codes, slots, half_lives_s, coarse, fine, anchor_s, limit_s, num_slots, places, found, counts,
    totals,
):  # fmt: skip
    seen, table = np.zeros(num_slots, np.int32), np.zeros((num_slots, half_lives_s.size))
    weights = np.empty(half_lives_s.size)
    for client in range(offsets.size - 1):
        start = offsets[client]
        end = end_of_history(timestamp_s, start, offsets[client + 1], limit_s)
        first = places[client]
        different = 0
        for row in range(end - 1, start - 1, -1):
            for half_life in range(half_lives_s.size):
                weight = decay_weight(anchor_s - timestamp_s[row], half_life, half_lives_s, coarse, fine)
                weights[half_life] = weight
                totals[client, half_life] += weight
            for column in range(slots.shape[1]):
                slot = slots[codes[row], column]
                if slot < 0:
                    continue
                if seen[slot] != client + 1:
                    seen[slot] = client + 1
                    found[first + different] = slot
                    different += 1
                for half_life in range(half_lives_s.size):
                    table[slot, half_life] += weights[half_life]
        _sort(found[first : first + different])
        for entry in range(first, first + different):
            for half_life in range(half_lives_s.size):
                counts[entry, half_life] = table[found[entry], half_life]
                table[found[entry], half_life] = 0.0
        places[client + 1] = first + different


@njit
def _lengths(first, last, offsets, timestamp_s, codes, slots, starts_s, limit_s, num_slots, lengths, num_events):
    """Number of entries of each row."""
    num_windows = starts_s.size
    seen = np.zeros(num_slots, np.int32)
    for client in range(first, last):
        mark, start = client - first + 1, offsets[client]
        end = end_of_history(timestamp_s, start, offsets[client + 1], limit_s)
        num_events[client] = end - start
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


@njit
def _sort(slots):
    """Ascending, in place; most clients have a handful, for which insertion beats the general sort."""
    if slots.size > 24:
        slots.sort()
        return
    for index in range(1, slots.size):
        slot, place = slots[index], index
        while place > 0 and slots[place - 1] > slot:
            slots[place] = slots[place - 1]
            place -= 1
        slots[place] = slot


@njit
def _fill(
    first, last, offsets, timestamp_s, codes, slots, starts_s, limit_s, num_slots, lengths, places, first_column,
    indices, counts,
):  # fmt: skip
    """Entries of the rows [first, last)."""
    num_windows = starts_s.size
    seen, table = np.zeros(num_slots, np.int32), np.zeros((num_windows, num_slots), np.int32)
    found = np.empty(num_slots, np.int32)
    for client in range(first, last):
        mark, start = client - first + 1, offsets[client]
        if lengths[client] == 0:
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
        _sort(found[:different])
        place = places[client]
        for window in range(num_windows):
            for index in range(different):
                slot = found[index]
                if window > 0:
                    table[window, slot] += table[window - 1, slot]
                if table[window, slot] > 0:
                    indices[place] = first_column + window * num_slots + slot
                    counts[place] = table[window, slot]
                    place += 1
        for window in range(num_windows):
            for index in range(different):
                table[window, found[index]] = 0
