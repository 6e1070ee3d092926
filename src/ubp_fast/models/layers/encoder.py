"""Packed transformer: events of many clients end to end in one [T, d] tensor, no padding, no mask.

    pre-norm   x <- x + drop(attention(norm(x)));  x <- x + drop(ff(norm(x)))
    post-norm  x <- norm(x + drop(attention(x)));  x <- norm(x + drop(ff(x)))

With the same weights it equals `torch.nn.TransformerEncoder` on each client alone, except that attention weights have a
dropout of their own, 0 by default. With `time_bias_buckets` each head adds a learned number to a score, by the time
between the two events; it starts at 0. Heads wider than the kernels take are padded for
PyTorch's own attention. Pooling: the last event, the mean, or the last state of an LSTM. An empty sequence gets a
vector of its own. [T, d] events and their SequenceBatch -> [B, d].

Source: Vaswani et al. 2017; docs/winner.md 3.4 and 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.events.schema import UserError
from ubp_fast.kernels import flash_attention
from ubp_fast.kernels.flash_attention.api import MAX_WIDTH
from ubp_fast.models.layers.dropout import dropout
from ubp_fast.models.layers.last_state import LastStatePooling
from ubp_fast.models.layers.linear import Linear, linear
from ubp_fast.sequences.batch import SequenceBatch, places

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": functional.gelu, "relu": functional.relu}


@dataclass(frozen=True)
class EncoderConfig:
    """A packed transformer and its pooling."""

    heads: int = 8  # attention heads, must divide the width; docs/winner.md 3.4
    layers: int = 2  # transformer layers, 0 pools the events as they are; docs/winner.md 3.4
    feed_forward: int = 2048  # hidden columns of the feed-forward part; docs/winner.md 3.4
    activation: Literal["gelu", "relu"] = "gelu"  # of the feed-forward part; docs/winner.md 3.4
    norm_first: bool = True  # pre-norm, else post-norm; docs/winner.md 3.4
    dropout: float = 0.2  # share of dropped activations; docs/winner.md 3.4
    pooling: Literal["last", "mean", "lstm"] = "lstm"  # sequence -> vector; docs/winner.md 3.4
    attention_dropout: float = 0.0  # share of dropped attention weights; ours
    time_bias_buckets: int = 0  # learned score by log time between events, two buckets per octave of seconds; 0 is off
    causal: bool = False  # an event sees itself and earlier ones only; ours


class EncoderLayer(nn.Module):
    """Self-attention inside each sequence and a feed-forward part, on packed rows [T, d] -> [T, d]."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        if width % config.heads:
            raise UserError(f"EncoderLayer: heads must divide the width {width}, got {config.heads}")
        self.config = config
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.expand = Linear(width, config.feed_forward)
        self.reduce = Linear(config.feed_forward, width)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pads = width // config.heads > MAX_WIDTH
        if self.pads and (config.causal or config.time_bias_buckets or config.attention_dropout):
            raise UserError(
                f"EncoderLayer: heads must leave at most {MAX_WIDTH} columns each for causal attention, time bias"
                f" and attention_dropout, got {width // config.heads}"
            )
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)
        buckets = config.time_bias_buckets
        self.time_bias = nn.Parameter(torch.zeros(config.heads, buckets)) if buckets else None

    def forward(
        self,
        rows: Tensor,
        cu_seqlens: Tensor,
        timestamp_s: Tensor | None = None,
        last: Tensor | None = None,
        first_rows: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """All rows, or only those at `last` (int64 [n], the last row of every sequence that has one): [T or n, d].

        `timestamp_s` int64 [T] is needed with `time_bias_buckets`; `first_rows` of the batch with dropout over several
        processes.
        """
        kept = rows if last is None else rows[last]
        first_key = first_rows[0]
        first = first_key if last is None else first_rows[1]
        if self.config.norm_first:
            kept = kept + self._attend(self.attention_norm(rows), cu_seqlens, timestamp_s, last, first, first_key)
            return kept + self._feed_forward(self.feed_forward_norm(kept), first)
        kept = self.attention_norm(kept + self._attend(rows, cu_seqlens, timestamp_s, last, first, first_key))
        return self.feed_forward_norm(kept + self._feed_forward(kept, first))

    def _attend(
        self,
        rows: Tensor,
        cu_seqlens: Tensor,
        timestamp_s: Tensor | None,
        last: Tensor | None,
        first: int,
        first_key: int,
    ) -> Tensor:
        heads, width = self.config.heads, rows.shape[1]
        head_width = width // heads
        query_time = key_time = timestamp_s if self.time_bias is not None else None
        cu_query = cu_seqlens
        if last is None:
            query, key, value = self.qkv(rows).view(len(rows), 3, heads, head_width).unbind(1)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            query = linear(rows[last], weight[:width], bias[:width]).view(len(last), heads, head_width)
            key_value = linear(rows, weight[width:], bias[width:])
            key, value = key_value.view(len(rows), 2, heads, head_width).unbind(1)
            cu_query = functional.pad((cu_seqlens.diff() > 0).cumsum(0, dtype=torch.int32), (1, 0))
            query_time = None if query_time is None else query_time[last]
        if self.pads:
            cu_key = cu_seqlens
            mixed = _padded_attention(query, key, value, cu_query, cu_key)
            return self._drop(self.out(mixed.flatten(1)), first)
        mixed = flash_attention(
            query,
            key,
            value,
            cu_query,
            None if last is None else cu_seqlens,
            causal=self.config.causal,
            time_bias=self.time_bias,
            timestamp_s=query_time,
            timestamp_key_s=None if last is None else key_time,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            first_rows=(first, first_key),
        )
        return self._drop(self.out(mixed.flatten(1)), first)

    def _feed_forward(self, rows: Tensor, first: int) -> Tensor:
        hidden = self._drop(_ACTIVATIONS[self.config.activation](self.expand(rows)), first)
        return self._drop(self.reduce(hidden), first)

    def _drop(self, rows: Tensor, first: int) -> Tensor:
        return dropout(rows, self.config.dropout, self.training, first)


def _padded_attention(query: Tensor, key: Tensor, value: Tensor, cu_query: Tensor, cu_key: Tensor) -> Tensor:
    """Attention of packed rows [T, H, D] inside each sequence, by PyTorch on padded ones: [T, H, D]."""
    if not len(key):
        return query
    query_place, keys = _places(cu_query, len(query)), _places(cu_key, len(key))
    query = _padded(query, query_place, len(cu_query) - 1)
    key, value = (_padded(rows, keys, len(cu_key) - 1) for rows in (key, value))
    position = torch.arange(key.shape[2], device=key.device)
    # A sequence without events has no query either; it looks at one key of zeros, not at nothing.
    is_key = position < cu_key.diff().clamp(min=1)[:, None]
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=is_key[:, None, None])
    return mixed.transpose(1, 2)[query_place]


