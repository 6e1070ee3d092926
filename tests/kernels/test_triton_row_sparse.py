"""row_sparse's Triton backend against the reference at float64, its rules and its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.closeness import assert_matches_reference
from support.gpu import DEVICE, HAS_GPU, require_triton_device
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
from support.waits import WouldWait, nothing_waits
from torch import Tensor

from ubp_fast import optim
from ubp_fast.kernels import BackendUnavailable, deferred, row_sparse
from ubp_fast.kernels.row_sparse import RowTable
from ubp_fast.kernels.row_sparse import api as row_sparse_api
from ubp_fast.kernels.row_sparse._triton import part_of
from ubp_fast.kernels.row_sparse.api import _catch_up_op, _gather_op, _reduce_op, _reduce_padded_op, _update_op
from ubp_fast.optim import RowSparseAdamW, RowSparseEmbedding, clip_gradient_norm

require_triton_device()

# The last one of the interpreter is wider than a block.
CASES = [*CASES, *([(50_000, 384, 8192, 20), (3000, 1100, 500, 7)] if HAS_GPU else [(20, 700, 30, 7)])]
Case = tuple[int, int, int, int]
# The interpreter is slow: the rarer rules take small tables, one of them past the horizon.
PAIRS = [(case, rule) for rule in RULES[:2] for case in CASES]
PAIRS += [(case, rule) for rule in RULES[2:] for case in ((7, 59, 20, 3), (6, 5, 9, 420))]
both_rules = pytest.mark.parametrize("rule", [SCHEDULE_FREE, ADAM], ids=str)


def moved(rows: RowTable) -> RowTable:
    return RowTable(*(part.to(DEVICE, copy=True) for part in rows))


def home(rows: RowTable) -> RowTable:
    return RowTable(*(part.cpu() for part in rows))


@pytest.mark.parametrize(("case", "rule"), PAIRS, ids=str)
def test_gather(case: Case, rule: Rule) -> None:
    rows, width, count, steps = case
    start, (ids, _) = table(rule, rows, width, steps, scale=1e-6), batch(rows, width, count)
    found = row_sparse.gather(moved(start), rule, ids.to(DEVICE), backend="triton").cpu()
    plain = row_sparse.gather(start, rule, ids, backend="reference")
    assert_matches_reference(found, plain, row_sparse.gather(copied(start, torch.float64), rule, ids), OP, case)
    if rule == SCHEDULE_FREE:
        untouched = ids % 3 == 0
        assert torch.equal(found[untouched], start.weight[ids[untouched]])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduce(case: Case) -> None:
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
        padded_ids, padded, distinct = row_sparse.reduce_padded(ids.to(DEVICE), strided, backend="triton")
        assert (padded_ids.shape, padded.shape, distinct.tolist()) == (ids.shape, gradient.shape, [len(found_ids)])
        assert torch.equal(padded_ids[: len(found_ids)], found_ids) and (padded_ids[len(found_ids) :] == -1).all()
        assert torch.equal(padded[: len(found_ids)], found) and not padded[len(found_ids) :].any()


@pytest.mark.parametrize("shares", [(150, 1, 1), (1, 200, 9), (32, 32, 64, 1), (5, 27, 224), (16, 16)], ids=str)
def test_reduce_of_popular_ids(shares: tuple[int, ...]) -> None:
    """Groups that end with a part of the entries, begin with one, and go over many."""
    ids = torch.repeat_interleave(torch.arange(len(shares)) * 7, torch.tensor(shares))
    generator = torch.Generator().manual_seed(3)
    ids = ids[torch.randperm(len(ids), generator=generator)]
    gradient = torch.randn(len(ids), 3, generator=generator)
    truth_ids, truth = row_sparse.reduce(ids, gradient.double())
    plain = row_sparse.reduce(ids, gradient, backend="reference")[1]
    runs = [row_sparse.reduce(ids.to(DEVICE), gradient.to(DEVICE), backend="triton") for _ in range(2)]
    assert torch.equal(runs[0][0].cpu(), truth_ids) and torch.equal(runs[0][1], runs[1][1])
    assert_matches_reference(runs[0][1].cpu(), plain, truth, OP, shares)


@pytest.mark.parametrize("entries", [1, 16, 257, 8192, 10**6])
def test_a_popular_id_keeps_no_program_busy(entries: int) -> None:
    part = part_of(entries)
    assert part & (part - 1) == 0 and part + entries / part <= 16 + 4 * entries**0.5


def test_reduce_sorts_large_ids() -> None:
    ids = torch.tensor([2**40 + 3, 5, 2**40 + 3, 2**22, 0, 5], device=DEVICE)
    gradient = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]], device=DEVICE)
    found, sums = row_sparse.reduce(ids, gradient, backend="triton")
    assert found.tolist() == [0, 5, 2**22, 2**40 + 3]
    assert sums[:, 0].tolist() == [16.0, 34.0, 8.0, 5.0]


@pytest.mark.parametrize("is_adaptive", [True, False])
@pytest.mark.parametrize(("case", "rule"), PAIRS, ids=str)
def test_update(case: Case, rule: Rule, is_adaptive: bool) -> None:
    rows, width, count, steps = case
    ids, gradient = row_sparse.reduce(*batch(rows, width, count))
    start, step = table(rule, rows, width, steps), STEPS[type(rule)]
    if rule == SCHEDULE_FREE:
        step = step._replace(is_adaptive=is_adaptive)
    elif not is_adaptive:
        return
    found, plain, truth, padded = moved(start), copied(start), copied(start, torch.float64), moved(start)
    row_sparse.update(found, rule, ids.to(DEVICE), gradient.to(DEVICE), step, backend="triton")
    row_sparse.update(plain, rule, ids, gradient, step, backend="reference")
    row_sparse.update(truth, rule, ids, gradient.double(), step)
    assert_same_table(home(found), plain, truth, case)
    others = torch.ones(rows, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(found.weight.cpu()[others], start.weight[others])
    ids, gradient, distinct = (part.to(DEVICE) for part in row_sparse.reduce_padded(*batch(rows, width, count)))
    row_sparse.update(padded, rule, ids, gradient, step, count=distinct, backend="triton")
    assert_same_table(home(padded), plain, truth, case)


@pytest.mark.parametrize("toward_z", [0.0, 1 - 1 / 0.9])
@pytest.mark.parametrize(("case", "rule"), PAIRS, ids=str)
def test_catch_up(case: Case, rule: Rule, toward_z: float) -> None:
    rows, width, _, steps = case
    if rule != SCHEDULE_FREE and toward_z:
        return
    start = table(rule, rows, width, steps)
    found, plain, truth = moved(start), copied(start), copied(start, torch.float64)
    row_sparse.catch_up(found, rule, toward_z=toward_z, backend="triton")
    row_sparse.catch_up(plain, rule, toward_z=toward_z, backend="reference")
    row_sparse.catch_up(truth, rule, toward_z=toward_z)
    assert_same_table(home(found), plain, truth, case)
    if rule == SCHEDULE_FREE:
        assert torch.equal(found.weight.cpu()[::3], start.weight[::3])


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9])
def test_the_way_of_a_row_to_the_last_digit(scale: float) -> None:
    """With weights at zero what is left is the distance moved, which rounding of weights would hide."""
    start, ids = table(ADAM, 60, 65, 420, scale=scale), torch.arange(60)
    start.weight.zero_()
    found = row_sparse.gather(moved(start), ADAM, ids.to(DEVICE), backend="triton").cpu()
    plain = row_sparse.gather(start, ADAM, ids, backend="reference")
    truth = row_sparse.gather(copied(start, torch.float64), ADAM, ids)
    assert_matches_reference(found, plain, truth, OP, scale)


def test_average_weight_one_makes_y_equal_z() -> None:
    start = longer(table(SCHEDULE_FREE, 30, 8, 4), 1e-100)
    found = row_sparse.gather(moved(start), SCHEDULE_FREE, torch.arange(30, device=DEVICE), backend="triton").cpu()
    is_touched = start.last_step >= 0
    assert torch.equal(found[is_touched], start.state[start.slot[is_touched].long(), 0])


@both_rules
def test_every_run_gives_the_same_bits(rule: Rule) -> None:
    start, (ids, gradient) = table(rule, 300, 20, 6), batch(300, 20, 500)
    results = []
    for _ in range(2):
        state = moved(start)
        entries = row_sparse.reduce(ids.to(DEVICE), gradient.to(DEVICE), backend="triton")
        row_sparse.update(state, rule, *entries, STEPS[type(rule)], backend="triton")
        results.append(b"".join(part.numpy().tobytes() for part in home(state)))
    assert results[0] == results[1]


Broken = Callable[[RowTable], RowTable]
FAULTS: list[tuple[list[int], Broken, type[Exception], str, str]] = [
    # ids, what is wrong with the table, the error, its text at once, its text later
    ([0, 4], lambda rows: rows, IndexError, r"ids must lie in 0\.\.3, got 4 at entry 1", r"ids must lie in 0\.\.3"),
    ([-1, 2], lambda rows: rows, IndexError, r"ids must lie in 0\.\.3, got -1 at entry 0", r"ids must lie in 0\.\.3"),
    ([2, 2], lambda rows: rows, ValueError, "ids of an update must ascend, got 2 then 2", "must ascend, got others"),
    (
        [0, 3],
        lambda rows: rows._replace(state=torch.ones(2, 2, 2)),
        ValueError,
        "state must have a slot for every touched row, got 2",
        "state must have a slot for every touched row",
    ),
    (
        [1, 2],
        lambda rows: rows._replace(last_step=torch.full((4,), 9).int()),
        ValueError,
        "last_step must not lie in the future, got 9",
        "last_step must not lie in the future",
    ),
    (
        [1, 2],
        lambda rows: rows._replace(slot=torch.full((4,), 7).int()),
        ValueError,
        r"slots of touched rows must lie in 0\.\.3, got 7",
        "slots of touched rows must lie in the state",
    ),
]


def assert_untouched(rows: RowTable, before: RowTable) -> None:
    for name, one, other in zip(rows._fields, home(rows), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: name + text)


@both_rules
@pytest.mark.parametrize(("ids", "broken", "error", "text", "later"), FAULTS, ids=[text for *_, text, _ in FAULTS])
def test_update_refuses(
    ids: list[int],
    broken: Broken,
    error: type[Exception],
    text: str,
    later: str,
    rule: Rule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, and, as on a GPU, in a later call; either way the table stays as it was."""
    start = broken(table(rule, 4, 2, 1))
    entries = (torch.tensor(ids).to(DEVICE), torch.ones(2, 2).to(DEVICE), STEPS[type(rule)])
    for is_deferred in (False, True):
        monkeypatch.setattr(deferred, "is_deferred", lambda _, answer=is_deferred: answer)
        state = moved(start)
        if not is_deferred:
            with pytest.raises(error, match=text):
                row_sparse.update(state, rule, *entries, backend="triton")
        else:
            row_sparse.update(state, rule, *entries, backend="triton")
            assert_untouched(state, start)
            with pytest.raises(error, match=later):
                deferred.check_deferred(state.weight.device)
            deferred.check_deferred(state.weight.device)
        assert_untouched(state, start)


