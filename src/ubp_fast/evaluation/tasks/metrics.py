"""AUROC, Diversity and Novelty of one epoch's logits, by the organisers' definitions.

With logits z [n, L], p = sigmoid(z), popularity w [L]:

    AUROC      mean over labels of P(score of a positive > score of a negative), ties count half; a label without
               positives or without negatives counts 0. The score is p in every batch that holds a logit outside
               [0, 1] and z itself in the others. p is float32, so logits above about 17 tie.
    Diversity  sum over rows of -sum_l q log2(q + 1e-9), q = p / sum_l p,  / ((n + 1e-9) log2 L)
    Novelty    (1 - sum over rows and their k highest p of p w' / (n + 1e-9))^100,  w' = w / sum of the k largest w,
               k = min(10, L)
    score      AUROC alone (churn, conversion) or 0.8 AUROC + 0.1 Diversity + 0.1 Novelty

AUROC is exact, from integer counts below each positive. Sums run in float64, the organisers' in float32.
Diversity is NaN when all p of a row underflow (logits below about -88.7), Novelty when all popularity is 0.
AUROC of logits with NaN is NaN here, where the organisers' code returns some number.
Source: Synerise/recsys2025 metrics; torchmetrics (AUROC with labels of one class).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ubp_fast.events.labels import LabelMatrix

TOP_LABELS = 10
NOVELTY_POWER = 100
EPSILON = 1e-9
AUROC_WEIGHT, DIVERSITY_WEIGHT, NOVELTY_WEIGHT = 0.8, 0.1, 0.1
# Rows that Diversity and Novelty look at at once.
BLOCK_ROWS = 16_384


@dataclass(frozen=True)
class Metrics:
    """Metrics of one epoch; diversity and novelty are None for churn and conversion."""

    auroc: float
    diversity: float | None
    novelty: float | None

    @property
    def score(self) -> float:
        """Weighted score of the task; NaN when a part of it is."""
        if self.diversity is None or self.novelty is None:
            return self.auroc
        return AUROC_WEIGHT * self.auroc + DIVERSITY_WEIGHT * self.diversity + NOVELTY_WEIGHT * self.novelty


def epoch_metrics(logits: torch.Tensor, labels: LabelMatrix, popularity: np.ndarray | None, batch_size: int) -> Metrics:
    """Metrics of the logits of all clients.

    Args:
        logits: float32 [n, L], rows in the order in which they were batched; overwritten.
        labels: n rows.
        popularity: [L] of a propensity task, or None for AUROC alone.
        batch_size: rows per batch of the organisers' loop, for their rule of when to apply the sigmoid.
    """
    diversity_value = novelty_value = None
    if popularity is not None:
        diversity_value, novelty_value = diversity(logits), novelty(logits, popularity)
    batch_sigmoid_(logits, batch_size)
    return Metrics(auroc(logits, labels), diversity_value, novelty_value)


def auroc(scores: torch.Tensor, labels: LabelMatrix) -> float:
    """Mean over labels of `auroc_per_label`; 0 without labels."""
    values = auroc_per_label(scores, labels)
    return float(values.mean()) if len(values) else 0.0


def auroc_per_label(scores: torch.Tensor, labels: LabelMatrix) -> np.ndarray:
    """Area under the ROC curve of each column, f64 [L].

    Args:
        scores: float [n, L].
        labels: n rows, L columns.

    Raises:
        ValueError: other shape.
    """
    if scores.shape != (labels.num_rows, labels.num_labels):
        raise ValueError(
            f"auroc: scores must have shape [{labels.num_rows}, {labels.num_labels}] like labels,"
            f" got {list(scores.shape)}"
        )
    areas = np.zeros(labels.num_labels)
    if torch.isnan(scores).any():
        areas[:] = math.nan
        return areas
    rows = np.repeat(np.arange(labels.num_rows), np.diff(labels.indptr))
    by_label = rows[np.argsort(labels.indices, kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(labels.column_counts())])
    for label in range(labels.num_labels):
        positives = int(bounds[label + 1] - bounds[label])
        negatives = labels.num_rows - positives
        if positives == 0 or negatives == 0:
            continue
        # NumPy, in one thread: torch wakes its threads for every short search, and waits for them on a busy machine.
        column = scores[:, label].cpu().numpy()
        ascending, own = np.sort(column), np.sort(column[by_label[bounds[label] : bounds[label + 1]]])
        # Scores below plus scores up to each positive: twice its rank among all, less one half for itself.
        below = np.searchsorted(ascending, own) + np.searchsorted(ascending, own, side="right")
        areas[label] = (int(below.sum()) - positives * positives) / (2 * positives * negatives)
    return areas


def has_both_classes(labels: LabelMatrix) -> np.ndarray:
    """Bool [L]: labels that some rows have and others have not, so that an AUROC is defined."""
    counts = labels.column_counts()
    return (counts > 0) & (counts < labels.num_rows)


def batch_sigmoid_(logits: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Applies the sigmoid in place to every batch of rows with a value outside [0, 1]; returns `logits` [n, L]."""
    row_outside = ((logits < 0) | (logits > 1)).any(dim=1)
    padded = functional.pad(row_outside, (0, -len(logits) % batch_size))
    outside = padded.view(-1, batch_size).any(dim=1)
    if outside.all():
        return logits.sigmoid_()
    for number in outside.nonzero()[:, 0].tolist():
        logits[number * batch_size : (number + 1) * batch_size].sigmoid_()
    return logits


def diversity(logits: torch.Tensor) -> float:
    """Mean entropy of the normalised probabilities of a row, as a share of the largest possible; 0 without rows."""
    num_rows, num_labels = logits.shape
    total = 0.0
    for block in logits.split(BLOCK_ROWS):
        probability = block.sigmoid()
        share = probability / probability.sum(dim=1, keepdim=True)
        total -= float((share * (share + EPSILON).log2_()).sum(dim=1).double().sum())
    largest = (num_rows + EPSILON) * math.log2(num_labels)
    return total / largest if largest else math.nan


def novelty(logits: torch.Tensor, popularity: np.ndarray, top_labels: int = TOP_LABELS) -> float:
    """How little the most probable labels of the rows are the popular ones; 1 without rows.

    Args:
        logits: float32 [n, L].
        popularity: [L], any scale.
        top_labels: how many labels of a row count; at most L.

    Raises:
        ValueError: popularity has another length.
    """
    num_labels = logits.shape[1]
    if popularity.shape != (num_labels,):
        raise ValueError(f"novelty: popularity must have shape [{num_labels}] like the labels, got {popularity.shape}")
    top = min(top_labels, num_labels)
    weight = torch.as_tensor(popularity.astype(np.float64), device=logits.device)
    largest = weight.topk(top).values.sum()
    total = 0.0
    for block in logits.split(BLOCK_ROWS):
        values, labels = block.sigmoid().topk(top, dim=1)
        total += float((values * (weight / largest)[labels]).sum())
    return (1.0 - total / (len(logits) + EPSILON)) ** NOVELTY_POWER
