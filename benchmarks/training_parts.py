"""The parts of a training step as calls of their own, on inputs that need a gradient where the step passes one on."""

from __future__ import annotations

from functools import partial

import torch
from breakdown import Call
from reference_pytorch.contrastive_step import PaddedContrastive, PaddedPair
from reference_pytorch.multitask_step import PaddedBatch, PaddedMultitask
from torch import Tensor
from torch.nn import functional

from ubp_fast.kernels import nt_xent
from ubp_fast.models.contrastive import ContrastiveModel
from ubp_fast.models.layers.dropout import dropout
from ubp_fast.models.layers.encoder import SequenceEncoder, pool_mean, sinusoidal_positions
from ubp_fast.models.multitask import MultitaskModel
from ubp_fast.sequences.batch import SequenceBatch, ViewBatch

# Parts that are divided by what computes, and parts that are reported as they are.
Parts = tuple[dict[str, Call], dict[str, Call]]
EXPERTS, POOLING, CONTRAST = "experts, towers, losses", "pooling", "contrastive loss"


def multitask_parts(model: MultitaskModel, batch: ViewBatch) -> Parts:
    """Of our multi-task model."""
    history = batch.history

    def events() -> Tensor:
        vectors = model.events(history)
        vectors = vectors + sinusoidal_positions(history.steps_to_end(), vectors.shape[1], model.config.history_length)
        return dropout(vectors, model.config.embedding_dropout, model.training)

    def experts() -> Tensor:
        logits = model.tasks(model.fusion(torch.cat([encoded, batch.features], dim=1)))
        return sum(
            functional.binary_cross_entropy_with_logits(values.squeeze(1), batch.labels[name])
            for name, values in logits.items()
        )

    rows = leaf(events())
    encoded = leaf(model.encoder(rows, history))
    return {"events": events, "encoder": lambda: model.encoder(rows, history)}, {EXPERTS: experts}


def padded_multitask_parts(model: PaddedMultitask, batch: PaddedBatch) -> Parts:
    """Of its rival."""
    rows = leaf(model.embed(batch))
    encoded = leaf(model.encode(rows, batch))
    mixed = {"events": partial(model.embed, batch), "encoder": lambda: model.encode(rows, batch)}
    return mixed, {EXPERTS: lambda: model.loss_of(encoded, batch)}


def contrastive_parts(model: ContrastiveModel, batch: ViewBatch) -> Parts:
    """Of our contrastive model; the pooling is that of both towers."""
    history, future = batch.history, batch.future

    def encode(tower: SequenceEncoder, rows: Tensor, events: SequenceBatch) -> Tensor:
        for layer in tower.layers:
            rows = layer(rows, events.cu_seqlens, events.timestamp_s)
        return rows

    def pool() -> Tensor:
        return model.history.lstm(encoded[0], history) + model.future_projection(pool_mean(encoded[1], future))

    def contrast() -> Tensor:
        has_future = future.lengths() > 0
        return nt_xent(ahead, profile, temperature=model.config.temperature, valid=has_future, ids=future.client)

    rows = leaf(model.events(history, with_age=True)), leaf(model.events(future, with_age=False))
    encoded = leaf(encode(model.history, rows[0], history)), leaf(encode(model.future, rows[1], future))
    profile = leaf(model.history.lstm(encoded[0], history))
    ahead = leaf(model.future_projection(pool_mean(encoded[1], future)).float())
    mixed = {
        "history events": lambda: model.events(history, with_age=True),
        "future events": lambda: model.events(future, with_age=False),
        "history encoder": lambda: encode(model.history, rows[0], history),
        "future encoder": lambda: encode(model.future, rows[1], future),
    }
    return mixed, {POOLING: pool, CONTRAST: contrast}


def padded_contrastive_parts(model: PaddedContrastive, batch: PaddedPair) -> Parts:
    """Of its rival."""
    rows = leaf(model.embed(batch.history, with_age=True)), leaf(model.embed(batch.future, with_age=False))
    encoded = tuple(leaf(part) for part in model.encode(*rows, batch))
    profile, ahead = (leaf(part) for part in model.pool(*encoded, batch))
    mixed = {  # the encoders first: their activations and the gradients of the tables are many gigabytes each
        "encoders": lambda: torch.cat(model.encode(*rows, batch)),
        "history events": lambda: model.embed(batch.history, with_age=True),
        "future events": lambda: model.embed(batch.future, with_age=False),
    }
    whole = {
        POOLING: lambda: sum(model.pool(*encoded, batch)),
        CONTRAST: lambda: model.loss_of(profile, ahead, batch.has_future),
    }
    return mixed, whole


def leaf(values: Tensor) -> Tensor:
    """The same numbers as the input of another part."""
    return values.detach().float().requires_grad_()
