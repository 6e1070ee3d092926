"""The packed encoder against PyTorch's own, one client at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from support.small_models import pick, whole_batch
from torch import nn

from ubp_fast.events.schema import UserError
from ubp_fast.models.layers.encoder import (
    EncoderConfig,
    EncoderLayer,
    LastStatePooling,
    SequenceEncoder,
    sinusoidal_positions,
)
from ubp_fast.sequences import SequenceBatch
from ubp_fast.store.event_store import EventStore

WIDTH = 24


@pytest.fixture(scope="module")
def batch(store: EventStore) -> SequenceBatch:
    return whole_batch(store).history


def rows_of(batch: SequenceBatch, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch.num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def encoder(pooling: Literal["last", "mean", "lstm"], layers: int = 2) -> SequenceEncoder:
    torch.manual_seed(0)
    return SequenceEncoder(WIDTH, EncoderConfig(heads=3, layers=layers, feed_forward=40, pooling=pooling)).eval()


def torch_layer(layer: EncoderLayer) -> nn.TransformerEncoderLayer:
    config = layer.config
    twin = nn.TransformerEncoderLayer(
        WIDTH, config.heads, config.feed_forward, config.dropout, config.activation, norm_first=config.norm_first,
        batch_first=True,
    )  # fmt: skip
    with torch.no_grad():
        twin.self_attn.in_proj_weight.copy_(layer.qkv.weight)
        twin.self_attn.in_proj_bias.copy_(layer.qkv.bias)
        for theirs, ours in (
            (twin.self_attn.out_proj, layer.out),
            (twin.linear1, layer.expand),
            (twin.linear2, layer.reduce),
            (twin.norm1, layer.attention_norm),
            (twin.norm2, layer.feed_forward_norm),
        ):
            theirs.load_state_dict(ours.state_dict())
    return twin.eval()


def torch_lstm(pooling: LastStatePooling) -> nn.LSTM:
    twin = nn.LSTM(WIDTH, WIDTH)
    twin.load_state_dict({f"{name}_l0": value for name, value in pooling.cell.state_dict().items()})
    return twin


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_layer_equals_torch_on_each_client(
    batch: SequenceBatch, norm_first: bool, activation: Literal["gelu", "relu"], causal: bool
) -> None:
    torch.manual_seed(1)
    config = EncoderConfig(heads=3, feed_forward=40, activation=activation, norm_first=norm_first, causal=causal)
    layer = EncoderLayer(WIDTH, config).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    rows, twin = rows_of(batch), torch_layer(layer)
    packed = layer(rows, batch.cu_seqlens)
    for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        if end > begin:
            mask = nn.Transformer.generate_square_subsequent_mask(end - begin) if causal else None
            expected = twin(rows[None, begin:end], src_mask=mask, is_causal=causal)[0]
            torch.testing.assert_close(packed[begin:end], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("buckets", [0, 40])
@pytest.mark.parametrize("norm_first", [True, False])
def test_last_rows_alone_equal_all_rows(batch: SequenceBatch, norm_first: bool, buckets: int, causal: bool) -> None:
    """The last layer of pooling "last" skips rows that nobody reads: same rows, same gradients."""
    config = EncoderConfig(3, 1, 40, norm_first=norm_first, time_bias_buckets=buckets, causal=causal)
    torch.manual_seed(0)
    layer, last = EncoderLayer(WIDTH, config).eval(), batch.cu_seqlens[1:].long()[batch.lengths() > 0] - 1
    assert 0 < len(last) < batch.num_sequences
    if buckets:
        nn.init.normal_(layer.time_bias)
    results = []
    for chosen in (last, None):
        rows = rows_of(batch).requires_grad_()
        found = layer(rows, batch.cu_seqlens, batch.timestamp_s, chosen)
        found = found if chosen is not None else found[last]
        results.append([found, *torch.autograd.grad(found.cos().sum(), (rows, *layer.parameters()))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean", "lstm"])
def test_pooled_states_are_the_result(batch: SequenceBatch, pooling: Literal["last", "mean", "lstm"]) -> None:
    model, rows = encoder(pooling), rows_of(batch)
    states = model.states(rows, batch)
    assert states.shape == rows.shape
    torch.testing.assert_close(model.pool(states, batch), model(rows, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean", "lstm"])
def test_pooling_equals_each_client_alone(batch: SequenceBatch, pooling: Literal["last", "mean", "lstm"]) -> None:
    model, rows = encoder(pooling, layers=0), rows_of(batch)
    pooled = model(rows, batch)
    for view, (begin, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        own = rows[begin:end]
        if begin == end:
            expected = model.empty
        elif pooling == "last":
            expected = own[-1]
        elif pooling == "mean":
            expected = own.mean(0)
        else:
            expected = torch_lstm(model.lstm)(own)[0][-1]
        torch.testing.assert_close(pooled[view], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean", "lstm"])
def test_packed_equals_alone_and_permutation_permutes(
    batch: SequenceBatch, pooling: Literal["last", "mean", "lstm"]
) -> None:
    model, rows = encoder(pooling), rows_of(batch)
    together = model(rows, batch)
    bounds = batch.cu_seqlens.tolist()
    for view in (0, 5, 17):
        alone = model(rows[bounds[view] : bounds[view + 1]], pick(batch, [view]))
        torch.testing.assert_close(together[view], alone[0], rtol=1e-4, atol=1e-5)
    order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(2)).tolist()
    moved = torch.cat([rows[bounds[view] : bounds[view + 1]] for view in order])
    torch.testing.assert_close(model(moved, pick(batch, order)), together[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean", "lstm"])
def test_batch_of_empty_clients_gets_the_learned_vector(
    batch: SequenceBatch, pooling: Literal["last", "mean", "lstm"]
) -> None:
    model, empty = encoder(pooling), pick(batch, [5, 5])
    vectors = model(torch.empty(0, WIDTH), empty)
    assert torch.equal(vectors, model.empty.expand(2, -1))
    vectors.sum().backward()
    assert model.empty.grad.abs().sum() > 0


def test_positions_count_back_from_the_last_event() -> None:
    positions = sinusoidal_positions(torch.tensor([0, 3]), 6, max_length=8)
    for row, place in zip(positions, (7, 4), strict=True):
        expected = []
        for pair in range(3):
            angle = place / 10_000 ** (2 * pair / 6)
            expected += [math.sin(angle), math.cos(angle)]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert sinusoidal_positions(torch.tensor([0]), 5, max_length=8).shape == (1, 5)


def test_time_bias_starts_at_nothing_and_learns(batch: SequenceBatch) -> None:
    rows, plain = rows_of(batch), encoder("mean")
    timed = SequenceEncoder(WIDTH, replace(plain.config, time_bias_buckets=64)).eval()
    missing, unexpected = timed.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["layers.0.time_bias", "layers.1.time_bias"] and not unexpected
    torch.testing.assert_close(timed(rows, batch), plain(rows, batch))
    timed(rows, batch).square().sum().backward()
    gradient = timed.layers[0].time_bias.grad
    assert gradient.shape == (3, 64) and gradient.abs().max() > 0
    nn.init.normal_(timed.layers[0].time_bias)
    assert not torch.allclose(timed(rows, batch), plain(rows, batch))
    later = replace(batch, timestamp_s=batch.timestamp_s + 10**6, cutoff_s=batch.cutoff_s + 10**6)
    assert torch.equal(timed(rows, later), timed(rows, batch))  # only the time between events counts


def test_attention_dropout_acts_in_training_only(batch: SequenceBatch) -> None:
    rows, plain = rows_of(batch), encoder("mean")
    dropping = SequenceEncoder(WIDTH, replace(plain.config, dropout=0.0, attention_dropout=0.4))
    dropping.load_state_dict(plain.state_dict())
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(dropping(rows, batch))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(dropping.eval()(rows, batch), plain(rows, batch))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads must divide the width 24, got 5"):
        EncoderLayer(24, EncoderConfig(heads=5))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_wide_heads_equal_narrow_ones_of_the_kernel(
    batch: SequenceBatch, pooling: Literal["last", "mean"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded by PyTorch instead of packed by the kernel: values, gradients, and the client without events."""
    results = []
    for widest in (256, 7):
        monkeypatch.setattr("ubp_fast.models.layers.encoder.MAX_WIDTH", widest)
        model, rows = encoder(pooling), rows_of(batch).requires_grad_()
        vectors = model(rows, batch)
        vectors.square().sum().backward()
        grads = [rows.grad, *(parameter.grad for parameter in model.parameters())]
        results.append([vectors.detach(), *grads])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert (batch.lengths() == 0).any()


def test_wide_heads_without_the_kernels_extras_are_refused() -> None:
    for changes in ({"causal": True}, {"time_bias_buckets": 4}):
        with pytest.raises(UserError, match=r"at most 256 columns each .*, got 412"):
            EncoderLayer(412, EncoderConfig(heads=1, **changes))  # type: ignore[arg-type]
