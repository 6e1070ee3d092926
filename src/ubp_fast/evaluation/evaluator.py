"""Profiles and labels in, scores of the six tasks out."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from ubp_fast.evaluation.metrics import Metrics
from ubp_fast.evaluation.probe import EvaluationConfig, ProbeData, probe_cost, train_probe
from ubp_fast.evaluation.scores import Scores, TaskScore
from ubp_fast.evaluation.tasks import Targets, TaskTargets
from ubp_fast.events.schema import DataError
from ubp_fast.profiles import Profiles
from ubp_fast.progress import Progress, Steps


def evaluate(
    profiles: Profiles,
    targets: Targets,
    config: EvaluationConfig,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Scores:
    """Scores profiles with the organisers' network and metrics.

    The vectors are taken as a submission holds them, in float16. Tasks with the same clients and labels (churn and
    conversion, when every client is active) are trained once.

    Args:
        profiles: of at least the clients in `targets`; their row order is that of `targets`.
        targets: labels of the tasks, see `build_targets`.
        config: tasks, precision, row orders.
        device: where the network is trained.
        progress: called as progress(steps done, steps in all).

    Raises:
        DataError: a client has no profile, a value does not fit float16, or vectors of width 0.
    """
    if profiles.dim == 0:
        raise DataError("evaluate: profiles must have at least one number per client, got width 0")
    chosen = [targets.tasks[name] for name in config.tasks if name in targets.tasks]
    vectors = _to_device(profiles.align(targets.client_ids).to_float16().embeddings, torch.device(device))
    orders = row_orders(targets.client_ids, config)
    twins = _twins(chosen)
    steps = Steps(progress, len(orders) * sum(_cost(chosen[position], config) for position in set(twins)))
    results: list[list[tuple[Metrics, ...]]] = [[] for _ in chosen]
    for order in orders:
        for position, task in enumerate(chosen):
            if twins[position] != position:
                results[position].append(results[twins[position]][-1])
                continue
            data = _probe_data(task, vectors, order)
            results[position].append(tuple(train_probe(data, config, steps.done)) if len(data.rows) else ())
    scores = {task.task.name: TaskScore(tuple(result)) for task, result in zip(chosen, results, strict=True)}
    digests = tuple(_digest(targets.client_ids[order]) for order in orders)
    missing = tuple(name for name in config.tasks if name not in targets.tasks)
    return Scores(scores, config, digests, len(targets.client_ids), missing)


def row_orders(client_ids: np.ndarray, config: EvaluationConfig) -> list[np.ndarray]:
    """Row orders i64 [U]: the submitted one, or `config.orders` seeded orders of the clients.

    A seeded order depends on the set of clients only, not on the submission's own order, so that submissions can be
    compared order by order.
    """
    if config.orders == 1:
        return [np.arange(len(client_ids))]
    ascending = np.argsort(client_ids, kind="stable")
    seeds = [np.random.default_rng([config.seed, number]) for number in range(config.orders)]
    return [ascending[generator.permutation(len(client_ids))] for generator in seeds]


def _probe_data(task: TaskTargets, vectors: torch.Tensor, order: np.ndarray) -> ProbeData:
    rows = order[task.included[order]]
    return ProbeData(vectors, rows, task.train.take(rows), task.validation.take(rows), task.popularity)


def _twins(tasks: list[TaskTargets]) -> list[int]:
    """For every task the position of the first one that asks the same."""
    return [
        next(earlier for earlier in range(position + 1) if earlier == position or tasks[earlier].same_as(task))
        for position, task in enumerate(tasks)
    ]


def _cost(task: TaskTargets, config: EvaluationConfig) -> int:
    return probe_cost(int(task.included.sum()), config)


def _to_device(vectors: np.ndarray, device: torch.device) -> torch.Tensor:
    # torch does not take read-only or byte-swapped memory; a copy of a memory-mapped file is one read of it.
    return torch.from_numpy(vectors if vectors.flags.writeable else vectors.copy()).to(device)


def _digest(client_ids: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(client_ids, "<i8").tobytes(), digest_size=8).hexdigest()