@both_rules
def test_after_a_fault_nothing_is_written_until_it_is_raised(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "is_deferred", lambda _: True)
    monkeypatch.setattr(deferred, "poll", lambda _: None)  # as if the fault had not become known
    start = table(rule, 4, 2, 1)
    state = moved(start)
    vectors = row_sparse.gather(state, rule, torch.tensor([1, 4, 2], device=DEVICE), backend="triton").cpu()
    assert vectors[1].isnan().all() and not vectors[::2].isnan().any()
    good = (torch.tensor([0, 1], device=DEVICE), torch.ones(2, 2, device=DEVICE), STEPS[type(rule)])
    row_sparse.update(state, rule, *good, backend="triton")
    row_sparse.catch_up(state, rule, backend="triton")
    assert_untouched(state, start)
    with pytest.raises(IndexError, match=r"row_sparse: ids must lie in 0\.\.3, got others .found on the device"):
        deferred.check_deferred(state.weight.device)
    row_sparse.update(state, rule, *good, backend="triton")
    assert not torch.equal(state.weight.cpu(), start.weight)
    deferred.check_deferred(state.weight.device)


@both_rules
def test_gather_reduce_and_catch_up_refuse(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "is_deferred", lambda _: False)
    start = table(rule, 4, 2, 1)
    with pytest.raises(IndexError, match=r"ids must lie in 0\.\.3, got 4 at entry 1"):
        row_sparse.gather(moved(start), rule, torch.tensor([0, 4], device=DEVICE), backend="triton")
    with pytest.raises(IndexError, match="ids must not be negative, got -2"):
        row_sparse.reduce(torch.tensor([-2], device=DEVICE), torch.ones(1, 2, device=DEVICE), backend="triton")
    late = moved(start._replace(last_step=torch.full((4,), 9).int()))
    with pytest.raises(ValueError, match="in the future, got 9"):
        row_sparse.catch_up(late, rule, backend="triton")
    assert (late.last_step == 9).all() and torch.equal(late.weight.cpu(), start.weight)
    with pytest.raises(BackendUnavailable, match=r"'triton' is unavailable: it computes float32"):
        row_sparse.gather(copied(start, torch.float64), rule, torch.tensor([1]), backend="triton")


