"""Profiles and labels in, scores of the six tasks out."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ubp_fast.evaluation.readers import EvaluationConfig, LabelScores, Reader, ReaderData, TaskScore, reader_named
from ubp_fast.evaluation.scores import Scores, task_from_json, task_to_json
from ubp_fast.evaluation.tasks import Targets, TaskTargets
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.files import load_json, write_json
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import NEAR
from ubp_fast.progress import Progress, Steps

# Of fewer clients of one class an AUROC says little.
LEAST_CLIENTS = 10
# Readers that may learn from some vectors and read others.
READ_OTHERS = {"linear", "boosting"}


def evaluate(
    profiles: Profiles,
    targets: Targets,
    config: EvaluationConfig,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    has_units: bool = False,
    read: Profiles | None = None,
    keep: Path | None = None,
) -> Scores:
    """Scores profiles with every reader that `config` names.

    Tasks with the same clients and labels (churn and conversion, when every client is active) are read once.

    Args:
        profiles: of at least the clients in `targets`; their row order is that of `targets`.
        targets: labels of the tasks, see `build_targets`.
        config: tasks, readers, precision, row orders.
        device: where readers compute (boosting: the CPU).
        progress: called as progress(steps done, steps in all); a step of one reader takes another time than of another.
        has_units: columns are measurements with units of their own, not a vector to be submitted: they stay float32,
            and the neighbours are those by standardised columns. Otherwise vectors are taken as a submission holds
            them, in float16.
        read: other vectors of the same clients and width, which are scored; `profiles` are learned from. None: the
            same. Of the readers `linear` and `boosting` know it.
        keep: a folder where the network's scores of every task and row order are kept until all are there, for the same
            evaluation to go on with when it was interrupted; nothing else may use it.

    Raises:
        DataError: a client has no profile, a value does not fit float16, or vectors of width 0.
        UserError: a reader needs a package that is not installed, or reads what it has learned from only.
    """
    if profiles.dim == 0:
        raise DataError("evaluate: profiles must have at least one number per client, got width 0")
    readers = {name: reader_named(name) for name in config.readers}
    if read is not None and not set(readers) <= READ_OTHERS:
        raise UserError(f"evaluate: readers of other vectors must be among {sorted(READ_OTHERS)}, got {list(readers)}")
    aligned = profiles.align(targets.client_ids)
    data = _read_data(aligned, targets, config, device, has_units, read)
    chosen, twins = _asked(targets, config)
    different = sorted(set(twins))
    asked = [chosen[position] for position in different]
    steps = Steps(progress, sum(reader.cost(data, asked, config) for reader in readers.values()))
    challenge: dict[str, TaskScore] = {}
    others: dict[str, dict[str, LabelScores]] = {}
    for name, reader in readers.items():
        if name == "network" and keep is not None:
            results: Sequence[TaskScore | LabelScores] = _kept_one_by_one(reader, data, asked, config, steps.done, keep)
        else:
            results = reader.read(_of_reader(name, data, aligned), asked, config, steps.done)
        for task, twin in zip(chosen, twins, strict=True):
            result = results[different.index(twin)]
            if isinstance(result, TaskScore):
                challenge[task.task.name] = result
            else:
                others.setdefault(name, {})[task.task.name] = result
    digests = tuple(_digest(targets.client_ids[order]) for order in data.orders)
    missing = {name: reason for name, reason in targets.missing.items() if name in config.tasks}
    remarks = {task.task.name: text for task in chosen if (text := _few(task))}
    return Scores(challenge, config, digests, len(targets.client_ids), missing, others, remarks)


def keep_share(
    load: Callable[[], tuple[Profiles, Targets]],
    config: EvaluationConfig,
    device: str,
    has_units: bool,
    keep: Path,
    rank: int,
    world: int,
    progress: Progress | None,
) -> None:
    """Trains the network on the tasks and row orders with the numbers rank, rank + world, ..., for `evaluate(keep=)`.

    The scores are those of one process with as many threads, bit by bit. Every one lies in a file when it is there, so
    that an evaluation whose processes have ended goes on with what is missing.

    Args:
        load: gives profiles and targets.
        config, device, has_units, keep, progress: as for `evaluate`, with the same values.
        rank, world: this process among those that share the work.
    """
    profiles, targets = load()
    reader = reader_named("network")
    data = _read_data(profiles.align(targets.client_ids), targets, config, device, has_units, None)
    chosen, twins = _asked(targets, config)
    mine = _trainings(data, [chosen[position] for position in sorted(set(twins))], keep)[rank::world]
    steps = Steps(progress, sum(reader.cost(one, [task], config) for _, one, task in mine))
    for training in mine:
        _keep_one(reader, training, config, steps.done)


def _read_data(
    aligned: Profiles,
    targets: Targets,
    config: EvaluationConfig,
    device: torch.device | str,
    has_units: bool,
    read: Profiles | None,
) -> ReaderData:
    vectors = _to_device((aligned if has_units else aligned.to_float16()).embeddings, torch.device(device))
    others_read = None if read is None else _to_device(read.align(targets.client_ids).embeddings, torch.device(device))
    orders, shuffle = row_orders(targets.client_ids, config), _shuffle(targets.client_ids, config, 0)
    forecasts = None if aligned.layout is None else aligned.layout.forecasts
    return ReaderData(vectors, tuple(orders), shuffle, has_units, others_read, forecasts)


def _asked(targets: Targets, config: EvaluationConfig) -> tuple[list[TaskTargets], list[int]]:
    """The tasks, and for each the position of the first one that asks the same."""
    chosen = [targets.tasks[name] for name in config.tasks if name in targets.tasks]
    return chosen, _twins(chosen)


# A file for the score of a task in the one row order of some data.
_Training = tuple[Path, ReaderData, TaskTargets]


def _trainings(data: ReaderData, tasks: Sequence[TaskTargets], folder: Path) -> list[_Training]:
    """All trainings of the network; the folder for their scores is there."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        (folder / f"{task.task.name}-{number}.json", replace(data, orders=(order,)), task)
        for number, order in enumerate(data.orders)
        for task in tasks
    ]


