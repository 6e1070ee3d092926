"""Where items stand in lists: the most frequent values of every column of a kind, and given lists of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ubp_fast.events.labels import positions_in
from ubp_fast.events.schema import ITEM_COLUMN, LabelLists
from ubp_fast.features.history import History
from ubp_fast.kernels.windowed_aggregate import code_counts
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.ids import least_of_largest
from ubp_fast.store.vocabulary import FIRST_ID

# Column -> (its dense id per item, None for the item itself; original value per dense id).
ValueTables = Mapping[str, tuple[np.ndarray | None, np.ndarray]]


class PopularValues(NamedTuple):
    """Slots of the most frequent values, the lists of all columns laid side by side.

    Attributes:
        slots: int32 [codes, columns], -1 for values that are not in the list.
        labels: "<column>_<value>" of every slot.
    """

    slots: np.ndarray
    labels: tuple[str, ...]


PopularLists = dict[str, np.ndarray]  # column -> original values i64, the most frequent first


def popular_lists(store: EventStore, kind: str, before_s: int, top_values: int) -> PopularLists:
    """Most frequent values per column (sku, category, price; url) of a kind; ties: the smaller id.

    Counted are the events of the clients that need a profile.

    Args:
        store: event store.
        kind: one with items, not searches.
        before_s: only events before it are counted.
        top_values: values per column, fewer where fewer occur.
    """
    if ITEM_COLUMN[kind] == "query":
        raise ValueError(f"popular_lists: kind must have items, got '{kind}'")
    num_items = store.num_urls if kind == "page_visit" else store.num_skus
    if not store.is_relevant.all():
        item_counts = np.zeros(num_items, np.int64)
        for part in History.of(store, before_s).parts(1):
            offsets, timestamp_s, item, *_ = part.events(kind)
            item_counts += code_counts(offsets, timestamp_s, item, before_s=before_s, num_codes=num_items)
    elif before_s >= store.cutoff_s:
        item_counts = np.asarray(store.item_counts(kind))
    else:
        offsets, timestamp_s, item, *_ = store.kind(kind)
        item_counts = code_counts(offsets, timestamp_s, item, before_s=before_s, num_codes=num_items)
    return {
        name: originals[_largest(_counts(dense_of_item, originals, item_counts), originals, top_values)]
        for name, (dense_of_item, originals) in _tables(store, kind).items()
    }


def lists_of_kinds(store: EventStore, before_s: int, top_values: int) -> dict[str, PopularLists]:
    """`popular_lists` of every kind with items."""
    return {kind: popular_lists(store, kind, before_s, top_values) for kind in store.kinds if kind != "search_query"}


def popular_values(store: EventStore, kind: str, lists: PopularLists) -> PopularValues:
    """Slots of a store's items of a kind in lists that were made from it or from another store."""
    slots: list[np.ndarray] = []
    labels: list[str] = []
    for name, (dense_of_item, originals) in _tables(store, kind).items():
        values = lists[name]
        position = positions_in(values, originals)
        position[:FIRST_ID] = -1
        slot_of_dense = np.where(position >= 0, position + len(labels), -1).astype(np.int32)
        slots.append(slot_of_dense if dense_of_item is None else slot_of_dense[dense_of_item])
        labels += [f"{name}_{value}" for value in values.tolist()]
    return _side_by_side(slots, labels)


def most_frequent(
    tables: ValueTables, item_counts: np.ndarray, top_values: int, first_seen: np.ndarray | None = None
) -> PopularValues:
    """The lists of all columns of a kind from how often each dense item id occurred, i64 [codes].

    Ties go to the smaller original value, or to the one that was seen first when `first_seen` tells when, i64 [codes].
    """
    slots: list[np.ndarray] = []
    labels: list[str] = []
    for name, (dense_of_item, originals) in tables.items():
        counts = _counts(dense_of_item, originals, item_counts)
        order = originals if first_seen is None else first_seen
        if dense_of_item is not None and first_seen is not None:
            order = np.full(len(originals), np.iinfo(np.int64).max)
            np.minimum.at(order, dense_of_item, first_seen)
        top = _largest(counts, order, top_values)
        slot_of_dense = np.full(len(originals), -1, np.int32)
        slot_of_dense[top] = len(labels) + np.arange(len(top))
        slots.append(slot_of_dense if dense_of_item is None else slot_of_dense[dense_of_item])
        labels += [f"{name}_{value}" for value in originals[top].tolist()]
    return _side_by_side(slots, labels)


def _counts(dense_of_item: np.ndarray | None, originals: np.ndarray, item_counts: np.ndarray) -> np.ndarray:
    """How often each dense id of a column occurred, i64."""
    if dense_of_item is None:
        return item_counts
    return np.bincount(dense_of_item, weights=item_counts, minlength=len(originals)).astype(np.int64)


def _side_by_side(slots: list[np.ndarray], labels: list[str]) -> PopularValues:
    # A single column may be millions of urls: it is not copied.
    return PopularValues(slots[0][:, None] if len(slots) == 1 else np.stack(slots, axis=1), tuple(labels))


def _tables(store: EventStore, kind: str) -> ValueTables:
    if kind == "page_visit":
        return {"url": (None, np.asarray(store.url_ids))}
    products = store.products
    return {
        "sku": (None, np.asarray(store.sku_ids)),
        "category": (np.asarray(products.category), np.asarray(store.category_ids)),
        "price": (np.asarray(products.price), np.arange(store.num_prices) - FIRST_ID),
    }


def _largest(counts: np.ndarray, order: np.ndarray, number: int) -> np.ndarray:
    """Dense ids of the real values with the largest counts above 0, ties by `order`."""
    real = counts[FIRST_ID:]
    candidates = np.flatnonzero(real >= least_of_largest(real, number)) + FIRST_ID
    return candidates[np.lexsort((order[candidates], -counts[candidates]))][:number]


def label_slots(store: EventStore, lists: LabelLists) -> tuple[np.ndarray, list[str]]:
    """Slots [num_skus, lists] of every dense sku in the lists laid side by side, and the names of all slots.

    Raises:
        ValueError: the last word of a list's name is not category, sku or price.
    """
    slots = np.full((store.num_skus, len(lists)), -1, np.int32)
    labels: list[str] = []
    for index, (name, (ids, _)) in enumerate(lists.items()):
        position = store.label_of_sku(name, ids)
        slots[:, index] = np.where(position >= 0, position + len(labels), -1)
        labels += [f"{name}_{value}" for value in ids.tolist()]
    return slots, labels
