"""Batches against a plain loop over the store, and the rules of time."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.shops import DAY_S, EMPTY_CLIENT, END_S, Rows, make_store, write_rows

from ubp_fast.events.schema import EVENT_KINDS
from ubp_fast.sequences import SequenceBatch, ViewLoader, Views, views_at, window_labels
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

CUTOFF_S = END_S - 28 * DAY_S
TENSORS = [item.name for item in fields(SequenceBatch) if item.name not in ("shared", "counted")]
LISTS = {
    "propensity_sku": (np.array([33, 4, 999, 0]), np.ones(4)),
    "propensity_category": (np.array([9, 7]), np.ones(2)),
    "propensity_price": (np.arange(10)[::-1], np.ones(10)),
    "propensity_new_sku": (np.array([12]), np.ones(1)),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return make_store(tmp_path_factory.mktemp("loader"))


def expected_events(store: EventStore, row: int, start_s: int, end_s: int) -> list[tuple[int, ...]]:
    """(time, kind, sku, category, price, url, first code) of one client, straight from the tables of the store."""
    found = []
    for number, name in enumerate(EVENT_KINDS, start=1):
        columns = store.kind(name)
        for at in range(columns.offsets[row], columns.offsets[row + 1]):
            time = int(columns.timestamp_s[at])
            if not start_s <= time < end_s:
                continue
            sku = int(columns.item[at]) if number <= 3 else 0
            url = int(columns.item[at]) if name == "page_visit" else 0
            products = store.products
            code = int(columns.codes[at, 0]) if name == "search_query" else int(products.name[sku, 0])
            found.append((time, number, sku, int(products.category[sku]), int(products.price[sku]), url, code))
    return sorted(found, key=lambda event: event[0])


def events_of(batch: SequenceBatch, view: int) -> list[tuple[int, ...]]:
    begin, end = batch.cu_seqlens[view : view + 2].tolist()
    columns = (batch.timestamp_s, batch.kind, batch.sku, batch.category, batch.price, batch.url, batch.codes[:, 0])
    return list(zip(*(column[begin:end].tolist() for column in columns), strict=True))


def test_repeats_of_visits_and_searches_are_left_out(tmp_path: Path) -> None:
    rows: Rows = {
        "product_buy": [(1, 50, 3), (1, 50, 3)],
        "page_visit": [(1, 10, 5), (1, 10, 6), (1, 10, 5), (1, 11, 5), (1, 60, 7), (1, 60, 7), (2, 60, 7)],
        "search_query": [(1, 60, 1), (1, 60, 2), (1, 60, 1), (1, 60, 2)],
    }
    build_store(write_rows(tmp_path / "events", rows), tmp_path / "store", 100)
    store = EventStore.open(tmp_path / "store")
    views = views_at(store, [100, 60])
    (batch,) = ViewLoader(store, views, batch_size=10, history_length=8, drop_repeats=True)
    buy, visit, search = (1 + EVENT_KINDS.index(name) for name in rows)

    def found(view: int) -> list[tuple[int, int]]:
        return [event[:2] for event in events_of(batch.history, view)]

    assert found(0)[-5:] == [(50, buy), (50, buy), (60, visit), (60, search), (60, search)]
    assert found(0)[:3] == [(10, visit), (10, visit), (11, visit)]
    assert found(1) == [(60, visit)], "that of another client is no repeat"
    assert found(2) == [(10, visit), (10, visit), (11, visit), (50, buy), (50, buy)]
    (short,) = ViewLoader(store, views, batch_size=10, history_length=4, drop_repeats=True)
    assert [event[:2] for event in events_of(short.history, 0)] == found(0)[-4:]
    (whole,) = ViewLoader(store, views, batch_size=10, history_length=100)
    assert whole.history.lengths().tolist() == [12, 1, 6, 0]


def test_pinned_batches_hold_the_same(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    views = views_at(store, [CUTOFF_S])
    loader = ViewLoader(
        store,
        views,
        batch_size=1000,
        history_length=9,
        future_length=4,
        features=np.ones((len(views.row), 2), np.float32),
        labels=window_labels(store, views, LISTS),
        weight=np.ones(len(views.row)),
    )
    (plain,) = loader
    assert not pinned
    loader.pins = True
    (batch,) = loader
    assert len(pinned) == 2 * len(TENSORS) + 2 + len(plain.labels)
    assert torch.equal(batch.history.codes, plain.history.codes)
    assert torch.equal(batch.labels["buy_sku"], plain.labels["buy_sku"])
    assert batch.to("meta").future.url.device.type == "meta"


def test_history_is_the_last_events_before_the_cutoff(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S, CUTOFF_S - 10 * DAY_S])
    (batch,) = ViewLoader(store, views, batch_size=1000, history_length=9)
    for view in range(len(views.row)):
        whole = expected_events(store, int(views.row[view]), 0, int(views.cutoff_s[view]))
        assert events_of(batch.history, view) == whole[-9:]
    assert (batch.history.lengths() == 9).any()


def test_future_is_the_first_events_of_the_window(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S])
    (batch,) = ViewLoader(store, views, batch_size=1000, future_length=4)
    for view in range(len(views.row)):
        window = expected_events(store, int(views.row[view]), CUTOFF_S, CUTOFF_S + 14 * DAY_S)
        assert events_of(batch.future, view) == window[:4]
    assert (batch.future.lengths() == 4).any()


def test_client_without_events_keeps_an_empty_view(store: EventStore) -> None:
    (batch,) = ViewLoader(store, views_at(store, [CUTOFF_S]), batch_size=1000, history_length=64)
    assert batch.history.num_sequences == store.num_clients
    assert batch.history.lengths()[EMPTY_CLIENT] == 0
    assert EMPTY_CLIENT not in views_at(store, [CUTOFF_S], with_history=True).row


def test_derived_positions_and_ages(store: EventStore) -> None:
    (batch,) = ViewLoader(store, views_at(store, [CUTOFF_S]), batch_size=1000, history_length=64)
    history = batch.history
    steps = history.steps_to_end()
    assert (steps[history.cu_seqlens[1:].long()[history.lengths() > 0] - 1] == 0).all()
    assert steps.max() < 64
    assert (history.age_s() > 0).all()
    assert torch.equal(history.segments().bincount(minlength=store.num_clients), history.lengths())


def test_one_epoch_visits_every_view_once_in_seeded_order(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S, CUTOFF_S - DAY_S])

    def clients(epoch: int, seed: int) -> list[int]:
        loader = ViewLoader(store, views, batch_size=7, history_length=3, shuffle_seed=seed)
        loader.set_epoch(epoch)
        assert len(list(loader)) == len(loader)
        return torch.cat([batch.history.client for batch in loader]).tolist()

    assert sorted(clients(0, 1)) == sorted(views.row.tolist())
    assert clients(0, 1) == clients(0, 1)
    assert clients(0, 1) != clients(1, 1)
    assert clients(0, 1) != clients(0, 2)


def test_a_pass_begins_where_it_is_told(store: EventStore) -> None:
    loader = ViewLoader(store, views_at(store, [CUTOFF_S]), batch_size=7, history_length=3, shuffle_seed=0)
    whole = [batch.history.client.tolist() for batch in loader]
    loader.set_epoch(0, first_batch=2)
    assert [batch.history.client.tolist() for batch in loader] == whole[2:]


def test_digest_tells_data_apart(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S])
    ones = np.ones(len(views.row))
    labels = window_labels(store, views, LISTS)
    options: dict[str, Any] = {"batch_size": 8, "history_length": 4, "features": ones[:, None], "weight": ones}
    options |= {"labels": labels, "shuffle_seed": 0}
    other = {
        **labels,
        "buy_category": labels["buy_category"].take(  # type: ignore[union-attr]
            np.arange(len(ones))[::-1]
        ),
    }
    changed = np.where(np.arange(len(ones)) == 3, 2.0, 1.0)
    fewer = Views(views.row[::-1].copy(), views.cutoff_s)
    changes: list[dict[str, Any]] = [
        {"history_length": 5},
        {"drop_repeats": True},
        {"features": changed[:, None]},
        {"weight": changed},
        {"labels": other},
        {"shuffle_seed": 1},
    ]
    loaders = [ViewLoader(store, views, **options | change) for change in ({}, *changes)]
    loaders.append(ViewLoader(store, fewer, **options))
    digests = [loader.digest() for loader in loaders]
    assert len({*digests}) == len(digests)
    assert ViewLoader(store, views, **options).digest() == digests[0]


def test_features_labels_and_weights_follow_their_views(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S])
    own = np.arange(len(views.row), dtype=np.float64)
    loader = ViewLoader(
        store, views, batch_size=8, history_length=2, features=own[:, None], labels={"churn": own}, weight=own,
        shuffle_seed=0,
    )  # fmt: skip
    for batch in loader:
        client = batch.history.client.float()
        assert torch.equal(batch.features[:, 0], client)
        assert torch.equal(batch.labels["churn"], client)
        assert torch.equal(batch.weight, client)


def test_loader_without_events_gives_features(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S])
    batches = list(ViewLoader(None, views, batch_size=16, features=np.ones((len(views.row), 2))))
    assert [batch.num_views for batch in batches] == [16, 14]
    assert batches[0].history is None


def test_events_from_the_cutoff_on_do_not_reach_the_history(tmp_path: Path) -> None:
    plain, scrambled = make_store(tmp_path / "a"), make_store(tmp_path / "b", scrambled_from_s=CUTOFF_S)
    batches = []
    for store in (plain, scrambled):
        (batch,) = ViewLoader(store, views_at(store, [CUTOFF_S]), batch_size=99, history_length=64, future_length=64)
        batches.append(batch)
    for name in TENSORS:
        assert torch.equal(getattr(batches[0].history, name), getattr(batches[1].history, name)), name
    assert batches[0].future.sku.tolist() != batches[1].future.sku.tolist()


@pytest.mark.parametrize("drop_repeats", [False, True])
def test_parts_know_their_place_in_the_whole(store: EventStore, drop_repeats: bool) -> None:
    def loader() -> ViewLoader:
        views = views_at(store, [CUTOFF_S])  # one of them without events
        options = {"history_length": 9, "drop_repeats": drop_repeats, "future_length": 4, "shuffle_seed": 3}
        return ViewLoader(store, views, batch_size=13, **options)

    parts = [loader() for _ in range(3)]
    for rank, part in enumerate(parts):
        part.share(rank, 3)
    for whole, *shares in zip(loader(), *parts, strict=True):
        for name in ("history", "future"):
            first = first_sequence = 0
            found = getattr(whole, name)
            for share in (getattr(one, name) for one in shares):
                has_events = int((share.lengths() > 0).sum())
                assert share.shared == (first, first_sequence, found.num_tokens, int((found.lengths() > 0).sum()))
                assert torch.equal(share.timestamp_s, found.timestamp_s[first : first + share.num_tokens])
                first, first_sequence = first + share.num_tokens, first_sequence + has_events
            assert first == found.num_tokens
        assert [share.first_view for share in shares] == [0, *np.cumsum([one.num_views for one in shares[:2]])]
        assert {share.all_views for share in shares} == {whole.num_views}


def test_purchases_only(tmp_path: Path) -> None:
    store = make_store(tmp_path, kinds=("product_buy",))
    (batch,) = ViewLoader(store, views_at(store, [CUTOFF_S]), batch_size=99, history_length=64)
    assert batch.history.num_tokens
    assert (batch.history.kind == 1).all()


def test_bad_arguments_are_named(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S])
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        ViewLoader(store, views, batch_size=0)
    with pytest.raises(ValueError, match="weight must have 30 rows like views, got 3"):
        ViewLoader(store, views, batch_size=1, weight=np.ones(3))
    with pytest.raises(ValueError, match="store must be given"):
        ViewLoader(None, views, batch_size=1, history_length=3)
    with pytest.raises(ValueError, match="target window: cutoff_s"):
        ViewLoader(store, views_at(store, [END_S - 13 * DAY_S]), batch_size=1, future_length=3)


def skus_of(store: EventStore, kind: str, row: int, start_s: int) -> set[int]:
    columns = store.kind(kind)
    own = slice(columns.offsets[row], columns.offsets[row + 1])
    inside = (columns.timestamp_s[own] >= start_s) & (columns.timestamp_s[own] < start_s + 14 * DAY_S)
    return set(store.sku_ids[columns.item[own][inside]].tolist())


def test_labels_say_what_happened_in_the_window(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S, CUTOFF_S - 14 * DAY_S])
    labels = window_labels(store, views, LISTS)
    everything = np.arange(len(views.row))
    for prefix, kind in (("buy", "product_buy"), ("add", "add_to_cart")):
        dense = {
            name: np.asarray(labels[f"{prefix}_{name.removeprefix('propensity_')}"].dense(everything)) for name in LISTS
        }
        for view, (row, cutoff_s) in enumerate(zip(*views, strict=True)):
            skus = skus_of(store, kind, row, cutoff_s)
            assert dense["propensity_sku"][view].tolist() == [float(sku in skus) for sku in (33, 4, 999, 0)]
            assert dense["propensity_new_sku"][view].tolist() == [float(12 in skus)]
            assert dense["propensity_category"][view].tolist() == [
                float(c in {s % 5 + 7 for s in skus}) for c in (9, 7)
            ]
            assert dense["propensity_price"][view].tolist() == [
                float(p in {s % 10 for s in skus}) for p in range(9, -1, -1)
            ]
            happened = float(bool(skus))
            assert (labels["add"] if prefix == "add" else 1 - labels["churn"])[view] == happened
    assert 0 < labels["churn"].mean() < 1


def test_purchases_only_have_no_cart_labels(tmp_path: Path) -> None:
    store = make_store(tmp_path, kinds=("product_buy",))
    assert set(window_labels(store, views_at(store, [CUTOFF_S]), LISTS)) == {
        "churn", "buy_sku", "buy_category", "buy_price", "buy_new_sku",
    }  # fmt: skip


def test_unknown_ids_have_no_label(store: EventStore) -> None:
    for column in ("sku", "category", "price"):
        assert (store.label_of_sku(column, np.array([-1, 0, 1]))[:2] == -1).all()
        assert (store.label_of_sku(column, np.empty(0, np.int64)) == -1).all()
    with pytest.raises(ValueError, match="_category, _sku or _price, got 'colour'"):
        store.label_of_sku("colour", np.array([1]))


def test_windows_beyond_the_store_are_refused(store: EventStore) -> None:
    with pytest.raises(ValueError, match="use an earlier cutoff"):
        window_labels(store, views_at(store, [END_S - 1]), LISTS)


def test_counts_come_along_to_a_device(store: EventStore) -> None:
    views = views_at(store, [CUTOFF_S])
    (batch,) = ViewLoader(store, views, batch_size=1000, history_length=64, future_length=9)
    for part in (batch.history, batch.future):
        lengths, kinds = part.lengths().tolist(), part.kind.tolist()
        wanted = [kinds.count(1 + EVENT_KINDS.index(name)) for name in ("page_visit", "search_query")]
        active = tuple(sum(length > at for length in lengths) for at in range(max(lengths)))
        assert part.counts == (*wanted, sum(length > 0 for length in lengths), active)
        assert part.counted is None
    moved = batch.to("meta")
    assert (moved.history.counts, moved.future.counts) == (batch.history.counts, batch.future.counts)
    assert batch.to("cpu").history.counted is None
    nothing = replace(batch.history, kind=batch.history.kind[:0], cu_seqlens=torch.zeros(3, dtype=torch.int32))
    assert nothing.counts == (0, 0, 0, ())
