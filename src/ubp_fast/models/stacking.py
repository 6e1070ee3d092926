"""Stacking: several profiles in, one profile out that is shaped for the fixed downstream network.

    profile = GELU(Linear([block | block | ...]));  logits = heads(body(profile));  loss = sum over tasks of mean BCE

The body is the organisers' downstream network without its output layer, so a good profile here is a good profile there.
Joined blocks [B, F] -> profile float32 [B, 512].

Source: docs/winner.md 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.features.matrix import Features
from ubp_fast.features.scaling import Rows, log_counts, moments
from ubp_fast.models.downstream import HIDDEN_DIM, DownstreamBody
from ubp_fast.models.layers.linear import Linear
from ubp_fast.models.layers.shared_mean import mean_of_views
from ubp_fast.sequences.batch import ViewBatch

STACKING_LABELS = ("churn", "buy_sku", "buy_category")


@dataclass(frozen=True)
class StackingConfig:
    """The stacking model with the winner's constants."""

    profile_width: int = 512  # columns of the stacked profile; docs/winner.md 6
    labels: tuple[str, ...] = STACKING_LABELS  # tasks, names of `window_labels`; docs/winner.md 6
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

    def fit_scaling(self, values: Rows) -> None:
        """Takes mean and deviation of the training inputs, float [N, F], when the config asks for standardised ones."""
        if not self.config.standardise:
            return
        mean, deviation = moments(values)
        self.input_mean.copy_(torch.as_tensor(mean))
        self.input_scale.copy_(torch.as_tensor(1.0 / np.where(deviation > 1e-6, deviation, 1.0)))

    def forward(self, batch: ViewBatch) -> Tensor:
        """Profiles float32 [B, profile_width]."""
        if batch.features is None:
            raise ValueError("StackingModel: features must be in the batch, got None")
        scaled = (batch.features - self.input_mean) * self.input_scale
        return functional.gelu(self.profile(scaled)).float()

    def label_logits(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Logits float [B, outputs] of every task, by label."""
        hidden = self.body(self(batch))
        return {name: head(hidden) for name, head in self.heads.items()}

    def loss(self, batch: ViewBatch) -> dict[str, Tensor]:
        """One mean BCE per task; their sum is minimised."""
        terms: dict[str, Tensor] = {}
        for name, logits in self.label_logits(batch).items():
            label = batch.labels[name].reshape(logits.shape)
            loss = functional.binary_cross_entropy_with_logits(logits.float(), label, reduction="none")
            terms[name] = mean_of_views(loss, batch)
        return terms


class JoinedBlocks:
    """Blocks of the same clients side by side at one or several cutoffs, joined for the rows that are asked for alone.

    Args:
        cutoffs: per cutoff, its blocks [U, F_i]: component profiles and features, the same columns at every cutoff and
            rows in the same client order. Row i of the result is client i % U at cutoff i // U.
        is_count: per block, take log1p and divide each row by its Euclidean length (rows of zeros stay zeros);
            docs/winner.md 5.
        unit_length: False takes the logarithm alone.
        raw_counts: True leaves the logarithm out.

    Raises:
        ValueError: no block, or different numbers of rows.
    """

    def __init__(
        self,
        cutoffs: Sequence[Sequence[np.ndarray | Features]],
        is_count: Sequence[bool],
        unit_length: bool = True,
        raw_counts: bool = False,
    ) -> None:
        if not cutoffs or not cutoffs[0] or any(len(blocks) != len(is_count) for blocks in cutoffs):
            raise ValueError(
                f"JoinedBlocks: blocks must be given with one flag each, got {[len(blocks) for blocks in cutoffs]} and"
                f" {len(is_count)}"
            )
        rows = [block.shape[0] for blocks in cutoffs for block in blocks]
        if len(set(rows)) != 1:
            raise ValueError(f"JoinedBlocks: blocks must have equal rows, got {rows}")
        self._cutoffs, self._is_count = cutoffs, is_count
        self._unit_length, self._raw_counts = unit_length, raw_counts
        self._num_clients = rows[0]
        self.shape = (len(cutoffs) * rows[0], sum(block.shape[1] for block in cutoffs[0]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        """Rows float32 [N, sum of F_i]: a slice or i64 positions [N]."""
        if isinstance(chosen, slice) and len(self._cutoffs) == 1:
            return self._joined(0, chosen)
        chosen = np.arange(len(self))[chosen]
        values = np.empty((len(chosen), self.shape[1]), np.float32)
        cutoff, client = np.divmod(chosen, max(self._num_clients, 1))
        for each in np.unique(cutoff):
            values[cutoff == each] = self._joined(each, client[cutoff == each])
        return values

    def _joined(self, cutoff: int, rows: slice | np.ndarray) -> np.ndarray:
        blocks = self._cutoffs[cutoff]
        number = len(range(self._num_clients)[rows]) if isinstance(rows, slice) else len(rows)
        joined, first = np.empty((number, self.shape[1]), np.float32), 0
        for block, is_count in zip(blocks, self._is_count, strict=True):
            values = joined[:, first : first + block.shape[1]]
            first += block.shape[1]
            values[:] = block[rows] if isinstance(block, np.ndarray) else block.rows(rows)
            if is_count and not self._raw_counts:
                log_counts(values)
            if is_count and self._unit_length:
                length = np.linalg.norm(values, axis=1, keepdims=True)
                values /= np.where(length > 0, length, 1.0)
        return joined
