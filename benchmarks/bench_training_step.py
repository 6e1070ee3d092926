"""One training step of the winner's multi-task model: packed and row-sparse against padded and dense."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from contest import Contest
from reference_pytorch.multitask_step import PaddedBatch, PaddedMultitask, pad, random_batch
from schedulefree import RAdamScheduleFree
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.models.dropout import dropout
from ubp_fast.models.encoder import sinusoidal_positions
from ubp_fast.models.event_embedding import EventSizes
from ubp_fast.models.multitask import MULTITASK_LABELS, MultitaskConfig, MultitaskModel
from ubp_fast.optim import adopt_tables
from ubp_fast.sequences.batch import ViewBatch

VIEWS, FEATURES, BATCHES = 128, 46, 8
OUTPUTS = {name: 1 if name in ("churn", "add") else 100 for name in MULTITASK_LABELS}
KINDS = ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")
Parts = list[tuple[str, Callable[[], Tensor]]]


def sizes_of(share: float) -> EventSizes:
    """The winner's vocabularies, or a share of the large ones."""
    return EventSizes(int(1_260_370 * share), 6_995, 102, int(373_500 * share), KINDS)


def lengths_of(batch: int) -> tuple[int, ...]:
    """History lengths: log-normal, median 26, the last 64 events of each client; about half of [B, 64] is padding."""
    normal = torch.randn(VIEWS, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
    return tuple(int(length) for length in (26 * torch.exp(0.95 * normal)).round().clamp(1, 64))


class OurStep:
    """The model of `ubp_fast` with its default optimizer, in bfloat16 as Lightning's bf16-mixed does it or not."""

    def __init__(self, model: MultitaskModel, batches: list[ViewBatch], precision: str) -> None:
        self.model, self.batches, self.at = model, batches, 0
        self.is_bf16 = precision == "bf16"
        self.optimizer = adopt_tables(RAdamScheduleFree(model.parameters(), lr=1e-3), model, "row_sparse")
        self.optimizer.train()

    def __call__(self) -> Tensor:
        with self._autocast():
            loss = torch.stack(list(self.model.loss(self.batches[self.at % BATCHES]).values())).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at += 1
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16)

    def parts_ms(self) -> dict[str, float]:
        """Forward and backward of each part alone, and the update."""
        model, batch = self.model, self.batches[self.at % BATCHES]
        history = batch.history

        def rows() -> Tensor:
            vectors = model.events(history)
            vectors = vectors + sinusoidal_positions(history.steps_to_end(), vectors.shape[1], 64)
            return dropout(vectors, model.config.embedding_dropout, model.training)

        leaf = rows().detach().requires_grad_()
        encoded = model.encoder(leaf, history).detach().requires_grad_()

        def head() -> Tensor:
            profile = model.fusion(torch.cat([encoded, batch.features], dim=1))
            logits = model.tasks(profile)
            return sum(
                functional.binary_cross_entropy_with_logits(logits[name].squeeze(1), batch.labels[name])
                for name in OUTPUTS
            )

        parts = [("events", rows), ("encoder", lambda: model.encoder(leaf, history)), ("experts", head)]
        return timed_parts([(name, self._autocast()(call)) for name, call in parts], self.optimizer)


class PaddedStep:
    """The rival with AdamW(fused=True)."""

    def __init__(self, model: PaddedMultitask, batches: list[PaddedBatch]) -> None:
        self.model, self.batches, self.at = model, batches, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def __call__(self) -> Tensor:
        loss = self.model.loss(self.batches[self.at % BATCHES])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at += 1
        return loss.detach()

    def parts_ms(self) -> dict[str, float]:
        """Forward and backward of each part alone, and the update."""
        model, batch = self.model, self.batches[self.at % BATCHES]
        leaf = model.embed(batch).detach().requires_grad_()
        encoded = model.encode(leaf, batch).detach().requires_grad_()
        parts = [
            ("events", partial(model.embed, batch)),
            ("encoder", lambda: model.encode(leaf, batch)),
            ("experts", lambda: model.loss_of(encoded, batch)),
        ]
        return timed_parts(parts, self.optimizer)


def timed_parts(parts: Parts, optimizer: torch.optim.Optimizer, rounds: int = 3) -> dict[str, float]:
    """Median milliseconds of CPU time of each part's forward and backward, and of the update."""
    samples: dict[str, list[float]] = {name: [] for name, _ in parts} | {"update": []}
    for _ in range(rounds):
        for name, call in parts:
            start = time.process_time()
            result = call()
            result.backward(torch.ones_like(result))
            samples[name].append(time.process_time() - start)
        start = time.process_time()
        optimizer.step()
        samples["update"].append(time.process_time() - start)
        optimizer.zero_grad()
    return {name: round(1e3 * float(np.median(values)), 2) for name, values in samples.items()}


@pytest.mark.parametrize(("share", "precision", "bar"), [(0.1, "fp32", None), (1.0, "fp32", 3.0), (1.0, "bf16", 5.0)])
def bench_multitask_step(contest: Contest, share: float, precision: str, bar: float | None) -> None:
    """Full vocabularies take 14 GB of memory, 10 of them for the rival."""
    sizes, config = sizes_of(share), MultitaskConfig()
    model = MultitaskModel(config, sizes, FEATURES, OUTPUTS)
    rival = without_initialisation(lambda: PaddedMultitask(config, sizes, FEATURES, OUTPUTS)).load_from(model)
    batches = [random_batch(lengths_of(batch), sizes, FEATURES, OUTPUTS) for batch in range(BATCHES)]
    padded = [pad(batch, config.history_length) for batch in batches]
    assert_same_loss(model, rival, batches[0], padded[0])
    ours, theirs = OurStep(model, batches, precision), PaddedStep(rival, padded)
    tokens = int(np.mean([batch.history.num_tokens for batch in batches if batch.history is not None]))
    contest.run(
        f"multi-task training step {precision}, {sizes.num_skus + sizes.num_urls:,} rows, batch {VIEWS}",
        ours,
        {"padded PyTorch fp32 + AdamW(fused)": (theirs, bar)},
        lambda _, mine, other: None,  # both drop out at random; the losses were compared without that
        min_rounds=10,
        seconds=30,
        facts={
            "tokens": tokens,
            "share_of_padded": round(tokens / (VIEWS * config.history_length), 3),
            "cpu_ms_by_part": {"ubp_fast": ours.parts_ms(), "rival": theirs.parts_ms()},
        },
    )


def without_initialisation(factory: Callable[[], PaddedMultitask]) -> PaddedMultitask:
    """Builds the rival without drawing random weights that `load_from` overwrites."""
    original, nn.Embedding.reset_parameters = nn.Embedding.reset_parameters, lambda self: None
    try:
        return factory()
    finally:
        nn.Embedding.reset_parameters = original


@torch.no_grad()
def assert_same_loss(model: MultitaskModel, rival: PaddedMultitask, batch: ViewBatch, padded: PaddedBatch) -> None:
    """Without dropout both give one loss."""
    model.eval(), rival.eval()
    ours, theirs = sum(model.loss(batch).values()), rival.loss(padded)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    model.train(), rival.train()
