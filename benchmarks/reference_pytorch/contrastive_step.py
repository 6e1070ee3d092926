"""The contrastive model as users write it today: padded towers, `nn.LSTM`, the whole matrix of similarities.

Same layers and sizes as `ubp_fast.models.contrastive`, on right-padded [B, L] tensors. `load_from` takes the weights of
ours, so that both can be checked to give the same loss on the same clients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from reference_pytorch.padded import DAY_S, PaddedEvents, copy_layer, pad
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from ubp_fast.models.contrastive import ContrastiveConfig, ContrastiveModel
from ubp_fast.models.layers.encoder import EncoderConfig
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.sequences.batch import ViewBatch


@dataclass(frozen=True)
class PaddedPair:
    """Right-padded histories and futures; a client without future keeps one column of padding in sight."""

    history: PaddedEvents
    future: PaddedEvents
    lengths: Tensor
    has_future: Tensor


def pad_pair(batch: ViewBatch, config: ContrastiveConfig) -> PaddedPair:
    """The padded form of a packed batch whose histories all have events."""
    assert batch.history is not None and batch.future is not None
    history = pad(batch.history, config.history_length, "right")
    future = pad(batch.future, config.future_length, "right")
    return PaddedPair(history, future, batch.history.lengths(), batch.future.lengths() > 0)


class PaddedContrastive(nn.Module):
    """Both towers and the loss."""

    def __init__(self, config: ContrastiveConfig, sizes: EventSizes) -> None:
        super().__init__()
        self.config = config
        events = config.events
        self.kind = nn.Embedding(6, events.kind_width)
        self.sku = nn.Embedding(sizes.num_skus, events.sku_width)
        self.category = nn.Embedding(sizes.num_categories, events.category_width)
        self.price = nn.Embedding(sizes.num_prices, events.price_width)
        self.codes = nn.Embedding(256, events.code_width)
        self.url = nn.Embedding(sizes.num_urls, events.url_width)
        self.register_buffer("edges", torch.arange(events.age_bins + 1, dtype=torch.float32))
        self.age_projection = nn.Linear(events.age_bins, events.age_width)
        item_width = events.sku_width + events.category_width + events.price_width + events.code_width
        widths = {"item": item_width, "visit": events.url_width, "search": events.code_width}
        self.content = nn.ModuleDict(
            {name: nn.Linear(events.kind_width + width, events.width) for name, width in widths.items()}
        )
        self.content_age = nn.ModuleDict(
            {name: nn.Linear(events.age_width, events.width, bias=False) for name in widths}
        )
        self.history = encoder_of(events.width, config.history)
        self.lstm = nn.LSTM(events.width, events.width, batch_first=True)
        self.future = encoder_of(events.width, config.future)
        self.future_projection = nn.Linear(events.width, events.width)
        self.future_activity = nn.Linear(events.width, 1)

    def embed(self, events: PaddedEvents, *, with_age: bool) -> Tensor:
        """Event vectors, [B, L, 512]."""
        masks = dict(zip(("item", "visit", "search"), events.by_content(), strict=True))
        tables = {
            "item": lambda at: (
                self.sku(events.sku[at]),
                self.category(events.category[at]),
                self.price(events.price[at]),
                self.codes(events.codes[at]).mean(dim=1),
            ),
            "visit": lambda at: (self.url(events.url[at]),),
            "search": lambda at: (self.codes(events.codes[at]).mean(dim=1),),
        }
        age = self.age(events) if with_age else None
        rows = torch.zeros((*events.kind.shape, self.config.events.width))
        for name, at in masks.items():
            projected = self.content[name](torch.cat([self.kind(events.kind[at]), *tables[name](at)], dim=1))
            if age is not None:
                projected = projected + self.content_age[name](age[at])
            rows[at] = functional.relu(projected)
        return rows

    def age(self, events: PaddedEvents) -> Tensor:
        """How far the age has come through each bin, projected, [B, L, 256]."""
        days = (events.age_s.float() / DAY_S)[:, :, None]
        return self.age_projection(((days - self.edges[:-1]) / self.edges.diff().clamp(min=1e-6)).clamp(0.0, 1.0))

    def encode(self, history: Tensor, future: Tensor, batch: PaddedPair) -> tuple[Tensor, Tensor]:
        """Both transformers on event vectors, [B, L, 512] each."""
        # A row without any event in sight is NaN in `nn.TransformerEncoder`.
        is_padding = batch.future.is_padding & (batch.has_future[:, None] | (torch.arange(future.shape[1]) > 0))
        return (
            self.history(history, src_key_padding_mask=batch.history.is_padding),
            self.future(future, src_key_padding_mask=is_padding),
        )

    def pool(self, history: Tensor, future: Tensor, batch: PaddedPair) -> tuple[Tensor, Tensor]:
        """Profiles and vectors of the futures, [B, 512] each."""
        packed = pack_padded_sequence(history, batch.lengths, batch_first=True, enforce_sorted=False)
        _, (state, _) = self.lstm(packed)
        is_event = (~batch.future.is_padding).float()[:, :, None]
        mean = (future * is_event).sum(dim=1) / is_event.sum(dim=1).clamp(min=1)
        return state[0], self.future_projection(mean)

    def loss_of(self, profile: Tensor, ahead: Tensor, has_future: Tensor) -> Tensor:
        """Futures find their histories; who has no future at all is told by a linear head."""
        left, right = functional.normalize(ahead[has_future]), functional.normalize(profile[has_future])
        logits = left @ right.t() / self.config.temperature
        contrast = functional.cross_entropy(logits, torch.arange(len(logits)))
        inactivity = self.future_activity(profile)[:, 0]
        activity = functional.binary_cross_entropy_with_logits(inactivity, (~has_future).float())
        return contrast + self.config.future_activity_weight * activity

    def loss(self, batch: PaddedPair) -> Tensor:
        """One number to minimise."""
        rows = self.embed(batch.history, with_age=True), self.embed(batch.future, with_age=False)
        return self.loss_of(*self.pool(*self.encode(*rows, batch), batch), batch.has_future)

    @torch.no_grad()
    def load_from(self, model: ContrastiveModel) -> PaddedContrastive:
        """Copies the weights of ours."""
        events = model.events
        for name in ("kind", "sku", "category", "price", "url", "age_projection", "content", "content_age"):
            getattr(self, name).load_state_dict(getattr(events, name).state_dict())
        self.codes.weight.copy_(events.codes.table.weight)
        self.edges.copy_(events.age.edges)
        for tower, ours in ((self.history, model.history), (self.future, model.future)):
            for layer, source in zip(tower.layers, ours.layers, strict=True):
                copy_layer(layer, source)
        self.lstm.load_state_dict({f"{name}_l0": value for name, value in model.history.lstm.cell.state_dict().items()})
        self.future_projection.load_state_dict(model.future_projection.state_dict())
        self.future_activity.load_state_dict(model.future_activity.state_dict())
        return self


def encoder_of(width: int, config: EncoderConfig) -> nn.TransformerEncoder:
    """The transformer of one tower."""
    layer = nn.TransformerEncoderLayer(
        width,
        config.heads,
        config.feed_forward,
        config.dropout,
        config.activation,
        batch_first=True,
        norm_first=config.norm_first,
    )
    return nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
