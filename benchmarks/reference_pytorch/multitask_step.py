"""The multi-task model as users write it today: padded batches, `nn.TransformerEncoder`, one module per expert.

Same layers and sizes as `ubp_fast.models.multitask`, on left-padded [B, L] tensors like the winner's. `load_from` takes
the weights of ours, so that both can be checked to give the same loss on the same clients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from reference_pytorch.padded import DAY_S, PaddedEvents, copy_layer, copy_linear, pad, random_events
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.layers.ple import ExpertBank
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel
from ubp_fast.sequences.batch import ViewBatch


@dataclass(frozen=True)
class PaddedBatch:
    """Left-padded events and what belongs to the clients."""

    events: PaddedEvents
    features: Tensor
    labels: dict[str, Tensor]


def pad_views(batch: ViewBatch, length: int) -> PaddedBatch:
    """The padded form of a packed batch."""
    assert batch.history is not None and batch.features is not None
    return PaddedBatch(pad(batch.history, length, "left"), batch.features, dict(batch.labels))


class Expert(nn.Sequential):
    """Linear - ReLU - dropout - Linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))


class Level(nn.Module):
    """One level of PLE, expert by expert."""

    def __init__(self, tasks: int, inputs: int, has_shared_gate: bool, config: MultitaskConfig) -> None:
        super().__init__()
        part = config.experts
        sizes = (inputs, part.expert_hidden, part.expert_width, part.expert_dropout)
        self.own = nn.ModuleList(nn.ModuleList(Expert(*sizes) for _ in range(part.task_experts)) for _ in range(tasks))
        self.shared = nn.ModuleList(Expert(*sizes) for _ in range(part.shared_experts))
        choices = part.shared_experts + part.task_experts
        self.gates = nn.ModuleList(nn.Linear(inputs, choices) for _ in range(tasks))
        everything = tasks * part.task_experts + part.shared_experts
        self.shared_gate = nn.Linear(inputs, everything) if has_shared_gate else None

    def forward(self, per_task: list[Tensor], shared_input: Tensor) -> tuple[list[Tensor], Tensor | None]:
        shared = [expert(shared_input) for expert in self.shared]
        own = [[expert(value) for expert in experts] for experts, value in zip(self.own, per_task, strict=True)]
        mixed = [
            self._mix(gate(value), [*shared, *experts])
            for gate, value, experts in zip(self.gates, per_task, own, strict=True)
        ]
        if self.shared_gate is None:
            return mixed, None
        return mixed, self._mix(self.shared_gate(shared_input), [*shared, *(one for part in own for one in part)])

    @staticmethod
    def _mix(logits: Tensor, experts: list[Tensor]) -> Tensor:
        return (logits.softmax(dim=1)[:, :, None] * torch.stack(experts, dim=1)).sum(dim=1)


