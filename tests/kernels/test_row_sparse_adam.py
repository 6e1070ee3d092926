"""row_sparse_adam: every backend and instruction set against the reference at float64, its rules, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.closeness import assert_matches_reference
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels import BackendUnavailable, row_sparse, row_sparse_adam
from ubp_fast.kernels.row_sparse_adam import AdamRows, AdamRule
from ubp_fast.kernels.row_sparse_adam.api import _catch_up_op, _gather_op, _update_op

OP = "row_sparse_adam"
STEP = (1e-2, 1.7, 0.995)
# rows, columns, ids, steps so far: nothing, one, odd sizes, more than one work item, longer than the horizon
CASES = [(1, 1, 0, 0), (1, 1, 1, 0), (7, 59, 20, 3), (300, 64, 257, 40), (40, 100, 1000, 9), (60, 65, 80, 420)]
# The usual one; no first moment; one whose series would never end; one whose moments never fade away.
RULES = [
    AdamRule(0.9, 0.999, 1e-8),
    AdamRule(0.0, 0.99, 1e-6),
    AdamRule(0.9, 0.9, 1e-8),
    AdamRule(0.95, 0.5, 1e-3),
]


@pytest.fixture(params=_core.usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def table(rows: int, width: int, steps: int, *, scale: float = 1.0) -> AdamRows:
    """A table in the middle of training: a third of the rows was never touched, and unused slots hold NaN."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    gradient = torch.randn(2, rows, width, generator=generator) * scale
    # Moments like those of a few steps, some columns without any.
    state = torch.stack([0.2 * gradient[0], 0.01 * gradient.square().sum(0)], dim=1)
    state[:, :, ::7] = 0
    last_step = torch.randint(0, steps + 1, (rows,), generator=generator, dtype=torch.int32)
    last_step[::3] = -1
    used = int((last_step >= 0).sum())
    slot = torch.full((rows,), -5, dtype=torch.int32)
    slot[last_step >= 0] = torch.randperm(used, generator=generator).int()
    state[used:] = float("nan")
    numbers = torch.rand(steps + 1, 3, generator=generator, dtype=torch.float64)
    history = torch.stack([1e-2 * numbers[:, 0], 1 + numbers[:, 1], 1 - 1e-3 * numbers[:, 2]], dim=1)
    history[0] = float("nan")
    return AdamRows(weight, state, slot, torch.tensor([used]), last_step, history)


