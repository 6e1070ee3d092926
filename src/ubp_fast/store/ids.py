"""Ids of 64 bits -> small numbers, fast enough to keep up with reading Parquet.

`KnownIds` tells the place of an id in a sorted list: a bit per possible id and a running count per 64 bits where the
ids lie close together (a few nanoseconds per look-up, 1/5 of a table), a hash table where they do not.
`Numbering` gives ids numbers while they come and counts them: small ids are their own numbers, a hash table holds all
others.
"""

from __future__ import annotations

import numpy as np

from ubp_fast.compiled import njit

# A bitmap is used up to this many bits per id: 64 bits are what an entry of a hash table takes at least.
BITS_PER_ID = 256
DIRECT_IDS = 1 << 25
SMALLEST_TABLE = 1 << 10
MAX_COUNT = 2**31 - 1
CHUNK = 1_024


class KnownIds:
    """Places of ids in a list.

    Args:
        ids: i64 [N], ascending, no id twice.
    """

    def __init__(self, ids: np.ndarray) -> None:
        ids = np.ascontiguousarray(ids)
        self._first = int(ids[0]) if len(ids) else 0
        span = int(ids[-1]) - self._first + 1 if len(ids) else 0
        self._bits = np.zeros(0, np.uint64)
        self._places = np.zeros(0, np.int32)
        self._keys = np.zeros(0, np.int64)
        if span <= max(len(ids), SMALLEST_TABLE) * BITS_PER_ID:
            self._bits = np.zeros(span // 64 + 1, np.uint64)
            self._places = np.zeros(len(self._bits), np.int32)
            _fill_bits(ids, self._first, self._bits, self._places)
        else:
            self._keys, self._places = _empty_table(len(ids))
            _insert_all(ids, self._keys, self._places)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Place of every id, i32 [N]; -1 for ids that are not in the list."""
        everything = np.arange(len(ids), dtype=np.int32)
        return _places_of(ids, everything, self._first, self._bits, self._keys, self._places)

    def known(self, ids: np.ndarray, timestamp_s: np.ndarray, before_s: int) -> tuple[np.ndarray, np.ndarray]:
        """Events of known ids before a time: which rows they are, i32 ascending, and the places of their ids, i32."""
        if len(self._bits):
            rows = _rows_in_bits(ids, timestamp_s, before_s, self._first, self._bits)
            return rows, _places_of(ids, rows, self._first, self._bits, self._keys, self._places)
        rows = np.flatnonzero(timestamp_s < before_s).astype(np.int32)
        places = _places_of(ids, rows, self._first, self._bits, self._keys, self._places)
        return rows[places >= 0], places[places >= 0]


class Numbering:
    """Numbers for ids, and how often each id came.

    An id in [0, 2^25) is its own number; all others get 2^25, 2^25 + 1, ... in order of first appearance.

    Args:
        in_order: every id gets the next number, and ties of the most frequent ones go to the one that came first.
    """

    def __init__(self, in_order: bool = False) -> None:
        self._in_order, self._direct_ids = in_order, 0 if in_order else DIRECT_IDS
        self._direct_counts = np.zeros(min(SMALLEST_TABLE, self._direct_ids), np.int32)
        self._keys, self._numbers = _empty_table(SMALLEST_TABLE)
        self._size = 0
        self._ids = np.zeros(SMALLEST_TABLE, np.int64)
        self._counts = np.zeros(SMALLEST_TABLE, np.int32)

    def number(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Numbers i32 of ids[rows]."""
        numbers = np.empty(len(rows), np.int32)
        known, done = (self._keys, self._numbers, self._ids, self._counts), 0
        direct_ids = self._direct_ids
        while True:
            done = _number_direct(ids, rows, done, numbers, self._direct_counts)
            done, self._size = _number(
                ids, rows, done, numbers, self._direct_counts, self._direct_ids, self._size, *known
            )
            if done == len(rows):
                return numbers
            if 0 <= ids[rows[done]] < direct_ids:
                self._direct_counts = _grown(self._direct_counts, int(ids[rows[done]]) + 1)
                continue
            space = np.zeros_like(self._ids)
            self._ids = np.concatenate([self._ids, space])
            self._counts = np.concatenate([self._counts, space.astype(np.int32)])
            self._keys, self._numbers = _empty_table(len(self._ids))
            _insert(self._ids[: self._size], np.arange(self._size, dtype=np.int32), self._keys, self._numbers)
            known = (self._keys, self._numbers, self._ids, self._counts)

    def add_counts(self, numbers: np.ndarray, counts: np.ndarray) -> None:
        """Counts ids again: how often more each of some numbers came; no number twice."""
        direct = numbers < DIRECT_IDS
        self._direct_counts = _grown(self._direct_counts, int(numbers[direct].max(initial=-1)) + 1)
        for table, rows, more in (
            (self._direct_counts, numbers[direct], counts[direct]),
            (self._counts, numbers[~direct] - DIRECT_IDS, counts[~direct]),
        ):
            table[rows] = np.minimum(table[rows] + more.astype(np.int64), MAX_COUNT)

    def counts_of(self, numbers: np.ndarray) -> np.ndarray:
        """How often the id of each number came, i64; 2^31 - 1 stands for that and more."""
        counts = np.empty(len(numbers), np.int64)
        direct = numbers < DIRECT_IDS
        counts[direct] = self._direct_counts[numbers[direct]]
        counts[~direct] = self._counts[numbers[~direct] - DIRECT_IDS]
        return counts

    def counted(self, min_count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids that came at least that often (1 or more), i64 in no order, and their numbers, i64."""
        direct = np.flatnonzero(self._direct_counts >= min_count)
        others = np.flatnonzero(self._counts[: self._size] >= min_count)
        return np.concatenate([direct, self._ids[others]]), np.concatenate([direct, others + DIRECT_IDS])

    def most_frequent(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids i64 that came most often, at most `number`, and their numbers and counts; ties: smaller id or first."""
        counts = (self._direct_counts, self._counts[: self._size])
        ids, numbers = self.counted(max(least_of_largest(each, number) for each in counts))
        largest = self.counts_of(numbers)
        order = np.lexsort((numbers if self._in_order else ids, -largest))[:number]
        return ids[order], numbers[order], largest[order]

    @property
    def end(self) -> int:
        """Every number given so far is smaller."""
        return DIRECT_IDS + self._size


def least_of_largest(counts: np.ndarray, number: int) -> int:
    """A count, 1 or more, that each of the `number` largest counts above 0 reaches; seldom do many others."""
    if not 0 < number < len(counts) // CHUNK:
        return 1
    # That many chunks hold a value of this size or more: one pass instead of a partition of millions.
    largest = np.maximum.reduceat(counts, np.arange(0, len(counts), CHUNK))
    return max(1, int(np.partition(largest, len(largest) - number)[len(largest) - number]))


def _grown(counts: np.ndarray, entries: int) -> np.ndarray:
    """At least so many counts, a power of two. Written as a whole: such memory comes in large pages."""
    if entries <= len(counts):
        return counts
    more = np.empty(1 << (entries - 1).bit_length(), counts.dtype)
    more[: len(counts)], more[len(counts) :] = counts, 0
    return more


def _empty_table(entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a hash table at most half full; value -1 is a free place."""
    size = SMALLEST_TABLE
    while size < 2 * entries:
        size *= 2
    return np.zeros(size, np.int64), np.full(size, -1, np.int32)


def _insert_all(ids: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    _insert(ids, np.arange(len(ids), dtype=np.int32), keys, values)


@njit
def _mixed(key):  # pragma: no cover - compiled
    """A hash of 64 bits. Source: Steele et al., Fast splittable pseudorandom number generators, 2014 (SplitMix64)."""
    mixed = np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@njit
def hashes(ids):  # pragma: no cover - compiled
    """The hash u64 [N] of every id i64 [N]: the same on every machine."""
    found = np.empty(ids.size, np.uint64)
    for index in range(ids.size):
        found[index] = _mixed(ids[index])
    return found


def drawn(ids: np.ndarray, number: int, *seed: int) -> np.ndarray:
    """Places i64, ascending, of `number` of the ids i64 [N], or of all: those whose hashes with the seed are smallest.

    Whoever knows a part of the ids finds those of them that are among the drawn of all, and nobody else.
    """
    if number >= len(ids):
        return np.arange(len(ids))
    return np.sort(np.argpartition(_salted(ids, *seed), number)[:number])


def in_drawn_order(ids: np.ndarray, *seed: int) -> np.ndarray:
    """Places i64 [N] of all ids; the first n are those that `drawn` gives for n."""
    return np.argsort(_salted(ids, *seed), kind="stable")


def _salted(ids: np.ndarray, *seed: int) -> np.ndarray:
    salt = np.uint64(0)
    for word in seed:
        salt = hashes(np.array([salt ^ np.uint64(word + 1)]).view(np.int64))[0]
    return hashes((hashes(np.ascontiguousarray(ids)) ^ salt).view(np.int64))


@njit
def _slot(key, keys, values):  # pragma: no cover - compiled
    """Place of a key in the table, or the free place where it belongs."""
    slot = np.int64(_mixed(key) & np.uint64(keys.size - 1))
    while values[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & (keys.size - 1)
    return slot


@njit
def _insert(ids, numbers, keys, values):  # pragma: no cover - compiled
    for index in range(ids.size):
        slot = _slot(ids[index], keys, values)
        keys[slot] = ids[index]
        values[slot] = numbers[index]


@njit
def _fill_bits(ids, first, bits, places):  # pragma: no cover - compiled
    for index in range(ids.size - 1, -1, -1):
        offset = np.uint64(ids[index] - first)
        word = np.int64(offset >> np.uint64(6))
        bits[word] |= np.uint64(1) << (offset & np.uint64(63))
        places[word] = index  # in the end the smallest of the word


@njit
def _rows_in_bits(ids, timestamp_s, before_s, first, bits):  # pragma: no cover - compiled
    """Without branches: most events are of clients that nobody asks for, in no order."""
    span = np.uint64(bits.size) << np.uint64(6)
    rows = np.empty(ids.size, np.int32)
    found = 0
    for index in range(ids.size):
        offset = np.uint64(ids[index] - first)
        inside = np.uint64(offset < span)
        word = bits[np.int64((offset >> np.uint64(6)) * inside)]
        hit = (word >> (offset & np.uint64(63))) & inside & np.uint64(timestamp_s[index] < before_s)
        rows[found] = index
        found += np.int64(hit)
    return rows[:found]


@njit
def _places_of(ids, rows, first, bits, keys, places):  # pragma: no cover - compiled
    found = np.empty(rows.size, np.int32)
    if bits.size == 0:
        for index in range(rows.size):
            slot = _slot(ids[rows[index]], keys, places)
            found[index] = places[slot]
        return found
    span = np.uint64(bits.size) << np.uint64(6)
    one = np.uint64(1)
    for index in range(rows.size):
        offset = np.uint64(ids[rows[index]] - first)
        if offset >= span:
            found[index] = -1
            continue
        word = bits[np.int64(offset >> np.uint64(6))]
        bit = one << (offset & np.uint64(63))
        below = word & (bit - one)
        # Number of ones in `below`, summed in fields of 2, 4 and 8 bits.
        below = below - ((below >> one) & np.uint64(0x5555555555555555))
        below = (below & np.uint64(0x3333333333333333)) + ((below >> np.uint64(2)) & np.uint64(0x3333333333333333))
        below = (below + (below >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        count = np.int64((below * np.uint64(0x0101010101010101)) >> np.uint64(56))
        found[index] = places[np.int64(offset >> np.uint64(6))] + count if word & bit else -1
    return found


@njit
def _number_direct(ids, rows, start, numbers, direct_counts):  # pragma: no cover - compiled
    """`_number` up to the first id that has no count of its own: as simple as the loop of nearly all data can be."""
    for index in range(start, rows.size):
        value = np.uint64(ids[rows[index]])
        if value >= np.uint64(direct_counts.size):
            return index
        direct_counts[value] = min(np.int64(direct_counts[value]) + 1, MAX_COUNT)
        numbers[index] = value
    return rows.size


@njit
def _number(
    ids, rows, start, numbers, direct_counts, direct_ids, size, keys, values, known, counts
):  # fmt: skip # pragma: no cover - compiled
    """Returns (rows done, entries in the table); stops where a table has to grow first. Counts stop at 2^31 - 1."""
    for index in range(start, rows.size):
        value = ids[rows[index]]
        if 0 <= value < direct_counts.size:
            direct_counts[value] += direct_counts[value] < MAX_COUNT
            numbers[index] = value
            continue
        if 0 <= value < direct_ids:
            return index, size
        slot = _slot(value, keys, values)
        number = values[slot]
        if number < 0:
            if size == known.size:
                return index, size
            number = size
            size += 1
            known[number] = value
            keys[slot] = value
            values[slot] = number
        counts[number] += counts[number] < MAX_COUNT
        numbers[index] = DIRECT_IDS + number
    return rows.size, size
