"""Tastes: factors of everything that clients bought or carted, also of items that stand on no list of labels.

    A[u, i] = log1p(decayed events of client u with item i) / |column i|^(1/2),    A ~ U diag(s) V^T
    tastes  = sqrt(clients) A V diag(1 / s)                                          [U, rank]

Columns are divided by the root of their length, or a few items that everybody buys would fill the first factors. Found
by subspace iteration: a few products of the sparse A with a narrow matrix, so the catalogue may be of any size. A
client's own counts and the item weights V alone make its row, also those of a client who was not there when V was
fitted.
Source: Halko, Martinsson, Tropp, Finding structure with randomness, 2011.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ubp_fast.compiled import njit
from ubp_fast.events.schema import SKU_KINDS
from ubp_fast.features.history import Column, History, features_of
from ubp_fast.features.matrix import Features
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.ids import drawn

# Counts below this, of events from 13 half-lives ago, are none: an item of which nothing else is known would weigh too
# much.
FAINT = 1e-4
SPARE_FACTORS = 16
ITERATIONS = 6


@dataclass(frozen=True)
class TastesConfig:
    """What `taste_features` factorises.

    Attributes:
        kinds: kinds with skus; an item that is bought and carted is two columns of A.
        rank: factors.
        half_life_days: an event from one half-life ago counts half of one from today.
        clients: drawn at most, whose events are factorised.
        seed: of the first narrow matrix and of the draw.
    """

    kinds: tuple[str, ...] = ("product_buy", "add_to_cart")
    rank: int = 64
    half_life_days: float = 60.0
    clients: int = 200_000
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(SKU_KINDS)
        if unknown or not self.kinds:
            raise ValueError(f"TastesConfig: kinds must be some of {list(SKU_KINDS)}, got {list(self.kinds)}")
        if self.rank < 1 or self.clients < 1 or not self.half_life_days > 0:
            raise ValueError(
                "TastesConfig: rank and clients must be >= 1 and half_life_days > 0,"
                f" got {self.rank}, {self.clients} and {self.half_life_days}"
            )


def fit_tastes(store: EventStore, cutoff_s: int, config: TastesConfig | None = None) -> np.ndarray:
    """Weights of the items, float32 [kinds, items, rank], from the events before the cutoff of the relevant clients.

    Kinds are those of the configuration that the store has. The strongest factor comes first; of both signs the one is
    taken with which the largest weight is positive. Factors of 0 where clients and items have fewer.
    """
    config = config or TastesConfig()
    history = History.of(store, cutoff_s)
    if len(history.clients) > config.clients:
        places = drawn(np.asarray(store.client_ids)[history.clients], config.clients, config.seed)
        history = replace(history, clients=history.clients[places])
    width = max(len(history.present(config.kinds)), 1) * store.num_skus
    parts, first = [(np.zeros((2, 0), np.int64), np.zeros(0, np.float32))], 0
    for part in history.parts(config.rank):
        for number, (offsets, items, values) in enumerate(_logarithms(part, config)):
            client = first + np.repeat(np.arange(len(part.rows)), np.diff(offsets))
            seen = values >= FAINT
            place = number * store.num_skus + items
            parts.append((np.stack((client[seen], place[seen])), values[seen]))
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
    return weights.reshape(-1, store.num_skus, config.rank)


def taste_features(
    store: EventStore,
    cutoff_s: int,
    config: TastesConfig | None = None,
    directory: Path | None = None,
    weights: np.ndarray | None = None,
) -> Features:
    """The factors of every client that needs a profile, from its events before the cutoff.

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        config: kinds, rank, half-life.
        directory: the result is written there and mapped from there.
        weights: what `fit_tastes` gave, float32 [kinds, items of the store, rank]; None: they are fitted here.

    Returns:
        [U, rank] float32; among the clients of the fit each column has mean square 1. Clients in the order of the
        store; one without events, or with none that the weights know, has zeros.
    """
    config = config or TastesConfig()
    if weights is None:
        weights = fit_tastes(store, cutoff_s, config)
    names = tuple(f"taste_{factor}" for factor in range(config.rank))

    def columns(part: History) -> Iterator[Column]:
        yield Column(names, "", tastes_of(part, config, weights))

    return features_of(History.of(store, cutoff_s), columns, directory)


def tastes_of(part: History, config: TastesConfig, weights: np.ndarray) -> np.ndarray:
    """The factors of the clients at hand, float32 [U, rank]; weights of all items of the store."""
    if weights.shape[1:] != (part.store.num_skus, config.rank):
        raise ValueError(
            f"tastes_of: weights must be [kinds, {part.store.num_skus}, {config.rank}], got {list(weights.shape)}"
        )
    found = np.zeros((len(part.rows), config.rank))
    for counted, of_items in zip(_logarithms(part, config), weights, strict=False):  # no kinds have weights, too
        _fold_in(*counted, of_items, found)
    return found.astype(np.float32)


def _logarithms(part: History, config: TastesConfig) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The rows of A before its columns are divided, kind by kind: offsets i64 [U + 1]; items i32, values float32."""
    num_items = part.store.num_skus
    every = part.once("every item", lambda: np.arange(num_items, dtype=np.int32)[:, None])
    for kind in part.present(config.kinds):
        found = part.decayed(kind, (config.half_life_days,), every, num_items)
        yield found.offsets, found.slots, np.log1p(found.counts[:, 0]).astype(np.float32)


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