def _places(cu_seqlens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sequence and position of every packed row, two int64 [T]."""
    sequence = torch.repeat_interleave(cu_seqlens.diff().long(), output_size=rows)
    return sequence, torch.arange(rows, device=cu_seqlens.device) - cu_seqlens.long()[sequence]


def _padded(rows: Tensor, places: tuple[Tensor, Tensor], num_sequences: int) -> Tensor:
    """[T, H, D] -> [B, H, longest, D], zeros where there is nothing."""
    longest = int(places[1].max()) + 1
    padded = rows.new_zeros(num_sequences, longest, *rows.shape[1:]).index_put(places, rows)
    return padded.transpose(1, 2)


def pool_mean(rows: Tensor, batch: SequenceBatch) -> Tensor:
    """Mean of each sequence's rows, float32 [B, d]; zeros for empty sequences."""
    lengths = batch.lengths()
    # Unless it is "unsafe", it looks at the lengths.
    sums = torch.segment_reduce(rows.float(), "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)
    return sums / lengths.clamp(min=1)[:, None]


class SequenceEncoder(nn.Module):
    """Packed transformer layers and pooling: event vectors [T, width] -> one vector per sequence [B, width].

    Args:
        width: columns of events and of the result.
        config: layers and pooling.
        learns_empty: empty sequences get a learned vector; otherwise zeros, where no loss would ever teach it.
    """

    empty: Tensor

    def __init__(self, width: int, config: EncoderConfig, *, learns_empty: bool = True) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(width, config) for _ in range(config.layers))
        self.lstm = LastStatePooling(width) if config.pooling == "lstm" else None
        if learns_empty:
            self.empty = nn.Parameter(torch.randn(width) / math.sqrt(width))
        else:
            self.register_buffer("empty", torch.zeros(width))

    def forward(self, rows: Tensor, batch: SequenceBatch) -> Tensor:
        """Pools each sequence.

        Args:
            rows: float [T, width] event vectors, packed like `batch`.
            batch: its `cu_seqlens` delimit the sequences.

        Returns:
            float32 [B, width].
        """
        if self.config.pooling != "last" or not len(self.layers):
            return self.pool(self.states(rows, batch), batch)
        # The last layer computes no other rows.
        rows = self.states(rows, batch, layers=len(self.layers) - 1)
        has_events, last = _last_rows(batch)
        pooled = self.layers[-1](rows, batch.cu_seqlens, batch.timestamp_s, last, batch.first_rows).float()
        return self._with_empty(pooled, has_events)

    def states(self, rows: Tensor, batch: SequenceBatch, layers: int | None = None) -> Tensor:
        """Every event after the first `layers` layers (None: all): [T, width] -> [T, width].

        Without events, too: what a layer draws, all processes draw.
        """
        for layer in self.layers[:layers]:
            rows = layer(rows, batch.cu_seqlens, batch.timestamp_s, first_rows=batch.first_rows)
        return rows

    def pool(self, states: Tensor, batch: SequenceBatch) -> Tensor:
        """What `states` gave, [T, width], as one vector per sequence, float32 [B, width]."""
        if not batch.num_tokens:
            return self.empty.expand(batch.num_sequences, -1)
        has_events, last = _last_rows(batch)
        if self.config.pooling == "last":
            return self._with_empty(states[last].float(), has_events)
        pooled = pool_mean(states, batch) if self.lstm is None else self.lstm(states, batch)
        return torch.where(has_events[:, None], pooled, self.empty)

    def _with_empty(self, pooled: Tensor, has_events: Tensor) -> Tensor:
        """Rows of `pooled` for the sequences that have events, the empty vector for the others."""
        place = (has_events.cumsum(0) - 1).clamp(min=0)
        pooled = functional.pad(pooled, (0, 0, 0, 1)).index_select(0, place)  # one row at least
        return torch.where(has_events[:, None], pooled, self.empty)


def _last_rows(batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Which sequences have events, bool [B], and the last row of each of these, int64 [n]."""
    has_events = batch.lengths() > 0
    with_events = places(has_events, lambda: batch.counts.with_events)
    return has_events, batch.cu_seqlens[1:].long()[with_events] - 1


def sinusoidal_positions(steps_to_end: Tensor, width: int, max_length: int) -> Tensor:
    """Sine and cosine position vectors, float32 [T, width], counted so that the last event has position max_length - 1.

    Equals the positions of left-padded sequences of `max_length`, which none exceeds. Source: Vaswani et al. 2017, 3.5.
    """
    # From a table: sines of the last few numbers of a tensor are computed otherwise than those before them.
    position = (max_length - 1 - torch.arange(max_length, device=steps_to_end.device)).float()
    rate = torch.exp(torch.arange(0, width, 2, device=position.device) * (-math.log(10_000.0) / width))
    angle = position[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[steps_to_end.long(), :width]
