"""nt_xent's Triton backend against the reference: the whole grid on a GPU, a small one in the interpreter."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support.closeness import assert_matches_reference
from support.contrastive_cases import (
    RECTANGULAR,
    RESULTS,
    Rectangular,
    assert_rectangular_is_close,
    assert_small_probabilities_count,
    facts,
    options,
    pair,
    results,
)
from support.gpu import DEVICE, DTYPES, HAS_GPU, require_triton_device
from torch import Tensor

from ubp_fast.kernels import BackendUnavailable
from ubp_fast.kernels.nt_xent import NTXentLoss, _triton, nt_xent
from ubp_fast.kernels.nt_xent.api import NEGATIVES
from ubp_fast.kernels.nt_xent.reference import Problem

require_triton_device()

FORMS = pytest.mark.parametrize("negatives", NEGATIVES)
TEMPERATURES = (1.0, 0.1, 0.02, 0.01, 0.005)
VARIANTS = ("plain", "options", "lengths")  # lengths: options, and rows are taken as they are
# Blocks have 32, 64 or 128 rows; rows wider than 256 are multiplied in parts and, from 512 on, summed in parts.
SMALL = [(1, 1), (2, 59), (3, 16), (33, 20), (65, 64)]
WIDE = [(5, 256), (20, 300), (3, 520)]
GRID = list(itertools.product((1, 2, 3, 63, 64, 65, 127, 1000, 1031), (1, 59, 64, 100, 128, 256, 512, 2048)))
CASES = [
    (count, width, TEMPERATURES[(at + len(form)) % 5], form, VARIANTS[(at + len(form)) % 3 if count > 3 else 0])
    for at, (count, width) in enumerate((*SMALL, *WIDE, *(GRID if HAS_GPU else ())))
    for form in NEGATIVES
]
# In the interpreter rows wider than 64 are 16-bit only: float32 takes them 16 elements at a time, each of which costs.
CASES_AND_DTYPES = [
    (*case, dtype) for case in CASES for dtype in DTYPES if HAS_GPU or case[1] <= 64 or dtype != DTYPES[0]
]


def moved(chosen: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in chosen.items()}


def assert_triton_is_close(left: Tensor, right: Tensor, temperature: float, case: str, **chosen: Any) -> None:
    here = moved(chosen)
    found = results(left.to(DEVICE), right.to(DEVICE), temperature, left.dtype, backend="triton", **here)
    plain = results(left, right, temperature, left.dtype, backend="reference", **chosen)
    truth = results(left, right, temperature, torch.float64, backend="reference", **chosen)
    for name, mine, same, exact in zip(RESULTS, found, plain, truth, strict=True):
        assert_matches_reference(mine.cpu(), same, exact, f"nt_xent {name}", case)


@pytest.mark.parametrize(("count", "width", "temperature", "negatives", "variant", "dtype"), CASES_AND_DTYPES, ids=str)
def test_matches_reference(
    count: int, width: int, temperature: float, negatives: str, variant: str, dtype: torch.dtype
) -> None:
    left, right = pair(count, width)
    if variant == "lengths":
        left, right = left / width**0.5, right / width**0.5
    chosen = {} if variant == "plain" else options(count)
    case = f"N={count} E={width} tau={temperature} {negatives} {variant}"
    more = {"negatives": negatives, "normalize": variant != "lengths", **chosen}
    assert_triton_is_close(left.to(dtype), right.to(dtype), temperature, case, **more)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems take the way of large ones, in chunks that their rows do not fill."""
    monkeypatch.setattr(_triton, "CHUNK", (40, 50))
    monkeypatch.setattr(_triton, "LEAST_CHUNKED", (1, 0))


