"""Multi-task model: packed transformer over the history, joined with static features, read by eight tasks through PLE.

    profile = Linear(drop(LeakyReLU(Linear([encoder(history) | features]))))
    loss    = sum_X mean over rows with a positive label of BCE_X + 0.025 (BCE_churn + BCE_add)

`wide` features of the client (counts, recency) enter the fusion, too, a linear layer adds them to the profile,
and the logits of another one are added to those of the experts: the rest of the network learns what these lack.
History [T events] and features [B, F] -> profile float32 [B, 256].

Source: docs/winner.md 4 (first place of the RecSys Challenge 2025, as far as it is public).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.models.layers.dropout import RowSequential, dropout
from ubp_fast.models.layers.encoder import EncoderConfig, SequenceEncoder, sinusoidal_positions
from ubp_fast.models.layers.event_embedding import ConcatenatedEventConfig, ConcatenatedEventEmbedding, EventSizes
from ubp_fast.models.layers.linear import Linear
from ubp_fast.models.layers.ple import PLE, PLEConfig
from ubp_fast.models.layers.shared_mean import added, count_of_all, mean_of_views
from ubp_fast.sequences.batch import ViewBatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MULTITASK_LABELS = ("churn", "add", "buy_sku", "buy_category", "buy_price", "add_sku", "add_category", "add_price")
_ACTIVITY = ("churn", "add")


def _post_norm_encoder() -> EncoderConfig:
    # The winner has one head of 412 columns, as has experiment=winner; flash_attention takes at most 256 a head.
    return EncoderConfig(heads=2, feed_forward=1536, activation="relu", norm_first=False, pooling="last")


@dataclass(frozen=True)
class MultitaskConfig:
    """The multi-task model with the winner's constants."""

    history_length: int = 64  # last events before the cutoff; docs/winner.md 4.1
    drop_repeats: bool = True  # of visits and searches, see `ViewLoader`; docs/winner.md 4.1
    events: ConcatenatedEventConfig = field(default_factory=ConcatenatedEventConfig)  # docs/winner.md 4.3
    encoder: EncoderConfig = field(default_factory=_post_norm_encoder)  # post-norm transformer; docs/winner.md 4.3
    embedding_dropout: float = 0.2  # share dropped after adding positions; docs/winner.md 4.3
    profile_width: int = 256  # columns of the profile and of the layer before it; docs/winner.md 4.4
    fusion_dropout: float = 0.01  # share dropped between the two fusion layers; docs/winner.md 4.4
    experts: PLEConfig = field(default_factory=PLEConfig)  # task experts; docs/winner.md 4.5
    activity_weight: float = 0.025  # factor of the churn and add losses; docs/winner.md 4.6
    all_clients: bool = False  # losses of lists over all clients, not those with a positive label alone; ours
    wide: tuple[str, ...] = ()  # feature sets, standardised, that a linear layer adds to the profile; ours
    wide_dropout: float = 0.4  # share of the wide features dropped in training; ours


class MultitaskModel(nn.Module):
    """Shared profile and one set of logits per task.

    Args:
        config: sizes and loss.
        sizes: vocabulary sizes of the store.
        num_features: columns F of the static features.
        outputs: label name -> number of labels (1 for churn and add), any subset of `MULTITASK_LABELS` or other
            multi-hot labels of `window_labels`; what the shop does not record is left out.
        num_wide: columns of the wide features, behind the static ones in a batch's `features`.
    """

    def __init__(
        self,
        config: MultitaskConfig,
        sizes: EventSizes,
        num_features: int,
        outputs: Mapping[str, int],
        num_wide: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.events = ConcatenatedEventEmbedding(config.events, sizes)
        self.encoder = SequenceEncoder(config.events.width, config.encoder)
        self.fusion = RowSequential(
            Linear(config.events.width + num_features + num_wide, config.profile_width),
            nn.LeakyReLU(),
            nn.Dropout(config.fusion_dropout),
            Linear(config.profile_width, config.profile_width),
        )
        self.tasks = PLE(config.profile_width, outputs, config.experts)
        self.wide = Linear(num_wide, config.profile_width, bias=False) if num_wide else None
        self.linear_tasks = nn.ModuleDict(
            {name: Linear(config.profile_width, count) for name, count in outputs.items()} if num_wide else {}
        )

    @property
    def embedding_width(self) -> int:
        """Columns of the profile."""
        return self.config.profile_width

    def forward(self, batch: ViewBatch) -> Tensor:
        """Profiles float32 [B, profile_width]."""
        history = batch.history
        if history is None or batch.features is None:
            raise ValueError("MultitaskModel: history and features must be in the batch, got None")
        rows = self.events(history)
        rows = rows + sinusoidal_positions(history.steps_to_end(), rows.shape[1], self.config.history_length)
        rows = dropout(rows, self.config.embedding_dropout, self.training, history.first_rows[0])
        encoded = self.encoder(rows, history)
        if self.wide is None:
            return self.fusion(torch.cat([encoded, batch.features], dim=1), batch.first_view).float()
        static, wide = batch.features.tensor_split([batch.features.shape[1] - self.wide.in_features], dim=1)
        wide = dropout(wide, self.config.wide_dropout, self.training, batch.first_view)
        fused = self.fusion(torch.cat([encoded, static, wide], dim=1), batch.first_view)
        return fused.float() + self.wide(wide).float()

    def label_logits(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Logits float [B, outputs] of every task, by label."""
        profile = self(batch)
        logits = self.tasks(profile, batch.first_view)
        return {name: logits[name] + layer(profile) for name, layer in self.linear_tasks.items()} or logits

    def loss(self, batch: ViewBatch) -> dict[str, Tensor]:
        """One term per task, weights applied; their sum is minimised."""
        logits = self.label_logits(batch)
        terms: dict[str, Tensor] = {}
        for name, task_logits in logits.items():
            label = batch.labels[name]
            if name in _ACTIVITY:
                loss = functional.binary_cross_entropy_with_logits(task_logits[:, 0].float(), label, reduction="none")
                terms[name] = self.config.activity_weight * mean_of_views(loss, batch)
            elif self.config.all_clients:
                loss = functional.binary_cross_entropy_with_logits(task_logits.float(), label, reduction="none")
                terms[name] = mean_of_views(loss, batch)
            else:
                terms[name] = masked_bce(task_logits.float(), label, batch.group)
        return terms


def masked_bce(logits: Tensor, labels: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Mean BCE over the rows of float32 [B, n] that have a positive label; 0 when there is none.

    With a group the rows are those of all its processes, as in `mean_of_views`.
    """
    is_counted = (labels > 0).any(dim=1).float()
    per_row = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)
    mean = (per_row * is_counted).sum() / count_of_all(is_counted.sum(), group).clamp(min=1.0)
    return mean if group is None else added(mean, group)
