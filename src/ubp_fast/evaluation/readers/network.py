"""Training of the organisers' fixed network on one task, as a plain loop over rows that lie in memory.

The same steps as theirs: seed 1278, BCE with logits, AdamW (weight decay 0.01), batches of consecutive rows, the last
one short, no shuffling; after every epoch the metrics of all rows on the labels of the validation window. What differs
is cost only: labels are made once, gradients stay in place (`NetworkLinear`), the optimizer is fused, no checkpoints
are written, and the forward pass of the validation takes more rows at a time.

precision="bf16" takes about half of the CPU time of fp32 on a processor with bf16 products. Measured drift of a task's
score on Complete Journey (2,464 clients, one row order): at most 0.0008 with raw counts as profiles, 0.0001 with log1p
of them; another row order moves the same scores by about 0.01.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ubp_fast.evaluation.readers.config import EvaluationConfig
from ubp_fast.evaluation.readers.network_linear import NetworkLinear
from ubp_fast.evaluation.readers.reader import ReaderData, TaskScore, scorable
from ubp_fast.evaluation.tasks import Metrics, TaskTargets
from ubp_fast.evaluation.tasks.metrics import epoch_metrics
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.models.downstream import DOWNSTREAM_SEED, DownstreamNetwork

VALIDATION_ROWS = 1024
# A training step costs about three validation passes over the same rows.
TRAIN_COST = 3


@dataclass(frozen=True)
class NetworkData:
    """What one training sees.

    Attributes:
        vectors: float16 or float32 [U, D] on the device; shared by all tasks.
        rows: i64 [n], rows of `vectors` in the order of training.
        train: labels of these rows in the train window.
        validation: the same in the validation window.
        popularity: [labels], or None for churn and conversion.
    """

    vectors: torch.Tensor
    rows: np.ndarray
    train: LabelMatrix
    validation: LabelMatrix
    popularity: np.ndarray | None


def cost(data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig) -> int:
    """Steps that `read` reports."""
    return len(data.orders) * sum(training_cost(int(task.included.sum()), config) for task in tasks)


def read(
    data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig, report: Callable[[int], None]
) -> list[TaskScore]:
    """Trains the network on every task in every row order, but for tasks of which no label can be scored."""
    results: list[list[tuple[Metrics, ...]]] = [[] for _ in tasks]
    skipped = []
    for task in tasks:
        labels = task.validation.take(np.flatnonzero(task.included))
        skipped.append(labels.num_labels - len(scorable(labels)) if labels.num_rows else 0)
    for order in data.orders:
        for result, task, none in zip(results, tasks, skipped, strict=True):
            rows = order[task.included[order]]
            if not len(rows) or none == task.validation.num_labels:
                report(training_cost(len(rows), config))
                result.append(())
                continue
            given = NetworkData(data.vectors, rows, task.train.take(rows), task.validation.take(rows), task.popularity)
            result.append(tuple(train_network(given, config, report)))
    return [
        TaskScore(tuple(result), task.validation.num_labels, none)
        for result, task, none in zip(results, tasks, skipped, strict=True)
    ]


def training_cost(num_rows: int, config: EvaluationConfig) -> int:
    """Steps that `train_network` reports for that many rows."""
    return config.epochs * (TRAIN_COST + 1) * num_rows


def train_network(data: NetworkData, config: EvaluationConfig, report: Callable[[int], None]) -> list[Metrics]:
    """Trains the network on one task and returns the metrics of every epoch.

    Deterministic for a given number of threads; memory is the network's (about 0.8 GB) plus logits [n, labels].

    Args:
        data: at least one row.
        config: epochs, batch size, learning rate and precision.
        report: called with the steps done since the last call; they add up to `training_cost`.
    """
    device = data.vectors.device
    rows = torch.from_numpy(data.rows).to(device)
    labels = dense_labels(data.train, device)
    network = make_network(data.vectors.shape[1], data.train.num_labels, device, config.precision == "bf16")
    layers = [module for module in network.modules() if isinstance(module, NetworkLinear)]
    others = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, fused=True)
    history = []
    for _ in range(config.epochs):
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            for module in others:
                module.zero_grad()
            logits = network(data.vectors[batch].float())
            functional.binary_cross_entropy_with_logits(logits, labels[start : start + len(batch)].float()).backward()
            optimizer.step()
            for layer in layers:
                layer.refresh()
            report(TRAIN_COST * len(batch))
        logits = predict(network, data.vectors, rows, report)
        history.append(epoch_metrics(logits, data.validation, data.popularity, config.batch_size))
    return history


def make_network(input_dim: int, num_labels: int, device: torch.device, low_precision: bool) -> DownstreamNetwork:
    """The network with the organisers' initial parameters; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(DOWNSTREAM_SEED)
        network = DownstreamNetwork(input_dim, num_labels, linear=NetworkLinear)
    network = network.to(device)
    inner = set(network.body.blocks.modules())
    for module in network.modules():
        if isinstance(module, NetworkLinear):
            # The first layer stays exact: profiles may hold large numbers (raw counts), of which bf16 keeps only
            # three digits, and the small differences between clients would be gone. First and last layer cost little.
            module.prepare(low_precision and module in inner)
    return network


@torch.no_grad()
def predict(
    network: DownstreamNetwork, vectors: torch.Tensor, rows: torch.Tensor, report: Callable[[int], None]
) -> torch.Tensor:
    """Logits float32 [n, labels] of these rows."""
    logits = torch.empty(len(rows), network.head.out_features, device=vectors.device)
    for start in range(0, len(rows), VALIDATION_ROWS):
        batch = rows[start : start + VALIDATION_ROWS]
        logits[start : start + len(batch)] = network(vectors[batch].float())
        report(len(batch))
    return logits


def dense_labels(labels: LabelMatrix, device: torch.device) -> torch.Tensor:
    """All labels as uint8 [n, labels] on the device: 100 MB for 1 M clients and 100 labels."""
    dense = torch.zeros(labels.num_rows, labels.num_labels, dtype=torch.uint8, device=device)
    entries = np.repeat(np.arange(labels.num_rows), np.diff(labels.indptr)) * labels.num_labels + labels.indices
    dense.view(-1)[torch.from_numpy(entries).to(device)] = 1
    return dense
