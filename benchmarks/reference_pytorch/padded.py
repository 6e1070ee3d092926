"""What both padded models share: [B, L] batches, the weights of a transformer layer, and random clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ubp_fast.models.layers.encoder import EncoderLayer
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.sequences.batch import SequenceBatch

Model = TypeVar("Model", bound=nn.Module)
VISIT, SEARCH, DAY_S = 4, 5, 86_400


@dataclass(frozen=True)
class PaddedEvents:
    """What a collate function makes: [B, L] fields, zeros where there is no event."""

    kind: Tensor
    sku: Tensor
    category: Tensor
    price: Tensor
    url: Tensor
    codes: Tensor
    age_s: Tensor
    is_padding: Tensor

    def by_content(self) -> tuple[Tensor, Tensor, Tensor]:
        """Masks [B, L] of product events, visits and searches."""
        is_visit, is_search = self.kind == VISIT, self.kind == SEARCH
        return ~(is_visit | is_search | self.is_padding), is_visit, is_search


def pad(events: SequenceBatch, length: int, side: str) -> PaddedEvents:
    """Padding on the "left" (the last event is the last column) or on the "right" of packed events."""
    row, from_end = events.segments(), events.steps_to_end()
    column = length - 1 - from_end if side == "left" else events.lengths()[row] - 1 - from_end

    def padded(values: Tensor) -> Tensor:
        result = torch.zeros((events.num_sequences, length, *values.shape[1:]), dtype=values.dtype)
        result[row, column] = values
        return result

    names = ("kind", "sku", "category", "price", "url", "codes")
    fields = {name: padded(getattr(events, name)) for name in names}
    return PaddedEvents(**fields, age_s=padded(events.age_s()), is_padding=fields["kind"] == 0)


def copy_linear(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Copies weights that are stored in another shape."""
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)


def copy_layer(layer: nn.TransformerEncoderLayer, ours: EncoderLayer) -> None:
    """Copies a transformer layer of ours."""
    layer.self_attn.in_proj_weight.copy_(ours.qkv.weight)
    layer.self_attn.in_proj_bias.copy_(ours.qkv.bias)
    pairs = (
        (layer.self_attn.out_proj, ours.out),
        (layer.linear1, ours.expand),
        (layer.linear2, ours.reduce),
        (layer.norm1, ours.attention_norm),
        (layer.norm2, ours.feed_forward_norm),
    )
    for module, source in pairs:
        module.load_state_dict(source.state_dict())


def random_lengths(clients: int, seed: int, median: float = 26.0, share_empty: float = 0.0) -> tuple[int, ...]:
    """Log-normal, cut to 1..64, like the last 64 events of each client; some clients may have none."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(clients, generator=generator, dtype=torch.float64)
    lengths = (median * torch.exp(0.95 * normal)).round().clamp(1, 64)
    lengths *= torch.rand(clients, generator=generator) >= share_empty
    return tuple(int(length) for length in lengths)


def random_events(lengths: tuple[int, ...], sizes: EventSizes, *, is_future: bool = False) -> SequenceBatch:
    """Clients with so many events; kinds in the shares of the challenge's release, ids by 1 / rank."""
    tokens, cutoff_s = sum(lengths), 1_700_000_000

    def zipf(size: int) -> Tensor:
        return (float(size - 2) ** torch.rand(tokens, dtype=torch.float64)).long().clamp(max=size - 3) + 2

    kind = 1 + torch.multinomial(torch.tensor([1.7, 5.2, 1.7, 150.7, 9.6]), tokens, replacement=True)
    is_visit, is_search = kind == VISIT, kind == SEARCH
    is_item = ~(is_visit | is_search)
    has_codes = (is_item | is_search)[:, None]
    distance_s = torch.randint(0, (14 if is_future else 150) * DAY_S, (tokens,))
    return SequenceBatch(
        kind=kind,
        sku=zipf(sizes.num_skus) * is_item,
        category=zipf(sizes.num_categories) * is_item,
        price=torch.randint(2, sizes.num_prices, (tokens,)) * is_item,
        url=zipf(sizes.num_urls) * is_visit,
        codes=torch.randint(0, 256, (tokens, 16)) * has_codes,
        timestamp_s=cutoff_s + (distance_s if is_future else -distance_s),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        cutoff_s=torch.full((len(lengths),), cutoff_s),
        client=torch.arange(len(lengths)),
    )


def without_initialisation(factory: Callable[[], Model]) -> Model:
    """Builds a model without drawing random tables that weights of ours overwrite."""
    original, nn.Embedding.reset_parameters = nn.Embedding.reset_parameters, lambda self: None
    try:
        return factory()
    finally:
        nn.Embedding.reset_parameters = original
