"""The share of a client's 50 nearest that has the label: what a vector index makes of a profile.

The nearest by cosine or by Euclidean distance, whichever ranks the labels of the train window better; a client is not
its own neighbour. The label of the neighbours is that of the train window. Search is exact, float32, a block of clients
against all others; of more than `MOST_ASKED` clients a seeded sample is asked about, against all.

Vectors are taken as they are: scale and angle are part of a profile. Where a profile has a block that is made for this
search, `evaluate` gives that block. Columns with units of their own (`features`) have neither scale nor angle, they are
standardised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ubp_fast.evaluation.readers.config import EvaluationConfig
from ubp_fast.evaluation.readers.reader import LabelScores, ReaderData, by_clients, label_samples, scorable
from ubp_fast.evaluation.tasks import TaskTargets
from ubp_fast.evaluation.tasks.metrics import auroc_per_label
from ubp_fast.events.labels import LabelMatrix

NEIGHBOURS = 50
DISTANCES = ("cosine", "euclidean")
MOST_ASKED = 20_000
BLOCK_VALUES = 1 << 24


def cost(data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig) -> int:
    """Steps that `read` reports: one per client and distance."""
    clients = [int(tasks[members[0]].included.sum()) for members in by_clients(tasks)]
    return sum(len(DISTANCES) * min(count, MOST_ASKED) for count in clients)


def read(
    data: ReaderData, tasks: Sequence[TaskTargets], config: EvaluationConfig, report: Callable[[int], None]
) -> list[LabelScores]:
    """Finds the neighbours once per distance and scores every task."""
    results: dict[int, LabelScores] = {}
    for members in by_clients(tasks):
        together = [tasks[member] for member in members]
        rows = data.shuffle[together[0].included[data.shuffle]]
        train = [task.train.take(rows) for task in together]
        vectors = _comparable(data.vectors[torch.from_numpy(rows).to(data.vectors.device)].float(), data.has_units)
        asked = np.arange(min(len(rows), MOST_ASKED))
        shares = {name: _shares(vectors, name, asked, train, report) for name in DISTANCES}
        fits = {name: _fit_of_train(shares[name], train, asked) for name in DISTANCES}
        chosen = max(fits, key=fits.__getitem__)
        for member, task, share in zip(members, together, shares[chosen], strict=True):
            labels = task.validation.take(rows[asked])
            columns = scorable(labels)
            samples = label_samples(share[:, torch.from_numpy(columns)], labels, columns, config.orders, chosen)
            results[member] = LabelScores(samples, task.train.num_labels, task.train.num_labels - len(columns))
    return [results[position] for position in range(len(tasks))]


def nearest(vectors: torch.Tensor, asked: torch.Tensor, distance: str) -> torch.Tensor:
    """Positions i64 [len(asked), K] of the K = min(50, n - 1) nearest others of some clients.

    Args:
        vectors: float32 [n, D].
        asked: i64 positions.
        distance: "cosine" (a vector of zeros is at right angles to all others) or "euclidean".
    """
    if distance == "cosine":
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        likeness = vectors[asked] @ vectors.t()
    else:
        # -|a - b|^2 / 2 but for what all candidates of a client share.
        likeness = torch.addmm(-vectors.square().sum(dim=1) / 2, vectors[asked], vectors.t())
    likeness[torch.arange(len(asked), device=vectors.device), asked] = -torch.inf
    return likeness.topk(min(NEIGHBOURS, len(vectors) - 1), dim=1).indices


def _comparable(vectors: torch.Tensor, has_units: bool) -> torch.Tensor:
    """Float32 [n, D]; standardised when columns have units."""
    if not has_units or not len(vectors):
        return vectors
    deviation, mean = torch.std_mean(vectors.double(), dim=0, correction=0)
    return ((vectors - mean) / torch.where(deviation > 0, deviation, 1.0)).float()


def _shares(
    vectors: torch.Tensor,
    distance: str,
    asked: np.ndarray,
    train: Sequence[LabelMatrix],
    report: Callable[[int], None],
) -> list[torch.Tensor]:
    """Share of the neighbours that has each label, float32 [len(asked), labels] per task."""
    if distance == "euclidean":
        # Differences stay as they are; squares of a part that all clients share would drown them.
        vectors = vectors - vectors.mean(dim=0)
    known = torch.from_numpy(np.concatenate([labels.dense() for labels in train], axis=1)).to(vectors)
    shares = torch.zeros(len(asked), known.shape[1], device=vectors.device)
    step = max(1, BLOCK_VALUES // max(len(vectors), 1))
    for start in range(0, len(asked), step):
        block = torch.from_numpy(asked[start : start + step]).to(vectors.device)
        if len(vectors) > 1:
            near = nearest(vectors, block, distance)
            for column in near.unbind(dim=1):
                shares[start : start + step] += known[column]
            shares[start : start + step] /= near.shape[1]
        report(len(block))
    return list(shares.split([labels.num_labels for labels in train], dim=1))


def _fit_of_train(shares: Sequence[torch.Tensor], train: Sequence[LabelMatrix], asked: np.ndarray) -> float:
    """Mean over tasks of the AUROC in the train window: a client's own label is not among its neighbours'."""
    areas = []
    for share, labels in zip(shares, train, strict=True):
        own = labels.take(asked)
        columns = scorable(own)
        if len(columns):
            areas.append(auroc_per_label(share[:, torch.from_numpy(columns)], own.columns(columns)).mean())
    return float(np.mean(areas)) if areas else 0.0
