"""Events on their way into the store: written down as they come, read back one block of clients at a time, sorted.

A record is a key (client row, time) and an item. Each batch is grouped by block and appended to a file, so that a block
is gathered from one run per batch; memory holds a batch, or a block, whatever the number of events.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ubp_fast.compiled import njit
from ubp_fast.events.times import EARLIEST_S

TIME_BITS = 34  # years 1900..2199 in seconds
MAX_CLIENTS = 1 << (63 - TIME_BITS)
# Shorter histories that are out of order are sorted by insertion.
INSERTION_SORT = 64
# So many events wait in memory, so that a block lies in few places of the file.
RUN_EVENTS = 1 << 21


class Events(NamedTuple):
    """Events of a block of clients, by client and time, ties in the order in which they came.

    Attributes:
        offsets: i64 [clients + 1].
        timestamp_s: [N], of the dtype that was asked for.
        item: i32 [N] numbers, or u8 [N, 16] codes.
        amounts: f32 [N, A], see `with_amounts`; None without any.
    """

    offsets: np.ndarray
    timestamp_s: np.ndarray
    item: np.ndarray
    amounts: np.ndarray | None = None

    @property
    def columns(self) -> list[np.ndarray]:
        """What there is, from left to right."""
        return [column for column in self if column is not None]


class Spill:
    """Records of one kind of event.

    Args:
        path: a file to make; it is read while this object lives.
        block_bits: a block has 2^block_bits clients: block b begins with the row b * 2^block_bits.
        num_blocks: number of blocks.
        item: an empty array with the dtype and shape of the items.

    Attributes:
        num_events: records so far.
    """

    def __init__(self, path: Path, block_bits: int, num_blocks: int, item: np.ndarray) -> None:
        self._path, self._block_bits, self._num_blocks, self._empty = path, block_bits, num_blocks, item
        self._file = path.open("wb+")
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_waiting = 0
        self._written: list[tuple[int, np.ndarray]] = []
        # Made once: memory that is new to the process costs more than what is done with it.
        self._keys, self._items = np.empty(0, np.int64), item
        self.num_events = 0

    def write(self, client_row: np.ndarray, timestamp_s: np.ndarray, item: np.ndarray) -> None:
        """Appends a batch: client rows i32 [N], times i64 [N], items [N, ...]."""
        self._waiting.append((client_row, timestamp_s, item))
        self._num_waiting += len(client_row)
        if self._num_waiting >= RUN_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Writes what waits, grouped by block."""
        count = self._num_waiting
        if count > len(self._keys):
            self._keys = np.empty(count + count // 8, np.int64)
            self._items = np.empty((len(self._keys), *self._empty.shape[1:]), self._empty.dtype)
        ends = np.zeros(self._num_blocks + 1, np.int64)
        for client_row, _, _ in self._waiting:
            _count_blocks(client_row, self._block_bits, ends)
        np.cumsum(ends, out=ends)
        self._written.append((self._file.tell(), ends.copy()))
        for batch in self._waiting:
            _scatter(*batch, self._block_bits, ends, self._keys, self._items)
        self._file.write(self._keys[:count].data)
        self._file.write(self._items[:count].data)
        self._file.flush()
        self.num_events += count
        self._waiting, self._num_waiting = [], 0

    def finish(self) -> None:
        """Writes what waits and gives the buffers back; nothing may follow."""
        self.flush()
        self._keys, self._items = np.empty(0, np.int64), self._empty

    def read(self, block: int, before: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Keys i64 [N] and items of a block in the order in which they came, after those `before`."""
        starts = [0 if before is None else len(before[0])]
        starts += [int(runs[block + 1] - runs[block]) for _, runs in self._written]
        ends = np.cumsum(starts)
        keys = np.empty(int(ends[-1]), np.int64)
        items = np.empty((len(keys), *self._empty.shape[1:]), self._empty.dtype)
        if before is not None:
            keys[: ends[0]], items[: ends[0]] = before
        width = items[:1].nbytes if len(items) else 0
        for (place, runs), start, end in zip(self._written, ends[:-1], ends[1:], strict=True):
            if start < end:
                first = int(runs[block])
                self._read(keys[start:end], place + 8 * first)
                self._read(items[start:end], place + 8 * int(runs[-1]) + width * first)
        return keys, items

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink()

    def _read(self, values: np.ndarray, place: int) -> None:
        content = values.data.cast("B")
        while len(content):
            count = os.preadv(self._file.fileno(), [content], place)
            if count == 0:
                raise OSError(5, "the file became shorter while the store was built", str(self._path))
            content, place = content[count:], place + count


def narrowest(smallest: int, largest: int) -> type[np.signedinteger]:
    """int32 where it holds both numbers, else int64."""
    limits = np.iinfo(np.int32)
    return np.int32 if limits.min <= smallest and largest <= limits.max else np.int64


def keys_of(client_row: np.ndarray, timestamp_s: np.ndarray) -> np.ndarray:
    """The keys i64 [N] of events."""
    return (client_row.astype(np.int64) << TIME_BITS) | (timestamp_s.astype(np.int64) - EARLIEST_S)


def with_amounts(numbers: np.ndarray, amounts: np.ndarray | None) -> np.ndarray:
    """Items that bring their amounts along: i32 [N, 1 + A], the numbers and the bits of f32 [N, A]."""
    return numbers if amounts is None else np.column_stack((numbers, np.ascontiguousarray(amounts).view(np.int32)))


def without_amounts(items: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers or codes, and amounts, of items as `with_amounts` gives them."""
    if items.ndim == 1 or items.dtype != np.int32:
        return items, None
    return np.ascontiguousarray(items[:, 0]), np.ascontiguousarray(items[:, 1:]).view(np.float32)


def sort_events(
    keys: np.ndarray,
    items: np.ndarray,
    first_client: int,
    num_clients: int,
    time: type[np.signedinteger] = np.int64,
    amounts: np.ndarray | None = None,
) -> Events:
    """Sorts records of the clients first_client up to first_client + num_clients; equal keys keep their order."""
    offsets, order = _sorted(keys, first_client, num_clients)
    timestamp_s = np.empty(len(order), time)
    _times(keys, order, timestamp_s)
    return Events(offsets, timestamp_s, items[order], None if amounts is None else amounts[order])


def merge(
    kinds: list[Events], first_rows: Sequence[int], row: type[np.signedinteger] = np.int64
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All kinds of a block merged by time; ties in the order of kinds, then of rows.

    Args:
        kinds: the events of every kind.
        first_rows: number of the first row of each of them.
        row: dtype of the numbers of rows.

    Returns:
        offsets i64 [clients + 1], timestamp_s [M], kind u8 [M] (1 + index in `kinds`), row [M] (in its kind).
    """
    starts = np.cumsum([0, *(len(events.timestamp_s) for events in kinds)])
    offsets = np.stack([events.offsets + start for events, start in zip(kinds, starts[:-1], strict=True)])
    times = np.concatenate([events.timestamp_s for events in kinds])
    merged = np.sum([events.offsets for events in kinds], axis=0)
    rows = np.empty(len(times), row)
    shifts = np.asarray(first_rows) - starts[:-1]  # from places in `times` to numbers of rows
    return merged, *_merged(offsets, times, shifts, rows), rows


@njit
def _count_blocks(client_row, block_bits, counts):  # pragma: no cover - compiled
    """Adds the events of block b to counts[b + 1]."""
    for row in client_row:
        counts[(row >> block_bits) + 1] += 1


@njit
def _scatter(client_row, timestamp_s, item, block_bits, ends, keys, items):  # pragma: no cover - compiled
    """Appends every event to its block; ends[b] is where the next one of block b goes."""
    for index in range(client_row.size):
        block = client_row[index] >> block_bits
        place = ends[block]
        ends[block] += 1
        keys[place] = (np.int64(client_row[index]) << TIME_BITS) | (timestamp_s[index] - EARLIEST_S)
        items[place] = item[index]


@njit
def _times(keys, order, times):  # pragma: no cover - compiled
    for place in range(order.size):
        times[place] = (keys[order[place]] & ((1 << TIME_BITS) - 1)) + EARLIEST_S


@njit
def _sorted(keys, first_client, num_clients):  # pragma: no cover - compiled
    """Counts per client give every record its place; histories that are not in order of time are sorted after that."""
    offsets = np.zeros(num_clients + 1, np.int64)
    for key in keys:
        offsets[(key >> TIME_BITS) - first_client + 1] += 1
    for client in range(num_clients):
        offsets[client + 1] += offsets[client]
    ends = offsets[:-1].copy()
    order = np.empty(keys.size, np.int64)
    for index in range(keys.size):
        client = (keys[index] >> TIME_BITS) - first_client
        order[ends[client]] = index
        ends[client] += 1
    for client in range(num_clients):
        history = order[offsets[client] : offsets[client + 1]]
        for place in range(1, history.size):
            if keys[history[place]] < keys[history[place - 1]]:
                _sort_history(history, keys)
                break
    return offsets, order


@njit
def _sort_history(history, keys):  # pragma: no cover - compiled
    if history.size > INSERTION_SORT:
        history[:] = history[np.argsort(keys[history], kind="mergesort")]
        return
    for place in range(1, history.size):
        index = history[place]
        earlier = place
        while earlier > 0 and keys[history[earlier - 1]] > keys[index]:
            history[earlier] = history[earlier - 1]
            earlier -= 1
        history[earlier] = index


@njit
def _merged(offsets, times, shifts, rows):  # pragma: no cover - compiled
    """Fills rows; returns the merged times and kinds."""
    num_kinds, num_clients = offsets.shape[0], offsets.shape[1] - 1
    merged = np.empty_like(times)
    kinds = np.empty(times.size, np.uint8)
    at = np.empty(num_kinds, np.int64)
    out = 0
    for client in range(num_clients):
        left = 0
        for kind in range(num_kinds):
            at[kind] = offsets[kind, client]
            left += offsets[kind, client + 1] - at[kind]
        for _ in range(left):
            best = -1
            best_s = times[0]
            for kind in range(num_kinds):
                if at[kind] < offsets[kind, client + 1] and (best < 0 or times[at[kind]] < best_s):
                    best, best_s = kind, times[at[kind]]
            merged[out], kinds[out], rows[out] = best_s, best + 1, at[best] + shifts[best]
            at[best] += 1
            out += 1
    return merged, kinds
