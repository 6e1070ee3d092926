"""How likely a client belongs to the relevant ones, as a loss weight for models that train on everybody.

Logistic regression on event counts and recency before the view's cutoff, predicted out of fold, scaled to mean 1. A
store that holds relevant clients only, or data without such a list, gives weight 1 to all. Where most clients are no
relevant ones most weights are near 0: `weighted_views` draws views by their weight then, and gives those that are drawn
what keeps every weighted sum the same on average.

Source: docs/winner.md 3.2; the winner's classifier is not public, this one is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ubp_fast.features.scaling import Sums, in_parts, moments, one_blas_thread
from ubp_fast.sequences.sampling import DAY_S, Views, views_at

if TYPE_CHECKING:
    from ubp_fast.store.event_store import EventStore

CLIENTS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class MembershipConfig:
    """The membership classifier."""

    folds: int = 5  # parts, each predicted by a fit on the others; ours
    l2: float = 1.0  # penalty on the coefficients of standardised columns, in observations; ours
    steps: int = 25  # Newton steps at most; ours
    seed: int = 0  # of the division into folds
    clients: int = 1_000_000  # that the fits look at, drawn when there are more; ours


def activity_columns(store: EventStore, cutoff_s: int, clients: np.ndarray | None = None) -> np.ndarray:
    """log1p event counts and log1p days since the last event, per kind, before `cutoff_s`.

    A kind that a client never used gives the whole span of the data as its recency.

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        clients: rows in the store, int64 [U]; None: all.

    Returns:
        float32 [U, 2 * kinds].
    """
    clients = np.arange(store.num_clients) if clients is None else clients
    span_days = (cutoff_s - store.first_timestamp_s) / DAY_S
    columns = np.empty((len(clients), 2 * len(store.kinds)), np.float32)
    for index, name in enumerate(store.kinds):
        kind, before = store.kind(name), store.rows_before(name, cutoff_s)
        for first in range(0, len(clients), CLIENTS_AT_ONCE):
            rows = slice(first, first + CLIENTS_AT_ONCE)
            end = before[clients[rows]]
            counts = end - kind.offsets[clients[rows]]
            days = np.full(len(end), span_days)
            used = counts > 0
            days[used] = (cutoff_s - kind.timestamp_s[end[used] - 1].astype(np.int64)) / DAY_S
            columns[rows, 2 * index] = np.log1p(counts)
            columns[rows, 2 * index + 1] = np.log1p(np.maximum(days, 0.0))
    return columns


class NewtonSums(Sums[list[np.ndarray]]):
    """Gradient [F + 1] and curvature [F + 1, F + 1] of the log-likelihood of columns [N, F] and targets [N], float64.

    Args:
        coefficients: where, float64 [F + 1], the intercept last.
    """

    def __init__(self, coefficients: np.ndarray) -> None:
        super().__init__()
        self.coefficients = coefficients

    def _of(self, *rows: Any) -> list[np.ndarray]:
        columns, target = rows
        design = np.column_stack([columns, np.ones(len(columns))])
        chance = _sigmoid(design @ self.coefficients)
        return [design.T @ (chance - target), (design * (chance * (1.0 - chance))[:, None]).T @ design]

    def _result(self, part: list[np.ndarray]) -> list[np.ndarray]:
        return part


@one_blas_thread()
def fit_logistic(columns: np.ndarray, target: np.ndarray, l2: float, steps: int) -> np.ndarray:
    """Coefficients float64 [F + 1] (intercept last, not penalised) of ridge logistic regression by Newton's method."""
    penalty = np.append(np.full(columns.shape[1], l2), 1e-6)
    coefficients = np.zeros(columns.shape[1] + 1)
    for _ in range(steps):
        sums = NewtonSums(coefficients)
        for number, part in in_parts(columns):
            sums.add(number, columns[part], target[part])
        gradient, curvature = sums.finish()
        step = np.linalg.solve(curvature + np.diag(penalty), gradient + penalty * coefficients)
        coefficients -= step
        if np.abs(step).max() < 1e-10:
            break
    return coefficients


