"""Compiled windowed aggregation: every client is walked once, newest event first, all windows in that one pass.

An event is added to the smallest window that holds it, and a running sum over windows follows at the end of the client:
the cost does not depend on the number of windows. Newest first makes distinct counts exact in the same pass: the first
sighting of a group is its newest one, so it lies in the smallest window that contains the group at all. A stamp per
group (the last client that showed it) makes that one comparison, and is never cleared. The group's number of events so
far stands beside it: entropy needs sum c ln c, which each event moves from c ln c to (c + 1) ln(c + 1).

Decay needs no power per event: 2^-(age / half-life) is a product of two table entries, of age // 4096 and age % 4096.

Each thread takes runs of clients with about the same number of events and owns their rows of the results: nothing is
shared, and the results do not depend on the number of threads. Sums add newest first, band by band, in float64.
Memory beyond the results: two int32 per group and thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ubp_fast.compiled import njit
from ubp_fast.kernels.windowed_aggregate.reference import Problem

FINE_BITS = 12
# 8.5 years; what is older is rare and pays for its own powers.
MAX_COARSE = 1 << 16
# Tables are made for a multiple of so many multiples, 12 days, so that blocks of clients share them.
COARSE_STEP = 1 << 8
# A thread starts in about 0.1 ms: below this many events it does not pay.
MIN_EVENTS_PER_THREAD = 50_000
_X_LOG_X = np.arange(1, 4098) * np.log(np.arange(1, 4098))
GAINS = np.concatenate((np.zeros(1), np.diff(_X_LOG_X)))


def unsupported(problem: Problem) -> str | None:
    """Nothing is: Numba compiles for every CPU."""
    return None


def prepare(problem: Problem) -> tuple[np.ndarray, ...]:
    """What all blocks of clients share: every array but the offsets, and tables made from them."""
    sizes = problem.groups.max(axis=0, initial=-1).astype(np.int64) + 1
    group_start = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    starts_s = np.array([problem.start_s(window) for window in range(len(problem.windows_s))], np.int64)
    arguments = (
        problem.timestamp_s, problem.codes, problem.slots, problem.groups, problem.values, group_start, starts_s,
        problem.half_lives_s, *decay_tables(problem), problem.periods_s, GAINS,
    )  # fmt: skip
    return tuple(read_only(array) for array in arguments)


def forward(
    problem: Problem, prepared: tuple[np.ndarray, ...], out: np.ndarray | None, threads: int | None
) -> tuple[np.ndarray, ...]:
    """The arrays of `WindowedAggregate`; counts are added to `out` where it is given."""
    results = problem.empty_results(out)
    inputs = (read_only(problem.offsets), *prepared)
    totals, counts, first_age_s, last_age_s, num_events = (results[place] for place in (0, 1, 7, 8, 9))
    lives = (problem.anchor_s, problem.limit_s, first_age_s, last_age_s, num_events)
    others = (problem.groups.shape[1], problem.values.shape[1], len(problem.periods_s), len(problem.half_lives_s))

    def work(first: int, last: int) -> None:
        if not any(others):
            starts_s = prepared[6]
            _count(first, last, *inputs[:4], starts_s, *lives, totals, counts)
            return
        _aggregate(first, last, *inputs, problem.anchor_s, problem.limit_s, *results)

    over_clients(problem.offsets, work, threads)
    return results


def over_clients(offsets: np.ndarray, work: Callable[[int, int], object], threads: int | None = None) -> None:
    """Calls work(first, last) for runs of clients that are all of them together, in torch's number of threads."""
    num_events = int(offsets[-1] - offsets[0])
    threads = max(1, min(threads or torch.get_num_threads(), num_events // MIN_EVENTS_PER_THREAD))
    if threads == 1:
        work(0, len(offsets) - 1)
        return
    # Several runs per thread even out clients whose events cost more or less than others'.
    runs = _runs(offsets, 4 * threads)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, int(runs[i]), int(runs[i + 1])) for i in range(len(runs) - 1)]:
            done.result()