@FORMS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("count", "width", "variant"), [(65, 20, "options"), (3, 300, "plain"), (70, 64, "lengths")])
def test_chunks_match_reference(
    count: int, width: int, variant: str, dtype: torch.dtype, negatives: str, chunked: None
) -> None:
    test_matches_reference(count, width, 0.1, negatives, variant, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", RECTANGULAR if HAS_GPU else [c for c in RECTANGULAR if c.is_small], ids=str)
def test_chunks_of_rectangular_problems(case: Rectangular, dtype: torch.dtype, chunked: None) -> None:
    assert_rectangular_is_close(case, dtype, "triton", DEVICE)


def test_chunks_are_for_many_wide_rows() -> None:
    def is_chunked(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        sides = [torch.empty(rows, width, dtype=dtype, device="meta") for _ in range(2)]
        return _triton.is_chunked(Problem(*sides, None, sides[0], "cross", *[None] * 7, True))

    assert is_chunked(4096, 512) and is_chunked(65_536, 257)
    assert not (is_chunked(4095, 512) or is_chunked(65_536, 256) or is_chunked(4096, 512, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RECTANGULAR if HAS_GPU else [c for c in RECTANGULAR if c.is_small], ids=str)
def test_rectangular_problems(case: Rectangular, dtype: torch.dtype) -> None:
    assert_rectangular_is_close(case, dtype, "triton", DEVICE)


@FORMS
@pytest.mark.parametrize("used", ["weight", "valid", "ids"])
def test_each_option_alone(used: str, negatives: str) -> None:
    left, right = pair(20, 12, torch.float32)
    chosen = {used: options(20)[used]}
    assert_triton_is_close(left, right, 0.1, f"{used} {negatives}", negatives=negatives, **chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maximum_runs_over_the_blocks_of_a_part(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems are split until every program has one block; here one has all of them, the largest gaps last."""
    monkeypatch.setattr(_triton, "PROGRAMS", 1)
    left, right = pair(80, 12, dtype)
    right[70:] = left[:10]
    assert_triton_is_close(left, right, 0.02, "one part", negatives="cross")


def test_gradient_is_accurate_when_the_loss_is_near_zero() -> None:
    """Orthogonal clients, left = right: the loss is exp(-1 / temperature) (N - 1), which 1 - p cannot represent."""
    left = torch.eye(8, device=DEVICE)
    a = left.clone().requires_grad_()
    tau = torch.tensor(0.02, requires_grad=True)
    loss = nt_xent(a, left, temperature=tau, backend="triton")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(7 * math.exp(-50), rel=1e-4)
    wanted = torch.full((7,), math.exp(-50) / 0.02 / 8)
    torch.testing.assert_close(a.grad[0, 1:].cpu(), wanted, rtol=1e-4, atol=0)
    assert float(tau.grad) == pytest.approx(7 * math.exp(-50) * 50 / 0.02, rel=1e-4)


def test_small_probabilities_count_in_float16() -> None:
    assert_small_probabilities_count(torch.float16, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_unrelated_and_opposite_rows_stay_finite(dtype: torch.dtype) -> None:
    base = torch.randn(9, 16).to(dtype).to(DEVICE)
    for other, expected in ((base, None), (-base, None), (base[:1].expand(9, 16), math.log(9))):
        left = (base if expected is None else other).clone().requires_grad_()
        loss = nt_xent(left, other, temperature=0.005, backend="triton")
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(left.grad).all()
        if expected is not None:
            assert float(loss.detach()) == pytest.approx(expected, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_normalised_loss_ignores_the_length_of_rows(scale: float, dtype: torch.dtype) -> None:
    left, right = pair(17, 100, torch.float64)
    plain = nt_xent(left.to(dtype).to(DEVICE), right.to(dtype).to(DEVICE), backend="triton")
    larger = [(side * scale).clamp(-6e4, 6e4).to(dtype).to(DEVICE) for side in (left, right)]
    torch.testing.assert_close(nt_xent(*larger, backend="triton"), plain, rtol=40 * torch.finfo(dtype).eps, atol=0)


def test_rows_near_the_ends_of_float32() -> None:
    left, right = pair(5, 8, torch.float32)
    plain = nt_xent(left.to(DEVICE), right.to(DEVICE), backend="triton")
    for scale in (1e37, 1e-37):
        sides = [(side * scale).to(DEVICE).requires_grad_() for side in (left, right)]
        loss = nt_xent(*sides, backend="triton")
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
        loss.backward()
        assert all(torch.isfinite(side.grad).all() for side in sides)


@FORMS
def test_zero_rows_stay_zero_and_get_no_gradient(negatives: str) -> None:
    left, right = (side.to(DEVICE) for side in pair(5, 8, torch.float32))
    left[1], right[1], right[3] = 0, 0, 0
    nt_xent(left.requires_grad_(), right.requires_grad_(), negatives=negatives, backend="triton").backward()
    assert not left.grad[1].any() and not right.grad[[1, 3]].any()
    assert left.grad[0].any()


@FORMS
@pytest.mark.parametrize("nothing", ["valid", "weight", "rows"])
def test_nothing_to_learn_from_is_zero(nothing: str, negatives: str) -> None:
    left, right = (side.to(DEVICE) for side in pair(0 if nothing == "rows" else 4, 3, torch.float32))
    chosen = {
        "valid": {"valid": torch.zeros(4, dtype=torch.bool)},
        "weight": {"weight": torch.zeros(4)},
        "rows": {},
    }[nothing]
    tau = torch.tensor(0.1, requires_grad=True)
    more = moved({"negatives": negatives, **chosen})
    loss = nt_xent(left.requires_grad_(), right.requires_grad_(), temperature=tau, backend="triton", **more)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not (left.grad.any() or right.grad.any() or tau.grad.any())


@FORMS
def test_rows_that_are_not_valid_may_hold_anything(negatives: str) -> None:
    left, right = pair(9, 6, torch.float32)
    chosen = options(9)
    chosen["valid"] = torch.tensor([True, False, True, True, False, True, True, True, False])
    keep = chosen["valid"]
    inside = moved({name: value[keep] for name, value in chosen.items()})
    left[1], right[4], chosen["weight"][8] = float("nan"), float("inf"), -1.0
    a, b = (side.to(DEVICE).requires_grad_() for side in (left, right))
    few_a, few_b = (tensor.detach()[keep.to(DEVICE)].requires_grad_() for tensor in (a, b))
    loss = nt_xent(a, b, negatives=negatives, backend="triton", **moved(chosen))
    few = nt_xent(few_a, few_b, negatives=negatives, backend="triton", **inside)
    torch.testing.assert_close(loss, few)
    loss.backward()
    few.backward()
    for whole, part in ((a, few_a), (b, few_b)):
        torch.testing.assert_close(whole.grad[keep.to(DEVICE)], part.grad)
        assert not whole.grad[~keep.to(DEVICE)].any()


def test_non_contiguous_rows() -> None:
    left, right = (side.to(DEVICE) for side in pair(16, 12, torch.float32))
    views = left.T.contiguous().T, torch.cat((right, right), dim=1)[:, :12]
    torch.testing.assert_close(nt_xent(*views, backend="triton"), nt_xent(left, right, backend="triton"))


def test_every_run_gives_the_same_bits() -> None:
    left, right = (side.to(DEVICE) for side in pair(40, 20, torch.float16))
    once, again = (results(left, right, 0.05, torch.float16, backend="triton", negatives="simclr") for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("used", [(), ("weight", "valid", "ids")], ids=["plain", "options"])
def test_opcheck(used: tuple[str, ...]) -> None:
    left, right = (side.to(DEVICE) for side in pair(5, 4, torch.float32))
    chosen = [value.to(DEVICE) if name in used else None for name, value in options(5).items()]
    tau = torch.tensor(0.2, requires_grad=True)
    arguments = (left.requires_grad_(), right.requires_grad_(), None, tau, "simclr", *facts(*chosen), True, "triton")
    torch.library.opcheck(torch.ops.ubp_fast.nt_xent.default, arguments)
    row_losses = torch.ops.ubp_fast.nt_xent(*arguments)
    detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
    given = (torch.ones_like(row_losses), row_losses.detach(), *detached)
    torch.library.opcheck(torch.ops.ubp_fast.nt_xent_backward.default, given)


def test_compiles_as_one_graph() -> None:
    module, outcome = NTXentLoss(0.3, "symmetric", learn_temperature=True, backend="triton").to(DEVICE), []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        left, right = (tensor.to(DEVICE).requires_grad_() for tensor in pair(9, 6, torch.float32))
        module.zero_grad()
        loss = run(left, right)
        loss.backward()
        outcome.append([loss, left.grad, right.grad, *(parameter.grad.clone() for parameter in module.parameters())])
    torch.testing.assert_close(outcome[0], outcome[1], rtol=0, atol=0)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"'triton' is unavailable: it computes float32, .* torch\.float64"):
        nt_xent(*(side.to(DEVICE) for side in pair(3, 4)), backend="triton")


@pytest.mark.gpu
@pytest.mark.slow
def test_a_million_rows_fit() -> None:
    """2^20 rows of 512 in less than 16 GB; the gradients of some rows of left equal those of the whole softmax."""
    torch.cuda.reset_peak_memory_stats()
    left = torch.randn(2**20, 512, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    right = (left.detach() + 0.5 * torch.randn_like(left)).requires_grad_()
    loss = nt_xent(left, right, temperature=0.05, backend="triton")
    (loss * 2**20).backward()
    assert torch.isfinite(loss) and torch.isfinite(right.grad).all() and torch.cuda.max_memory_allocated() < 16e9
    chosen = torch.tensor([0, 1, 2**19, 2**20 - 65, 2**20 - 1], device=DEVICE)
    some = left.detach()[chosen].double().requires_grad_()
    others = torch.nn.functional.normalize(right.detach().float())
    scores = (torch.nn.functional.normalize(some).float() @ others.T).double() / 0.05
    torch.nn.functional.cross_entropy(scores, chosen, reduction="sum").backward()
    mine = left.grad[chosen].double()
    assert (mine - some.grad).norm() <= 2 * torch.finfo(torch.bfloat16).eps * some.grad.norm()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["statistics", "gradient"])
def test_rows_beyond_int32_elements(kernel: str) -> None:
    """2^22 + 100 pairs of 512, 2^32 elements: blocks of the last rows and columns equal those of these rows alone."""
    pairs, last, kind = 2**22 + 100, 200, torch.bfloat16
    left = torch.randn(pairs, 512, dtype=kind, device=DEVICE)
    many, few = (_problem_of(rows) for rows in (left, left[-last:].clone()))
    assert 2 * left.numel() > 2**32
    found = []
    for problem in (many, few):
        count = len(problem.left)
        prepared, end = _triton._prepare(problem), 2 * count
        own, others = (end - last, last), (end - last, last)  # of right, the second half of the rows
        chosen = _triton._tiles_here(kernel, problem)
        grid = (math.ceil(last / chosen.block_m), 1)
        if kernel == "statistics":
            results = tuple(torch.zeros(1, last, dtype=torch.float64, device=DEVICE) for _ in range(2))
            _triton._launch("statistics_kernel", grid, problem, *prepared, *results, *own, *others, last, chosen=chosen)
            found.append(torch.cat(results))
            continue
        slope = torch.zeros(2 * count, 512, dtype=torch.float32, device=DEVICE)
        moment = torch.zeros(grid[0], dtype=torch.float64, device=DEVICE)
        losses = torch.full((2 * count,), 9.0, dtype=torch.float64, device=DEVICE)
        weight = torch.ones(2 * count, dtype=torch.float32, device=DEVICE)
        sides = {"HAS_ROW_LOSS": True, "HAS_COLUMN_LOSS": True}
        more = (losses, weight, slope, moment, *own, *others)
        _triton._launch("gradient_kernel", grid, problem, *prepared, *more, chosen=chosen, **sides)
        found.append(slope[-last:].clone())
    assert torch.equal(*found) and found[0].any()


def _problem_of(rows: Tensor) -> Problem:
    tau = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    return Problem(rows, rows, None, tau, "symmetric", *[None] * 7, True)