@pytest.fixture
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """On a GPU PyTorch itself says what waits, elsewhere a stub."""

    @contextmanager
    def on_a_device() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return on_a_device if HAS_GPU else lambda: nothing_waits(monkeypatch)


@both_rules
def test_no_call_waits_for_the_device(rule: Rule, without_waiting: Callable[[], Any]) -> None:
    start, step = moved(table(rule, 30, 8, 4)), STEPS[type(rule)]
    ids, gradient = (part.to(DEVICE) for part in batch(30, 8, 40))
    later = moved(longer(table(rule, 30, 8, 4)))
    with without_waiting():
        row_sparse.gather(start, rule, ids, backend="triton")
        distinct, sums, count = row_sparse.reduce_padded(ids, gradient, backend="triton")
        row_sparse.update(start, rule, distinct, sums, step, count=count, backend="triton")
        row_sparse.catch_up(later, rule, backend="triton")
    with pytest.raises((WouldWait, RuntimeError)), without_waiting():
        row_sparse.reduce(ids, gradient, backend="triton")


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("name", ["RowSparseRAdamScheduleFree", "RowSparseAdamW"])
def test_no_step_waits_for_the_device(
    name: str, padding_idx: int | None, without_waiting: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookups, backward, clipping and step; the weights are those of an optimizer that waits."""
    monkeypatch.setattr(row_sparse_api, "ORDER", ("triton", "native", "reference"))
    if name == "RowSparseRAdamScheduleFree":
        pytest.importorskip("schedulefree", reason="needs schedulefree")
    factory = getattr(optim, name)
    weights = []
    for is_watched in (False, True):
        rows = RowSparseEmbedding(30, 5, padding_idx, device=DEVICE if is_watched else "cpu")
        optimizer = factory([rows.weight], [rows], lr=1e-2)
        getattr(optimizer, "train", lambda: None)()
        rows.weight.data.copy_(torch.randn(30, 5, generator=torch.Generator().manual_seed(2)))
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 20, (12,), generator=generator).to(rows.weight.device)
            noise = torch.randn(12, 5, generator=generator).to(rows.weight.device)
            with without_waiting() if is_watched else nullcontext():
                optimizer.zero_grad()
                (rows(ids) * noise).sum().backward()
                (rows(ids[:4]) ** 2).sum().backward()
                clip_gradient_norm([rows.weight], 1.0)
                optimizer.step()
        weights.append(rows.state_dict()["weight"].cpu().clone())
    torch.testing.assert_close(weights[1], weights[0])


def test_a_fault_of_a_step_raises_before_the_history_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sparse_api, "ORDER", ("triton", "native", "reference"))
    monkeypatch.setattr(deferred, "is_deferred", lambda _: True)
    monkeypatch.setattr(deferred, "poll", lambda _: None)
    rows = RowSparseEmbedding(6, 2, device=DEVICE)
    optimizer = RowSparseAdamW([rows.weight], [rows], lr=1e-2)
    for ids in ([1, 2], [2, 6]):
        optimizer.zero_grad()
        rows(torch.tensor(ids, device=DEVICE)).sum().backward()
        optimizer.step()
    with pytest.raises(IndexError, match=r"ids must lie in 0\.\.5"):
        optimizer.state_dict()
    assert rows.touched.last_step.tolist() == [-1, 1, 1, -1, -1, -1]
    assert float(optimizer.state_dict()["state"][0]["step"]) == 2
    assert rows.touched.last_step.tolist() == [-1, 0, 0, -1, -1, -1]


@both_rules
def test_opcheck(rule: Rule) -> None:
    start, kind = without_nan(table(rule, 30, 8, 4)), "adam" if rule == ADAM else "schedule_free"
    numbers, toward_z = [float(number) for number in STEPS[type(rule)]], 0.1 if rule == SCHEDULE_FREE else 0.0
    ids, gradient = (part.to(DEVICE) for part in row_sparse.reduce(*batch(30, 8, 40)))
    entries = tuple(part.to(DEVICE) for part in batch(30, 8, 40))
    torch.library.opcheck(_gather_op, (*moved(start), kind, list(rule), ids, "triton"))
    torch.library.opcheck(_reduce_op, (*entries, "triton"))
    torch.library.opcheck(_reduce_padded_op, (*entries, "triton"))
    torch.library.opcheck(_update_op, (*moved(start), kind, list(rule), ids, gradient, numbers, None, "triton"))
    torch.library.opcheck(_catch_up_op, (*moved(start), kind, list(rule), toward_z, "triton"))


@both_rules
def test_compiles_whole(rule: Rule) -> None:
    def whole(rows: RowTable, ids: Tensor, gradient: Tensor) -> Tensor:
        row_sparse.update(rows, rule, ids, gradient, STEPS[type(rule)], backend="triton")
        return row_sparse.gather(rows._replace(last_step=rows.last_step.clamp(max=4)), rule, ids, backend="triton") * 2

    start = table(rule, 30, 8, 4)
    ids, gradient = (part.to(DEVICE) for part in row_sparse.reduce(*batch(30, 8, 40)))
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(moved(start), ids, gradient), whole(moved(start), ids, gradient))