@one_blas_thread()
def membership_weights(
    columns: np.ndarray, is_relevant: np.ndarray | None, config: MembershipConfig | None = None
) -> np.ndarray:
    """Loss weights of U clients.

    Args:
        columns: float [U, F] activity before the cutoff, see `activity_columns`.
        is_relevant: bool [U], or None when the data names no relevant clients.
        config: of the classifier.

    Returns:
        float32 [U], positive, mean 1; all 1 when every client is relevant, none is, or the list is missing.
    """
    config = config or MembershipConfig()
    if is_relevant is None or is_relevant.all() or not is_relevant.any():
        return np.ones(len(columns), np.float32)
    order = np.random.default_rng(config.seed).permutation(len(columns))
    fold = (order % config.folds).astype(np.int8)
    looked_at = np.flatnonzero(order < config.clients)
    sample, target = columns[looked_at].astype(np.float64), is_relevant[looked_at].astype(np.float64)
    mean, deviation = moments(sample)
    deviation = np.where(deviation > 0, deviation, 1.0)
    sample = (sample - mean) / deviation
    chance = np.empty(len(columns))
    for part in range(config.folds):
        others = fold[looked_at] != part
        coefficients = fit_logistic(sample[others], target[others], config.l2, config.steps)
        for first in range(0, len(columns), CLIENTS_AT_ONCE):
            rows = first + np.flatnonzero(fold[first : first + CLIENTS_AT_ONCE] == part)
            chance[rows] = _sigmoid(((columns[rows] - mean) / deviation) @ coefficients[:-1] + coefficients[-1])
    return (chance / chance.mean()).astype(np.float32)


def drawn(weight: np.ndarray, expected: int, seed: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws by weight: each i by itself with chance min(1, k weight_i), k such that `expected` come on average.

    Args:
        weight: float [N], positive.
        expected: how many; N or more draws all.
        seed: of the draw.

    Returns:
        Which, int64 ascending, and weight_i / chance_i of each, float32: sums of weight times anything have the same
        expectation over the draws as over all.
    """
    if expected >= len(weight):
        return np.arange(len(weight)), weight.astype(np.float32)
    factor, sure = 0.0, np.zeros(len(weight), bool)
    while True:
        factor = (expected - sure.sum()) / weight[~sure].sum(dtype=np.float64)
        more = factor * weight >= 1
        if (more == sure).all():
            break
        sure |= more
    chance = np.minimum(1.0, factor * weight)
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(weight)) < chance)
    return chosen, (weight[chosen] / chance[chosen]).astype(np.float32)


def weighted_views(
    store: EventStore, cutoffs_s: Sequence[int], expected: int | None, seed: int
) -> tuple[Views, np.ndarray]:
    """Views of all clients of a store with events before a cutoff, and their loss weights, cutoff by cutoff.

    Args:
        store: event store.
        cutoffs_s: of the views.
        expected: how many views of all cutoffs together are drawn on average; None: every view is taken.
        seed: of the draw.

    Returns:
        N views and float32 [N], mean 1.
    """
    parts, weights = [], []
    for index, cutoff_s in enumerate(cutoffs_s):
        views = views_at(store, [cutoff_s], with_history=True, relevant_only=False)
        columns = activity_columns(store, cutoff_s, views.row)
        weight = membership_weights(columns, np.asarray(store.is_relevant)[views.row])
        if expected is not None:
            chosen, weight = drawn(weight, expected // len(cutoffs_s), [seed, index])
            views = Views(views.row[chosen], views.cutoff_s[chosen])
        parts.append(views)
        weights.append(weight)
    weight = np.concatenate(weights)
    views = Views(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return views, weight / max(float(weight.mean(dtype=np.float64)), 1e-12) if len(weight) else weight


def _sigmoid(value: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-value.clip(-500.0, 500.0)))
