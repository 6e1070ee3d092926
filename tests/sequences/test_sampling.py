"""Which views there are, and the cutoffs of training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.shops import DAY_S, END_S, START_S, make_store

from ubp_fast.sequences import Views, age_quantiles_days, past_cutoffs, training_cutoffs, views_at
from ubp_fast.sequences.sampling import epoch_order, rows_at, token_rows
from ubp_fast.store.event_store import EventStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return make_store(tmp_path_factory.mktemp("sampling"))


def test_views_are_cutoff_by_cutoff_in_store_order(store: EventStore) -> None:
    views = views_at(store, [END_S, END_S - DAY_S])
    assert views.row.tolist() == [*range(30), *range(30)]
    assert views.cutoff_s.tolist() == [END_S] * 30 + [END_S - DAY_S] * 30


def test_training_cutoffs_leave_room_for_the_windows(store: EventStore) -> None:
    cutoffs = training_cutoffs(store, 3)
    assert cutoffs == tuple(END_S - days * DAY_S for days in (28, 42, 56))
    many = training_cutoffs(store, 50)
    assert many[-1] >= START_S + 14 * DAY_S > many[-1] - 14 * DAY_S
    with pytest.raises(ValueError, match="must reach back more than 98 days"):
        training_cutoffs(store, 1, 7)
    for count, newest in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="count and newest must be >= 1"):
            training_cutoffs(store, count, newest)


def test_past_cutoffs_are_fewer_where_the_history_is_short(store: EventStore) -> None:
    assert past_cutoffs(store, 2, 1) == (tuple(END_S - days * DAY_S for days in (28, 42)), (END_S - 14 * DAY_S,))
    model, stacking = past_cutoffs(store, 50, 50)
    assert len(model) == 1 and len(stacking) > 2
    assert model[0] == stacking[-1] - 14 * DAY_S > store.first_timestamp_s
    long, short = (replace(store, header={**store.header, "target_days": days}) for days in (60, 5))
    assert past_cutoffs(long, 1, 1) == ((), (END_S - 60 * DAY_S,))
    assert past_cutoffs(short, 1, 2) == ((END_S - 15 * DAY_S,), (END_S - 5 * DAY_S, END_S - 10 * DAY_S))


def test_cutoffs_outside_the_store_are_refused(store: EventStore) -> None:
    with pytest.raises(ValueError, match=f"store's cutoff {END_S}, got {END_S + 1}"):
        views_at(store, [END_S + 1])
    with pytest.raises(ValueError, match="must hold a past window"):
        views_at(store, [])


def test_rows_at_reads_each_view_at_its_own_cutoff(store: EventStore) -> None:
    views = Views(np.array([3, 3, 9]), np.array([END_S, END_S - 30 * DAY_S, END_S - 30 * DAY_S]))
    found = rows_at(store, "product_buy", views, shift_s=-DAY_S)
    kind = store.kind("product_buy")
    for row, cutoff_s, end in zip(views.row, views.cutoff_s, found, strict=True):
        own = np.asarray(kind.timestamp_s[kind.offsets[row] : kind.offsets[row + 1]])
        assert end == kind.offsets[row] + (own < cutoff_s - DAY_S).sum()


def test_token_rows_of_uneven_ranges() -> None:
    rows, offsets = token_rows(np.array([5, 2, 9]), np.array([7, 2, 12]))
    assert rows.tolist() == [5, 6, 9, 10, 11]
    assert offsets.tolist() == [0, 2, 2, 5]


def test_epoch_order_is_a_seeded_permutation() -> None:
    assert sorted(epoch_order(50, 1, 0)) == list(range(50))
    assert epoch_order(50, 1, 0).tolist() == epoch_order(50, 1, 0).tolist() != epoch_order(50, 1, 1).tolist()


def test_age_quantiles_cover_the_ages(store: EventStore) -> None:
    edges = age_quantiles_days(store, views_at(store, [END_S]), max_length=10_000, bins=4)
    ages = (END_S - np.asarray(store.timeline.timestamp_s)) / DAY_S
    assert edges.dtype == np.float32
    np.testing.assert_allclose(edges, np.quantile(ages, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-5)
    nobody = Views(np.empty(0, np.int64), np.empty(0, np.int64))
    assert age_quantiles_days(store, nobody, max_length=5, bins=2).tolist() == [0, 1, 2]
