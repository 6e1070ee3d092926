"""Which optimizer trains tables, and clipping with sparse gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from schedulefree import RAdamScheduleFree
from torch import nn

from ubp_fast.optim import (
    RowSparseAdamW,
    RowSparseEmbedding,
    RowSparseRAdamScheduleFree,
    adopt_tables,
    clip_gradient_norm,
)


class Other(RAdamScheduleFree):
    """Steps in a way nobody knows."""


def model() -> nn.Sequential:
    return nn.Sequential(RowSparseEmbedding(10, 4), nn.Linear(4, 2))


def test_schedule_free_is_adopted() -> None:
    layers = model()
    optimizer = adopt_tables(RAdamScheduleFree(layers.parameters(), lr=0.25, betas=(0.8, 0.9)), layers, "auto")
    assert isinstance(optimizer, RowSparseRAdamScheduleFree)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"]) == (0.25, (0.8, 0.9))
    assert len(group["params"]) == 3
    assert layers[0].touched is not None


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.Adam])
def test_adam_is_adopted(factory: type[torch.optim.Optimizer]) -> None:
    layers = model()
    before = factory(layers.parameters(), lr=0.25, betas=(0.8, 0.9))
    decay = before.param_groups[0]["weight_decay"]
    optimizer = adopt_tables(before, layers, "auto")
    assert isinstance(optimizer, RowSparseAdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.8, 0.9), decay)
    assert layers[0].touched is not None


@pytest.mark.parametrize(
    "factory",
    [
        Other,
        torch.optim.SGD,
        partial(RAdamScheduleFree, weight_decay=0.1),
        partial(torch.optim.Adam, weight_decay=0.1),
        partial(torch.optim.AdamW, amsgrad=True),
    ],
    ids=["subclass", "sgd", "schedule-free decay", "adam decay", "amsgrad"],
)
def test_others_stay_as_they_are(factory: type[torch.optim.Optimizer]) -> None:
    layers = model()
    optimizer = factory(layers.parameters())
    assert adopt_tables(optimizer, layers, "auto") is optimizer
    assert layers[0].touched is None
    with pytest.raises(ValueError, match="optimizer must be row-sparse, got one that is not"):
        adopt_tables(optimizer, layers, "row_sparse")


def test_dense_and_models_without_tables_keep_theirs() -> None:
    layers, linear = model(), nn.Linear(2, 2)
    dense = RAdamScheduleFree(layers.parameters())
    assert adopt_tables(dense, layers, "dense") is dense
    other = RAdamScheduleFree(linear.parameters())
    assert adopt_tables(other, linear, "row_sparse") is other


@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_clipping_equals_the_dense_one(max_norm: float) -> None:
    layers = model()
    plain = copy.deepcopy(layers)
    adopt_tables(RAdamScheduleFree(layers.parameters()), layers, "row_sparse")
    ids = torch.tensor([1, 1, 3, 9])
    for one in (layers, plain):
        (one(ids).square().sum() + one(ids[:2]).sum()).backward()
    wanted = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    torch.testing.assert_close(clip_gradient_norm(layers.parameters(), max_norm), wanted)
    for one, other in zip(layers.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad.to_dense(), other.grad)
    nothing = nn.Linear(1, 1)
    assert clip_gradient_norm(nothing.parameters(), 1.0) == 0.0


@pytest.mark.parametrize("factory", [RAdamScheduleFree, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_state_continues_bit_by_bit_and_disturbs_nothing(
    factory: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, tmp_path: Path
) -> None:
    """1,100 steps make the history of steps longer than it is at first; most rows wait for their next use."""

    def start() -> tuple[nn.Sequential, Any]:
        torch.manual_seed(0)
        layers = nn.Sequential(RowSparseEmbedding(30, 4, dtype=dtype), nn.Linear(4, 1))
        optimizer: Any = adopt_tables(factory(layers.parameters(), lr=0.01), layers, "auto")
        getattr(optimizer, "train", lambda: None)()
        return layers, optimizer

    def steps(layers: nn.Sequential, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            ids = torch.tensor([step * step % 29, step % 7])
            optimizer.zero_grad()
            layers(ids).square().sum().backward()
            optimizer.step()

    def memory(layers: nn.Sequential) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return layers[0].weight.detach().clone()

    layers, optimizer = start()
    steps(layers, optimizer, 0, 1100)
    with torch._C.DisableTorchFunctionSubclass():
        torch.save((layers.state_dict(), optimizer.exact_state()), tmp_path / "exact")
    assert (layers[0].touched.last_step != layers[0].touched.steps).any()
    others, continued = start()
    weights, exact = torch.load(tmp_path / "exact", weights_only=True)
    continued.load_exact_state(exact)
    with torch._C.DisableTorchFunctionSubclass():
        others.load_state_dict(weights)
    for one in ((layers, optimizer), (others, continued)):
        steps(*one, 1100, 1200)
    assert torch.equal(memory(layers), memory(others))
    assert torch.equal(layers[0].weight, others[0].weight)
    undisturbed, alone = start()
    steps(undisturbed, alone, 0, 1200)
    assert torch.equal(layers[0].weight, undisturbed[0].weight)
    assert (tmp_path / "exact").stat().st_size < 100_000, "of rows in use alone"
