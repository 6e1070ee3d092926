"""One training step of a large embedding table: lookup, backward and update of the rows in use against all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
from contest import Contest
from schedulefree import RAdamScheduleFree
from torch import Tensor, nn

from ubp_fast.optim import RowSparseAdamW, RowSparseEmbedding, RowSparseRAdamScheduleFree

WIDTH, IDS, BATCHES = 384, 8192, 64
Call = Callable[[], Tensor]


def zipf_batches(rows: int) -> list[Tensor]:
    """Ids whose popularity falls with 1 / rank, ranks scattered over the table."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randperm(rows, generator=generator)
    uniform = torch.rand((BATCHES, IDS), generator=generator, dtype=torch.float64)
    return list(place[(rows**uniform).long().clamp(max=rows - 1)])


def training_step(table: nn.Embedding, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> Call:
    """Looks the next batch up, walks back and updates; returns the vectors that were looked up."""
    upcoming: Iterator[Tensor] = cycle(batches)
    gradient = torch.randn((IDS, WIDTH), generator=torch.Generator().manual_seed(1))

    def call() -> Tensor:
        vectors = table(next(upcoming))
        vectors.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        return vectors.detach()

    return call


def row_sparse_step(
    weights: Tensor, batches: list[Tensor], factory: type[torch.optim.Optimizer] = RowSparseRAdamScheduleFree
) -> Call:
    table = RowSparseEmbedding(len(weights), WIDTH, dtype=weights.dtype)
    table.load_state_dict({"weight": weights})
    optimizer = factory([table.weight], [table], lr=1e-3)
    if isinstance(optimizer, RAdamScheduleFree):
        optimizer.train()
    return training_step(table, optimizer, batches)


def dense_step(weights: Tensor, batches: list[Tensor], factory: Callable[..., torch.optim.Optimizer]) -> Call:
    table = nn.Embedding.from_pretrained(weights, freeze=False)
    optimizer = factory([table.weight])
    if isinstance(optimizer, RAdamScheduleFree):
        optimizer.train()
    return training_step(table, optimizer, batches)


@pytest.mark.parametrize(("rows", "bar"), [(126_000, 3.0), (1_260_000, 10.0)])
def bench_against_fused_adamw(contest: Contest, rows: int, bar: float) -> None:
    """What users run today; another rule, so only the lookups of the first step are compared. Takes 10 GB of memory.

    All batches were seen once before: the first visit of a row also pays for fresh memory, once in a training.
    """
    batches, weights = zipf_batches(rows), torch.randn(rows, WIDTH)
    mine = row_sparse_step(weights, batches)
    rival = dense_step(weights, batches, lambda part: torch.optim.AdamW(part, lr=1e-3, fused=True))

    assert torch.equal(mine(), rival())
    for _ in range(BATCHES):
        mine()

    contest.run(
        f"row_sparse step {rows:,} x {WIDTH}, {IDS:,} ids",
        mine,
        {"nn.Embedding + AdamW(fused)": (rival, bar)},
        lambda *_: None,  # compared above
        min_rounds=40,
        facts=facts(rows, batches),
    )


@pytest.mark.parametrize(("rows", "bar"), [(126_000, 3.0), (1_260_000, 10.0)])
def bench_adamw(contest: Contest, rows: int, bar: float) -> None:
    """What users run today, weight decay included, and the same rule: vectors agree after many steps. Takes 10 GB."""
    batches, weights = zipf_batches(rows), torch.randn(rows, WIDTH)
    mine = row_sparse_step(weights, batches, RowSparseAdamW)
    rival = dense_step(weights, batches, lambda part: torch.optim.AdamW(part, lr=1e-3, fused=True))
    for _ in range(BATCHES - 1):
        mine(), rival()

    def check(_: str, found: Tensor, wanted: Tensor) -> None:
        # A step moves a weight by about 1e-3; sums of hundreds of gradients are rounded in two orders.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-5)

    contest.run(
        f"row_sparse AdamW step {rows:,} x {WIDTH}, {IDS:,} ids",
        mine,
        {"nn.Embedding + AdamW(fused)": (rival, bar)},
        check,
        min_rounds=40,
        facts=facts(rows, batches),
    )


def bench_against_dense_schedule_free(contest: Contest) -> None:
    """The same rule, every row in every step: vectors agree after many steps."""
    rows = 126_000
    batches, weights = zipf_batches(rows), torch.randn(rows, WIDTH)
    mine = row_sparse_step(weights, batches)
    rival = dense_step(weights, batches, lambda part: RAdamScheduleFree(part, lr=1e-3))
    for _ in range(20):
        mine(), rival()

    def check(_: str, found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

    contest.run(
        f"row_sparse step {rows:,} x {WIDTH}, {IDS:,} ids, same rule",
        mine,
        {"nn.Embedding + RAdamScheduleFree": (rival, 10.0)},
        check,
        facts=facts(rows, batches),
    )


def bench_bfloat16_table(contest: Contest) -> None:
    """Half the memory of the weights, state in float32 for the rows in use; steps are rounded at random."""
    rows = 1_260_000
    batches, weights = zipf_batches(rows), torch.randn(rows, WIDTH, dtype=torch.bfloat16)
    mine, plain = row_sparse_step(weights, batches), row_sparse_step(weights.float(), batches)
    rival = dense_step(weights.float(), batches, lambda part: torch.optim.AdamW(part, lr=1e-3, fused=True))
    first = [mine(), plain(), rival()]
    assert all(torch.equal(vectors, first[0]) for vectors in first)
    for _ in range(BATCHES):
        mine(), plain()

    contest.run(
        f"row_sparse step {rows:,} x {WIDTH}, {IDS:,} ids, bfloat16 table",
        mine,
        {"nn.Embedding + AdamW(fused)": (rival, 5.0), "float32 table": (plain, None)},
        lambda *_: None,  # compared above
        min_rounds=40,
        facts=facts(rows, batches),
    )


def facts(rows: int, batches: list[Tensor]) -> dict[str, int]:
    distinct = sum(len(ids.unique()) for ids in batches) // len(batches)
    return {"rows": rows, "width": WIDTH, "ids": IDS, "distinct_ids": distinct}
