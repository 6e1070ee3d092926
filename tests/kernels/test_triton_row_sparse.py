"""row_sparse's Triton backend against the reference at float64, its rules and its errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.closeness import assert_matches_reference
from support.gpu import DEVICE, HAS_GPU, require_triton_device
from support.row_tables import CASES, OP, STEP, assert_same_table, batch, copied, table
from torch import Tensor

from ubp_fast.kernels import BackendUnavailable, row_sparse
from ubp_fast.kernels.row_sparse import ScheduleFreeRows
from ubp_fast.kernels.row_sparse.api import _catch_up_op, _gather_op, _reduce_op, _update_op

require_triton_device()

# The last one of the interpreter is wider than a block.
CASES = [*CASES, *([(50_000, 384, 8192, 20), (3000, 1100, 500, 7)] if HAS_GPU else [(20, 700, 30, 7)])]


def moved(rows: ScheduleFreeRows) -> ScheduleFreeRows:
    return ScheduleFreeRows(*(part.to(DEVICE, copy=True) for part in rows))


def home(rows: ScheduleFreeRows) -> ScheduleFreeRows:
    return ScheduleFreeRows(*(part.cpu() for part in rows))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather(case: tuple[int, int, int, int]) -> None:
    rows, width, count, steps = case
    start, (ids, _) = table(rows, width, steps), batch(rows, width, count)
    found = row_sparse.gather(moved(start), ids.to(DEVICE), backend="triton").cpu()
    plain = row_sparse.gather(start, ids, backend="reference")
    assert_matches_reference(found, plain, row_sparse.gather(copied(start, torch.float64), ids), OP, case)
    untouched = ids % 3 == 0
    assert torch.equal(found[untouched], start.weight[ids[untouched]])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduce(case: tuple[int, int, int, int]) -> None:
    rows, width, count, _ = case
    ids, gradient = batch(rows, width, count)
    wide = torch.randn(count, width + 5)
    wide[:, 2 : 2 + width] = gradient
    truth_ids, truth = row_sparse.reduce(ids, gradient.double())
    plain = row_sparse.reduce(ids, gradient, backend="reference")[1]
    for strided in (gradient.to(DEVICE), wide.to(DEVICE)[:, 2 : 2 + width], gradient.to(DEVICE).t().contiguous().t()):
        found_ids, found = row_sparse.reduce(ids.to(DEVICE), strided, backend="triton")
        assert torch.equal(found_ids.cpu(), truth_ids)
        assert_matches_reference(found.cpu(), plain, truth, OP, case)


def test_reduce_sorts_large_ids() -> None:
    ids = torch.tensor([2**40 + 3, 5, 2**40 + 3, 2**22, 0, 5], device=DEVICE)
    gradient = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]], device=DEVICE)
    found, sums = row_sparse.reduce(ids, gradient, backend="triton")
    assert found.tolist() == [0, 5, 2**22, 2**40 + 3]
    assert sums[:, 0].tolist() == [16.0, 34.0, 8.0, 5.0]


@pytest.mark.parametrize("is_adaptive", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update(case: tuple[int, int, int, int], is_adaptive: bool) -> None:
    rows, width, count, steps = case
    ids, gradient = row_sparse.reduce(*batch(rows, width, count))
    start, step = table(rows, width, steps), STEP._replace(is_adaptive=is_adaptive)
    found, plain, truth = moved(start), copied(start), copied(start, torch.float64)
    row_sparse.update(found, ids.to(DEVICE), gradient.to(DEVICE), step, backend="triton")
    row_sparse.update(plain, ids, gradient, step, backend="reference")
    row_sparse.update(truth, ids, gradient.double(), step)
    assert_same_table(home(found), plain, truth, case)
    others = torch.ones(rows, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(found.weight.cpu()[others], start.weight[others])


@pytest.mark.parametrize("toward_z", [0.0, 1 - 1 / 0.9])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_catch_up(case: tuple[int, int, int, int], toward_z: float) -> None:
    rows, width, _, steps = case
    start = table(rows, width, steps)
    found, plain, truth = moved(start), copied(start), copied(start, torch.float64)
    row_sparse.catch_up(found, 0.99, toward_z=toward_z, backend="triton")
    row_sparse.catch_up(plain, 0.99, toward_z=toward_z, backend="reference")
    row_sparse.catch_up(truth, 0.99, toward_z=toward_z)
    assert_same_table(home(found), plain, truth, case)
    assert torch.equal(found.weight.cpu()[::3], start.weight[::3])


def test_average_weight_one_makes_y_equal_z() -> None:
    start = table(30, 8, 4)
    start = start._replace(retained=torch.cat([start.retained, start.retained[-1:] * 1e-100]))
    found = row_sparse.gather(moved(start), torch.arange(30, device=DEVICE), backend="triton").cpu()
    is_touched = start.last_step >= 0
    assert torch.equal(found[is_touched], start.state[start.slot[is_touched].long(), 0])


def test_every_run_gives_the_same_bits() -> None:
    start, (ids, gradient) = table(300, 20, 6), batch(300, 20, 500)
    results = []
    for _ in range(2):
        state = moved(start)
        step = row_sparse.reduce(ids.to(DEVICE), gradient.to(DEVICE), backend="triton")
        row_sparse.update(state, *step, STEP, backend="triton")
        results.append(b"".join(part.numpy().tobytes() for part in home(state)))
    assert results[0] == results[1]


def refused(
    call: Callable[[ScheduleFreeRows], object], rows: ScheduleFreeRows, error: type[Exception], text: str
) -> None:
    """The call raises, and the table is as it was."""
    state = moved(rows)
    with pytest.raises(error, match=text):
        call(state)
    for before, after in zip(rows, home(state), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


GOOD = table(4, 2, 1)
FEW_SLOTS = GOOD._replace(state=torch.ones(2, 2, 2))
LATE = GOOD._replace(last_step=torch.full((4,), 9).int())
LOST = GOOD._replace(slot=torch.full((4,), 7).int())


@pytest.mark.parametrize(
    ("ids", "rows", "error", "text"),
    [
        ([0, 4], GOOD, IndexError, r"ids must lie in 0\.\.3, got 4 at entry 1"),
        ([-1, 2], GOOD, IndexError, r"ids must lie in 0\.\.3, got -1 at entry 0"),
        ([2, 2], GOOD, ValueError, "ids of an update must ascend, got 2 then 2"),
        (
            [0, 3],
            GOOD._replace(state=torch.ones(2, 2, 2)),
            ValueError,
            "state must have a slot for every touched row, got",
        ),
        (
            [1, 2],
            GOOD._replace(last_step=torch.full((4,), 9).int()),
            ValueError,
            "last_step must not lie in the future",
        ),
        (
            [1, 2],
            GOOD._replace(slot=torch.full((4,), 7).int()),
            ValueError,
            r"slots of touched rows must lie in 0\.\.3",
        ),
    ],
    ids=str,
)
def test_update_refuses(ids: list[int], rows: ScheduleFreeRows, error: type[Exception], text: str) -> None:
    def call(state: ScheduleFreeRows) -> None:
        row_sparse.update(state, torch.tensor(ids).to(DEVICE), torch.ones(2, 2).to(DEVICE), STEP, backend="triton")

    refused(call, rows, error, text)


def test_gather_reduce_and_catch_up_refuse() -> None:
    with pytest.raises(IndexError, match=r"ids must lie in 0\.\.3, got 4 at entry 1"):
        row_sparse.gather(moved(GOOD), torch.tensor([0, 4], device=DEVICE), backend="triton")
    with pytest.raises(IndexError, match="ids must not be negative, got -2"):
        row_sparse.reduce(torch.tensor([-2], device=DEVICE), torch.ones(1, 2, device=DEVICE), backend="triton")
    refused(lambda state: row_sparse.catch_up(state, 0.9, backend="triton"), LATE, ValueError, "in the future, got 9")
    with pytest.raises(BackendUnavailable, match=r"'triton' is unavailable: it computes float32"):
        row_sparse.gather(copied(GOOD, torch.float64), torch.tensor([1]), backend="triton")


def test_opcheck() -> None:
    start = table(30, 8, 4)
    start.state.nan_to_num_()
    ids, gradient = (part.to(DEVICE) for part in row_sparse.reduce(*batch(30, 8, 40)))
    entries = tuple(part.to(DEVICE) for part in batch(30, 8, 40))
    torch.library.opcheck(_gather_op, (*moved(start), ids, "triton"))
    torch.library.opcheck(_reduce_op, (*entries, "triton"))
    torch.library.opcheck(_update_op, (*moved(start), ids, gradient, list(STEP[:6]), True, "triton"))
    torch.library.opcheck(_catch_up_op, (*moved(start), 0.99, 0.1, "triton"))


def test_compiles_whole() -> None:
    def whole(rows: ScheduleFreeRows, ids: Tensor, gradient: Tensor) -> Tensor:
        row_sparse.update(rows, ids, gradient, STEP, backend="triton")
        return row_sparse.gather(rows._replace(last_step=rows.last_step.clamp(max=4)), ids, backend="triton") * 2

    start = table(30, 8, 4)
    ids, gradient = (part.to(DEVICE) for part in row_sparse.reduce(*batch(30, 8, 40)))
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(moved(start), ids, gradient), whole(moved(start), ids, gradient))
