"""How likely a client belongs to the relevant ones, as a loss weight for models that train on everybody.

Logistic regression on event counts and recency, predicted out of fold, scaled to mean 1. A store that holds relevant
clients only, or data without such a list, gives weight 1 to all.

Source: docs/winner.md 3.2; the winner's classifier is not public, this one is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ubp_fast.sequences.sampling import DAY_S

if TYPE_CHECKING:
    from ubp_fast.store.event_store import EventStore


@dataclass(frozen=True)
class MembershipConfig:
    """The membership classifier."""

    folds: int = 5  # parts, each predicted by a fit on the others; ours
    l2: float = 1.0  # penalty on the coefficients of standardised columns, in observations; ours
    steps: int = 25  # Newton steps at most; ours
    seed: int = 0  # of the division into folds


def activity_columns(store: EventStore, cutoff_s: int) -> np.ndarray:
    """log1p event counts and log1p days since the last event, per kind, float64 [U, 2 * kinds], before `cutoff_s`.

    A kind that a client never used gives the whole span of the data as its recency.
    """
    span_days = (cutoff_s - store.first_timestamp_s) / DAY_S
    columns = []
    for name in store.kinds:
        kind = store.kind(name)
        start, end = kind.offsets[:-1], store.rows_before(name, cutoff_s)
        counts = end - start
        days = np.full(store.num_clients, span_days)
        used = counts > 0
        days[used] = (cutoff_s - kind.timestamp_s[end[used] - 1].astype(np.int64)) / DAY_S
        columns += [np.log1p(counts), np.log1p(np.maximum(days, 0.0))]
    return np.stack(columns, axis=1)


def fit_logistic(columns: np.ndarray, target: np.ndarray, l2: float, steps: int) -> np.ndarray:
    """Coefficients float64 [F + 1] (intercept last, not penalised) of ridge logistic regression by Newton's method."""
    design = np.column_stack([columns, np.ones(len(columns))])
    penalty = np.append(np.full(columns.shape[1], l2), 1e-6)
    coefficients = np.zeros(design.shape[1])
    for _ in range(steps):
        chance = _sigmoid(design @ coefficients)
        gradient = design.T @ (chance - target) + penalty * coefficients
        curvature = (design * (chance * (1.0 - chance))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        coefficients -= step
        if np.abs(step).max() < 1e-10:
            break
    return coefficients


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
    target = is_relevant.astype(np.float64)
    deviation = columns.std(axis=0)
    scaled = (columns - columns.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    fold = np.random.default_rng(config.seed).permutation(len(target)) % config.folds
    chance = np.empty(len(target))
    for part in range(config.folds):
        held_out = fold == part
        coefficients = fit_logistic(scaled[~held_out], target[~held_out], config.l2, config.steps)
        chance[held_out] = _sigmoid(scaled[held_out] @ coefficients[:-1] + coefficients[-1])
    return (chance / chance.mean()).astype(np.float32)


def _sigmoid(value: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-value.clip(-500.0, 500.0)))
