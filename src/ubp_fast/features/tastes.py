"""Tastes: factors of everything that clients bought, carted, looked at or searched for.

    A[u, i] = log1p(decayed events of client u with item i) / |column i|^(1/2),    A ~ U diag(s) V^T
    tastes  = sqrt(clients) A V diag(1 / s)                                          [U, rank]

Items are the skus of buying and of carting, the pages that are looked at most, and of searches their codes, sixteen of
each, told apart by their places. Columns are divided by the root of their length, or a few items that everybody buys
would fill the first factors. Found by subspace iteration: a few products of the sparse A with a narrow matrix, so the
catalogue may be of any size. A client's own counts and the item weights V alone make its row, also those of a client
who was not there when V was fitted.
Source: Halko, Martinsson, Tropp, Finding structure with randomness, 2011.

Few factors know what is bought by many. Beside them stand the items that go with a label, one by one: those whose
columns of A are nearest to the label's by the cosine, rows divided by their length before, so that a client who buys
everything says little of any two things. A label's own items are none of them.
Source: Sarwar, Karypis, Konstan, Riedl, Item-based collaborative filtering recommendation algorithms, 2001.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubp_fast.compiled import njit
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, NUM_CODES, SKU_KINDS, LabelLists
from ubp_fast.features.history import Column, History, features_of, num_items
from ubp_fast.features.matrix import Features
from ubp_fast.features.popular import label_slots
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.ids import in_drawn_order

# Counts below this, of events from 13 half-lives ago, are none: an item of which nothing else is known would weigh too
# much.
FAINT = 1e-4
SPARE_FACTORS = 16
ITERATIONS = 6
# Items of a kind that may go with a label: the most frequent ones.
MOST_ITEMS = 4000


@dataclass(frozen=True)
class TastesConfig:
    """What `taste_features` factorises.

    Attributes:
        kinds: of events; an item that is bought and carted is two columns of A.
        rank: factors.
        half_life_days: an event from one half-life ago counts half of one from today.
        clients: drawn at most, whose events are factorised.
        entries: items of events that are factorised at most; fewer clients are drawn where theirs are more.
        pages: that are factorised at most, those with most visits.
        seed: of the first narrow matrix and of the draw.
    """

    kinds: tuple[str, ...] = ("product_buy", "add_to_cart", "page_visit", "search_query")
    rank: int = 64
    half_life_days: float = 60.0
    clients: int = 200_000
    entries: int = 4_000_000
    pages: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(EVENT_KINDS)
        if unknown or not self.kinds:
            raise ValueError(f"TastesConfig: kinds must be some of {list(EVENT_KINDS)}, got {list(self.kinds)}")
        if min(self.rank, self.clients, self.entries, self.pages) < 1 or not self.half_life_days > 0:
            raise ValueError(
                "TastesConfig: rank, clients, entries and pages must be >= 1 and half_life_days > 0,"
                f" got {self.rank}, {self.clients}, {self.entries}, {self.pages} and {self.half_life_days}"
            )


class ItemWeights(NamedTuple):
    """What the items of one kind weigh.

    Attributes:
        items: int32 [n], ascending: dense ids of skus or urls in the store that was factorised, codes of searches, see
            `num_items`. Others weigh nothing.
        weights: float32 [n, rank].
    """

    items: np.ndarray
    weights: np.ndarray

    def places(self, store: EventStore, kind: str) -> np.ndarray:
        """Row int32 [items of the store, 1] of every item of a kind, -1 for those that weigh nothing.

        `store`: the one that was factorised, or one of its ids (`embedding_rows`).
        """
        column = ITEM_COLUMN[kind]
        ids = np.arange(num_items(store, kind))
        ids = ids if column == "query" else store.embedding_rows(column, ids)
        known = np.append(self.items, np.int32(-1))
        found = np.searchsorted(self.items, ids)
        return np.where(known[found] == ids, found, -1).astype(np.int32)[:, None]


Weights = Mapping[str, ItemWeights]


def arrays_of_weights(weights: Weights) -> dict[str, np.ndarray]:
    """By name; for safetensors."""
    return {f"{kind}/{name}": array for kind, one in weights.items() for name, array in one._asdict().items()}


def weights_of_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, ItemWeights]:
    """The weights that `arrays` belong to, in the order of kinds.

    Raises:
        KeyError: an array is missing.
    """
    kinds = {path.split("/")[0] for path in arrays}
    return {
        kind: ItemWeights(*(arrays[f"{kind}/{name}"] for name in ItemWeights._fields))
        for kind in EVENT_KINDS
        if kind in kinds
    }


def fit_tastes(store: EventStore, cutoff_s: int, config: TastesConfig | None = None) -> dict[str, ItemWeights]:
    """Weights of the items by kind, from the events before the cutoff of the relevant clients.

    Kinds are those of the configuration that the store has. The strongest factor comes first; of both signs the one is
    taken with which the largest weight is positive. Factors of 0 where clients and items have fewer.
    """
    config = config or TastesConfig()
    history = History.of(store, cutoff_s)
    history = replace(history, clients=_drawn(history, config))
    none = np.zeros((0, config.rank), np.float32)
    columns = {kind: ItemWeights(_candidates(history, kind, config), none) for kind in history.present(config.kinds)}
    *starts, width = np.cumsum([0, *(len(one.items) for one in columns.values())]).tolist()
    start_of = dict(zip(columns, starts, strict=True))
    parts, first = [(np.zeros((2, 0), np.int64), np.zeros(0, np.float32))], 0
    for part in history.parts(config.rank):
        for kind, offsets, items, values in _logarithms(part, config, columns):
            client = first + np.repeat(np.arange(len(part.rows)), np.diff(offsets))
            seen = values >= FAINT
            parts.append((np.stack((client[seen], start_of[kind] + items[seen])), values[seen]))
        first += len(part.rows)
    indices, value = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
    length = np.sqrt(np.bincount(indices[1], value.astype(np.float64) ** 2, minlength=width))
    root = np.sqrt(np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
    value = value / root[indices[1]]
    shape = (len(history.clients), width)
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(indices), torch.from_numpy(value), shape, check_invariants=False
    ).coalesce()
    weights = _weights(matrix, config.rank, config.seed)
    weights *= np.where(length > 0, 1 / root, 0)[:, None]
    found = {}
    for kind, (items, _) in columns.items():
        weighs = np.flatnonzero(length[start_of[kind] :][: len(items)] > 0)
        found[kind] = ItemWeights(items[weighs], weights[start_of[kind] + weighs])
    return found


def _drawn(history: History, config: TastesConfig) -> np.ndarray:
    """Rows of the clients whose events are factorised, ascending."""
    store, rows = history.store, history.clients
    entries = np.zeros(len(rows), np.int64)
    for kind in history.present(config.kinds):
        events = store.rows_before(kind, history.cutoff_s)[rows] - store.kind(kind).offsets[rows]
        entries += events * (NUM_CODES if ITEM_COLUMN[kind] == "query" else 1)
    order = in_drawn_order(np.asarray(store.client_ids)[rows], config.seed)
    fit = int(np.searchsorted(np.cumsum(entries[order]), config.entries, side="right"))
    return np.sort(rows[order[: min(max(fit, 1), config.clients)]])


def num_candidates(store: EventStore, kind: str, config: TastesConfig) -> int:
    """Items of a kind that are factorised at most."""
    count = num_items(store, kind)
    return min(count, config.pages) if kind == "page_visit" else count


def _candidates(history: History, kind: str, config: TastesConfig) -> np.ndarray:
    """Items that may have weights, int32 ascending; of pages those that the clients visited most before the cutoff."""
    count = num_items(history.store, kind)
    if num_candidates(history.store, kind, config) == count:
        return np.arange(count, dtype=np.int32)
    return _most_frequent(history, kind, config.pages)


def _most_frequent(history: History, kind: str, number: int) -> np.ndarray:
    """Items of a kind that the clients had most often before the cutoff, int32 ascending."""
    counts = np.zeros(num_items(history.store, kind), np.int64)
    for part in history.parts(1):
        events = part.events(kind)
        assert events.item is not None
        counts += np.bincount(events.item[events.timestamp_s < history.cutoff_s], minlength=len(counts))
    most = np.argsort(-counts, kind="stable")[:number]
    return np.sort(most).astype(np.int32)


def taste_features(
    store: EventStore,
    cutoff_s: int,
    config: TastesConfig | None = None,
    directory: Path | None = None,
    weights: Weights | None = None,
) -> Features:
    """The factors of every client that needs a profile, from its events before the cutoff.

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        config: kinds, rank, half-life.
        directory: the result is written there and mapped from there.
        weights: what `fit_tastes` gave for this store, or for the one whose ids it has; None: they are fitted here.

    Returns:
        [U, rank] float32; among the clients of the fit each column has mean square 1. Clients in the order of the
        store; one without events, or with none that the weights know, has zeros.
    """
    config = config or TastesConfig()
    known = fit_tastes(store, cutoff_s, config) if weights is None else weights
    names = tuple(f"taste_{factor}" for factor in range(config.rank))

    def columns(part: History) -> Iterator[Column]:
        yield Column(names, "", tastes_of(part, config, known))

    return features_of(History.of(store, cutoff_s), columns, directory)


def tastes_of(part: History, config: TastesConfig, weights: Weights) -> np.ndarray:
    """The factors of the clients at hand, float32 [U, rank]."""
    found = np.zeros((len(part.rows), config.rank))
    for kind, *counted in _logarithms(part, config, weights):
        if weights[kind].weights.shape[1] != config.rank:
            raise ValueError(f"tastes_of: weights must be [n, {config.rank}], got {list(weights[kind].weights.shape)}")
        _fold_in(*counted, weights[kind].weights, found)
    return found.astype(np.float32)


def _logarithms(
    part: History, config: TastesConfig, weights: Weights
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """The rows of A before its columns are divided: kind; offsets i64 [U + 1]; rows of items i32, values float32."""
    for kind in part.present(config.kinds):
        if kind in weights and len(weights[kind].items):
            one = weights[kind]
            # Kept beside its rows, so that the address stays that of these weights.
            _, places = part.once(("taste", kind, id(one)), partial(_with_places, one, part.store, kind))
            found = part.decayed(kind, (config.half_life_days,), places, len(one.items))
            yield kind, found.offsets, found.slots, np.log1p(found.counts[:, 0]).astype(np.float32)


def _with_places(weights: ItemWeights, store: EventStore, kind: str) -> tuple[ItemWeights, np.ndarray]:
    return weights, weights.places(store, kind)


@njit
def _fold_in(offsets, items, values, weights, found):  # pragma: no cover - compiled
    for client in range(offsets.size - 1):
        for entry in range(offsets[client], offsets[client + 1]):
            for factor in range(weights.shape[1]):
                found[client, factor] += values[entry] * weights[items[entry], factor]


def _weights(matrix: Tensor, rank: int, seed: int) -> np.ndarray:
    """sqrt(rows) * right singular vectors / singular values, float32 [columns, rank]."""
    rows, columns = matrix.shape
    found = np.zeros((columns, rank), np.float32)
    width = min(rank + SPARE_FACTORS, rows, columns)
    if not width or not matrix._nnz():
        return found
    transposed = matrix.t().coalesce()
    # Of many items every copy of the right side counts: none is kept while the next one is made.
    right = torch.from_numpy(np.random.default_rng(seed).standard_normal((columns, width), np.float32))
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(torch.sparse.mm(matrix, right)).Q
        del right
        right = torch.linalg.qr(torch.sparse.mm(transposed, left)).Q
    _, values, turn = torch.linalg.svd(torch.sparse.mm(matrix, right), full_matrices=False)
    kept = min(rank, int((values > values[0] * 1e-5).sum()))
    weights = right @ turn[:kept].T
    del right
    weights *= torch.sign(weights.gather(0, weights.abs().argmax(dim=0, keepdim=True)))
    weights *= rows**0.5 / values[:kept]
    found[:, :kept] = weights.numpy()
    return found


class Cosines(NamedTuple):
    """How near items are to the labels of a list, sparse.

    Attributes:
        starts: int64 [n + 1], where the labels of each item begin.
        labels: int32 [entries], positions in the list.
        cosines: float32 [entries], > 0.
    """

    starts: np.ndarray
    labels: np.ndarray
    cosines: np.ndarray


class ItemCounts(NamedTuple):
    """What the clients at hand have of some items: log1p of decayed counts, sparse.

    Attributes:
        offsets: int64 [U + 1].
        items: int32 [entries], rows of all kinds end to end.
        values: float32 [entries].
        lengths: float32 [U, 1], root of the sum of squares of each client's values.
    """

    offsets: np.ndarray
    items: np.ndarray
    values: np.ndarray
    lengths: np.ndarray

    def products(self, cosines: Cosines, num_labels: int, rows: slice = slice(None)) -> np.ndarray:
        """Sum of the cosines of a client's items to each label, weighed by its values, float32 [rows, num_labels]."""
        clients = np.arange(len(self.offsets) - 1)[rows]
        found = np.zeros((len(clients), num_labels))
        if len(clients):
            offsets = self.offsets[clients[0] : clients[-1] + 2]
            _sum_cosines(offsets, self.items, self.values, *cosines, found)
        return found.astype(np.float32)


