"""Compiled windowed aggregation: every client is walked once, newest event first, all windows in that one pass.

An event is added to the smallest window that holds it, and a running sum over windows follows at the end of the client:
the cost does not depend on the number of windows. Newest first makes distinct counts exact in the same pass: the first
sighting of a group is its newest one, so it lies in the smallest window that contains the group at all. A stamp per
group (the last client that showed it) makes that one comparison, and is never cleared.

Each thread takes a run of clients with about the same number of events and owns their rows of the results: nothing is
shared, and the results do not depend on the number of threads. Sums add newest first, band by band, in float64.
Memory beyond the results: one int64 stamp per group and thread.
"""

from __future__ import annotations

import threading

import numba
import numpy as np
import torch

from ubp_fast.kernels.windowed_aggregate.reference import Problem

# The fallback threading layer of Numba ends the process when two Python threads enter it at once.
_one_at_a_time = threading.Lock()


def unsupported(problem: Problem) -> str | None:
    """Nothing is: Numba compiles for every CPU."""
    return None


def forward(problem: Problem) -> tuple[np.ndarray, ...]:
    """The arrays of `WindowedAggregate`."""
    results = problem.empty_results()
    sizes = problem.groups.max(axis=0, initial=-1).astype(np.int64) + 1
    group_start = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    starts_s = np.array([problem.start_s(window) for window in range(len(problem.windows_s))], np.int64)
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = max(1, min(torch.get_num_threads(), most))
    arguments = (
        problem.offsets, problem.timestamp_s, problem.codes, problem.slots, problem.groups, problem.values,
        group_start, starts_s, problem.half_lives_s, problem.periods_s, _runs(problem.offsets, threads),
    )  # fmt: skip
    with _one_at_a_time:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            inputs = [_read_only(array) for array in arguments]
            _aggregate(*inputs, problem.anchor_s, problem.limit_s, *results)  # type: ignore[call-arg]
        finally:
            numba.set_num_threads(before)
    return results


def _runs(offsets: np.ndarray, threads: int) -> np.ndarray:
    """[threads + 1] client rows that split the events into runs of about equal size."""
    events = np.linspace(offsets[0], offsets[-1], threads + 1).astype(np.int64)
    runs = np.searchsorted(offsets, events).astype(np.int64)
    runs[0], runs[-1] = 0, len(offsets) - 1
    return np.maximum.accumulate(np.minimum(runs, len(offsets) - 1))


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view with one fixed type: memory-mapped columns must not trigger a second compilation."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


@numba.njit(cache=True)
def _end_of_history(timestamp_s, start, end, limit_s):
    """First row in [start, end) with timestamp_s >= limit_s."""
    while start < end:
        middle = (start + end) // 2
        if timestamp_s[middle] < limit_s:
            start = middle + 1
        else:
            end = middle
    return start


@numba.njit(cache=True)
def _add_bands(array):
    """[W, C] in place: from the events of each band to those of each window."""
    for window in range(1, array.shape[0]):
        for column in range(array.shape[1]):
            array[window, column] += array[window - 1, column]


@numba.njit(cache=True)
def _one_client(
    client, start, end, timestamp_s, codes, slots, groups, values, group_start, starts_s, half_lives_s, periods_s,
    anchor_s, stamp, totals, counts, distinct, distinct_times, sums, decayed_totals, decayed_counts,
):  # fmt: skip
    """Adds the events in rows [start, end) of one client to its row of the results, newest first."""
    num_windows, num_half_lives = starts_s.size, half_lives_s.size
    period_seen = np.zeros(periods_s.size, np.int64)
    band = 0
    for row in range(end - 1, start - 1, -1):
        time_s, code = timestamp_s[row], codes[row]
        while band < num_windows and time_s < starts_s[band]:
            band += 1
        if band == num_windows and num_half_lives == 0:
            break
        for half_life in range(num_half_lives):
            weight = np.exp2(-(anchor_s - time_s) / half_lives_s[half_life])
            decayed_totals[half_life] += weight
            for column in range(slots.shape[1]):
                if slots[code, column] >= 0:
                    decayed_counts[half_life, slots[code, column]] += weight
        if band == num_windows:
            continue
        totals[band] += 1
        for column in range(slots.shape[1]):
            if slots[code, column] >= 0:
                counts[band, slots[code, column]] += 1
        for column in range(groups.shape[1]):
            if groups[code, column] >= 0:
                place = group_start[column] + groups[code, column]
                if stamp[place] != client:
                    stamp[place] = client
                    distinct[band, column] += 1
        for column in range(periods_s.size):
            period = time_s // periods_s[column]
            if row == end - 1 or period != period_seen[column]:
                period_seen[column] = period
                distinct_times[band, column] += 1
        for column in range(values.shape[1]):
            sums[band, column] += values[code, column]


@numba.njit(cache=True, parallel=True)
def _aggregate(
    offsets, timestamp_s, codes, slots, groups, values, group_start, starts_s, half_lives_s, periods_s, runs,
    anchor_s, limit_s, totals, counts, distinct, distinct_times, sums, decayed_totals, decayed_counts,
    first_age_s, last_age_s,
):  # fmt: skip
    for run in numba.prange(runs.size - 1):
        stamp = np.full(group_start[-1], -1, np.int64)
        for client in range(runs[run], runs[run + 1]):
            start = offsets[client]
            end = _end_of_history(timestamp_s, start, offsets[client + 1], limit_s)
            if start == end:
                continue
            first_age_s[client] = anchor_s - timestamp_s[start]
            last_age_s[client] = anchor_s - timestamp_s[end - 1]
            _one_client(
                client, start, end, timestamp_s, codes, slots, groups, values, group_start, starts_s, half_lives_s,
                periods_s, anchor_s, stamp, totals[client], counts[client], distinct[client], distinct_times[client],
                sums[client], decayed_totals[client], decayed_counts[client],
            )  # fmt: skip
            totals_of_client = totals[client]
            for window in range(1, starts_s.size):
                totals_of_client[window] += totals_of_client[window - 1]
            _add_bands(counts[client])
            _add_bands(distinct[client])
            _add_bands(distinct_times[client])
            _add_bands(sums[client])
