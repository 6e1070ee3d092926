"""The six tasks of the challenge, and their labels for both target windows and one list of clients.

| task | clients | label of a client in a target window |
|---|---|---|
| churn | those with a purchase before the cutoff | 1: no purchase |
| conversion | all | the same |
| propensity_category, _sku, _new_sku, _price | all | one 0/1 per listed category, sku, sku, price: bought |

The network learns from the train window and is scored on the validation window: same clients, same vectors.

Source: Synerise/recsys2025; conversion, new_sku and price are the challenge's three hidden tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from ubp_fast.events.labels import ClientRows, LabelMatrix, label_matrices, make_label_lists
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import LabelLists


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as on the leaderboard.
        column: column of the purchases that its labels are values of; None: the label is "no purchase".
        active_only: only clients with a purchase before the cutoff take part.
    """

    name: str
    column: str | None = None
    active_only: bool = False


# With one label there is no Diversity.
LEAST_LABELS = 2
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("churn", active_only=True),
        Task("conversion"),
        Task("propensity_category", "category"),
        Task("propensity_sku", "sku"),
        Task("propensity_new_sku", "sku"),
        Task("propensity_price", "price"),
    )
}


def named_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, in the order given.

    Raises:
        ValueError: an unknown name, or one that occurs twice.
    """
    for position, name in enumerate(names):
        if name not in TASKS:
            raise ValueError(f"evaluation: tasks must be among {list(TASKS)}, got '{name}'")
        if name in names[:position]:
            raise ValueError(f"evaluation: tasks must be named once, got '{name}' twice")
    return [TASKS[name] for name in names]


@dataclass(frozen=True)
class TaskTargets:
    """Labels of one task.

    Attributes:
        task: which.
        included: bool [U], clients that take part.
        train: labels of all clients in the train window, U rows.
        validation: the same for the validation window.
        popularity: f64 [labels], share of the purchases of the train window; None for churn and conversion.
    """

    task: Task
    included: np.ndarray
    train: LabelMatrix
    validation: LabelMatrix
    popularity: np.ndarray | None

    def same_as(self, other: TaskTargets) -> bool:
        """True when both ask the same of the same clients, so that one training serves both."""
        return (
            self.popularity is None
            and other.popularity is None
            and np.array_equal(self.included, other.included)
            and all(
                np.array_equal(getattr(mine, part), getattr(theirs, part))
                for mine, theirs in ((self.train, other.train), (self.validation, other.validation))
                for part in ("indptr", "indices")
            )
        )


@dataclass(frozen=True)
class Targets:
    """Labels of several tasks.

    Attributes:
        client_ids: i64 [U], rows of all matrices.
        tasks: by name; a task whose list has fewer than two labels is left out.
        missing: name of each task that was left out -> reason.
    """

    client_ids: np.ndarray
    tasks: dict[str, TaskTargets]
    missing: dict[str, str] = field(default_factory=dict)


def build_targets(
    events: EventDirectory,
    client_ids: np.ndarray,
    tasks: Sequence[str] = tuple(TASKS),
    windows: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Targets:
    """Labels of both windows in one pass over the purchases of each.

    Label lists and active clients are those of the event directory. What it lacks is made: lists by `make_label_lists`
    from the train window, active clients = those with a purchase before the input's end.

    Args:
        events: where purchases, lists and windows come from.
        client_ids: i64 [U], clients of the profiles, in their order.
        tasks: names.
        windows: two others than the train and the validation window, [first second, last second) each.

    Raises:
        DataError: lists have to be made and the train window has no purchase.
        ValueError: an unknown task.
    """
    lists, missing = _label_lists(events, [task for task in named_tasks(tasks) if task.column])
    wanted = [task for task in named_tasks(tasks) if task.name not in missing]
    columns = {task.name: (task.column, lists[task.name][0]) for task in wanted if task.column}
    clients = ClientRows(client_ids)
    labelled = []
    for start_s, end_s in windows or (events.split.train_window_s, events.split.validation_window_s):
        bought, matrices = label_matrices(clients, events.purchases(start_s, end_s), columns)
        labelled.append((_no_purchase(bought), matrices))
    (train_none, train), (validation_none, validation) = labelled
    everyone = np.ones(len(client_ids), bool)
    built = {}
    for task in wanted:
        included = np.isin(client_ids, _active_clients(events)) if task.active_only else everyone
        built[task.name] = TaskTargets(
            task,
            included,
            train.get(task.name, train_none),
            validation.get(task.name, validation_none),
            lists[task.name][1] if task.column else None,
        )
    return Targets(np.asarray(client_ids, np.int64), built, missing)


def _label_lists(events: EventDirectory, tasks: Sequence[Task]) -> tuple[LabelLists, dict[str, str]]:
    """Lists of the tasks, and why some tasks have none."""
    brought = events.label_lists or {}
    lists = dict(brought)
    if any(task.name not in lists for task in tasks):
        lists = {**make_label_lists(events, *events.split.train_window_s), **lists}
    missing = {
        task.name: f"the list that came with the data has {len(brought[task.name][0])} labels, a task needs two"
        if task.name in brought
        else f"the purchases of the train window leave fewer than two values of '{task.column}' to ask for"
        for task in tasks
        if task.name not in lists or len(lists[task.name][0]) < LEAST_LABELS
    }
    return lists, missing


def _active_clients(events: EventDirectory) -> np.ndarray:
    active = events.active_clients
    if active is None:
        past = events.scan("product_buy").filter(pl.col("timestamp_s") < events.split.input_end_s)
        active = past.select(pl.col("client_id").unique()).collect()["client_id"].to_numpy()
    return active


def _no_purchase(bought: np.ndarray) -> LabelMatrix:
    """One column: 1 = no purchase in the window."""
    ones = ~bought
    indptr = np.concatenate([[0], np.cumsum(ones)])
    return LabelMatrix(indptr.astype(np.int64), np.zeros(int(indptr[-1]), np.int32), 1)
