"""Training steps of our models and their rivals on random clients, for the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from reference_pytorch.multitask_step import random_batch
from reference_pytorch.padded import random_events, random_lengths
from schedulefree import RAdamScheduleFree
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.models.contrastive import ContrastiveConfig, ContrastiveModel
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.layers.linear import linear
from ubp_fast.models.multitask import MULTITASK_LABELS, MultitaskConfig, MultitaskModel
from ubp_fast.optim import adopt_tables
from ubp_fast.sequences.batch import ViewBatch

FEATURES, BATCHES = 46, 8
OUTPUTS = {name: 1 if name in ("churn", "add") else 100 for name in MULTITASK_LABELS}
KINDS = ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")


def sizes_of(share: float) -> EventSizes:
    """The winner's vocabularies, or a share of the large ones."""
    return EventSizes(int(1_260_370 * share), 6_995, 102, int(373_500 * share), KINDS)


def in_precision(precision: str) -> torch.autocast:
    """As Lightning's bf16-mixed, or float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


class Step:
    """Forward, backward and update on the next of some batches."""

    def __init__(
        self, loss: Callable[[Any], Tensor], batches: list[Any], optimizer: torch.optim.Optimizer, precision: str
    ) -> None:
        self.loss, self.batches, self.optimizer, self.precision = loss, cycle(batches), optimizer, precision

    def __call__(self) -> Tensor:
        with in_precision(self.precision):
            loss = self.loss(next(self.batches))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def release(self) -> None:
        """Lets go of model and optimizer, whose memory can be given back then; the last call."""
        del self.loss, self.optimizer


class FirstStep(Step):
    """A step whose optimizer has no state yet: making it is not timed."""

    off_the_clock: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(cls, step: Step, off_the_clock: Callable[[], AbstractContextManager[None]]) -> FirstStep:
        """The first call of a step."""
        first = cls.__new__(cls)
        first.__dict__.update(step.__dict__, off_the_clock=off_the_clock)
        return first

    def __call__(self) -> Tensor:
        loss = self.loss(next(self.batches))
        loss.backward()
        with self.off_the_clock():
            self.optimizer.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def our_step(model: nn.Module, batches: list[ViewBatch], precision: str) -> Step:
    """A model of `ubp_fast` with its default optimizer."""
    optimizer = adopt_tables(RAdamScheduleFree(model.parameters(), lr=1e-3), model, "row_sparse")
    optimizer.train()
    return Step(lambda batch: sum(model.loss(batch).values()), batches, optimizer, precision)


def padded_step(model: nn.Module, batches: list[Any]) -> Step:
    """The rival with AdamW(fused=True)."""
    return Step(model.loss, batches, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), "fp32")


def by_onednn(loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """A rival's loss with its linear layers by oneDNN, as ours are: torch takes another BLAS for float32."""
    plain = functional.linear

    def linear_of_rows(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not rows.numel():
            return plain(rows, weight, bias)
        return linear(rows.flatten(0, -2), weight, bias).unflatten(0, rows.shape[:-1])

    def computed(batch: Any) -> Tensor:
        functional.linear = linear_of_rows
        try:
            return loss(batch)
        finally:
            functional.linear = plain

    return computed


def multitask_batches(sizes: EventSizes) -> list[ViewBatch]:
    """128 clients each; about half of [B, 64] would be padding."""
    return [random_batch(random_lengths(128, seed), sizes, FEATURES, OUTPUTS) for seed in range(BATCHES)]


def contrastive_batch(sizes: EventSizes, clients: int, seed: int) -> ViewBatch:
    """A fifth of the clients has no event in the two weeks ahead."""
    history = random_events(random_lengths(clients, seed), sizes)
    future = random_events(random_lengths(clients, 100 + seed, 8.0, 0.2), sizes, is_future=True)
    return ViewBatch(history=history, future=future)


def steps_alone(name: str) -> tuple[float, float]:
    """CPU seconds until model and optimizer exist, and the largest resident set after some steps."""
    torch.set_num_threads(1)
    is_contrastive, sizes = name == "contrastive", sizes_of(1.0)
    batches = [contrastive_batch(sizes, 1024, 0)] if is_contrastive else multitask_batches(sizes)
    start = time.process_time()
    if is_contrastive:
        model: nn.Module = ContrastiveModel(ContrastiveConfig(), sizes)
    else:
        model = MultitaskModel(MultitaskConfig(), sizes, FEATURES, OUTPUTS)
    step = our_step(model, batches, "fp32")
    start_s = time.process_time() - start
    for _ in batches:
        step()
    return start_s, peak_bytes_of_process()


def peak_bytes_of_process() -> int:
    """Largest resident set since the process began its program; `getrusage` adds what the parent had when it forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
