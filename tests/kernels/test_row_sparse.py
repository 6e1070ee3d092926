"""row_sparse: every backend and instruction set against the reference at float64, its rules, threads, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support.closeness import assert_matches_reference
from support.row_tables import CASES, OP, STEP, assert_same_table, batch, copied, table
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels import BackendUnavailable, row_sparse
from ubp_fast.kernels.row_sparse import ScheduleFreeRows
from ubp_fast.kernels.row_sparse.api import _catch_up_op, _gather_op, _reduce_op, _update_op


@pytest.fixture(params=_core.usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather(case: tuple[int, int, int, int], isa: str) -> None:
    rows, width, count, steps = case
    start, (ids, _) = table(rows, width, steps), batch(rows, width, count)
    found = row_sparse.gather(start, ids, backend="native")
    plain = row_sparse.gather(start, ids, backend="reference")
    assert_matches_reference(found, plain, row_sparse.gather(copied(start, torch.float64), ids), OP, case)
    assert row_sparse.gather(start, ids.view(1, -1, 1)).shape == (1, count, 1, width)
    untouched = ids % 3 == 0
    assert torch.equal(found[untouched], start.weight[ids[untouched]])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduce(case: tuple[int, int, int, int], isa: str) -> None:
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


def test_reduce_sorts_large_ids() -> None:
    ids = torch.tensor([2**40 + 3, 5, 2**40 + 3, 2**22, 0, 5])
    found, sums = row_sparse.reduce(ids, torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]]), backend="native")
    assert found.tolist() == [0, 5, 2**22, 2**40 + 3]
    assert sums[:, 0].tolist() == [16.0, 34.0, 8.0, 5.0]


@pytest.mark.parametrize("is_adaptive", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update(case: tuple[int, int, int, int], is_adaptive: bool, isa: str) -> None:
    rows, width, count, steps = case
    ids, gradient = row_sparse.reduce(*batch(rows, width, count))
    start, step = table(rows, width, steps), STEP._replace(is_adaptive=is_adaptive)
    found, plain, truth = copied(start), copied(start), copied(start, torch.float64)
    row_sparse.update(found, ids, gradient, step, backend="native")
    row_sparse.update(plain, ids, gradient, step, backend="reference")
    row_sparse.update(truth, ids, gradient.double(), step)
    assert_same_table(found, plain, truth, case)
    others = torch.ones(rows, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(found.weight[others], start.weight[others])
    slots = start.slot[others & (start.last_step >= 0)].long()
    assert torch.equal(found.state[slots], start.state[slots])


@pytest.mark.parametrize("toward_z", [0.0, 0.1, 1 - 1 / 0.9])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_catch_up(case: tuple[int, int, int, int], toward_z: float, isa: str) -> None:
    rows, width, _, steps = case
    start = table(rows, width, steps)
    found, plain, truth = copied(start), copied(start), copied(start, torch.float64)
    row_sparse.catch_up(found, 0.99, toward_z=toward_z, backend="native")
    row_sparse.catch_up(plain, 0.99, toward_z=toward_z, backend="reference")
    row_sparse.catch_up(truth, 0.99, toward_z=toward_z)
    assert_same_table(found, plain, truth, case)
    assert torch.equal(found.weight[::3], start.weight[::3])


def test_average_weight_one_makes_y_equal_z() -> None:
    start = table(30, 8, 4)
    retained = torch.cat([start.retained, start.retained[-1:] * 1e-100])
    found = row_sparse.gather(start._replace(retained=retained), torch.arange(30), backend="native")
    is_touched = start.last_step >= 0
    assert torch.equal(found[is_touched], start.state[start.slot[is_touched].long(), 0])


def test_threads_do_not_change_a_bit() -> None:
    rows, width, count = 5000, 48, 3000
    start, (ids, gradient) = table(rows, width, 20), batch(rows, width, count)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = copied(start)
        gathered = row_sparse.gather(state, ids)
        row_sparse.update(state, *row_sparse.reduce(ids, gradient), STEP)
        row_sparse.catch_up(state._replace(retained=torch.cat([start.retained, start.retained[-1:] * 0.9])), 0.99)
        results.append(b"".join(part.numpy().tobytes() for part in (gathered, *state)))
    assert results[0] == results[1] == results[2]


def test_backends() -> None:
    start = table(4, 2, 1)
    with pytest.raises(BackendUnavailable, match=r"row_sparse: backend 'native' is unavailable: it computes float32"):
        row_sparse.gather(copied(start, torch.float64), torch.tensor([1]), backend="native")
    with pytest.raises(BackendUnavailable, match="'triton' is unavailable: it computes on a CUDA device"):
        row_sparse.gather(start, torch.tensor([1]), backend="triton")


GOOD = table(4, 2, 1)
WRONG: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (IndexError, r"ids must lie in 0\.\.3, got 4 at entry 1", lambda: row_sparse.gather(GOOD, torch.tensor([0, 4]))),
    (IndexError, r"ids must lie in 0\.\.3, got -1", lambda: row_sparse.gather(GOOD, torch.tensor([-1]))),
    (IndexError, "ids must not be negative, got -2", lambda: row_sparse.reduce(torch.tensor([-2]), torch.ones(1, 2))),
    (TypeError, r"ids must have dtype torch\.int64, got torch\.int32", lambda: row_sparse.gather(GOOD, ids32())),
    (ValueError, r"gradient must have shape \[T, D\]", lambda: row_sparse.reduce(torch.tensor([1]), torch.ones(2, 2))),
    (ValueError, r"gradient must have shape \[1, 2\]", lambda: update(torch.tensor([1]), torch.ones(1, 3))),
    (TypeError, "gradient must have the dtype of weight", lambda: update(torch.tensor([1]), torch.ones(1, 2).double())),
    (ValueError, "ids of an update must ascend, got 2 then 2", lambda: update(torch.tensor([2, 2]), torch.ones(2, 2))),
    (ValueError, r"state must have shape \[C, 2, 2\]", lambda: row_sparse.catch_up(with_state(4, 3), 0.9)),
    (ValueError, "state must have a slot for every touched row, got 2", lambda: update_in(with_state(2, 2))),
    (
        ValueError,
        r"slots of touched rows must lie in 0\.\.0, got 1",
        lambda: row_sparse.catch_up(with_state(1, 2), 0.9),
    ),
    (ValueError, r"retained must have shape \[S \+ 1\]", lambda: row_sparse.catch_up(without_steps(), 0.9)),
    (ValueError, "last_step must not lie in the future", lambda: row_sparse.catch_up(from_the_future(), 0.9)),
]


def ids32() -> Tensor:
    return torch.tensor([1], dtype=torch.int32)


def update(ids: Tensor, gradient: Tensor) -> None:
    row_sparse.update(copied(GOOD), ids, gradient, STEP)


def with_state(slots: int, width: int) -> ScheduleFreeRows:
    return GOOD._replace(state=torch.ones(slots, 2, width))


def update_in(rows: ScheduleFreeRows) -> None:
    row_sparse.update(copied(rows), torch.tensor([0, 3]), torch.ones(2, 2), STEP)


def without_steps() -> ScheduleFreeRows:
    return GOOD._replace(retained=torch.empty(0, dtype=torch.float64))


def from_the_future() -> ScheduleFreeRows:
    return GOOD._replace(last_step=torch.full((4,), 9, dtype=torch.int32))


@pytest.mark.parametrize(("error", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_wrong_arguments(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck(backend: str) -> None:
    start = table(30, 8, 4)
    start.state.nan_to_num_()
    ids, gradient = row_sparse.reduce(*batch(30, 8, 40))
    torch.library.opcheck(_gather_op, (*start, ids, backend))
    torch.library.opcheck(_reduce_op, (*batch(30, 8, 40), backend))
    torch.library.opcheck(_update_op, (*start, ids, gradient, list(STEP[:6]), True, backend))
    torch.library.opcheck(_catch_up_op, (*start, 0.99, 0.1, backend))


def test_compiles_whole() -> None:
    def whole(rows: ScheduleFreeRows, ids: Tensor, gradient: Tensor) -> Tensor:
        row_sparse.update(rows, ids, gradient, STEP)
        return row_sparse.gather(rows._replace(last_step=rows.last_step.clamp(max=4)), ids) * 2

    start = table(30, 8, 4)
    ids, gradient = row_sparse.reduce(*batch(30, 8, 40))
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(copied(start), ids, gradient), whole(copied(start), ids, gradient))
