"""Whole histories before a cutoff: how often each code occurs, and sums of rows per client."""

from __future__ import annotations

import numpy as np

from ubp_fast.compiled import njit
from ubp_fast.kernels.windowed_aggregate._numba import end_of_history, over_clients, read_only


def code_counts(
    offsets: np.ndarray, timestamp_s: np.ndarray, codes: np.ndarray, *, before_s: int, num_codes: int
) -> np.ndarray:
    """How often each code occurs before a time, all clients together: what lists of frequent values are made from.

    Args:
        offsets: [U + 1] int64 as in `windowed_aggregate`.
        timestamp_s: [N] int64, ascending inside every client.
        codes: [N] int32.
        before_s: events at or after it are not counted.
        num_codes: length of the result.

    Returns:
        [num_codes] int64.

    Raises:
        ValueError: a code is not in [0, num_codes).
    """
    inputs = [read_only(array) for array in (offsets, timestamp_s, codes)]
    free: list[np.ndarray] = []
    bad_rows: list[int] = []

    def work(first: int, last: int) -> None:
        counts = free.pop() if free else np.zeros(num_codes, np.int32)
        bad_rows.append(_count(first, last, *inputs, before_s, counts))
        free.append(counts)

    over_clients(offsets, work)
    bad_row = max(bad_rows)
    if bad_row >= 0:
        raise ValueError(f"code_counts: codes must lie in 0..{num_codes - 1}, got {codes[bad_row]} in row {bad_row}")
    return np.asarray(np.sum(free, axis=0, dtype=np.int64))


def row_sums(
    offsets: np.ndarray, timestamp_s: np.ndarray, rows: np.ndarray, *, before_s: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the rows of each client before a time, such as query codes; in the calling thread.

    Args:
        offsets: [U + 1] int64 as in `windowed_aggregate`.
        timestamp_s: [N] int64, ascending inside every client.
        rows: [N, C] uint8.
        before_s: events at or after it are left out.

    Returns:
        [U, C] int64 sums and [U] int64 numbers of events.
    """
    clients = len(offsets) - 1
    sums, num_events = np.zeros((clients, rows.shape[1]), np.int64), np.zeros(clients, np.int64)
    inputs = [read_only(array) for array in (offsets, timestamp_s, rows)]
    _sum(0, clients, *inputs, before_s, sums, num_events)
    return sums, num_events


@njit
def _count(first, last, offsets, timestamp_s, codes, before_s, counts):
    """Adds to counts; returns a row whose code does not fit, or -1."""
    for client in range(first, last):
        end = end_of_history(timestamp_s, offsets[client], offsets[client + 1], before_s)
        for row in range(offsets[client], end):
            if codes[row] < 0 or codes[row] >= counts.size:
                return row
            counts[codes[row]] += 1
    return -1


@njit
def _sum(first, last, offsets, timestamp_s, rows, before_s, sums, num_events):
    for client in range(first, last):
        end = end_of_history(timestamp_s, offsets[client], offsets[client + 1], before_s)
        num_events[client] = end - offsets[client]
        for row in range(offsets[client], end):
            for column in range(rows.shape[1]):
                sums[client, column] += rows[row, column]
