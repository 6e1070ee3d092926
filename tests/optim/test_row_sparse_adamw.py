"""RowSparseAdamW against torch's dense AdamW and Adam: every row and every moment, in every situation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.two_tables import FLOAT_BETAS, TwoTables, assert_same, batches, distance, everything, take_steps
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ubp_fast.optim import RowSparseAdamW, RowSparseEmbedding


def make(dense: type[Optimizer] | None, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Model and optimizer, row-sparse without `dense`."""
    options = {"lr": 1e-2, **options}
    model = TwoTables(nn.Embedding if dense else RowSparseEmbedding, dtype)
    if dense:
        return model, dense(model.parameters(), **options)
    return model, RowSparseAdamW(model.parameters(), [model.first, model.second], **options)


def table_run(is_sparse: bool, dtype: torch.dtype, scale: float) -> dict[str, Tensor]:
    """One table, 300 steps with given gradients, falling learning rate, new objects from a checkpoint after 150."""
    generator = torch.Generator().manual_seed(4)
    weights, table, optimizer = torch.randn(2000, 16, generator=generator).to(dtype), None, None
    for step in range(300):
        if step in (0, 150):
            state = None if optimizer is None else optimizer.state_dict()
            weights = weights if table is None else table.state_dict()["weight"].clone()
            table = (RowSparseEmbedding if is_sparse else nn.Embedding)(2000, 16, dtype=dtype)
            table.load_state_dict({"weight": weights})
            options: dict[str, Any] = {"lr": 1e-2, "betas": FLOAT_BETAS}
            optimizer = (
                RowSparseAdamW([table.weight], [table], **options) if is_sparse else AdamW([table.weight], **options)
            )
            optimizer.load_state_dict(state or optimizer.state_dict())
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + 0.01 * step)
        ids = (2000 ** torch.rand(200, generator=generator, dtype=torch.float64)).long().clamp(max=1999)
        gradient = torch.randn(200, 16, generator=generator) * torch.randn(200, 1, generator=generator).exp() * scale
        optimizer.zero_grad()
        table(ids).backward(gradient.to(dtype))
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    return {"weight": table.state_dict()["weight"], "m": state["exp_avg"], "v": state["exp_avg_sq"]}


@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("threads", [1, 2])
def test_300_steps_of_a_table_in_float32(threads: int, scale: float) -> None:
    """With the same gradients all that is left is rounding; gradients far above eps, and so small that eps counts."""
    truth, plain = table_run(False, torch.float64, scale), table_run(False, torch.float32, scale)
    torch.set_num_threads(threads)
    found = table_run(True, torch.float32, scale)
    for name, value in truth.items():
        ours, theirs = distance(found[name], value), distance(plain[name], value)
        print(f"{name}: to float64 {ours:.1e}, dense {theirs:.1e}, to dense {distance(found[name], plain[name]):.1e}")
        assert ours <= 1e-6, name
        assert ours < theirs or name != "weight"


@pytest.mark.parametrize(
    ("dense", "options"),
    [
        (AdamW, {}),
        (AdamW, {"weight_decay": 0.5, "betas": (0.5, 0.9)}),
        (AdamW, {"lr": torch.tensor(1e-2, dtype=torch.float64), "eps": 1e-3}),
        (Adam, {"betas": (0.0, 0.99)}),
    ],
    ids=str,
)
def test_options(dense: type[Optimizer], options: dict[str, Any]) -> None:
    steps, results = batches(25, torch.float64), []
    for kind in (None, dense):
        without_decay = {"weight_decay": 0.0} if dense is Adam else {}
        model, optimizer = make(kind, **options, **without_decay)
        take_steps(model, optimizer, steps)
        results.append((model, optimizer))
    assert_same(*(everything(*one) for one in results))


def test_numbers_may_change_between_steps() -> None:
    results = []
    for kind in (None, AdamW):
        model, optimizer = make(kind)
        for at, changes in enumerate(({}, {"lr": 0.1}, {"betas": (0.8, 0.99), "eps": 1e-4}, {"weight_decay": 0.3})):
            optimizer.param_groups[0].update(changes)
            take_steps(model, optimizer, batches(20, torch.float64)[5 * at : 5 * at + 5])
        results.append((model, optimizer))
    assert_same(*(everything(*one) for one in results))


@pytest.mark.parametrize("from_sparse", [True, False])
def test_state_loads_across_dense_and_sparse(from_sparse: bool) -> None:
    steps = batches(30, torch.float64)
    model, optimizer = make(None if from_sparse else AdamW)
    take_steps(model, optimizer, steps[:15])
    weights, state = model.state_dict(), optimizer.state_dict()
    other, other_optimizer = make(AdamW if from_sparse else None)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(state)
    wanted = make(AdamW)
    for part, (one, one_optimizer) in ((steps[15:], (other, other_optimizer)), (steps, wanted)):
        take_steps(one, one_optimizer, part)
    assert_same(everything(other, other_optimizer), everything(*wanted))


def test_a_table_without_gradient_rests() -> None:
    steps, results = batches(24, torch.float64), []
    for kind in (None, AdamW):
        model, optimizer = make(kind)
        for start in range(0, 24, 6):
            take_steps(model, optimizer, steps[start : start + 6], uses_second=start in (6, 18))
        results.append((model, optimizer))
    assert_same(*(everything(*one) for one in results))


def test_history_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ubp_fast.optim.row_sparse_adamw._LONGEST_HISTORY", 7)
    steps, results = batches(30, torch.float64), []
    for kind in (None, AdamW):
        model, optimizer = make(kind)
        if kind is None:
            model.first.touched._history = torch.ones((2, 3), dtype=torch.float64)
        take_steps(model, optimizer, steps)
        results.append((model, optimizer))
    assert results[0][0].first.touched.steps == 30 % 7
    assert_same(*(everything(*one) for one in results))


def test_strong_decay_starts_the_history_anew() -> None:
    results = []
    for kind in (None, AdamW):
        model, optimizer = make(kind, lr=0.5, weight_decay=1.0)
        take_steps(model, optimizer, batches(20, torch.float64))
        results.append((model, optimizer))
    assert results[0][0].first.touched._kept >= 1e-3
    assert_same(*(everything(*one) for one in results))


def test_closure_hooks_and_gradients_stay() -> None:
    model, optimizer = make(None)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    (batch,) = batches(1, torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        return loss

    before = model.loss(batch)
    assert torch.equal(optimizer.step(closure), before)
    assert calls == ["before", "after"]
    assert model.first.weight.grad._nnz() == len(batch[0].unique())


def turn_on_amsgrad(model: TwoTables, optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.step()


@pytest.mark.parametrize(
    ("action", "message"),
    [(turn_on_amsgrad, "must go without amsgrad")],
)
def test_misuse(action: Callable[[TwoTables, Optimizer], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action(*make(None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps = 0"),
        ({"lr": 2.0, "weight_decay": 0.5}, "lr . weight_decay >= 1"),
        ({"maximize": True}, "max"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    model = TwoTables(RowSparseEmbedding, torch.float32)
    with pytest.raises(ValueError, match=message):
        RowSparseAdamW(model.parameters(), [model.first], **options)
    with pytest.raises(ValueError, match="tables must have their weights in params"):
        RowSparseAdamW(model.linear.parameters(), [model.first])
    groups = [{"params": model.linear.parameters(), **options}, {"params": [model.first.weight]}]
    RowSparseAdamW(groups, [model.first])
