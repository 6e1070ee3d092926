"""How far inputs and vectors of a run have moved from those of an earlier one.

Inputs: the population stability index of numbers per client, sum over ten bins of (p - q) ln(p / q), with bins that
hold a tenth of the earlier clients each; below .1 is little, above .25 much. Vectors are compared on the clients that
both have, by what turning the space does not change: the linear kernel alignment (CKA, 1: the same up to a turn and a
scale) and the share of the ten nearest that stay among the ten nearest. Where the columns are the same in both, also by
the share of the earlier variance that the new columns explain as they stand.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ubp_fast.events.schema import DataError
from ubp_fast.events.split import DAY_S, utc_text
from ubp_fast.profiles import Profiles
from ubp_fast.store.event_store import EventStore

BINS = 10
NEAREST = 10
MOST_COMPARED, MOST_ASKED = 5_000, 500
RECENT_DAYS = 28
# Of an empty bin: what a tenth of a client would be.
LEAST_SHARE = 1e-4


def drift(
    store: EventStore, profiles: Profiles, earlier_store: EventStore, earlier: Profiles, seed: int = 0
) -> dict[str, Any]:
    """What has moved, as plain data for JSON.

    Raises:
        DataError: the runs share hardly a client.
    """
    common = np.intersect1d(profiles.client_ids, earlier.client_ids)
    if len(common) <= NEAREST:
        raise DataError(
            f"drift: the earlier run must share more than {NEAREST} clients with this one, got {len(common)};"
            " report.against must name a run of the same shop"
        )
    inputs = []
    now, before = _measures(store), _measures(earlier_store)
    for name in before.keys() & now.keys():
        share, reference = _shares(before[name], now[name])
        inputs.append({"name": name, "psi": _stability(share, reference), "now": share, "before": reference})
    chosen = np.sort(np.random.default_rng([seed, len(common)]).permutation(common)[:MOST_COMPARED])
    mine, theirs = profiles.align(chosen), earlier.align(chosen)
    return {
        "clients": {
            "both": len(common),
            "new": profiles.num_clients - len(common),
            "gone": earlier.num_clients - len(common),
        },
        "cutoffs": [utc_text(earlier_store.cutoff_s)[:10], utc_text(store.cutoff_s)[:10]],
        "inputs": sorted(inputs, key=lambda one: (-one["psi"], one["name"])),
        "categories": _moved(earlier_store, store),
        "vectors": [
            {"block": name, **_compared(mine.select(name) if name else mine, theirs.select(name) if name else theirs)}
            for name in _blocks(mine, theirs)
        ],
    }


def _blocks(mine: Profiles, theirs: Profiles) -> list[str]:
    """Blocks that both have; "" stands for the whole where a layout is not known."""
    if mine.layout is None or theirs.layout is None:
        return [""]
    names = {block.name for block in theirs.layout.blocks}
    return [block.name for block in mine.layout.blocks if block.name in names]


def _measures(store: EventStore) -> dict[str, np.ndarray]:
    """Numbers of each client that needs a profile."""
    found = {}
    newest = np.full(store.num_clients, -1, np.int64)
    for kind in store.kinds:
        columns = store.kind(kind)
        counts = np.diff(columns.offsets)
        recent = store.rows_before(kind, store.cutoff_s - RECENT_DAYS * DAY_S)
        found[f"{kind} in all"] = counts
        found[f"{kind} in {RECENT_DAYS} days"] = columns.offsets[1:] - recent
        has = counts > 0
        newest[has] = np.maximum(newest[has], np.asarray(columns.timestamp_s)[columns.offsets[1:][has] - 1])
    found["days since the newest event"] = np.where(newest < 0, np.inf, (store.cutoff_s - newest) / DAY_S)
    return {name: values[store.is_relevant] for name, values in found.items()}


def _shares(before: np.ndarray, now: np.ndarray) -> tuple[list[float], list[float]]:
    """Share of the clients in bins of the earlier clients' deciles: now, and before."""
    finite = before[np.isfinite(before)]
    edges = np.unique(np.quantile(finite, np.linspace(0, 1, BINS + 1)[1:-1])) if len(finite) else np.zeros(0)
    shares = [
        np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(edges) + 1) / max(len(values), 1)
        for values in (now, before)
    ]
    return shares[0].tolist(), shares[1].tolist()


def _stability(share: list[float], reference: list[float]) -> float:
    p, q = (np.maximum(values, LEAST_SHARE) for values in (share, reference))
    return float(((p - q) * np.log(p / q)).sum())


def _moved(before: EventStore, now: EventStore, shown: int = 8) -> list[list[Any]]:
    """[category, share of the purchases before, share now], those that moved most first."""
    shares: list[dict[int, float]] = []
    for store in (before, now):
        bought = np.bincount(
            store.products.category, weights=store.item_counts("product_buy"), minlength=store.num_categories
        )
        total = max(float(bought.sum()), 1.0)
        ids = np.asarray(store.category_ids)
        shares.append({int(one): float(count) / total for one, count in zip(ids, bought, strict=True) if count})
    names = sorted(shares[0].keys() | shares[1].keys())
    rows = [[name, shares[0].get(name, 0.0), shares[1].get(name, 0.0)] for name in names]
    return sorted(rows, key=lambda row: -abs(row[2] - row[1]))[:shown]


def _compared(mine: Profiles, theirs: Profiles) -> dict[str, float | None]:
    """How alike vectors of the same clients are."""
    new, old = (profiles.embeddings.astype(np.float64) for profiles in (mine, theirs))
    new, old = new - new.mean(axis=0), old - old.mean(axis=0)
    cross, own, earlier = (float(np.linalg.norm(a.T @ b)) for a, b in ((new, old), (new, new), (old, old)))
    explained = None
    if mine.layout is not None and mine.layout.blocks[0].columns == theirs.layout.blocks[0].columns:  # type: ignore[union-attr]
        explained = 1 - float(((new - old) ** 2).sum() / max((old**2).sum(), 1e-30))
    kept = [len(np.intersect1d(*pair)) / len(pair[0]) for pair in zip(_near(new), _near(old), strict=True)]
    return {
        "cka": float(cross**2 / max(own * earlier, 1e-30)),
        "neighbours": float(np.mean(kept)),
        "explained": explained,
    }


def _near(vectors: np.ndarray) -> np.ndarray:
    """Rows of the nearest others by distance, i64 [n, K]; a sample of rows asks."""
    rows = np.arange(0, len(vectors), max(1, len(vectors) // MOST_ASKED))
    far = (vectors**2).sum(axis=1) - 2 * vectors[rows] @ vectors.T
    far[np.arange(len(rows)), rows] = np.inf
    return np.argpartition(far, NEAREST - 1, axis=1)[:, :NEAREST]
