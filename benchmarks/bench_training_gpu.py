"""On a CUDA device: steps of a large embedding table, and of the winner's multi-task model, against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import cycle
from typing import Any

import pytest
import torch
from contest import Contest
from reference_pytorch.multitask_step import PaddedMultitask, pad_views, random_batch
from reference_pytorch.padded import random_lengths, without_initialisation
from torch import Tensor, nn

from ubp_fast.kernels import CapturedStep
from ubp_fast.kernels.row_sparse import RowTable, ScheduleFree, ScheduleFreeStep, gather, reduce_padded, update
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.multitask import MULTITASK_LABELS, MultitaskConfig, MultitaskModel
from ubp_fast.sequences import FixedSizes

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
DEVICE, WIDTH, IDS = "cuda", 384, 8192
FEATURES, KINDS = 46, ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")
OUTPUTS = {name: 1 if name in ("churn", "add") else 100 for name in MULTITASK_LABELS}


@pytest.mark.parametrize("rows", [126_000, 1_260_000])
def bench_row_sparse_gpu(gpu_contest: Contest, rows: int) -> None:
    """Lookup, sums of equal ids and update of the rows in use; the rival updates all rows by another rule."""
    generator = torch.Generator().manual_seed(0)
    ranks = rows ** torch.rand((64, IDS), generator=generator, dtype=torch.float64)
    batches = list(torch.randperm(rows, generator=generator)[ranks.long().clamp(max=rows - 1)].to(DEVICE))
    gradient, weight = torch.randn(IDS, WIDTH, device=DEVICE), torch.randn(rows, WIDTH, device=DEVICE)
    state = torch.zeros(rows, 2, WIDTH, device=DEVICE)
    places = [torch.full((rows,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    used, retained = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones(1, dtype=torch.float64, device=DEVICE)
    table, rule = RowTable(weight.clone(), state, places[0], used, places[1], retained), ScheduleFree(0.999, 1e-8)
    numbers = ScheduleFreeStep(1e-3, 0.1, 0.05, 0.1, True)
    upcoming, theirs_upcoming = cycle(batches), cycle(batches)

    def ours() -> Tensor:
        nonlocal table
        ids = next(upcoming)
        vectors = gather(table, rule, ids, backend="triton")
        distinct, sums, count = reduce_padded(ids, gradient, backend="triton")
        update(table, rule, distinct, sums, numbers, count=count, backend="triton")
        table = table._replace(history=torch.cat([table.history, table.history[-1:] * 0.9]))
        return vectors

    dense = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3, fused=True)

    def theirs() -> Tensor:
        vectors = dense(next(theirs_upcoming))
        vectors.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        return vectors.detach()

    assert torch.equal(ours(), theirs())
    gpu_contest.run(
        f"row_sparse triton {rows:,} x {WIDTH}, {IDS:,} ids",
        ours,
        {"nn.Embedding + AdamW(fused)": (theirs, 5.0 if rows > 10**6 else None)},
        lambda *_: None,  # compared above
        seconds=2,
        facts={"dtype": "float32", "rows": rows, "width": WIDTH, "flop": 0.0, "bytes": 10 * IDS * WIDTH * 4},
    )


def moved(value: Any) -> Any:
    """Batches and their tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, dict):
        return {name: moved(part) for name, part in value.items()}
    if is_dataclass(value):
        return replace(
            value, **{field.name: moved(getattr(value, field.name)) for field in fields(value) if field.init}
        )
    return value


def training_step(
    loss: Callable[[Any], Tensor], batches: list[Any], optimizer: torch.optim.Optimizer
) -> Callable[[], Tensor]:
    upcoming: Iterator[Any] = cycle(batches)

    def call() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(next(upcoming))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return call


@pytest.mark.parametrize("batch", [128, 1024])
def bench_multitask_step_gpu(gpu_contest: Contest, batch: int) -> None:
    """bfloat16 under autocast, the same AdamW for all weights on all sides: packed layers against padded ones.

    Ours is captured as one graph, of batches that are filled up to one size; it stands beside the step without one.
    """
    torch.set_default_device("cpu")
    sizes, config = EventSizes(126_037, 6_995, 102, 37_350, KINDS), MultitaskConfig()
    model = MultitaskModel(config, sizes, FEATURES, OUTPUTS)
    rival = without_initialisation(lambda: PaddedMultitask(config, sizes, FEATURES, OUTPUTS)).load_from(model)
    batches = [random_batch(random_lengths(batch, seed), sizes, FEATURES, OUTPUTS) for seed in range(4)]
    padded = [moved(pad_views(part, config.history_length)) for part in batches]
    packed, fills = [part.to(DEVICE) for part in batches], FixedSizes(config.history_length, batch)
    for part in batches:  # to the size of all
        fills(part)
    filled = [fills(part).to(DEVICE) for part in batches]
    model, rival = model.to(DEVICE), rival.to(DEVICE)
    ours, theirs = (torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True) for module in (model, rival))
    captured, upcoming = CapturedStep(model.loss, model), cycle(filled)

    def captured_step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            terms = captured(next(upcoming))
        ours.step()
        return terms["churn"]

    gpu_contest.run(
        f"multi-task training step bfloat16, {sizes.num_skus + sizes.num_urls:,} rows, batch {batch:,}",
        captured_step,
        {
            "padded PyTorch": (training_step(rival.loss, padded, theirs), 3.0),
            "the same without a graph": (
                training_step(lambda part: sum(model.loss(part).values()), packed, ours),
                None,
            ),
        },
        lambda *_: None,  # both drop out at random; the CPU case compares the losses without that
        seconds=2,
        facts={"dtype": "bfloat16", "flop": 0.0, "tokens": sum(part.history.num_tokens for part in batches) // 4},
    )