def batch(rows: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    """Distinct ids and gradients."""
    generator = torch.Generator().manual_seed(1)
    ids = (torch.rand(count, generator=generator) ** 3 * rows).long()
    return row_sparse.reduce(ids, torch.randn(count, width, generator=generator))


def copied(rows: AdamRows, dtype: torch.dtype = torch.float32) -> AdamRows:
    weight, state, *others = (part.clone() for part in rows)
    return AdamRows(weight.to(dtype), state.to(dtype), *others)


def assert_same_table(found: AdamRows, plain: AdamRows, truth: AdamRows, case: Any) -> None:
    for name in ("slot", "used", "last_step"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert_matches_reference(found.weight, plain.weight, truth.weight, OP, (case, "weight"))
    used = int(truth.used)
    for column, name in enumerate(("exp_avg", "exp_avg_sq")):
        parts = (one.state[:used, column] for one in (found, plain, truth))
        assert_matches_reference(*parts, OP, (case, name))
    assert found.state[used:].isnan().all()


# Gradients whose roots are large beside eps, near it, and far below: series, both, sums.
SCALES = [1.0, 1e-6, 1e-9]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather(case: tuple[int, int, int, int], rule: AdamRule, isa: str) -> None:
    rows, width, count, steps = case
    start = table(rows, width, steps, scale=1e-6)
    ids = torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(2))
    found = row_sparse_adam.gather(start, rule, ids, backend="native")
    plain = row_sparse_adam.gather(start, rule, ids, backend="reference")
    truth = row_sparse_adam.gather(copied(start, torch.float64), rule, ids)
    assert_matches_reference(found, plain, truth, OP, case)
    assert row_sparse_adam.gather(start, rule, ids.view(1, -1, 1)).shape == (1, count, 1, width)


@pytest.mark.parametrize("scale", SCALES)
def test_the_way_of_a_row_to_the_last_digit(scale: float, isa: str) -> None:
    """With weights at zero what is left is the distance moved, which rounding of weights would hide."""
    start = table(60, 65, 420, scale=scale)
    start.weight.zero_()
    ids = torch.arange(60)
    found = row_sparse_adam.gather(start, RULES[0], ids, backend="native")
    plain = row_sparse_adam.gather(start, RULES[0], ids, backend="reference")
    truth = row_sparse_adam.gather(copied(start, torch.float64), RULES[0], ids)
    assert truth.abs().max() > 1e-3 * min(scale / 1e-8, 1)
    assert_matches_reference(found, plain, truth, OP, scale)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update(case: tuple[int, int, int, int], rule: AdamRule, isa: str) -> None:
    rows, width, count, steps = case
    ids, gradient = batch(rows, width, count)
    start = table(rows, width, steps)
    found, plain, truth = copied(start), copied(start), copied(start, torch.float64)
    row_sparse_adam.update(found, rule, ids, gradient, STEP, backend="native")
    row_sparse_adam.update(plain, rule, ids, gradient, STEP, backend="reference")
    row_sparse_adam.update(truth, rule, ids, gradient.double(), STEP)
    assert_same_table(found, plain, truth, case)
    others = torch.ones(rows, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(found.weight[others], start.weight[others])
    slots = start.slot[others & (start.last_step >= 0)].long()
    assert torch.equal(found.state[slots], start.state[slots])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_catch_up(case: tuple[int, int, int, int], rule: AdamRule, isa: str) -> None:
    rows, width, _, steps = case
    start = table(rows, width, steps)
    found, plain, truth = copied(start), copied(start), copied(start, torch.float64)
    row_sparse_adam.catch_up(found, rule, backend="native")
    row_sparse_adam.catch_up(plain, rule, backend="reference")
    row_sparse_adam.catch_up(truth, rule)
    assert_same_table(found, plain, truth, case)


def test_threads_do_not_change_a_bit() -> None:
    rows, width = 5000, 48
    start, (ids, gradient) = table(rows, width, 20), batch(rows, width, 3000)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = copied(start)
        gathered = row_sparse_adam.gather(state, RULES[0], ids)
        row_sparse_adam.update(state, RULES[0], ids, gradient, STEP)
        longer = torch.cat([start.history, torch.tensor([STEP], dtype=torch.float64)])
        row_sparse_adam.catch_up(state._replace(history=longer), RULES[0])
        results.append(b"".join(part.numpy().tobytes() for part in (gathered, *state)))
    assert results[0] == results[1] == results[2]


GOOD = table(4, 2, 1)
WRONG: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (IndexError, r"ids must lie in 0\.\.3, got 4 at entry 1", lambda: gather(GOOD, torch.tensor([0, 4]))),
    (TypeError, r"ids must have dtype torch\.int64", lambda: gather(GOOD, torch.tensor([1], dtype=torch.int32))),
    (ValueError, r"gradient must have shape \[1, 2\]", lambda: update(torch.tensor([1]), torch.ones(1, 3))),
    (TypeError, "gradient must have the dtype of weight", lambda: update(torch.tensor([1]), torch.ones(1, 2).double())),
    (ValueError, "ids of an update must ascend, got 2 then 2", lambda: update(torch.tensor([2, 2]), torch.ones(2, 2))),
    (ValueError, r"state must have shape \[C, 2, 2\]", lambda: gather(GOOD._replace(state=torch.ones(4, 2, 3)))),
    (ValueError, r"history must have shape \[S \+ 1, 3\]", lambda: gather(GOOD._replace(history=GOOD.history[:, 0]))),
    (ValueError, "eps > 0, got", lambda: row_sparse_adam.gather(GOOD, AdamRule(0.9, 0.999, 0.0), torch.tensor([1]))),
    (ValueError, "last_step must not lie in the future", lambda: row_sparse_adam.catch_up(from_the_future(), RULES[0])),
]


def gather(rows: AdamRows, ids: Tensor | None = None) -> Tensor:
    return row_sparse_adam.gather(rows, RULES[0], torch.tensor([1]) if ids is None else ids)


def update(ids: Tensor, gradient: Tensor) -> None:
    row_sparse_adam.update(copied(GOOD), RULES[0], ids, gradient, STEP)


def from_the_future() -> AdamRows:
    return GOOD._replace(last_step=torch.full((4,), 9, dtype=torch.int32))


@pytest.mark.parametrize(("error", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_arguments(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_backends() -> None:
    with pytest.raises(BackendUnavailable, match="backend 'native' is unavailable: it computes float32"):
        row_sparse_adam.gather(copied(GOOD, torch.float64), RULES[0], torch.tensor([1]), backend="native")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend: str) -> None:
    start = table(30, 8, 4)
    start.state.nan_to_num_()
    start.history.nan_to_num_()
    ids, gradient = batch(30, 8, 40)
    torch.library.opcheck(_gather_op, (*start, list(RULES[0]), ids, backend))
    torch.library.opcheck(_update_op, (*start, list(RULES[0]), ids, gradient, list(STEP), backend))
    torch.library.opcheck(_catch_up_op, (*start, list(RULES[0]), backend))


def test_compiles_whole() -> None:
    def whole(rows: AdamRows, ids: Tensor, gradient: Tensor) -> Tensor:
        row_sparse_adam.update(rows, RULES[0], ids, gradient, STEP)
        return row_sparse_adam.gather(rows._replace(last_step=rows.last_step.clamp(max=4)), RULES[0], ids) * 2

    start = table(30, 8, 4)
    ids, gradient = batch(30, 8, 40)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(copied(start), ids, gradient), whole(copied(start), ids, gradient))
