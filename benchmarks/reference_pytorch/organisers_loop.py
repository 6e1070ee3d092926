"""The evaluation as users write it down today: the rival of `ubp_fast.evaluation`.

Labels are looked up per sample by filtering the purchases (again in every epoch), the optimizer is AdamW with its
defaults, metrics are torchmetrics objects updated per batch, two validation batches run before the training. Like the
organisers' loop, but without Lightning and without its checkpoint of 610 MB per epoch, which favours this rival.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import BinaryAUROC, MultilabelAUROC

from ubp_fast.events.labels import make_label_lists
from ubp_fast.events.read import EventDirectory
from ubp_fast.models.downstream import DOWNSTREAM_SEED, DownstreamNetwork
from ubp_fast.profiles import Profiles

BATCH_SIZE, EPOCHS, SANITY_BATCHES = 128, 3, 2


@dataclass(frozen=True)
class LoopTask:
    """One task: its column and labels (None for churn and conversion), and the clients' rows."""

    name: str
    column: str | None
    label_ids: np.ndarray | None
    popularity: np.ndarray | None


class ClientDataset(Dataset):
    """One client: vector and labels of a window, looked up when asked for."""

    def __init__(self, client_ids: np.ndarray, vectors: np.ndarray, purchases: pl.DataFrame, task: LoopTask) -> None:
        self.client_ids, self.vectors, self.purchases, self.task = client_ids, vectors, purchases, task

    def __len__(self) -> int:
        return len(self.client_ids)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        own = self.purchases.filter(pl.col("client_id") == self.client_ids[row])
        if self.task.column is None:
            return self.vectors[row], np.array([own.is_empty()], np.float32)
        return self.vectors[row], np.isin(self.task.label_ids, own[self.task.column].to_numpy()).astype(np.float32)


class EpochMetrics:
    """AUROC, Diversity and Novelty of one pass over the validation batches."""

    def __init__(self, task: LoopTask, num_labels: int) -> None:
        self.area = BinaryAUROC() if task.column is None else MultilabelAUROC(num_labels, average="macro")
        self.num_labels, self.popularity = num_labels, task.popularity
        self.rows, self.entropy, self.popular = 0, 0.0, 0.0

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        if self.popularity is None:
            self.area.update(logits[:, 0], labels[:, 0].long())
            return
        self.area.update(logits, labels.long())
        probability = torch.sigmoid(logits)
        share = probability / probability.sum(dim=1, keepdim=True)
        self.entropy -= float((share * torch.log2(share + 1e-9)).sum())
        popularity = torch.from_numpy(self.popularity)
        top = min(10, self.num_labels)
        values, labels_of_top = probability.topk(top, dim=1)
        weight = popularity / popularity.topk(top).values.sum()
        self.popular += float((values * weight[labels_of_top]).sum())
        self.rows += len(logits)

    def score(self) -> float:
        area = float(self.area.compute())
        if self.popularity is None:
            return area
        rows = self.rows + 1e-9
        diversity = self.entropy / (rows * float(np.log2(self.num_labels)))
        return 0.8 * area + 0.1 * diversity + 0.1 * (1 - self.popular / rows) ** 100


def validate(network: nn.Module, loader: DataLoader, metrics: EpochMetrics, batches: int | None = None) -> None:
    """One pass, or its first batches."""
    network.eval()
    with torch.no_grad():
        for number, (vectors, labels) in enumerate(loader):
            if batches is not None and number == batches:
                break
            metrics.update(network(vectors), labels)
    network.train()


def train_task(
    task: LoopTask, client_ids: np.ndarray, vectors: np.ndarray, train: pl.DataFrame, validation: pl.DataFrame
) -> list[float]:
    """Scores of every epoch."""
    num_labels = 1 if task.label_ids is None else len(task.label_ids)
    train_loader, validation_loader = (
        DataLoader(ClientDataset(client_ids, vectors, window, task), batch_size=BATCH_SIZE)
        for window in (train, validation)
    )
    torch.manual_seed(DOWNSTREAM_SEED)
    network = DownstreamNetwork(vectors.shape[1], num_labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss = nn.BCEWithLogitsLoss()
    validate(network, validation_loader, EpochMetrics(task, num_labels), SANITY_BATCHES)
    scores = []
    for _ in range(EPOCHS):
        for inputs, labels in train_loader:
            optimizer.zero_grad()
            loss(network(inputs), labels).backward()
            optimizer.step()
        metrics = EpochMetrics(task, num_labels)
        validate(network, validation_loader, metrics)
        scores.append(metrics.score())
    return scores


def evaluate_by_loop(events: EventDirectory, profiles: Profiles, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Scores of every epoch of the named tasks."""
    lists = {**make_label_lists(events, *events.split.train_window_s), **(events.label_lists or {})}
    train, validation = (
        events.purchases(*window) for window in (events.split.train_window_s, events.split.validation_window_s)
    )
    active = events.active_clients
    if active is None:
        active = events.purchases(0, events.split.input_end_s)["client_id"].unique().to_numpy()
    vectors = profiles.embeddings.astype(np.float32)
    results = {}
    for name in names:
        ids, popularity = lists.get(name, (None, None))
        task = LoopTask(name, None if ids is None else name.rsplit("_", 1)[1], ids, popularity)
        keep = np.isin(profiles.client_ids, active) if name == "churn" else np.ones(len(vectors), bool)
        results[name] = train_task(task, profiles.client_ids[keep], vectors[keep], train, validation)
    return results
