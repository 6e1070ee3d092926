"""Contrastive two-tower model: a client's history and what follows it in the target window point in one direction.

    loss = NT-Xent(future, history) + w * BCE(head(history), "no event at all in the future")
           [+ v * NT-Xent(state after event t, event t + 1)] [+ probes]

The towers share every table and the projections of event content; only the history tower knows the age of an event.
Clients without a future event neither pull nor push (`valid`), clients who are likely to matter weigh more (`weight`).
`wide` features of the client (counts, recency) are added to what the history tower gives.
The next event of a history is an objective of ours, off by default: it teaches from every event, not from every client.
History [T events] -> profile float32 [B, width].

Source: docs/winner.md 3 (first place of the RecSys Challenge 2025, as far as it is public).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.events.schema import UserError
from ubp_fast.kernels import nt_xent
from ubp_fast.models.layers.auroc import BinnedAuroc
from ubp_fast.models.layers.dropout import dropout
from ubp_fast.models.layers.encoder import EncoderConfig, SequenceEncoder
from ubp_fast.models.layers.event_embedding import EventSizes, ProjectedEventConfig, ProjectedEventEmbedding
from ubp_fast.models.layers.linear import Linear
from ubp_fast.models.layers.shared_mean import mean_of_views
from ubp_fast.sequences.batch import SequenceBatch, ViewBatch, places

# What the winner's probes tell, see `window_labels`.
PROBE_LABELS = ("churn", "buy_category", "buy_sku")


def _future_tower() -> EncoderConfig:
    return EncoderConfig(layers=1, pooling="mean")


@dataclass(frozen=True)
class ContrastiveConfig:
    """The contrastive model with the winner's constants."""

    history_length: int = 64  # last events before the cutoff; docs/winner.md 3.3
    drop_repeats: bool = False  # of visits and searches, see `ViewLoader`; ours
    future_length: int = 64  # first events of the target window; docs/winner.md 3.3
    events: ProjectedEventConfig = field(default_factory=ProjectedEventConfig)  # event vectors; docs/winner.md 3.4
    history: EncoderConfig = field(default_factory=EncoderConfig)  # history tower; docs/winner.md 3.4
    future: EncoderConfig = field(default_factory=_future_tower)  # future tower; docs/winner.md 3.4
    temperature: float = 0.02  # divides the cosine similarities; docs/winner.md 3.2
    negatives: Literal["cross", "symmetric"] = "cross"  # one direction as the winner, or both; docs/winner.md 3.2
    future_activity_weight: float = 1.0  # factor of the "no future event" loss; docs/winner.md 3.2
    next_event_weight: float = 0.0  # factor of the next event's loss, which needs `history.causal`; 0 is off; ours
    next_events: int = 2048  # events of a batch whose successor is asked for, spread evenly; ours
    wide: tuple[str, ...] = ()  # feature sets, standardised, that a linear layer adds to the profile; ours
    wide_dropout: float = 0.4  # share of the wide features dropped in training; ours
    probes: bool = False  # linear probes on the detached profile, AUROC after every epoch; docs/winner.md 3.2

    def __post_init__(self) -> None:
        if not self.next_event_weight >= 0 or self.next_events < 2:
            raise ValueError(
                "ContrastiveConfig: next_event_weight must be >= 0 and next_events >= 2,"
                f" got {self.next_event_weight} and {self.next_events}"
            )
        if self.next_event_weight and not self.history.causal:
            raise ValueError(
                "ContrastiveConfig: history.causal must be true with a next_event_weight, got false;"
                " otherwise an event sees the one that it has to tell"
            )


