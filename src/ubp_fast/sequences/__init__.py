"""Packed batches of client histories, assembled from the store: views, label windows, loaders. Nothing is padded,
but for `FixedSizes`, which CUDA graphs need."""

from __future__ import annotations

from ubp_fast.sequences.batch import SequenceBatch, ViewBatch
from ubp_fast.sequences.loader import ViewLoader, window_labels
from ubp_fast.sequences.padding import FixedSizes
from ubp_fast.sequences.sampling import Views, age_quantiles_days, past_cutoffs, training_cutoffs, views_at

__all__ = [
    "FixedSizes",
    "SequenceBatch",
    "ViewBatch",
    "ViewLoader",
    "Views",
    "age_quantiles_days",
    "past_cutoffs",
    "training_cutoffs",
    "views_at",
    "window_labels",
]