def _keep_one(reader: Reader, training: _Training, config: EvaluationConfig, report: Callable[[int], None]) -> None:
    """Trains where there is no score in the file."""
    path, one, task = training
    if path.exists():
        report(reader.cost(one, [task], config))
    else:
        write_json(path, task_to_json(reader.read(one, [task], config, report)[0]))  # type: ignore[arg-type]


def _kept_one_by_one(
    reader: Reader,
    data: ReaderData,
    tasks: Sequence[TaskTargets],
    config: EvaluationConfig,
    report: Callable[[int], None],
    folder: Path,
) -> list[TaskScore]:
    """The network's scores, a training at a time; what lies in the folder is not trained again."""
    trainings = _trainings(data, tasks, folder)
    for training in trainings:
        _keep_one(reader, training, config, report)
    scores = [task_from_json(load_json(path)) for path, _, _ in trainings]
    shutil.rmtree(folder)
    of_tasks = (scores[position :: len(tasks)] for position in range(len(tasks)))
    return [replace(parts[0], orders=tuple(part.orders[0] for part in parts)) for parts in of_tasks]


def _of_reader(name: str, data: ReaderData, profiles: Profiles) -> ReaderData:
    """What a reader looks at: a search for neighbours the block that is made for it, where the profile has it."""
    layout = profiles.layout
    if name != "neighbours" or layout is None or NEAR not in [block.name for block in layout.blocks]:
        return data
    return replace(data, vectors=data.vectors[:, torch.from_numpy(layout.columns_of(NEAR))])


def row_orders(client_ids: np.ndarray, config: EvaluationConfig) -> list[np.ndarray]:
    """Row orders i64 [U]: the submitted one, or `config.orders` seeded orders of the clients.

    A seeded order depends on the set of clients only, not on the submission's own order, so that submissions can be
    compared order by order.
    """
    if config.orders == 1:
        return [np.arange(len(client_ids))]
    return [_shuffle(client_ids, config, number) for number in range(config.orders)]


def _shuffle(client_ids: np.ndarray, config: EvaluationConfig, number: int) -> np.ndarray:
    ascending = np.argsort(client_ids, kind="stable")
    return ascending[np.random.default_rng([config.seed, number]).permutation(len(client_ids))]


def _twins(tasks: list[TaskTargets]) -> list[int]:
    """For every task the position of the first one that asks the same."""
    return [
        next(earlier for earlier in range(position + 1) if earlier == position or tasks[earlier].same_as(task))
        for position, task in enumerate(tasks)
    ]


def _few(task: TaskTargets) -> str:
    """What is said of labels that hardly any client has, or hardly any lacks; "" when there are none."""
    labels = task.validation.take(np.flatnonzero(task.included))
    counts = labels.column_counts()
    smaller = np.minimum(counts, labels.num_rows - counts)
    few = int(((smaller > 0) & (smaller < LEAST_CLIENTS)).sum())
    if not few:
        return ""
    labels_have = "the label has" if labels.num_labels == 1 else f"{few} of {labels.num_labels} labels have"
    return (
        f"{labels_have} fewer than {LEAST_CLIENTS} clients of one class in the validation window, an AUROC of so few is"
        " mostly chance"
    )


def _to_device(vectors: np.ndarray, device: torch.device) -> torch.Tensor:
    # torch does not take read-only or byte-swapped memory; a copy of a memory-mapped file is one read of it.
    return torch.from_numpy(vectors if vectors.flags.writeable else vectors.copy()).to(device)


def _digest(client_ids: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(client_ids, "<i8").tobytes(), digest_size=8).hexdigest()