class Probe(nn.Module):
    """A linear layer on vectors that it must not change, and how well it ranks: `width` inputs, `outputs` labels."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(width, outputs)
        self.ranking = BinnedAuroc(outputs)

    def forward(self, vectors: Tensor, label: Tensor, batch: ViewBatch) -> Tensor:
        """Mean binary cross entropy of labels float32 [B] or [B, outputs]; in training mode also counts them."""
        logits = self.linear(vectors.detach()).float()
        label = label.reshape(logits.shape)
        if self.training:
            self.ranking.add(logits, label, batch.valid)
        return mean_of_views(functional.binary_cross_entropy_with_logits(logits, label, reduction="none"), batch)


class ContrastiveModel(nn.Module):
    """Two towers over packed events.

    Args:
        config: sizes and loss.
        sizes: vocabulary sizes of the store.
        probes: label name -> number of outputs of linear probes. They show what the profile knows while it trains and
            never change it: it is detached, and they are drawn last.
        num_wide: columns of the wide features.
    """

    def __init__(
        self,
        config: ContrastiveConfig,
        sizes: EventSizes,
        probes: Mapping[str, int] | None = None,
        num_wide: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.events = ProjectedEventEmbedding(config.events, sizes)
        self.history = SequenceEncoder(config.events.width, config.history)
        # Clients without a future are left out of the contrast, so nothing would teach a vector for them.
        self.future = SequenceEncoder(config.events.width, config.future, learns_empty=False)
        self.future_projection = Linear(config.events.width, config.events.width)
        self.future_activity = Linear(config.events.width, 1)
        self.next_event = Linear(config.events.width, config.events.width) if config.next_event_weight else None
        self.probes = nn.ModuleDict(
            {name: Probe(config.events.width, outputs) for name, outputs in (probes or {}).items()}
        )
        self.wide = Linear(num_wide, config.events.width, bias=False) if num_wide else None

    @property
    def embedding_width(self) -> int:
        """Columns of the profile."""
        return self.config.events.width

    def set_age_edges(self, edges_days: np.ndarray) -> None:
        """Sets the bins of the age encoding, float32 [age_bins + 1] ascending days, see `age_quantiles_days`."""
        edges = torch.as_tensor(edges_days, dtype=torch.float32)
        if edges.shape != self.events.age.edges.shape:
            raise ValueError(
                f"ContrastiveModel: edges_days must have shape {tuple(self.events.age.edges.shape)},"
                f" got {tuple(edges.shape)}"
            )
        self.events.age.edges.copy_(edges)

    def forward(self, batch: ViewBatch) -> Tensor:
        """Profiles float32 [B, width] of the batch's histories."""
        history = _required(batch.history, "history")
        return self._with_wide(self.history(self.events(history, with_age=True), history), batch)

    def _with_wide(self, profile: Tensor, batch: ViewBatch) -> Tensor:
        """Adds what the wide features say."""
        if self.wide is None:
            return profile
        if batch.features is None:
            raise ValueError("ContrastiveModel: features must be in the batch, got None")
        features = dropout(batch.features, self.config.wide_dropout, self.training, batch.first_view)
        return profile + self.wide(features).float()

    def _profile_and_next_event(self, batch: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The profiles, and the term `next_event` when the config asks for it."""
        history = _required(batch.history, "history")
        events = self.events(history, with_age=True)
        if self.next_event is None:
            return self._with_wide(self.history(events, history), batch), {}
        if batch.valid is not None:
            raise UserError(
                "ContrastiveModel: a batch of fixed sizes must have next_event_weight 0,"
                f" got {self.config.next_event_weight}: which events are asked for follows from how many there are; set"
                " cuda_graph=false"
            )
        states = self.history.states(events, history)
        rows = rows_with_successor(history, self.config.next_events)
        # Content alone: the age would tell how far away the next event is.
        ahead = self.next_event(self.events(history, with_age=False)[rows + 1]).float()
        with torch.autocast(ahead.device.type, enabled=False):
            term = nt_xent(
                states[rows].float(),
                ahead,
                temperature=self.config.temperature,
                ids=content_ids(history)[rows + 1],
                group=batch.group,
            )
        profile = self._with_wide(self.history.pool(states, history), batch)
        return profile, {"next_event": self.config.next_event_weight * term}

    def embed_future(self, future: SequenceBatch) -> Tensor:
        """Vectors float32 [B, width] of the target windows."""
        return self.future_projection(self.future(self.events(future, with_age=False), future)).float()

    def loss(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Named terms whose sum is minimised: `nt_xent`, `future_activity`, `next_event`, `probe_<label>` per probe."""
        future = _required(batch.future, "future")
        profile, extra = self._profile_and_next_event(batch)
        ahead = self.embed_future(future)
        has_future = future.lengths() > 0
        if batch.valid is not None:
            has_future = has_future & batch.valid
        # Similarities divided by a small temperature need more digits than bfloat16 has.
        with torch.autocast(profile.device.type, enabled=False):
            contrast = nt_xent(
                ahead,
                profile,
                temperature=self.config.temperature,
                negatives=self.config.negatives,
                weight=batch.weight,
                valid=has_future,
                ids=future.client,
                group=batch.group,
            )
        inactivity = self.future_activity(profile)[:, 0].float()
        activity = functional.binary_cross_entropy_with_logits(
            inactivity, (~has_future).float(), weight=batch.weight, reduction="none"
        )
        activity = mean_of_views(activity, batch)
        terms = {"nt_xent": contrast, "future_activity": self.config.future_activity_weight * activity, **extra}
        for name, probe in self.probes.items():
            terms[f"probe_{name}"] = probe(profile, batch.labels[name], batch)
        return terms

    def label_logits(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Logits float [B, outputs] of the probes, by label; none without probes."""
        if not self.probes:
            return {}
        profile = self(batch)
        return {name: cast(Probe, probe).linear(profile) for name, probe in self.probes.items()}

    def epoch_metrics(self) -> dict[str, float]:
        """`auroc_<label>` of every probe over the batches trained on since the last call, mean of its outputs."""
        found = {f"auroc_{name}": cast(Probe, probe).ranking.take() for name, probe in self.probes.items()}
        return {name: value for name, value in found.items() if value is not None}


def rows_with_successor(batch: SequenceBatch, limit: int) -> Tensor:
    """Events that another one of the same view follows, int64 ascending, at most `limit`, spread evenly.

    Of a step that several processes share, those of all of them that are here.
    """
    is_last = torch.zeros(batch.num_tokens + 1, dtype=torch.bool, device=batch.kind.device)
    is_last[batch.cu_seqlens.long()] = True
    rows = places(~is_last[1:], lambda: batch.num_tokens - batch.counts.with_events)
    first, total = 0, len(rows)
    if batch.shared is not None:
        first = batch.shared.first_event - batch.shared.first_sequence
        total = batch.shared.events - batch.shared.sequences
    if total <= limit:
        return rows
    # Numbers i * total // limit of those that lie here.
    begin, end = (-(-at * limit // total) for at in (first, first + len(rows)))
    return rows[torch.arange(begin, end, device=rows.device) * total // limit - first]


def content_ids(batch: SequenceBatch) -> Tensor:
    """Equal numbers, int64 [T], for the same product or the same page; searches differ from everything."""
    unique = -1 - batch.first_rows[0] - torch.arange(batch.num_tokens, device=batch.kind.device)
    page = torch.where(batch.url > 0, 2 * batch.url + 1, unique)
    return torch.where(batch.sku > 0, 2 * batch.sku, page)


def _required(part: SequenceBatch | None, name: str) -> SequenceBatch:
    if part is None:
        raise ValueError(f"ContrastiveModel: {name} must be in the batch, got None; give the loader a {name}_length")
    return part