class PaddedMultitask(nn.Module):
    """The whole model."""

    def __init__(self, config: MultitaskConfig, sizes: EventSizes, num_features: int, outputs: dict[str, int]) -> None:
        super().__init__()
        self.config, self.names = config, tuple(outputs)
        events, encoder, part = config.events, config.encoder, config.experts
        self.kind = nn.Embedding(6, events.kind_width)
        self.sku = nn.Embedding(sizes.num_skus, events.sku_width)
        self.category = nn.Embedding(sizes.num_categories, events.category_width)
        self.price = nn.Embedding(sizes.num_prices, events.price_width)
        self.url = nn.Embedding(sizes.num_urls, events.content_width)
        self.codes = nn.Embedding(256, events.content_width)
        self.day = nn.Embedding(events.max_days, events.day_width)
        self.week = nn.Embedding((events.max_days + 6) // 7, events.week_width)
        item_width = events.sku_width + events.category_width + events.price_width + events.content_width
        self.item = nn.Linear(item_width, events.content_width)
        layer = nn.TransformerEncoderLayer(
            events.width, encoder.heads, encoder.feed_forward, encoder.dropout, encoder.activation, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, encoder.layers, enable_nested_tensor=False)
        self.fusion = nn.Sequential(
            nn.Linear(events.width + num_features, config.profile_width),
            nn.LeakyReLU(),
            nn.Dropout(config.fusion_dropout),
            nn.Linear(config.profile_width, config.profile_width),
        )
        self.first = Level(len(outputs), config.profile_width, True, config)
        self.second = Level(len(outputs), part.expert_width, False, config)
        self.towers = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(part.expert_width, part.tower_hidden),
                    nn.ReLU(),
                    nn.Dropout(part.tower_dropout),
                    nn.Linear(part.tower_hidden, count),
                )
                for name, count in outputs.items()
            }
        )

    def embed(self, batch: PaddedBatch) -> Tensor:
        """Event vectors with positions, [B, L, 412]."""
        events = batch.events
        is_item, is_visit, is_search = events.by_content()
        content = torch.zeros((*events.kind.shape, self.config.events.content_width))
        tables = (
            self.sku(events.sku[is_item]),
            self.category(events.category[is_item]),
            self.price(events.price[is_item]),
            self.codes(events.codes[is_item]).mean(dim=1),
        )
        content[is_item] = functional.relu(self.item(torch.cat(tables, dim=1))).float()  # under autocast, too
        content[is_visit] = self.url(events.url[is_visit])
        content[is_search] = self.codes(events.codes[is_search]).mean(dim=1)
        day = (events.age_s // DAY_S).clamp(0, self.config.events.max_days - 1)
        rows = torch.cat((self.kind(events.kind), content, self.day(day), self.week(day // 7)), dim=2)
        rows = rows + positions(*rows.shape[1:])
        return functional.dropout(rows, self.config.embedding_dropout, self.training)

    def encode(self, rows: Tensor, batch: PaddedBatch) -> Tensor:
        """The last position of the transformer, [B, 412]."""
        return self.encoder(rows, src_key_padding_mask=batch.events.is_padding)[:, -1]

    def loss_of(self, encoded: Tensor, batch: PaddedBatch) -> Tensor:
        """Profile, experts, towers and the sum of all losses."""
        profile = self.fusion(torch.cat([encoded, batch.features], dim=1))
        mixed, shared = self.first([profile] * len(self.names), profile)
        mixed, _ = self.second(mixed, shared)
        total = torch.zeros(())
        for name, value in zip(self.names, mixed, strict=True):
            logits, label = self.towers[name](value), batch.labels[name]
            if label.dim() == 1:
                loss = functional.binary_cross_entropy_with_logits(logits[:, 0], label)
                total = total + self.config.activity_weight * loss
                continue
            has_label = label.sum(dim=1) > 0
            if has_label.any():
                total = total + functional.binary_cross_entropy_with_logits(logits[has_label], label[has_label])
        return total

    def loss(self, batch: PaddedBatch) -> Tensor:
        """One number to minimise."""
        return self.loss_of(self.encode(self.embed(batch), batch), batch)

    @torch.no_grad()
    def load_from(self, model: MultitaskModel) -> PaddedMultitask:
        """Copies the weights of ours."""
        events = model.events
        for name in ("kind", "sku", "category", "price", "url", "day", "week", "item"):
            getattr(self, name).load_state_dict(getattr(events, name).state_dict())
        self.codes.weight.copy_(events.codes.table.weight)
        self.fusion.load_state_dict(model.fusion.state_dict())
        for layer, ours in zip(self.encoder.layers, model.encoder.layers, strict=True):
            copy_layer(layer, ours)
        for level, ours in ((self.first, model.tasks.first), (self.second, model.tasks.second)):
            for index, experts in enumerate(level.own):
                _copy_experts(experts, ours.own, index)
            _copy_experts(level.shared, ours.shared, 0)
            for index, gate in enumerate(level.gates):
                copy_linear(gate, ours.gate_weight[index].t(), ours.gate_bias[index])
        self.first.shared_gate.load_state_dict(model.tasks.first.shared_gate.state_dict())
        self.towers.load_state_dict(model.tasks.towers.state_dict())
        return self


def positions(length: int, width: int) -> Tensor:
    """Sinusoidal positions, [L, width]."""
    rate = torch.exp(torch.arange(0, width, 2) * (-torch.log(torch.tensor(10_000.0)) / width))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


def _copy_experts(experts: nn.ModuleList, bank: ExpertBank, group: int) -> None:
    hidden = bank.hidden_weight[group].chunk(bank.experts, dim=1)
    hidden_bias = bank.hidden_bias[group].chunk(bank.experts)
    for index, expert in enumerate(experts):
        copy_linear(expert[0], hidden[index].t(), hidden_bias[index])
        place = group * bank.experts + index
        copy_linear(expert[3], bank.out_weight[place].t(), bank.out_bias[group, index])


def random_batch(lengths: tuple[int, ...], sizes: EventSizes, num_features: int, outputs: dict[str, int]) -> ViewBatch:
    """Clients with histories of these lengths, random features and labels."""
    history = random_events(lengths, sizes)
    labels = {
        name: (torch.rand(len(lengths)) < 0.3).float()
        if count == 1
        else (torch.rand(len(lengths), count) < 0.02).float()
        for name, count in outputs.items()
    }
    return ViewBatch(history=history, features=torch.rand(len(lengths), num_features), labels=labels)