class ItemNeighbours(NamedTuple):
    """The items that go with the labels of some lists.

    Attributes:
        items: the items by kind of events, without weights: those that `Cosines` tell of, kinds end to end.
        lists: list -> the cosines of its labels.
    """

    items: Weights
    lists: Mapping[str, Cosines]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By name; for safetensors."""
        of_items = {f"items/{kind}": one.items for kind, one in self.items.items()}
        of_lists = {f"{name}/{key}": array for name, one in self.lists.items() for key, array in one._asdict().items()}
        return of_items | of_lists

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ItemNeighbours:
        """The neighbours that `arrays` belong to.

        Raises:
            KeyError: an array is missing.
        """
        items = {kind: _unweighed(arrays[f"items/{kind}"]) for kind in EVENT_KINDS if f"items/{kind}" in arrays}
        names = dict.fromkeys(path.split("/")[0] for path in arrays if not path.startswith("items/"))
        lists = {name: Cosines(*(arrays[f"{name}/{key}"] for key in Cosines._fields)) for name in names}
        return cls(items, lists)


def fit_neighbours(
    store: EventStore, cutoff_s: int, lists: LabelLists, config: TastesConfig, number: int
) -> ItemNeighbours:
    """The items that went with labels before the cutoff, among the relevant clients.

    Args:
        store: event store.
        cutoff_s: events before it are seen, seconds since 1970 UTC.
        lists: whose labels are bought.
        config: kinds, those with skus; half-life and the draw of clients.
        number: items of all kinds together that go with a label, the nearest ones; more where some are as near.
    """
    history = History.of(store, cutoff_s)
    history = replace(history, clients=_drawn(history, config))
    items = {
        kind: _unweighed(_most_frequent(history, kind, MOST_ITEMS))
        for kind in history.present(config.kinds)
        if kind in SKU_KINDS
    }
    slots, labels = label_slots(store, lists)
    products = np.zeros((sum(len(one.items) for one in items.values()), len(labels)))
    of_items, of_labels = np.zeros(len(products)), np.zeros(len(labels))
    for part in history.parts(config.rank):
        if "product_buy" in items:
            bought = part.decayed("product_buy", (config.half_life_days,), slots, len(labels))
            logarithms = np.log1p(bought.counts[:, 0]).astype(np.float32)
            counts = item_counts(part, config, items)
            _add_products(*counts[:3], bought.offsets, bought.slots, logarithms, products, of_items, of_labels)
    products /= np.sqrt(np.maximum(of_items, np.finfo(np.float64).tiny))[:, None]
    products /= np.sqrt(np.maximum(of_labels, np.finfo(np.float64).tiny))
    first = 0
    for one in items.values():
        rows = np.arange(first, first + len(one.items))
        for own in slots[one.items].T:
            products[rows[own >= 0], own[own >= 0]] = 0
        first += len(one.items)
    found, first = {}, 0
    for name, (ids, _) in lists.items():
        found[name] = _nearest(products[:, first : first + len(ids)], number)
        first += len(ids)
    return ItemNeighbours(items, found)


def _nearest(cosines: np.ndarray, number: int) -> Cosines:
    """The largest of each column that are above 0."""
    items, labels = cosines.shape
    least = np.zeros(labels)
    if items > number:
        least = np.partition(cosines, items - number, axis=0)[items - number]
    kept = (cosines >= least) & (cosines > 0)
    starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(kept.sum(axis=1))))
    return Cosines(starts, np.nonzero(kept)[1].astype(np.int32), cosines[kept].astype(np.float32))


def item_counts(part: History, config: TastesConfig, items: Weights) -> ItemCounts:
    """What the clients at hand have of the items, all kinds side by side."""
    clients, rows, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    starts = dict(zip(items, itertools.accumulate((len(one.items) for one in items.values()), initial=0), strict=False))
    for kind, offsets, item, value in _logarithms(part, config, items):
        clients.append(np.repeat(np.arange(len(part.rows)), np.diff(offsets)))
        rows.append(item + np.int32(starts[kind]))
        values.append(value)
    client, number = np.concatenate(clients), len(part.rows)
    order = np.argsort(client, kind="stable")
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(np.bincount(client, minlength=number))))
    lengths = np.sqrt(np.bincount(client, np.concatenate(values).astype(np.float64) ** 2, number))
    ordered = np.concatenate(rows)[order], np.concatenate(values)[order]
    return ItemCounts(offsets, *ordered, lengths.astype(np.float32)[:, None])


def _unweighed(items: np.ndarray) -> ItemWeights:
    return ItemWeights(items, np.zeros((len(items), 0), np.float32))


@njit
def _add_products(  # pragma: no cover - compiled
    offsets, items, values, label_offsets, labels, label_values, products, of_items, of_labels
):
    for client in range(offsets.size - 1):
        square = 0.0
        for entry in range(offsets[client], offsets[client + 1]):
            square += np.float64(values[entry]) * values[entry]
        if square == 0:
            continue
        for entry in range(offsets[client], offsets[client + 1]):
            item, value = items[entry], values[entry] / square
            of_items[item] += value * values[entry]
            for other in range(label_offsets[client], label_offsets[client + 1]):
                products[item, labels[other]] += value * label_values[other]
        for other in range(label_offsets[client], label_offsets[client + 1]):
            of_labels[labels[other]] += np.float64(label_values[other]) * label_values[other] / square


@njit
def _sum_cosines(offsets, items, values, starts, labels, cosines, found):  # pragma: no cover - compiled
    for client in range(offsets.size - 1):
        for entry in range(offsets[client], offsets[client + 1]):
            for near in range(starts[items[entry]], starts[items[entry] + 1]):
                found[client, labels[near]] += values[entry] * cosines[near]
