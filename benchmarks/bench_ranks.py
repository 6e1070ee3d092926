"""A training step by two processes of one thread each against one process, and the bytes that a step sends.

The bytes of a process are those of its calls of `torch.distributed`, reductions as a ring sends them. The least are
those of dense gradients, of the distinct rows of tables, and of candidates and their gradients, without padding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing
from contest import Contest
from torch import Tensor
from training_steps import Step, contrastive_batch, our_step, sizes_of

from ubp_fast.models.contrastive import ContrastiveConfig, ContrastiveModel
from ubp_fast.optim.ranks import sum_gradients
from ubp_fast.sequences.batch import Place, SequenceBatch, ViewBatch

WORLD, CLIENTS, SHARE = 2, 128, 0.02
# Of all bytes that one process's tensor has, what it sends in a group of so many.
SENT = {"all_reduce": 2 * (WORLD - 1) / WORLD, "all_gather": WORLD - 1, "all_to_all_single": (WORLD - 1) / WORLD}


def bench_two_processes(contest: Contest) -> None:
    with trainers() as (ends, facts):

        def step() -> float:
            for end in ends:
                end.send(True)
            losses = [end.recv() for end in ends]
            return float(losses[0])

        alone = step_of(None)
        contest.run(
            f"contrastive training step fp32, batch {CLIENTS}, by {WORLD} processes",
            step,
            {"1 process": (lambda: float(alone()), None)},
            lambda _, ours, theirs: torch.testing.assert_close(
                torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0
            ),
            min_rounds=7,
            seconds=30,
            facts=facts,
        )


@contextmanager
def trainers() -> Iterator[tuple[list[Connection], dict[str, Any]]]:
    """Ends of pipes to the processes, each of which takes a step when it is told; facts of a step."""
    context = torch.multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(WORLD)]
    with tempfile.TemporaryDirectory() as meeting:
        others = [
            context.Process(target=serve, args=(rank, Path(meeting) / "store", pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for other in others:
            other.start()
        ends = [pipe[0] for pipe in pipes]
        facts, *_ = [end.recv() for end in ends]
        try:
            yield ends, facts
        finally:
            for end in ends:
                end.send(False)
            for other in others:
                other.join()


def serve(rank: int, meeting: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    pipe.send(sent_by_a_step())
    step = step_of(dist.group.WORLD)
    while pipe.recv():
        pipe.send(float(step()))
    dist.destroy_process_group()


def sent_by_a_step() -> dict[str, Any]:
    sent: dict[str, float] = dict.fromkeys(SENT, 0.0)

    def counted(name: str, call: Any, *arguments: Any, **options: Any) -> Any:
        mine = arguments[0] if name == "all_reduce" else arguments[1]
        sent[name] += SENT[name] * mine.numel() * mine.element_size()
        return call(*arguments, **options)

    step = step_of(dist.group.WORLD)
    with mock.patch.multiple(dist, **{name: partial(counted, name, getattr(dist, name)) for name in SENT}):
        step()
    model, least = step.model, 0.0
    tables = {id(model.events.sku.trainable()), id(model.events.url.trainable())}
    for part in model.parameters():
        if id(part) not in tables:
            least += SENT["all_reduce"] * part.numel() * part.element_size()
    for table, rows in ((model.events.sku, "sku"), (model.events.url, "url")):
        batch = step.batch
        used = torch.cat([getattr(batch.history, rows), getattr(batch.future, rows)]).unique()
        least += SENT["all_gather"] * len(used) * (table.trainable().shape[1] * 4 + 8)
    least += 2 * SENT["all_gather"] * batch.num_views * model.config.events.width * 4
    return {
        "sent_bytes_per_step": round(sum(sent.values())),
        "least_bytes_per_step": round(least),
        "sent_by_call": sent,
    }


class SharedStep(Step):
    """Of a part of the batch, with the gradients of all processes."""

    model: ContrastiveModel
    batch: ViewBatch

    def __call__(self) -> Tensor:
        loss = self.loss(next(self.batches))
        loss.backward()
        if self.batch.group is not None:
            sum_gradients(self.model.parameters(), self.batch.group)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def step_of(group: dist.ProcessGroup | None) -> SharedStep:
    """The same model and batch in every process."""
    torch.manual_seed(0)
    sizes = sizes_of(SHARE)
    model, batch = ContrastiveModel(ContrastiveConfig(), sizes), contrastive_batch(sizes, CLIENTS, 0)
    if group is not None:
        rank, size = dist.get_rank(group), CLIENTS // WORLD
        batch = ViewBatch(
            history=part_of(batch.history, rank * size, (rank + 1) * size),
            future=part_of(batch.future, rank * size, (rank + 1) * size),
            group=group,
            all_views=CLIENTS,
            first_view=rank * size,
        )
    step = SharedStep.__new__(SharedStep)
    step.__dict__.update(our_step(model, [batch], "fp32").__dict__, model=model, batch=batch)
    torch.manual_seed(1)
    return step


def part_of(whole: SequenceBatch | None, begin: int, end: int) -> SequenceBatch:
    assert whole is not None
    first, last = whole.cu_seqlens[[begin, end]].tolist()
    has_events = whole.lengths() > 0
    place = Place(first, int(has_events[:begin].sum()), whole.num_tokens, int(has_events.sum()))
    rows = ("kind", "sku", "category", "price", "url", "codes", "timestamp_s")
    return replace(
        whole,
        **{name: getattr(whole, name)[first:last] for name in rows},
        cu_seqlens=whole.cu_seqlens[begin : end + 1] - first,
        cutoff_s=whole.cutoff_s[begin:end],
        client=whole.client[begin:end],
        shared=place,
    )
