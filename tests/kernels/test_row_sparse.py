"""row_sparse: both rules, every backend and instruction set against the reference at float64, threads, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support.closeness import assert_matches_reference
from support.row_tables import (
    ADAM,
    CASES,
    OP,
    RULES,
    SCHEDULE_FREE,
    STEPS,
    Rule,
    assert_same_table,
    batch,
    copied,
    longer,
    table,
    without_nan,
)
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels import BackendUnavailable, row_sparse
from ubp_fast.kernels.row_sparse import Adam, RowTable
from ubp_fast.kernels.row_sparse.api import _catch_up_op, _gather_op, _reduce_op, _reduce_padded_op, _update_op

Case = tuple[int, int, int, int]
both_rules = pytest.mark.parametrize("rule", [SCHEDULE_FREE, ADAM], ids=str)


@pytest.fixture(params=_core.usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather(case: Case, rule: Rule, isa: str) -> None:
    rows, width, count, steps = case
    start, (ids, _) = table(rule, rows, width, steps, scale=1e-6), batch(rows, width, count)
    found = row_sparse.gather(start, rule, ids, backend="native")
    plain = row_sparse.gather(start, rule, ids, backend="reference")
    assert_matches_reference(found, plain, row_sparse.gather(copied(start, torch.float64), rule, ids), OP, case)
    assert row_sparse.gather(start, rule, ids.view(1, -1, 1)).shape == (1, count, 1, width)
    if rule == SCHEDULE_FREE:
        untouched = ids % 3 == 0
        assert torch.equal(found[untouched], start.weight[ids[untouched]])


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9])
def test_the_way_of_a_row_to_the_last_digit(scale: float, isa: str) -> None:
    """With weights at zero what is left is the distance moved, which rounding of weights would hide.

    Gradients whose roots are large beside eps, near it, and far below: series, both, sums.
    """
    start, ids = table(ADAM, 60, 65, 420, scale=scale), torch.arange(60)
    start.weight.zero_()
    found = row_sparse.gather(start, ADAM, ids, backend="native")
    plain = row_sparse.gather(start, ADAM, ids, backend="reference")
    truth = row_sparse.gather(copied(start, torch.float64), ADAM, ids)
    assert truth.abs().max() > 1e-3 * min(scale / 1e-8, 1)
    assert_matches_reference(found, plain, truth, OP, scale)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduce(case: Case, isa: str) -> None:
    rows, width, count, _ = case
    ids, gradient = batch(rows, width, count)
    wide = torch.randn(count, width + 5)
    wide[:, 2 : 2 + width] = gradient
    truth_ids, truth = row_sparse.reduce(ids, gradient.double())
    plain = row_sparse.reduce(ids, gradient, backend="reference")[1]
    for strided in (gradient, wide[:, 2 : 2 + width], gradient.t().contiguous().t()):
        found_ids, found = row_sparse.reduce(ids, strided, backend="native")
        assert torch.equal(found_ids, truth_ids)
        assert_matches_reference(found, plain, truth, OP, case)
        padded_ids, padded, distinct = row_sparse.reduce_padded(ids, strided, backend="native")
        assert (padded_ids.shape, padded.shape, distinct.tolist()) == (ids.shape, gradient.shape, [len(found_ids)])
        assert torch.equal(padded_ids[: len(found_ids)], found_ids) and (padded_ids[len(found_ids) :] == -1).all()
        assert torch.equal(padded[: len(found_ids)], found) and not padded[len(found_ids) :].any()


def test_reduce_sorts_large_ids() -> None:
    ids = torch.tensor([2**40 + 3, 5, 2**40 + 3, 2**22, 0, 5])
    found, sums = row_sparse.reduce(ids, torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]]), backend="native")
    assert found.tolist() == [0, 5, 2**22, 2**40 + 3]
    assert sums[:, 0].tolist() == [16.0, 34.0, 8.0, 5.0]


@pytest.mark.parametrize("is_adaptive", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update(case: Case, rule: Rule, is_adaptive: bool, isa: str) -> None:
    rows, width, count, steps = case
    ids, gradient = row_sparse.reduce(*batch(rows, width, count))
    start, step = table(rule, rows, width, steps), STEPS[type(rule)]
    if rule == SCHEDULE_FREE:
        step = step._replace(is_adaptive=is_adaptive)
    elif not is_adaptive:
        return
    found, plain, truth, padded = copied(start), copied(start), copied(start, torch.float64), copied(start)
    row_sparse.update(found, rule, ids, gradient, step, backend="native")
    row_sparse.update(plain, rule, ids, gradient, step, backend="reference")
    row_sparse.update(truth, rule, ids, gradient.double(), step)
    assert_same_table(found, plain, truth, case)
    others = torch.ones(rows, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(found.weight[others], start.weight[others])
    slots = start.slot[others & (start.last_step >= 0)].long()
    assert torch.equal(found.state[slots], start.state[slots])
    ids, gradient, distinct = row_sparse.reduce_padded(*batch(rows, width, count), backend="native")
    row_sparse.update(padded, rule, ids, gradient, step, count=distinct, backend="native")
    for one, other in zip(padded, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("toward_z", [0.0, 0.1, 1 - 1 / 0.9])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_catch_up(case: Case, rule: Rule, toward_z: float, isa: str) -> None:
    rows, width, _, steps = case
    if rule != SCHEDULE_FREE and toward_z:
        return
    start = table(rule, rows, width, steps)
    found, plain, truth = copied(start), copied(start), copied(start, torch.float64)
    row_sparse.catch_up(found, rule, toward_z=toward_z, backend="native")
    row_sparse.catch_up(plain, rule, toward_z=toward_z, backend="reference")
    row_sparse.catch_up(truth, rule, toward_z=toward_z)
    assert_same_table(found, plain, truth, case)
    if rule == SCHEDULE_FREE:
        assert torch.equal(found.weight[::3], start.weight[::3])


def test_average_weight_one_makes_y_equal_z() -> None:
    start = longer(table(SCHEDULE_FREE, 30, 8, 4), 1e-100)
    found = row_sparse.gather(start, SCHEDULE_FREE, torch.arange(30), backend="native")
    is_touched = start.last_step >= 0
    assert torch.equal(found[is_touched], start.state[start.slot[is_touched].long(), 0])


@both_rules
def test_threads_do_not_change_a_bit(rule: Rule) -> None:
    rows, width, count = 5000, 48, 3000
    start, (ids, gradient) = table(rule, rows, width, 20), batch(rows, width, count)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = copied(start)
        gathered = row_sparse.gather(state, rule, ids)
        row_sparse.update(state, rule, *row_sparse.reduce(ids, gradient), STEPS[type(rule)])
        row_sparse.catch_up(longer(state), rule)
        results.append(b"".join(part.numpy().tobytes() for part in (gathered, *state)))
    assert results[0] == results[1] == results[2]


def test_backends() -> None:
    start = table(ADAM, 4, 2, 1)
    with pytest.raises(BackendUnavailable, match=r"row_sparse: backend 'native' is unavailable: it computes float32"):
        row_sparse.gather(copied(start, torch.float64), ADAM, torch.tensor([1]), backend="native")
    with pytest.raises(BackendUnavailable, match="'triton' is unavailable: it computes on a CUDA device"):
        row_sparse.gather(start, ADAM, torch.tensor([1]), backend="triton")


Call = Callable[[RowTable, Rule], object]
ONE, TWO = torch.tensor([1]), torch.tensor([2, 2])
WRONG: list[tuple[type[Exception], str, Call]] = [
    (IndexError, r"ids must lie in 0\.\.3, got 4 at entry 1", lambda *on: row_sparse.gather(*on, torch.tensor([0, 4]))),
    (IndexError, r"ids must lie in 0\.\.3, got -1", lambda *on: row_sparse.gather(*on, torch.tensor([-1]))),
    (
        IndexError,
        "ids must not be negative, got -2",
        lambda *_: row_sparse.reduce(torch.tensor([-2]), torch.ones(1, 2)),
    ),
    (TypeError, r"ids must have dtype torch\.int64, got torch\.int32", lambda *on: row_sparse.gather(*on, ONE.int())),
    (ValueError, r"gradient must have shape \[T, D\]", lambda *_: row_sparse.reduce(ONE, torch.ones(2, 2))),
    (ValueError, r"gradient must have shape \[1, 2\]", lambda *on: update(*on, ONE, torch.ones(1, 3))),
    (TypeError, "gradient must have the dtype of weight", lambda *on: update(*on, ONE, torch.ones(1, 2).double())),
    (ValueError, "ids of an update must ascend, got 2 then 2", lambda *on: update(*on, TWO, torch.ones(2, 2))),
    (ValueError, r"count must have shape \[1\]", lambda *on: update(*on, ONE, torch.ones(1, 2), torch.tensor(1))),
    (ValueError, "step must be of .*Step like the rule", lambda *on: update_with_the_other_step(*on)),
    (
        ValueError,
        r"state must have shape \[C, 2, 2\]",
        lambda start, rule: row_sparse.catch_up(state(start, 4, 3), rule),
    ),
    (ValueError, "must have a slot for every touched row, got 2", lambda start, rule: update(state(start, 2, 2), rule)),
    (
        ValueError,
        r"slots of touched rows must lie in 0\.\.0, got 1",
        lambda start, rule: row_sparse.catch_up(state(start, 1, 2), rule),
    ),
    (
        ValueError,
        r"history must have shape \[S \+ 1(, 3)?\]",
        lambda start, rule: row_sparse.catch_up(start._replace(history=start.history[:0]), rule),
    ),
    (
        ValueError,
        "last_step must not lie in the future",
        lambda start, rule: row_sparse.catch_up(start._replace(last_step=torch.full((4,), 9).int()), rule),
    ),
    (ValueError, "eps > 0, got", lambda start, rule: row_sparse.gather(start, rule._replace(eps=0.0), ONE)),
]


def update(
    rows: RowTable, rule: Rule, ids: Tensor | None = None, gradient: Tensor | None = None, count: Tensor | None = None
) -> None:
    ids = torch.tensor([0, 3]) if ids is None else ids
    gradient = torch.ones(2, 2) if gradient is None else gradient
    row_sparse.update(rows, rule, ids, gradient, STEPS[type(rule)], count=count)


def update_with_the_other_step(rows: RowTable, rule: Rule) -> None:
    other = next(step for kind, step in STEPS.items() if kind is not type(rule))
    row_sparse.update(rows, rule, ONE, torch.ones(1, 2), other)


def state(rows: RowTable, slots: int, width: int) -> RowTable:
    return rows._replace(state=torch.ones(slots, 2, width))


@both_rules
@pytest.mark.parametrize(("error", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_arguments(error: type[Exception], message: str, call: Call, rule: Rule) -> None:
    with pytest.raises(error, match=message):
        call(table(rule, 4, 2, 1), rule)


def test_only_schedule_free_moves_toward_z() -> None:
    with pytest.raises(ValueError, match=r"toward_z must be 0 for Adam, got 0\.1"):
        row_sparse.catch_up(table(ADAM, 4, 2, 1), ADAM, toward_z=0.1)
    with pytest.raises(ValueError, match="0 <= beta1 < 1"):
        row_sparse.catch_up(table(ADAM, 4, 2, 1), Adam(1.0, 0.9, 1e-8))


@both_rules
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend: str, rule: Rule) -> None:
    start, kind = without_nan(table(rule, 30, 8, 4)), "adam" if rule == ADAM else "schedule_free"
    ids, gradient = row_sparse.reduce(*batch(30, 8, 40))
    numbers = [float(number) for number in STEPS[type(rule)]]
    torch.library.opcheck(_gather_op, (*start, kind, list(rule), ids, backend))
    torch.library.opcheck(_reduce_op, (*batch(30, 8, 40), backend))
    torch.library.opcheck(_reduce_padded_op, (*batch(30, 8, 40), backend))
    torch.library.opcheck(_update_op, (*start, kind, list(rule), ids, gradient, numbers, None, backend))
    torch.library.opcheck(_catch_up_op, (*start, kind, list(rule), 0.1 if rule == SCHEDULE_FREE else 0.0, backend))


@both_rules
def test_compiles_whole(rule: Rule) -> None:
    def whole(rows: RowTable, ids: Tensor, gradient: Tensor) -> Tensor:
        row_sparse.update(rows, rule, ids, gradient, STEPS[type(rule)])
        return row_sparse.gather(rows._replace(last_step=rows.last_step.clamp(max=4)), rule, ids) * 2

    start = table(rule, 30, 8, 4)
    ids, gradient = row_sparse.reduce(*batch(30, 8, 40))
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(copied(start), ids, gradient), whole(copied(start), ids, gradient))
