"""Comparing submissions: ranks and Borda count of several, paired differences of two.

python -m ubp_fast.evaluation.leaderboard RUN [RUN ...] [--reader READER]      run directories, or scores.json files
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

from ubp_fast.evaluation.readers import READERS
from ubp_fast.evaluation.readers.reader import mean_and_error
from ubp_fast.evaluation.scores import Scores
from ubp_fast.events.schema import DataError
from ubp_fast.files import load_json, why

SCORES_FILE = "scores.json"
# What stands there beside the profiles.
WARNINGS = "warnings"


@dataclass(frozen=True)
class Difference:
    """First minus second submission on one task.

    Attributes:
        mean: over the repetitions; None when one has no score.
        standard_error: of the mean; None with one repetition.
        per_order: difference in each row order, or sample of labels.
    """

    mean: float | None
    standard_error: float | None
    per_order: tuple[float | None, ...]


def compare(first: Scores, second: Scores, reader: str = "network") -> dict[str, Difference]:
    """Differences of two submissions (first minus second), paired by repetition, for the tasks that both have.

    The network's scores are paired by row order, which alone moves a score by about 0.01 on 2,500 clients; AUROC by
    other readers is paired by sample of labels. The difference within one repetition moves less.

    Raises:
        DataError: they were not scored on the same row orders or labels, or with another precision, or no task is
            common.
    """
    if reader == "network":
        _require_same_orders(first, second)
    mine, theirs = scores_by(first, reader), scores_by(second, reader)
    common = [name for name in mine if name in theirs]
    if not common:
        raise DataError(f"compare: submissions must share a task, got {list(mine)} and {list(theirs)} by '{reader}'")
    for name in common if reader != "network" else ():
        samples, others = ([sample.labels for sample in one.others[reader][name].samples] for one in (first, second))
        if samples != others or first.num_clients != second.num_clients:
            raise DataError(
                f"compare: both submissions must be scored on the same labels and clients, got other ones in {name} by"
                f" '{reader}'; score both with the same evaluation.orders, evaluation.seed and labels_per_task"
            )
    return {name: _difference(mine[name], theirs[name]) for name in common}


def scores_by(scores: Scores, reader: str) -> dict[str, tuple[float | None, ...]]:
    """Task -> what a submission is ranked by in every repetition: the challenge's score, by other readers AUROC."""
    if reader == "network":
        return {name: task.best for name, task in scores.tasks.items()}
    return {name: task.aurocs for name, task in scores.others.get(reader, {}).items()}


def _require_same_orders(first: Scores, second: Scores) -> None:
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


def leaderboard(submissions: Mapping[str, Scores], reader: str = "network") -> list[Standing]:
    """Ranks per task and the Borda count of the challenge: rank k of N gets N - k points; most points first.

    A task without a score ranks last. Submissions with equal points stand in the order given.

    Raises:
        DataError: no submission, or they have different tasks.
    """
    if not submissions:
        raise DataError("leaderboard: submissions must not be empty, got none")
    names = list(submissions)
    repetitions = {name: scores_by(submissions[name], reader) for name in names}
    tasks = list(repetitions[names[0]])
    for name in names:
        if set(repetitions[name]) != set(tasks) or not tasks:
            raise DataError(
                f"leaderboard: submissions must have the same tasks, got {tasks} of '{names[0]}' and"
                f" {list(repetitions[name])} of '{name}'; score all with the same evaluation.tasks and with reader"
                f" '{reader}'"
            )
    ranks: dict[str, dict[str, int]] = {name: {} for name in names}
    for task in tasks:
        values = {name: mean_and_error(repetitions[name][task])[0] for name in names}
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
            scores = {name: Scores.from_json(part) for name, part in parts.items() if name != WARNINGS}
            submissions |= {f"{path} {name}".rstrip(): one for name, one in scores.items()}
        except (FileNotFoundError, NotADirectoryError) as error:
            found = f"no {SCORES_FILE} in it; run it without evaluation=off"
            if not path.is_dir():
                found = f"'{why(error)}'; check the path"
            raise DataError(f"{path}: must be a run that was scored, or its {SCORES_FILE}, got {found}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{file}: file must hold the scores of a run, got '{error}'; name the run, or make it again"
            ) from error
    return submissions


def leaderboard_table(submissions: Mapping[str, Scores], reader: str = "network") -> Table:
    """Place by place: points, then score and rank of every task; below, the difference to the first where it is paired.

    Raises:
        DataError: see `leaderboard`.
    """
    standings = leaderboard(submissions, reader)
    first = submissions[standings[0].name]
    title = f"leaderboard by {reader}: Borda points, score (rank), difference to the first"
    table = Table(title=title, title_justify="left")
    tasks = list(scores_by(first, reader))
    for name in ("profile", "points", *tasks):
        table.add_column(name.removeprefix("propensity_"), justify="left" if name == "profile" else "right")
    for standing in standings:
        scores = submissions[standing.name]
        try:
            differences = compare(scores, first, reader) if scores is not first else {}
        except DataError:
            differences = {}  # scored on other orders or labels: there is a place, and no difference
        repetitions, cells = scores_by(scores, reader), []
        for task in tasks:
            score, difference = mean_and_error(repetitions[task])[0], differences.get(task)
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
    parser.add_argument(
        "--reader", choices=READERS, default="network", help="by whose scores; network: the challenge's"
    )
    options = parser.parse_args(arguments)
    try:
        Console().print(leaderboard_table(read_submissions(options.runs), options.reader))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
