"""Comparing submissions: paired differences of two, ranks and Borda count of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ubp_fast.evaluation.scores import Scores


@dataclass(frozen=True)
class Difference:
    """First minus second submission on one task.

    Attributes:
        mean: over the row orders; None when an order has no score.
        standard_error: of the mean; None with one order.
        per_order: difference in each row order.
    """

    mean: float | None
    standard_error: float | None
    per_order: tuple[float | None, ...]


def compare(first: Scores, second: Scores) -> dict[str, Difference]:
    """Differences of two submissions (first minus second), paired by row order, for the tasks that both have.

    The row order alone moves a score by about 0.01 on 2,500 clients; the difference within one order moves less.

    Raises:
        ValueError: they were not scored on the same row orders, or with another precision, or no task is common.
    """
    if first.order_digests != second.order_digests:
        raise ValueError(
            "compare: both submissions must be scored on the same clients in the same row orders, got"
            f" {len(first.order_digests)} orders of {first.num_clients} clients and {len(second.order_digests)} of"
            f" {second.num_clients}; score both with the same evaluation.orders > 1 and evaluation.seed"
        )
    if first.config.precision != second.config.precision:
        raise ValueError(
            f"compare: both submissions must be scored with the same precision, got {first.config.precision}"
            f" and {second.config.precision}"
        )
    common = [name for name in first.tasks if name in second.tasks]
    if not common:
        raise ValueError(f"compare: submissions must share a task, got {list(first.tasks)} and {list(second.tasks)}")
    return {name: _difference(first.tasks[name].best, second.tasks[name].best) for name in common}


def _difference(first: tuple[float | None, ...], second: tuple[float | None, ...]) -> Difference:
    pairs = zip(first, second, strict=True)
    per_order = tuple(None if a is None or b is None else a - b for a, b in pairs)
    if None in per_order:
        return Difference(None, None, per_order)
    values = np.array(per_order, float)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Difference(float(values.mean()), error, per_order)


@dataclass(frozen=True)
class Standing:
    """Place of one submission.

    Attributes:
        name: of the submission.
        ranks: task -> rank, 1 is best; submissions with equal scores share the better rank.
        borda: sum over tasks of (submissions - rank).
    """

    name: str
    ranks: dict[str, int]
    borda: int


def leaderboard(submissions: Mapping[str, Scores]) -> list[Standing]:
    """Ranks per task and the Borda count of the challenge: rank k of N gets N - k points; most points first.

    A task without a score ranks last. Submissions with equal points stand in the order given.

    Raises:
        ValueError: no submission, or they have different tasks.
    """
    if not submissions:
        raise ValueError("leaderboard: submissions must not be empty, got none")
    names = list(submissions)
    tasks = list(submissions[names[0]].tasks)
    for name in names:
        if set(submissions[name].tasks) != set(tasks):
            raise ValueError(
                f"leaderboard: submissions must have the same tasks, got {tasks} of '{names[0]}' and"
                f" {list(submissions[name].tasks)} of '{name}'; score all with the same evaluation.tasks"
            )
    ranks: dict[str, dict[str, int]] = {name: {} for name in names}
    for task in tasks:
        values = {name: submissions[name].tasks[task].score for name in names}
        order = {name: -math.inf if value is None else value for name, value in values.items()}
        for name in names:
            ranks[name][task] = 1 + sum(order[other] > order[name] for other in names)
    standings = [Standing(name, ranks[name], sum(len(names) - rank for rank in ranks[name].values())) for name in names]
    return sorted(standings, key=lambda standing: -standing.borda)
