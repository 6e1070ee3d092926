"""Batches of fixed sizes: one shape for all, the views of clients as they are, and numbers of events that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.shops import make_store
from support.small_models import training_loader

from ubp_fast.sequences import FixedSizes, ViewLoader
from ubp_fast.sequences.batch import SequenceBatch, ViewBatch
from ubp_fast.store.event_store import EventStore

EVENTS = ("kind", "sku", "category", "price", "url", "codes", "timestamp_s")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    return make_store(tmp_path_factory.mktemp("padding"))


def loader_of(store: EventStore) -> ViewLoader:
    return training_loader(store, batch_size=16, weight=np.ones(training_loader(store).num_views))


def shapes(batch: ViewBatch) -> list[torch.Size]:
    found: list[torch.Size] = []
    batch.map(lambda part: (found.append(part.shape), part)[1])
    return found


def parts_of(batch: ViewBatch) -> list[SequenceBatch]:
    assert batch.history is not None and batch.future is not None
    return [batch.history, batch.future]


def test_all_batches_have_one_size(store: EventStore) -> None:
    """The last one of an epoch, too, which is smaller; sizes may grow with the first ones."""
    loader = loader_of(store)
    loader.fills, seen = loader.fixed_sizes(), []
    for epoch in range(4):
        loader.set_epoch(epoch)
        seen.append([(shapes(batch), [part.counted for part in parts_of(batch)]) for batch in loader])
    assert len(loader) > 2 and loader.num_views % 16
    assert all(one == seen[1][0] for epoch in seen[1:] for one in epoch)
    assert len({str(one) for epoch in seen for one in epoch}) <= 3


def test_views_of_clients_stay_and_others_follow(store: EventStore) -> None:
    loader = loader_of(store)
    plain = list(loader)
    loader.fills = loader.fixed_sizes()
    for batch, padded in zip(plain, loader, strict=True):
        here = batch.num_views
        assert padded.valid is not None and padded.valid.tolist() == [True] * here + [False] * (padded.num_views - here)
        assert padded.all_views == here
        for name in batch.labels:
            assert torch.equal(padded.labels[name][:here], batch.labels[name]) and not padded.labels[name][here:].any()
        assert padded.weight is not None and not padded.weight[here:].any()
        for part, more in zip(parts_of(batch), parts_of(padded), strict=True):
            assert torch.equal(more.cu_seqlens[: here + 1], part.cu_seqlens)
            assert all(torch.equal(getattr(more, name)[: part.num_tokens], getattr(part, name)) for name in EVENTS)
            assert int(more.cu_seqlens[-1]) == more.num_tokens and int(more.lengths().min()) >= 0
            assert int(more.lengths().max()) <= 64
            counted = replace(more, counted=None).counts
            assert more.counted == counted._replace(active=None)


def test_sizes_grow_where_a_batch_does_not_fit(store: EventStore) -> None:
    loader = loader_of(store)
    small, large = loader.batch(np.arange(3)), loader.batch(np.arange(16))
    fills = FixedSizes(64, 16)
    first, second, third = fills(small), fills(large), fills(small)
    assert shapes(first) != shapes(second) == shapes(third)
    assert [part.counted for part in parts_of(second)] == [part.counted for part in parts_of(third)]


def test_batches_of_features_alone(store: EventStore) -> None:
    loader = loader_of(store)
    bare = [replace(batch, history=None, future=None) for batch in loader]
    fills = FixedSizes(1, 16)
    assert {fills(batch).num_views for batch in bare} == {16}


def test_a_part_of_a_batch_is_refused(store: EventStore) -> None:
    loader = loader_of(store)
    loader.fills = loader.fixed_sizes()
    loader.share(0, 2)
    with pytest.raises(ValueError, match="a batch must be whole and have at most 16 views, got 8"):
        next(iter(loader))
    with pytest.raises(ValueError, match="at most 4 views, got 5"):
        FixedSizes(64, 4)(loader.batch(np.arange(5)))
