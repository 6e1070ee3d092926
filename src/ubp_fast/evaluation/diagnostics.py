"""Behind the scores: who is told apart, how well the probabilities hold, from how many clients, for how long, by what.

All of it is of one reader, the ridge regression (`readers.linear`): it is the same every time, its predictions of 0/1
labels are estimates of probabilities, and the part of a block in them is a sum. It learns from the train window and is
looked at in the validation window, but for the age of profiles, where clients are held out instead. Tasks with many
labels give means over the labels that can be scored. Of more than `MOST_CLIENTS` clients a seeded sample is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import torch

from ubp_fast.evaluation.evaluator import LEAST_CLIENTS
from ubp_fast.evaluation.readers import EvaluationConfig
from ubp_fast.evaluation.readers.linear import FOLDS, OPTIONS, Option, Regression
from ubp_fast.evaluation.readers.reader import by_clients
from ubp_fast.evaluation.tasks import TaskTargets, build_targets
from ubp_fast.evaluation.tasks.metrics import auroc_per_label
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.split import DAY_S
from ubp_fast.profiles import Profiles
from ubp_fast.progress import Progress, Steps

MOST_CLIENTS = 20_000
# Every second decade: a finer penalty moves an AUROC by less than its error.
FEW_OPTIONS = OPTIONS[::4]
# Shares of the clients that are learned from while the other half is scored.
SIZES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
FALSE_POSITIVES = np.linspace(0.0, 1.0, 41)
# Fine at the top: rare labels are likely for few clients.
CALIBRATION_QUANTILES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
GROUPS = 5
# Events before the cutoff that the histories of a group have at least; clients without any come before.
LENGTHS = (1, 2, 5, 20, 100)
WEEKS = 4


def diagnose(
    components: Mapping[str, Profiles],
    events: EventDirectory,
    config: EvaluationConfig,
    choices: Mapping[str, Mapping[str, Option]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What the scores of some profiles rest on, as plain data for JSON.

    Args:
        components: name -> profiles of the same clients; the first are those that everything is asked of, the others
            stand beside them.
        events: what the clients did, with the windows.
        config: tasks and seed.
        choices: component -> task -> the option that the linear reader has chosen; where it was not asked, one of
            fewer options is chosen here.
        progress: called as progress(steps done, steps in all).

    Returns:
        `tasks`: names, `same`: task left out -> the one that asks the same; `clients`: how many were looked at;
        `roc`, `calibration`, `sizes`, `history`, `recency`, `age`: component -> task -> curve; `blocks`: task -> block
        -> what the AUROC loses without it. An AUROC stands beside its standard error.
    """
    first = next(iter(components.values()))
    ids = np.sort(first.client_ids)
    shuffled = ids[np.random.default_rng([config.seed, len(ids)]).permutation(len(ids))][:MOST_CLIENTS]
    targets = build_targets(events, shuffled, config.tasks)
    tasks, same = _different(list(targets.tasks.values()))
    groups = [[tasks[member] for member in members] for members in by_clients(tasks)]
    groups = [group for group in groups if int(group[0].included.sum()) >= 4 * FOLDS]
    counts, ages_s = activity(events, shuffled)
    found: dict[str, Any] = {
        "clients": len(shuffled),
        "of_clients": len(ids),
        "tasks": [task.task.name for task in tasks],
        "same": same,
    }
    found |= {name: {component: {} for component in components} for name in ("roc", "calibration", "sizes", "age")}
    found |= {name: {component: {} for component in components} for name in ("history", "recency")} | {"blocks": {}}
    each = FOLDS * len(FEW_OPTIONS) + len(SIZES) + FOLDS
    steps = Steps(progress, each * len(groups) * len(components))
    for name, profiles in components.items():
        vectors = torch.from_numpy(profiles.align(shuffled).embeddings)
        forecasts = None if profiles.layout is None else profiles.layout.forecasts
        for group in groups:
            rows = np.flatnonzero(group[0].included)
            train = [task.train.take(rows) for task in group]
            regression, columns = _regression(vectors, rows, train, forecasts)
            known = [(choices or {}).get(name, {}).get(task.task.name) for task in group]
            options = [option for option in known if option is not None]
            if len(options) < len(group):
                options = regression.choose(train, steps.done, FEW_OPTIONS)
            else:
                steps.done(FOLDS * len(FEW_OPTIONS))
            for task, option, own in zip(group, options, columns, strict=True):
                key = task.task.name
                predicted = regression.predicted(option, vectors, rows, own)
                labels = task.validation.take(rows)
                found["roc"][name][key] = _roc(predicted, labels)
                found["calibration"][name][key] = _calibration(predicted, labels)
                found["history"][name][key] = by_length(predicted, labels, counts[rows])
                found["recency"][name][key] = _by_group(predicted, labels, ages_s[rows] / DAY_S)
                if profiles is first and profiles.layout is not None:
                    parts = _parts(regression, option, own, vectors, rows, profiles)
                    found["blocks"][key] = _occluded(predicted, parts, labels)
            found["sizes"][name] |= _sizes(vectors, rows, group, options, forecasts, steps)
            found["age"][name] |= _ages(vectors, rows, group, options, forecasts, events, shuffled, steps)
    return found


