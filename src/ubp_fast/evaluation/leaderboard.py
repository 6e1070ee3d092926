"""Comparing submissions: ranks and Borda count of several, paired differences of two.

python -m ubp_fast.evaluation.leaderboard RUN [RUN ...]      run directories, or scores.json files
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ubp_fast.evaluation.scores import Scores
from ubp_fast.events.schema import DataError
from ubp_fast.files import load_json

SCORES_FILE = "scores.json"


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
        DataError: they were not scored on the same row orders, or with another precision, or no task is common.
    """
    if first.order_digests != second.order_digests:
        raise DataError(
            "compare: both submissions must be scored on the same clients in the same row orders, got"
            f" {len(first.order_digests)} orders of {first.num_clients} clients and {len(second.order_digests)} of"
            f" {second.num_clients}; score both with the same evaluation.orders > 1 and evaluation.seed"
        )
    if first.config.precision != second.config.precision:
        raise DataError(
            f"compare: both submissions must be scored with the same precision, got {first.config.precision}"
            f" and {second.config.precision}"
        )
    common = [name for name in first.tasks if name in second.tasks]
    if not common:
        raise DataError(f"compare: submissions must share a task, got {list(first.tasks)} and {list(second.tasks)}")
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
        DataError: no submission, or they have different tasks.
    """
    if not submissions:
        raise DataError("leaderboard: submissions must not be empty, got none")
    names = list(submissions)
    tasks = list(submissions[names[0]].tasks)
    for name in names:
        if set(submissions[name].tasks) != set(tasks):
            raise DataError(
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


def read_submissions(paths: Sequence[Path]) -> dict[str, Scores]:
    """Scores of every profile in the given run directories or scores.json files, as `<path> <profile>`.

    Raises:
        DataError: no such file, or not one of scores.
    """
    submissions: dict[str, Scores] = {}
    for path in paths:
        file = path / SCORES_FILE if path.is_dir() else path
        try:
            value = load_json(file)
            parts = {"": value} if "format" in value else value
            submissions |= {f"{path} {name}".rstrip(): Scores.from_json(part) for name, part in parts.items()}
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: file must hold the scores of a run, got '{error}'; evaluate it first") from error
    return submissions


def leaderboard_table(submissions: Mapping[str, Scores]) -> Table:
    """Place by place: points, then score and rank of every task; below, the difference to the first where it is paired.

    Raises:
        DataError: see `leaderboard`.
    """
    standings = leaderboard(submissions)
    first = submissions[standings[0].name]
    table = Table(title="leaderboard: Borda points, score (rank), difference to the first", title_justify="left")
    for name in ("profile", "points", *first.tasks):
        table.add_column(name.removeprefix("propensity_"), justify="left" if name == "profile" else "right")
    for standing in standings:
        scores = submissions[standing.name]
        is_paired = (scores.order_digests, scores.config.precision) == (first.order_digests, first.config.precision)
        differences = compare(scores, first) if is_paired and scores is not first else {}
        cells = []
        for task in first.tasks:
            score, difference = scores.tasks[task].score, differences.get(task)
            cell = f"{'-' if score is None else f'{score:.4f}'} ({standing.ranks[task]})"
            if difference is not None and difference.mean is not None:
                error = difference.standard_error
                cell += f"\n{difference.mean:+.4f}" + ("" if error is None else f"±{error:.4f}")
            cells.append(cell)
        table.add_row(standing.name, str(standing.borda), *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the leaderboard of the runs named on the command line; 2 when they cannot be compared."""
    parser = argparse.ArgumentParser("python -m ubp_fast.evaluation.leaderboard", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help=f"run directory, or its {SCORES_FILE}")
    try:
        Console().print(leaderboard_table(read_submissions(parser.parse_args(arguments).runs)))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
