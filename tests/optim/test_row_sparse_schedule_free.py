"""RowSparseRAdamScheduleFree against the library's dense optimizer: every row, z and exp_avg_sq, in every situation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from schedulefree import RAdamScheduleFree
from support.closeness import assert_matches_reference
from support.two_tables import FLOAT_BETAS, ROWS, TwoTables, assert_same, batches, distance, everything, take_steps
from torch import Tensor, nn

from ubp_fast.optim import RowSparseEmbedding, RowSparseRAdamScheduleFree


def make(is_sparse: bool, dtype: torch.dtype, **options: Any) -> tuple[TwoTables, RAdamScheduleFree]:
    options = {"lr": 1e-2, **options}
    model = TwoTables(RowSparseEmbedding if is_sparse else nn.Embedding, dtype)
    if is_sparse:
        tables = [model.first, model.second]
        return model, RowSparseRAdamScheduleFree(model.parameters(), tables, **options)
    return model, RAdamScheduleFree(model.parameters(), **options)


def moved_into_new_objects(model: TwoTables, optimizer: RAdamScheduleFree, is_sparse: bool, dtype: torch.dtype) -> Any:
    """What a process does that starts from a checkpoint."""
    weights, state = model.state_dict(), optimizer.state_dict()
    other, other_optimizer = make(is_sparse, dtype)
    other.load_state_dict(weights)
    other_optimizer.load_state_dict(state)
    return other, other_optimizer


@cache
def long_run(is_sparse: bool, dtype: torch.dtype, saves: bool = True) -> dict[str, Tensor]:
    """300 steps, switches after 100 and 170, a checkpoint after 200."""
    steps = batches(300, dtype)
    model, optimizer = make(is_sparse, dtype)
    for start, end in ((0, 100), (100, 170), (170, 200)):
        take_steps(model, optimizer, steps[start:end])
        optimizer.eval()
    if saves:
        model, optimizer = moved_into_new_objects(model, optimizer, is_sparse, dtype)
    take_steps(model, optimizer, steps[200:])
    in_training = everything(model, optimizer)
    optimizer.eval()
    return in_training | {f"{name} in evaluation": value for name, value in everything(model, optimizer).items()}


def test_300_steps_equal_dense_in_float64() -> None:
    assert_same(long_run(True, torch.float64), long_run(False, torch.float64))


@pytest.mark.parametrize("threads", [1, 2])
def test_300_steps_of_a_model_in_float32(threads: int) -> None:
    plain, truth = long_run(False, torch.float32), long_run(False, torch.float64)
    torch.set_num_threads(threads)
    found = long_run.__wrapped__(True, torch.float32)
    assert torch.equal(make(True, torch.float32)[0].first.weight, make(False, torch.float64)[0].first.weight.float())
    for name, value in truth.items():
        assert_matches_reference(found[name], plain[name], value, "RowSparseRAdamScheduleFree", name)


@cache
def table_run(is_sparse: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """One table, 300 steps with given gradients, switches after 100 and 200, a checkpoint after 150."""
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
                RowSparseRAdamScheduleFree([table.weight], [table], **options)
                if is_sparse
                else RAdamScheduleFree([table.weight], **options)
            )
            optimizer.load_state_dict(state or optimizer.state_dict())
        if step in (0, 100, 200):
            optimizer.eval()
            optimizer.train()
        ids = (2000 ** torch.rand(200, generator=generator, dtype=torch.float64)).long().clamp(max=1999)
        gradient = torch.randn(200, 16, generator=generator) * torch.randn(200, 1, generator=generator).exp()
        optimizer.zero_grad()
        table(ids).backward(gradient.to(dtype))
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    result = {"z": state["z"].clone(), "v": state["exp_avg_sq"].clone(), "y": table.state_dict()["weight"].clone()}
    optimizer.eval()
    return result | {"x": table.weight.detach().clone()}


@pytest.mark.parametrize("threads", [1, 2])
def test_300_steps_of_a_table_in_float32(threads: int) -> None:
    """With the same gradients all that is left is rounding: ours of touched rows, the dense one's of all rows.

    The dense optimizer in float32 rounds y of every row in every step, and so is further from itself in float64.
    """
    truth, plain = table_run(False, torch.float64), table_run(False, torch.float32)
    torch.set_num_threads(threads)
    found = table_run.__wrapped__(True, torch.float32)
    for name, value in truth.items():
        ours, theirs = distance(found[name], value), distance(plain[name], value)
        print(f"{name}: to float64 {ours:.1e}, dense {theirs:.1e}, to dense {distance(found[name], plain[name]):.1e}")
        assert ours <= 1e-6, name
        assert ours < theirs or name in "zv", name
    exact = table_run(True, torch.float64)
    assert max(distance(exact[name], value) for name, value in truth.items()) < 1e-14


def test_threads_and_a_checkpoint_do_not_change_a_bit() -> None:
    results = []
    for threads, saves in ((1, True), (2, True), (1, False)):
        torch.set_num_threads(threads)
        found = long_run.__wrapped__(True, torch.float32, saves)
        results.append([found[name].numpy().tobytes() for name in sorted(found)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("from_sparse", [True, False])
def test_state_loads_across_dense_and_sparse(from_sparse: bool, mode: str) -> None:
    steps = batches(60, torch.float64)
    model, optimizer = make(from_sparse, torch.float64)
    take_steps(model, optimizer, steps[:30])
    getattr(optimizer, mode)()
    other, other_optimizer = moved_into_new_objects(model, optimizer, not from_sparse, torch.float64)
    take_steps(other, other_optimizer, steps[30:])
    wanted, wanted_optimizer = make(False, torch.float64)
    take_steps(wanted, wanted_optimizer, steps)
    assert_same(everything(other, other_optimizer), everything(wanted, wanted_optimizer))


@pytest.mark.parametrize(
    "options", [{"betas": (0.8, 0.99)}, {"r": 1.0}, {"silent_sgd_phase": False}, {"weight_lr_power": 0.0}], ids=str
)
def test_options(options: dict[str, Any]) -> None:
    results = []
    for is_sparse in (True, False):
        model, optimizer = make(is_sparse, torch.float64, **{"lr": 1e-3, **options})
        take_steps(model, optimizer, batches(25, torch.float64))
        results.append(everything(model, optimizer))
    assert_same(*results)


def test_a_table_without_gradient_rests() -> None:
    steps, results = batches(40, torch.float64), []
    for is_sparse in (True, False):
        model, optimizer = make(is_sparse, torch.float64)
        for start in range(0, 40, 10):
            take_steps(model, optimizer, steps[start : start + 10], uses_second=start in (10, 30))
        results.append(everything(model, optimizer))
    assert_same(*results)


def test_closure_hooks_and_gradients_stay() -> None:
    model, optimizer = make(True, torch.float64)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.train()
    (batch,) = batches(1, torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        return loss

    before = model.loss(batch)
    assert torch.equal(optimizer.step(closure), before)
    assert calls == ["before", "after"]
    assert model.first.weight.grad.is_sparse
    assert model.first.weight.grad._nnz() == len(batch[0].unique())


def test_memory_is_that_of_the_touched_rows() -> None:
    model, optimizer = make(True, torch.float32)
    touched = model.first.touched
    touched.state.fill_(float("nan"))  # what nobody writes stays NaN
    steps = batches(20, torch.float32)
    take_steps(model, optimizer, steps)
    optimizer.eval()
    optimizer.train()
    used = len(torch.cat([ids for ids, _ in steps]).unique())
    assert 0 < used < ROWS
    assert int(touched.used) == used
    assert not touched.state[:used].isnan().any()
    assert touched.state[used:].isnan().all()


def test_many_steps_between_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history of averages grows, and starts anew before its quotients lose digits."""
    monkeypatch.setattr("ubp_fast.optim.row_sparse_schedule_free._SMALLEST_RETAINED", 1e-2)
    steps, results = batches(50, torch.float64), []
    for is_sparse in (True, False):
        model, optimizer = make(is_sparse, torch.float64)
        if is_sparse:
            model.first.touched._history = torch.ones(2, dtype=torch.float64)
        take_steps(model, optimizer, steps)
        results.append(everything(model, optimizer))
    assert_same(*results)


def leave_training_mode(model: TwoTables, optimizer: RAdamScheduleFree) -> None:
    optimizer.step()


@pytest.mark.parametrize(
    ("action", "message"),
    [(leave_training_mode, "not in train mode")],
)
def test_misuse(action: Callable[[TwoTables, RAdamScheduleFree], None], message: str) -> None:
    with pytest.raises(Exception, match=message):
        action(*make(True, torch.float32))


def test_wrong_arguments() -> None:
    model = TwoTables(RowSparseEmbedding, torch.float32)
    with pytest.raises(ValueError, match=r"weight_decay must be 0 for tables, got 0\.1"):
        RowSparseRAdamScheduleFree(model.parameters(), [model.first], weight_decay=0.1)
    with pytest.raises(ValueError, match="tables must have their weights in params"):
        RowSparseRAdamScheduleFree(model.linear.parameters(), [model.first])
    groups = [{"params": model.linear.parameters(), "weight_decay": 0.1}, {"params": [model.first.weight]}]
    RowSparseRAdamScheduleFree(groups, [model.first])