def _different(tasks: Sequence[TaskTargets]) -> tuple[list[TaskTargets], dict[str, str]]:
    """Tasks that ask different things, and name -> the earlier task that asks the same."""
    kept: list[TaskTargets] = []
    same = {}
    for task in tasks:
        twin = next((earlier for earlier in kept if earlier.same_as(task)), None)
        if twin is None:
            kept.append(task)
        else:
            same[task.task.name] = twin.task.name
    return kept, same


def activity(events: EventDirectory, client_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Events of each client before the cutoff, f64 [U], and the age of the newest at the cutoff in seconds, f64 [U].

    A client without events has 0 of them, and an age of NaN.
    """
    cutoff_s = events.split.input_end_s
    wanted = pl.DataFrame({"client_id": client_ids})
    parts = [
        events.scan(kind).select("client_id", "timestamp_s").filter(pl.col("timestamp_s") < cutoff_s)
        for kind in events.kinds
    ]
    each = pl.concat(parts).group_by("client_id").agg(pl.len().alias("events"), pl.col("timestamp_s").max())
    known = wanted.lazy().join(each, on="client_id", how="left", maintain_order="left").collect()
    age = (cutoff_s - known["timestamp_s"]).cast(pl.Float64).fill_null(math.nan)
    return known["events"].fill_null(0).cast(pl.Float64).to_numpy(), age.to_numpy()


def _regression(
    vectors: torch.Tensor, rows: np.ndarray, labels: Sequence[LabelMatrix], forecasts: np.ndarray | None
) -> tuple[Regression, list[slice]]:
    """The regression of some clients, rows of `labels`, and the columns of each matrix among its labels."""
    bounds = np.cumsum([0, *(one.num_labels for one in labels)])
    columns = [slice(int(first), int(last)) for first, last in pairwise(bounds)]
    return Regression(vectors, rows, np.concatenate([one.dense() for one in labels], axis=1), forecasts), columns


def _scored(labels: LabelMatrix, least: int = 1) -> np.ndarray:
    """Positions i64 of the labels that at least `least` rows have and as many have not."""
    counts = labels.column_counts()
    return np.flatnonzero((counts >= least) & (counts <= labels.num_rows - least))


def _area(predicted: np.ndarray, labels: LabelMatrix, columns: np.ndarray) -> tuple[float | None, float | None]:
    """Mean AUROC of some labels and its standard error by Hanley and McNeil, labels taken as independent."""
    if not len(columns):
        return None, None
    chosen = labels.columns(columns)
    areas = auroc_per_label(torch.from_numpy(np.ascontiguousarray(predicted[:, columns])), chosen)
    have = chosen.column_counts()
    lack = labels.num_rows - have
    both, twice = areas / (2 - areas), 2 * areas**2 / (1 + areas)
    variance = areas * (1 - areas) + (have - 1) * (both - areas**2) + (lack - 1) * (twice - areas**2)
    error = math.sqrt(float((np.maximum(variance, 0) / (have * lack)).sum())) / len(columns)
    return float(areas.mean()), error


def _roc(predicted: np.ndarray, labels: LabelMatrix) -> dict[str, Any]:
    """Share of those who have the label that is found, at given shares of the others that are taken for such."""
    columns = _scored(labels)
    area, error = _area(predicted, labels, columns)
    curve = np.zeros(len(FALSE_POSITIVES))
    truth = labels.columns(columns).dense()
    for position, column in enumerate(columns):
        order = np.argsort(-predicted[:, column], kind="stable")
        hits = truth[order, position].cumsum()
        misses = np.arange(1, len(order) + 1) - hits
        last = np.append(np.diff(predicted[order, column]) != 0, True)  # ties are one step
        found, wrong = np.append(0, hits[last]) / hits[-1], np.append(0, misses[last]) / misses[-1]
        curve += np.interp(FALSE_POSITIVES, wrong, found)
    rates = (curve / len(columns)).tolist() if len(columns) else []
    return {"false": FALSE_POSITIVES.tolist(), "true": rates, "auroc": area, "error": error, "labels": len(columns)}


def _calibration(predicted: np.ndarray, labels: LabelMatrix) -> list[list[float]]:
    """[mean prediction, share that has the label, pairs] of groups of (client, label) pairs by their prediction."""
    expected, truth = np.clip(predicted.ravel(), 0, 1), labels.dense().ravel()
    order = np.argsort(expected, kind="stable")
    bounds = np.unique((np.array(CALIBRATION_QUANTILES) * len(order)).astype(int))
    groups = [order[start:end] for start, end in pairwise(bounds)]
    return [[float(expected[one].mean()), float(truth[one].mean()), len(one)] for one in groups]


def by_length(predicted: np.ndarray, labels: LabelMatrix, events: np.ndarray) -> list[dict[str, Any]]:
    """AUROC among clients whose histories are alike in length, the shortest first.

    A group has labels of its own: those that `LEAST_CLIENTS` of its clients have, and as many lack. New clients buy
    little, and what they share with all other groups would be nothing.

    Args:
        predicted: float32 [n, L].
        labels: n rows, L columns.
        events: f64 [n] of each client before the cutoff.

    Returns:
        For every group of `LENGTHS` with a client: "from" and "to", the fewest and the most events in it, "clients",
        "labels", "auroc" and its "error", both None without a label.
    """
    number = np.searchsorted(LENGTHS, events, side="right")
    found = []
    for group in np.unique(number):
        rows = np.flatnonzero(number == group)
        part = labels.take(rows)
        found.append(_group(predicted[rows], part, _scored(part, LEAST_CLIENTS), events[rows]))
    return found


def _group(predicted: np.ndarray, labels: LabelMatrix, columns: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """What is said of a group of clients by some labels; the values are those that they are alike in."""
    area, error = _area(predicted, labels, columns)
    low, high = float(values.min()), float(values.max())
    limits = {"from": None if math.isnan(low) else low, "to": None if math.isnan(high) else high}
    return {**limits, "clients": len(values), "labels": len(columns), "auroc": area, "error": error}


def _by_group(predicted: np.ndarray, labels: LabelMatrix, values: np.ndarray) -> list[dict[str, Any]]:
    """AUROC among clients with alike values: groups of one size, and one of those without a value.

    The labels are the same in all groups: those that `LEAST_CLIENTS` clients of each group have, and as many lack.
    """
    has_value = np.isfinite(values)
    number = np.full(len(values), GROUPS)
    if has_value.any():
        edges = np.unique(np.quantile(values[has_value], np.linspace(0, 1, GROUPS + 1)))
        number[has_value] = np.searchsorted(edges[1:-1], values[has_value], side="left")
    members = [np.flatnonzero(number == group) for group in np.unique(number)]
    members = [rows for rows in members if len(rows) >= 2 * LEAST_CLIENTS]
    parts = [labels.take(rows) for rows in members]
    columns = np.arange(labels.num_labels)
    for part in parts:
        columns = np.intersect1d(columns, _scored(part, LEAST_CLIENTS))
    return [_group(predicted[rows], part, columns, values[rows]) for rows, part in zip(members, parts, strict=True)]


def _parts(
    regression: Regression, option: Option, labels: slice, vectors: torch.Tensor, rows: np.ndarray, profiles: Profiles
) -> dict[str, np.ndarray]:
    """What each block adds to the predictions of one task, f64 [n, L]."""
    weight, mean = regression.weights(option, labels)
    assert profiles.layout is not None
    found = {}
    for block in profiles.layout.blocks:
        columns = torch.from_numpy(profiles.layout.columns_of(block.name))
        values = vectors[rows][:, columns].double() - mean[columns]
        found[block.name] = (values @ weight[columns]).numpy()
    return found


def _occluded(predicted: np.ndarray, parts: Mapping[str, np.ndarray], labels: LabelMatrix) -> dict[str, float | None]:
    """How much AUROC is lost when a block's columns are those of the mean client."""
    columns = _scored(labels)
    whole, _ = _area(predicted, labels, columns)
    found = {}
    for name, part in parts.items():
        without, _ = _area((predicted - part).astype(np.float32), labels, columns)
        found[name] = None if whole is None or without is None else whole - without
    return found


def _sizes(
    vectors: torch.Tensor,
    rows: np.ndarray,
    tasks: Sequence[TaskTargets],
    options: Sequence[Option],
    forecasts: np.ndarray | None,
    steps: Steps,
) -> dict[str, list[list[float | None]]]:
    """Task -> [clients learned from, AUROC of the other half of the clients, its error], ascending.

    The penalty as a whole is that of all clients: what was believed of the weights before any client was seen.
    """
    learners, scored = rows[::2], rows[1::2]
    found: dict[str, list[list[float | None]]] = {task.task.name: [] for task in tasks}
    for share in SIZES:
        some = learners[: round(share * len(learners))]
        if len(some) >= 2 * FOLDS:
            regression, columns = _regression(vectors, some, [task.train.take(some) for task in tasks], forecasts)
            for task, (scaling, penalty), own in zip(tasks, options, columns, strict=True):
                option = (scaling, penalty * len(rows) / len(some))
                predicted = regression.predicted(option, vectors, scored, own)
                labels = task.validation.take(scored)
                area, error = _area(predicted, labels, _scored(labels, LEAST_CLIENTS))
                found[task.task.name].append([len(some), area, error])
        steps.done()
    return found


def _ages(
    vectors: torch.Tensor,
    rows: np.ndarray,
    tasks: Sequence[TaskTargets],
    options: Sequence[Option],
    forecasts: np.ndarray | None,
    events: EventDirectory,
    client_ids: np.ndarray,
    steps: Steps,
) -> dict[str, list[dict[str, Any]]]:
    """Task -> AUROC of what clients do in equal parts of the target windows, by models of other clients in that part.

    The question and the vectors stay the same; only the time since the vectors' cutoff grows.
    """
    start_s, end_s = events.split.input_end_s, events.split.validation_window_s[1]
    bounds_s = np.linspace(start_s, end_s, WEEKS + 1).astype(int)
    names = [task.task.name for task in tasks]
    parts: list[dict[str, LabelMatrix]] = []
    for early in range(0, WEEKS, 2):
        windows = tuple((int(bounds_s[early + one]), int(bounds_s[early + one + 1])) for one in (0, 1))
        built = build_targets(events, client_ids, names, (windows[0], windows[1])).tasks
        parts += [{name: getattr(built[name], window) for name in names} for window in ("train", "validation")]
    labels = [[part[name].take(rows) for name in names] for part in parts]
    # A label counts where every part has clients of both classes.
    chosen = [
        np.flatnonzero(np.logical_and.reduce([_is_in(part[position], LEAST_CLIENTS) for part in labels]))
        for position in range(len(names))
    ]
    regression, columns = _regression(vectors, rows, [one for part in labels for one in part], forecasts)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, part in enumerate(labels):
        days = [float(bounds_s[number + one] - start_s) / DAY_S for one in (0, 1)]
        for position, name in enumerate(names):
            own = columns[number * len(names) + position]
            predicted = regression.held_out(options[position], own)
            area, error = _area(predicted, part[position], chosen[position])
            limits = {"from": days[0], "to": days[1], "labels": len(chosen[position])}
            found[name].append({**limits, "auroc": area, "error": error})
    steps.done(FOLDS)
    return found


def _is_in(labels: LabelMatrix, least: int) -> np.ndarray:
    return np.isin(np.arange(labels.num_labels), _scored(labels, least))
