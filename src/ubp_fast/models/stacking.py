"""Stacking: several profiles in, one profile out that is shaped for the fixed downstream network.

    profile = GELU(Linear([block | block | ...]));  logits = heads(body(profile));  loss = sum over tasks of mean BCE

The body is the organisers' downstream network without its output layer, so a good profile here is a good profile there.
Joined blocks [B, F] -> profile float32 [B, 512].

Source: spec 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.models.downstream import HIDDEN_DIM, DownstreamBody
from ubp_fast.models.layers.linear import Linear
from ubp_fast.sequences.batch import ViewBatch

STACKING_LABELS = ("churn", "buy_sku", "buy_category")


@dataclass(frozen=True)
class StackingConfig:
    """The stacking model with the winner's constants."""

    profile_width: int = 512  # columns of the stacked profile; spec 6
    labels: tuple[str, ...] = STACKING_LABELS  # tasks, names of `window_labels`; spec 6
    standardise: bool = False  # bring every input column to mean 0, deviation 1 first; ours


class StackingModel(nn.Module):
    """Linear + GELU profile, the downstream body, one head per task.

    Args:
        config: sizes.
        num_inputs: columns F of the joined blocks.
        outputs: label name -> number of labels (1 for churn and add).
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, config: StackingConfig, num_inputs: int, outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("input_mean", torch.zeros(num_inputs))
        self.register_buffer("input_scale", torch.ones(num_inputs))
        self.profile = Linear(num_inputs, config.profile_width)
        self.body = DownstreamBody(config.profile_width, linear=Linear)
        self.heads = nn.ModuleDict({name: Linear(HIDDEN_DIM, count) for name, count in outputs.items()})

    @property
    def embedding_width(self) -> int:
        """Columns of the profile."""
        return self.config.profile_width

    def fit_scaling(self, values: np.ndarray) -> None:
        """Takes mean and deviation of the training inputs, float [N, F], when the config asks for standardised ones."""
        if not self.config.standardise:
            return
        deviation = values.std(axis=0, dtype=np.float64)
        self.input_mean.copy_(torch.as_tensor(values.mean(axis=0, dtype=np.float64)))
        self.input_scale.copy_(torch.as_tensor(1.0 / np.where(deviation > 1e-6, deviation, 1.0)))

    def forward(self, batch: ViewBatch) -> Tensor:
        """Profiles float32 [B, profile_width]."""
        if batch.features is None:
            raise ValueError("StackingModel: features must be in the batch, got None")
        scaled = (batch.features - self.input_mean) * self.input_scale
        return functional.gelu(self.profile(scaled)).float()

    def loss(self, batch: ViewBatch) -> dict[str, Tensor]:
        """One mean BCE per task; their sum is minimised."""
        hidden = self.body(self(batch))
        terms: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            logits = head(hidden).float()
            label = batch.labels[name].reshape(logits.shape)
            terms[name] = functional.binary_cross_entropy_with_logits(logits, label)
        return terms


def join_blocks(blocks: Sequence[np.ndarray], is_row_normalised: Sequence[bool]) -> np.ndarray:
    """Puts blocks float [U, F_i] of the same clients side by side, float32 [U, sum F_i].

    Args:
        blocks: component profiles and features, rows in the same client order.
        is_row_normalised: per block, divide each row by its Euclidean length (rows of zeros stay zeros); spec 5.

    Raises:
        ValueError: no block, or different numbers of rows.
    """
    if not blocks or len(blocks) != len(is_row_normalised):
        raise ValueError(
            f"join_blocks: blocks must be given with one flag each, got {len(blocks)} and {len(is_row_normalised)}"
        )
    if len({len(block) for block in blocks}) != 1:
        raise ValueError(f"join_blocks: blocks must have equal rows, got {[len(block) for block in blocks]}")
    joined = []
    for block, is_normalised in zip(blocks, is_row_normalised, strict=True):
        values: np.ndarray = np.asarray(block, np.float32)
        if is_normalised:
            length = np.linalg.norm(values, axis=1, keepdims=True)
            values = values / np.where(length > 0, length, 1.0)
        joined.append(values)
    return np.concatenate(joined, axis=1)
