"""Tastes: factors of everything that clients bought or carted, also of items that stand on no list of labels.

    A[u, i] = log1p(decayed events of client u with item i) / |column i|^(1/2),    A ~ U diag(s) V^T
    tastes  = sqrt(clients) U                                                        [U, rank]

Columns are divided by the root of their length, or a few items that everybody buys would fill the first factors. Found
by subspace iteration: a few products of the sparse A with a narrow matrix, so the catalogue may be of any size.
Source: Halko, Martinsson, Tropp, Finding structure with randomness, 2011.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ubp_fast.events.schema import SKU_KINDS
from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History, features_of
from ubp_fast.features.matrix import Features
from ubp_fast.store.event_store import EventStore

SPARE_FACTORS = 16
ITERATIONS = 6


@dataclass(frozen=True)
class TastesConfig:
    """What `taste_features` factorises.

    Attributes:
        kinds: kinds with skus; an item that is bought and carted is two columns of A.
        rank: factors.
        half_life_days: an event from one half-life ago counts half of one from today.
        seed: of the first narrow matrix.
    """

    kinds: tuple[str, ...] = ("product_buy", "add_to_cart")
    rank: int = 64
    half_life_days: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(SKU_KINDS)
        if unknown or not self.kinds:
            raise ValueError(f"TastesConfig: kinds must be some of {list(SKU_KINDS)}, got {list(self.kinds)}")
        if self.rank < 1 or not self.half_life_days > 0:
            raise ValueError(
                f"TastesConfig: rank must be >= 1 and half_life_days > 0, got {self.rank} and {self.half_life_days}"
            )


def taste_features(
    store: EventStore, cutoff_s: int, config: TastesConfig | None = None, directory: Path | None = None
) -> Features:
    """The factors of every client that needs a profile; they are fitted on these clients' events before the cutoff.

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        config: kinds, rank, half-life.
        directory: the result is written there and mapped from there.

    Returns:
        [U, rank] float32, each column of mean square 1, the strongest first; of both signs the one is taken with which
        the largest item weight is positive. Columns of 0 where clients and items have fewer factors. Clients in the
        order of the store; one without events has zeros.
    """
    config = config or TastesConfig()
    history = History.of(store, cutoff_s)
    factors = _factors(_decayed_counts(history, config), config.rank, config.seed)

    def columns(part: History) -> list[Column]:
        rows = np.searchsorted(history.clients, part.rows)
        return [Column(tuple(f"taste_{factor}" for factor in range(config.rank)), "", factors[rows])]

    return features_of(history, columns, directory)


def _decayed_counts(history: History, config: TastesConfig) -> Tensor:
    """A as a coalesced sparse tensor float32 [U, kinds * items]."""
    kinds = history.present(config.kinds)
    num_items = history.store.num_skus
    width = max(len(kinds), 1) * num_items
    places, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    first = 0
    for part in history.parts(config.rank):
        for number, kind in enumerate(kinds):
            events = part.events(kind)
            assert events.item is not None
            client = first + np.repeat(np.arange(len(part.rows)), np.diff(events.offsets))
            seen = np.flatnonzero(events.timestamp_s < history.cutoff_s)
            age_days = (history.cutoff_s - events.timestamp_s[seen].astype(np.int64)) / DAY_S
            place = client[seen] * width + number * num_items + events.item[seen]
            different, which = np.unique(place, return_inverse=True)
            decayed = np.bincount(which, 0.5 ** (age_days / config.half_life_days), minlength=len(different))
            places.append(different)
            values.append(np.log1p(decayed).astype(np.float32))
        first += len(part.rows)
    place, value = np.concatenate(places), np.concatenate(values)
    column = place % width
    length = np.sqrt(np.bincount(column, value.astype(np.float64) ** 2, minlength=width))
    value /= np.sqrt(np.maximum(length, np.finfo(np.float32).tiny))[column].astype(np.float32)
    indices = torch.from_numpy(np.stack((place // width, column)))
    shape = (len(history.clients), width)
    return torch.sparse_coo_tensor(indices, torch.from_numpy(value), shape, check_invariants=False).coalesce()


def _factors(matrix: Tensor, rank: int, seed: int) -> np.ndarray:
    """sqrt(rows) * left singular vectors, float32 [rows, rank]."""
    rows, columns = matrix.shape
    found = np.zeros((rows, rank), np.float32)
    width = min(rank + SPARE_FACTORS, rows, columns)
    if not width or not matrix._nnz():
        return found
    transposed = matrix.t().coalesce()
    start = np.random.default_rng(seed).standard_normal((columns, width), np.float32)
    right = torch.from_numpy(start)
    for _ in range(ITERATIONS):
        left = torch.linalg.qr(torch.sparse.mm(matrix, right)).Q
        right = torch.linalg.qr(torch.sparse.mm(transposed, left)).Q
    _, values, turn = torch.linalg.svd(torch.sparse.mm(matrix, right), full_matrices=False)
    kept = min(rank, int((values > values[0] * 1e-5).sum()))
    weights = right @ turn[:kept].T
    sign = torch.sign(weights.gather(0, weights.abs().argmax(dim=0, keepdim=True)))
    # A client's own counts alone decide its row: nothing is exactly 0.
    found[:, :kept] = torch.sparse.mm(matrix, weights * sign * (rows**0.5 / values[:kept])).numpy()
    return found
