from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ubp_fast.store.ids import DIRECT_IDS, KnownIds, Numbering, drawn

IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300) | st.sampled_from([-(2**63), 2**63 - 1])


@settings(max_examples=200, deadline=None)
@given(st.lists(IDS, unique=True, max_size=40), st.lists(IDS, max_size=40), st.integers(0, 3))
def test_places_of_known_ids(known: list[int], others: list[int], before_s: int) -> None:
    known = sorted(known)
    asked = np.array([*known, *others, *(i + 1 for i in known if i < 2**63 - 1)], np.int64)
    place = {value: index for index, value in enumerate(known)}
    wanted = [place.get(int(value), -1) for value in asked]
    ids = KnownIds(np.array(known, np.int64))
    assert ids.find(asked).tolist() == wanted
    times = np.arange(len(asked)) % 3
    rows, places = ids.known(asked, times, before_s)
    expected = [row for row in range(len(asked)) if wanted[row] >= 0 and row % 3 < before_s]
    assert rows.tolist() == expected
    assert places.tolist() == [wanted[row] for row in expected]


@pytest.mark.parametrize("gap", [1, 255, 257, 2**40])
def test_close_ids_and_scattered_ones(gap: int) -> None:
    """A bitmap below 256 possible ids per id, a hash table beyond; more ids than its first size."""
    known = np.arange(3000, dtype=np.int64) * gap - 5000
    assert KnownIds(known).find(known).tolist() == list(range(3000))
    if gap > 1:
        assert (KnownIds(known).find(known + 1) == -1).all()


def test_numbers_while_ids_come() -> None:
    rng = np.random.default_rng(0)
    far = rng.integers(-(2**63), 2**63 - 1, 3000)
    ids = np.concatenate([rng.integers(0, 50, 2000), far, far[:500], [DIRECT_IDS - 1, DIRECT_IDS, -1]])
    rng.shuffle(ids)
    numbering = Numbering()
    numbers = np.concatenate(
        [
            numbering.number(ids[start : start + 700], np.arange(len(ids[start : start + 700])))
            for start in range(0, len(ids), 700)
        ]
    )
    small = (ids >= 0) & (ids < DIRECT_IDS)
    np.testing.assert_array_equal(numbers[small], ids[small])
    unique, first, counts = np.unique(ids[~small], return_index=True, return_counts=True)
    in_order = np.argsort(first)
    number_of = dict(zip(unique[in_order].tolist(), range(DIRECT_IDS, DIRECT_IDS + len(unique)), strict=True))
    assert numbers[~small].tolist() == [number_of[value] for value in ids[~small].tolist()]
    assert numbering.end == DIRECT_IDS + len(unique)
    for least in (1, 2, 40):
        found, their_numbers = numbering.counted(least)
        values, occurrences = np.unique(ids, return_counts=True)
        assert sorted(found.tolist()) == values[occurrences >= least].tolist()
        assert [number_of.get(value, value) for value in found.tolist()] == their_numbers.tolist()
    assert counts.max() == 2
    values, occurrences = np.unique(ids, return_counts=True)
    every = np.array([number_of.get(value, value) for value in values.tolist()])
    assert numbering.counts_of(every).tolist() == occurrences.tolist()
    numbering.add_counts(every[::2], np.arange(len(every[::2])))
    occurrences[::2] += np.arange(len(every[::2]))
    assert numbering.counts_of(every).tolist() == occurrences.tolist()
    numbering.add_counts(every[-1:], np.array([2**40]))
    assert numbering.counts_of(every[-1:]).tolist() == [2**31 - 1]


def test_only_the_rows_asked_for() -> None:
    numbering = Numbering()
    assert numbering.number(np.array([7, -7, 9]), np.array([2, 1])).tolist() == [9, DIRECT_IDS]
    assert sorted(numbering.counted(1)[0].tolist()) == [-7, 9]


@pytest.mark.parametrize("number", [0, 1, 7, 60, 20_000])
def test_most_frequent_ids(number: int) -> None:
    """Small ids and others together, more of them than chunks, with ties; the smaller id goes first."""
    random = np.random.default_rng(2)
    ids = np.concatenate([random.zipf(1.3, 30_000) % 9_000, -(random.zipf(1.3, 30_000) % 9_000) - DIRECT_IDS])
    numbering = Numbering()
    numbers = numbering.number(ids, np.arange(len(ids)))
    number_of = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
    values, occurrences = np.unique(ids, return_counts=True)
    order = np.lexsort((values, -occurrences))[:number]
    found = numbering.most_frequent(number)
    assert found[0].tolist() == values[order].tolist()
    assert found[1].tolist() == [number_of[value] for value in values[order].tolist()]
    assert found[2].tolist() == occurrences[order].tolist()


def test_who_is_drawn_does_not_depend_on_who_else_is_known() -> None:
    ids = np.unique(np.random.default_rng(0).integers(-(2**60), 2**60, 2_000))
    chosen = ids[drawn(ids, 300, 5)]
    assert len(chosen) == 300 and (np.diff(chosen) > 0).all()
    some = np.union1d(ids[::7], chosen)
    np.testing.assert_array_equal(some[drawn(some, 300, 5)], chosen)
    assert 20 < len(np.intersect1d(ids[drawn(ids, 300, 6)], chosen)) < 80, "another seed draws others"
    assert len(np.intersect1d(ids[drawn(ids, 300, 5, 1)], ids[drawn(ids, 300, 5, 2)])) < 80
    np.testing.assert_array_equal(drawn(ids, 5_000, 5), np.arange(len(ids)))
