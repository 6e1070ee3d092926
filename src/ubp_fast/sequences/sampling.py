"""Views of clients: which client is looked at from which moment, and in which order training meets them.

A view is a pair (client row in the store, cutoff in seconds). Its history is what the client did before the cutoff, its
future what happened in the target window from the cutoff on. One client gives as many views as there are cutoffs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.split import DAY_S

if TYPE_CHECKING:
    from ubp_fast.store.event_store import EventStore

_MAX_VIEWS_FOR_QUANTILES = 20_000


class Views(NamedTuple):
    """Client rows int64 [N] and the cutoff of each in seconds, int64 [N]."""

    row: np.ndarray
    cutoff_s: np.ndarray


def rows_at(store: EventStore, name: str, views: Views, shift_s: int = 0) -> np.ndarray:
    """End row, int64 [N], of each view's events of table `name` with timestamp < cutoff + `shift_s`."""
    ends = np.empty(len(views.row), np.int64)
    for cutoff_s in np.unique(views.cutoff_s):
        chosen = views.cutoff_s == cutoff_s
        ends[chosen] = store.rows_before(name, int(cutoff_s) + shift_s)[views.row[chosen]]
    return ends


def views_at(
    store: EventStore, cutoffs_s: Sequence[int], *, with_history: bool = False, relevant_only: bool = True
) -> Views:
    """Every client at every cutoff, cutoff by cutoff in the given order, clients in store order.

    Args:
        cutoffs_s: moments in seconds since 1970 UTC, none after the store's own cutoff.
        with_history: leave out views without any event before their cutoff. Wanted in training; never at inference,
            where every client gets a vector.
        relevant_only: leave out clients that need no profile.

    Raises:
        DataError: no cutoff.
        ValueError: one after the store's.
    """
    if not cutoffs_s:
        raise DataError(
            "views_at: the history must hold a past window that a model can learn from, got none; bring a longer"
            " history, or take experiment=demo, which trains no such model"
        )
    if max(cutoffs_s) > store.cutoff_s:
        raise ValueError(
            f"views_at: cutoffs_s must not be after the store's cutoff {store.cutoff_s}, got {max(cutoffs_s)};"
            " build a store that reaches further"
        )
    chosen = np.flatnonzero(store.is_relevant) if relevant_only else np.arange(store.num_clients)
    views = Views(np.tile(chosen, len(cutoffs_s)), np.repeat(np.asarray(cutoffs_s, np.int64), len(chosen)))
    if not with_history:
        return views
    kept = rows_at(store, "timeline", views) > store.timeline.offsets[views.row]
    return Views(views.row[kept], views.cutoff_s[kept])


def training_cutoffs(store: EventStore, count: int, newest: int = 2) -> tuple[int, ...]:
    """Up to `count` past cutoffs, newest first, one target window apart; before all but the newest lies a whole window.

    Args:
        count: how many cutoffs to return at most, at least 1.
        newest: target windows from the newest cutoff to the store's cutoff, at least 1.

    Raises:
        UserError: `count` or `newest` below 1.
        DataError: not a single event before the newest cutoff.
    """
    if count < 1 or newest < 1:
        raise UserError(f"training_cutoffs: count and newest must be >= 1, got {count} and {newest}")
    window_s = store.target_days * DAY_S
    newest_s = store.cutoff_s - newest * window_s
    if newest_s <= store.first_timestamp_s:
        raise DataError(
            f"training_cutoffs: the store must reach back more than {newest * store.target_days} days, got"
            f" {(store.cutoff_s - store.first_timestamp_s) / DAY_S:.1f} days; use data of a longer period, or fewer"
            " windows.days"
        )
    oldest_s = store.first_timestamp_s + window_s
    others = (newest_s - step * window_s for step in range(1, count))
    return (newest_s, *(cutoff_s for cutoff_s in others if cutoff_s >= oldest_s))


def past_cutoffs(store: EventStore, model_count: int, stacking_count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cutoffs of the contrastive and multi-task models, and the later ones of the model that joins them.

    All are one target window apart. Both are fewer where the history is short; the first are none where it ends before
    them.

    Args:
        model_count: of the first, at most.
        stacking_count: of the later ones, at most.

    Raises:
        DataError: no event before the newest of the later ones.
    """
    window_s = store.target_days * DAY_S
    stacking = training_cutoffs(store, stacking_count, 1)
    while len(stacking) > 1 and stacking[-1] - window_s <= store.first_timestamp_s:
        stacking = stacking[:-1]
    newest = len(stacking) + 1
    if store.cutoff_s - newest * window_s <= store.first_timestamp_s:
        return (), stacking
    return training_cutoffs(store, model_count, newest), stacking


def epoch_order(num_views: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation int64 [num_views] that depends on seed and epoch only."""
    return np.random.default_rng([seed, epoch]).permutation(num_views)


def token_rows(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows `start[i] .. end[i] - 1` of all i end to end, int64 [T], and where each i begins in them, int64 [N + 1]."""
    offsets = np.zeros(len(start) + 1, np.int64)
    np.cumsum(end - start, out=offsets[1:])
    return np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], end - start), offsets


def age_quantiles_days(store: EventStore, views: Views, *, max_length: int, bins: int, seed: int = 0) -> np.ndarray:
    """Edges, float32 [bins + 1], that cut the ages of the views' last `max_length` events into equally filled bins.

    Ages are days from event to cutoff. Equal neighbours are possible where many ages coincide. At most 20,000 views are
    read, drawn with `seed`. Views without any event give 0, 1, 2, ... days.
    """
    if len(views.row) > _MAX_VIEWS_FOR_QUANTILES:
        drawn = np.random.default_rng(seed).choice(len(views.row), _MAX_VIEWS_FOR_QUANTILES, replace=False)
        views = Views(views.row[drawn], views.cutoff_s[drawn])
    end = rows_at(store, "timeline", views)
    start = np.maximum(end - max_length, store.timeline.offsets[views.row])
    rows, _ = token_rows(start, end)
    if not len(rows):
        return np.arange(bins + 1, dtype=np.float32)
    ages_s = np.repeat(views.cutoff_s, end - start) - store.timeline.timestamp_s[rows]
    return np.quantile(ages_s / DAY_S, np.linspace(0.0, 1.0, bins + 1)).astype(np.float32)