def first_fault(offsets: np.ndarray, timestamp_s: np.ndarray, codes: np.ndarray, num_codes: int) -> tuple[int, int]:
    """First row whose code is not in [0, num_codes) and first row that is earlier than its client's row before, or -1.

    A negative `num_codes` leaves the codes unchecked.
    """
    inputs = [read_only(array) for array in (offsets, timestamp_s, codes)]
    faults: list[tuple[int, int]] = []

    def work(first: int, last: int) -> None:
        faults.append(_first_fault(first, last, *inputs, num_codes))

    over_clients(offsets, work)
    bad_code, falls = (min((row for row in rows if row >= 0), default=-1) for rows in zip(*faults, strict=True))
    return bad_code, falls


def decay_tables(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """2^-(age / half-life) for ages of multiples of 4096 s [H, C] and for ages below 4096 s [H, 4096]."""
    starts = problem.offsets[:-1][np.diff(problem.offsets) > 0]
    oldest_s = problem.anchor_s - int(problem.timestamp_s[starts].min()) if len(starts) else 0
    steps = min(max(oldest_s, 0) >> FINE_BITS, MAX_COARSE - 1) + 1
    return _decay_tables(tuple(problem.half_lives_s.tolist()), -(-steps // COARSE_STEP) * COARSE_STEP)


@functools.lru_cache(maxsize=32)
def _decay_tables(half_lives_s: tuple[float, ...], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Of so many multiples; blocks of clients share them."""
    if not half_lives_s:
        return np.zeros((0, 0)), np.zeros((0, 0))
    column = np.array(half_lives_s)[:, None]
    coarse = np.arange(steps) << FINE_BITS
    return np.exp2(-coarse / column), np.exp2(-np.arange(1 << FINE_BITS) / column)


def _runs(offsets: np.ndarray, count: int) -> np.ndarray:
    """[count + 1] client rows that split the events into runs of about equal size."""
    events = np.linspace(offsets[0], offsets[-1], count + 1).astype(np.int64)
    runs = np.searchsorted(offsets, events).astype(np.int64)
    runs[0], runs[-1] = 0, len(offsets) - 1
    return np.maximum.accumulate(np.minimum(runs, len(offsets) - 1))


def read_only(array: np.ndarray) -> np.ndarray:
    """A view with one fixed type: memory-mapped columns must not trigger a second compilation."""
    view = np.ascontiguousarray(array).view(np.ndarray)
    view.flags.writeable = False
    return view


@njit
def _first_fault(first, last, offsets, timestamp_s, codes, num_codes):
    bad_code, falls = np.int64(-1), np.int64(-1)
    # Whole runs of clients first: a history is too short for the CPU's vectors. Times may fall where a client begins.
    run = slice(offsets[first], offsets[last])
    faults = _num_falls(timestamp_s[run][1:], timestamp_s[run][:-1])
    for client in range(first, last):
        start = offsets[client]
        if offsets[first] < start < offsets[client + 1]:
            faults -= timestamp_s[start] < timestamp_s[start - 1]
    if num_codes >= 0:
        faults += _num_outside(codes[run], num_codes)
    if faults == 0:
        return bad_code, falls
    for client in range(first, last):
        start, end = offsets[client], offsets[client + 1]
        for row in range(start, end):
            if bad_code < 0 and num_codes >= 0 and (codes[row] < 0 or codes[row] >= num_codes):
                bad_code = row
            if falls < 0 and row > start and timestamp_s[row] < timestamp_s[row - 1]:
                falls = row
    return bad_code, falls


@njit
def _num_falls(later, earlier):
    falls = 0
    for place in range(later.size):
        falls += later[place] < earlier[place]
    return falls


@njit
def _num_outside(codes, num_codes):
    outside = 0
    for code in codes:
        outside += (code < 0) | (code >= num_codes)
    return outside


@njit
def end_of_history(timestamp_s, start, end, limit_s):
    """First row in [start, end) with timestamp_s >= limit_s."""
    if start == end or timestamp_s[end - 1] < limit_s:
        return end
    while start < end:
        middle = (start + end) // 2
        if timestamp_s[middle] < limit_s:
            start = middle + 1
        else:
            end = middle
    return start


# Functions below take whole results and a client's row: a slice of an array costs as much as a few events.


@njit
def _add_bands(array, client):
    """[U, W, C] in place: from the events of each band to those of each window."""
    for window in range(1, array.shape[1]):
        for column in range(array.shape[2]):
            array[client, window, column] += array[client, window - 1, column]


@njit
def _decay(
    client, start, end, timestamp_s, codes, slots, half_lives_s, coarse, fine, anchor_s, decayed_totals,
    decayed_counts,
):  # fmt: skip
    """Adds the weights of rows [start, end), newest first."""
    for row in range(end - 1, start - 1, -1):
        age_s, code = anchor_s - timestamp_s[row], codes[row]
        for half_life in range(half_lives_s.size):
            weight = decay_weight(age_s, half_life, half_lives_s, coarse, fine)
            decayed_totals[client, half_life] += weight
            for column in range(slots.shape[1]):
                if slots[code, column] >= 0:
                    decayed_counts[client, half_life, slots[code, column]] += weight


@njit
def decay_weight(age_s, half_life, half_lives_s, coarse, fine):
    """2^-(age / half-life)."""
    step = age_s >> FINE_BITS
    if step < coarse.shape[1]:
        return coarse[half_life, step] * fine[half_life, age_s & ((1 << FINE_BITS) - 1)]
    return np.exp2(-age_s / half_lives_s[half_life])


@njit
def _add_groups(client, code, band, mark, groups, group_start, gains, seen, grouped, distinct, entropy):
    """One event in its groups: a new one is counted, sum c ln c follows."""
    for column in range(groups.shape[1]):
        group = groups[code, column]
        if group < 0:
            continue
        place = group_start[column] + group
        if seen[place, 0] != mark:
            seen[place, 0] = mark
            seen[place, 1] = 0
            distinct[client, band, column] += 1
        count = seen[place, 1]
        seen[place, 1] = count + 1
        grouped[0, band, column] += 1
        if count < gains.size:
            entropy[client, band, column] += gains[count]
        else:
            entropy[client, band, column] += (count + 1) * np.log(count + 1) - count * np.log(count)


@njit
def _one_client(
    client, mark, start, end, timestamp_s, codes, slots, groups, values, group_start, starts_s, periods_s, gains,
    seen, grouped, period_start_s, totals, counts, distinct, distinct_times, sums, entropy,
):  # fmt: skip
    """Adds the events in rows [start, end) of one client to its row of the results, newest first."""
    num_windows = starts_s.size
    # Few events: each one goes to all its windows at once. Many: to its smallest one, and a running sum follows.
    is_summed = (end - start) * slots.shape[1] > counts.shape[2]
    band = 0
    for row in range(end - 1, start - 1, -1):
        time_s, code = timestamp_s[row], codes[row]
        while band < num_windows and time_s < starts_s[band]:
            band += 1
        if band == num_windows:
            break
        totals[client, band] += 1
        for column in range(slots.shape[1]):
            slot = slots[code, column]
            if slot >= 0:
                for window in range(band, band + 1 if is_summed else num_windows):
                    counts[client, window, slot] += 1
        _add_groups(client, code, band, mark, groups, group_start, gains, seen, grouped, distinct, entropy)
        for column in range(periods_s.size):
            if row == end - 1 or time_s < period_start_s[column]:
                period_start_s[column] = time_s - time_s % periods_s[column]
                distinct_times[client, band, column] += 1
        for column in range(values.shape[1]):
            sums[client, band, column] += values[code, column]
    if is_summed:
        _add_bands(counts, client)


@njit
def _aggregate(
    first, last, offsets, timestamp_s, codes, slots, groups, values, group_start, starts_s, half_lives_s, coarse, fine,
    periods_s, gains, anchor_s, limit_s, totals, counts, distinct, distinct_times, sums, decayed_totals,
    decayed_counts, first_age_s, last_age_s, num_events, entropy,
):  # fmt: skip
    """Clients in rows [first, last)."""
    seen = np.zeros((group_start[-1], 2), np.int32)
    grouped = np.zeros((1, starts_s.size, groups.shape[1]), np.int64)
    period_start_s = np.zeros(periods_s.size, np.int64)
    for client in range(first, last):
        start = offsets[client]
        end = end_of_history(timestamp_s, start, offsets[client + 1], limit_s)
        if start == end:
            continue
        num_events[client] = end - start
        first_age_s[client] = anchor_s - timestamp_s[start]
        last_age_s[client] = anchor_s - timestamp_s[end - 1]
        if half_lives_s.size:
            _decay(
                client, start, end, timestamp_s, codes, slots, half_lives_s, coarse, fine, anchor_s, decayed_totals,
                decayed_counts,
            )  # fmt: skip
        if starts_s.size == 0 or timestamp_s[end - 1] < starts_s[-1]:
            continue
        grouped[:] = 0
        _one_client(
            client, client - first + 1, start, end, timestamp_s, codes, slots, groups, values, group_start, starts_s,
            periods_s, gains, seen, grouped, period_start_s, totals, counts, distinct, distinct_times, sums, entropy,
        )  # fmt: skip
        for window in range(1, starts_s.size):
            totals[client, window] += totals[client, window - 1]
        _add_bands(distinct, client)
        _add_bands(distinct_times, client)
        _add_bands(sums, client)
        _add_bands(entropy, client)
        _add_bands(grouped, 0)
        _finish_entropy(client, grouped, distinct, entropy)


@njit
def _count(
    first, last, offsets, timestamp_s, codes, slots, starts_s, anchor_s, limit_s, first_age_s, last_age_s, num_events,
    totals, counts,
):  # fmt: skip
    """`_aggregate` of totals and counts alone: a client costs so little that slices of arrays would be most of it."""
    num_windows, num_columns, num_slots = starts_s.size, slots.shape[1], counts.shape[2]
    for client in range(first, last):
        start = offsets[client]
        end = end_of_history(timestamp_s, start, offsets[client + 1], limit_s)
        if start == end:
            continue
        num_events[client] = end - start
        first_age_s[client] = anchor_s - timestamp_s[start]
        last_age_s[client] = anchor_s - timestamp_s[end - 1]
        is_summed = (end - start) * num_columns > num_slots
        band = 0
        for row in range(end - 1, start - 1, -1):
            time_s = timestamp_s[row]
            while band < num_windows and time_s < starts_s[band]:
                band += 1
            if band == num_windows:
                break
            totals[client, band] += 1
            for column in range(num_columns):
                slot = slots[codes[row], column]
                if slot >= 0:
                    for window in range(band, band + 1 if is_summed else num_windows):
                        counts[client, window, slot] += 1
        for window in range(1, num_windows):
            totals[client, window] += totals[client, window - 1]
            if is_summed:
                for slot in range(num_slots):
                    counts[client, window, slot] += counts[client, window - 1, slot]


@njit
def _finish_entropy(client, grouped, distinct, entropy):
    """From sum c ln c to ln n - (sum c ln c) / n, in place; exactly 0 for a single group."""
    for window in range(grouped.shape[1]):
        for column in range(grouped.shape[2]):
            events = grouped[0, window, column]
            if distinct[client, window, column] > 1:
                entropy[client, window, column] = np.log(events) - entropy[client, window, column] / events
            else:
                entropy[client, window, column] = 0.0
