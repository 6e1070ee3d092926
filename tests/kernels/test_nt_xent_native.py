"""nt_xent's compiled backend: the bound of closeness over the grid, special rows, instruction sets, threads."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.contrastive_cases import RESULTS, assert_native_is_close, options, pair, results
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels.nt_xent import nt_xent
from ubp_fast.kernels.nt_xent.api import NEGATIVES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = (1, 2, 3, 63, 64, 65, 127, 1000, 1031)
WIDTHS = (1, 59, 64, 100, 128, 256, 512)
TEMPERATURES = (1.0, 0.1, 0.02, 0.01, 0.005)
FORMS = pytest.mark.parametrize("negatives", NEGATIVES)
VARIANTS = ("plain", "options", "lengths")  # lengths: options, and rows are taken as they are


def assert_grid_case_is_close(
    count: int, width: int, temperature: float, dtype: torch.dtype, negatives: str, variant: str
) -> None:
    left, right = pair(count, width)
    if variant == "lengths":
        left, right = left / width**0.5, right / width**0.5
    chosen = {} if variant == "plain" else options(count)
    case = f"N={count} E={width} tau={temperature} {negatives} {variant}"
    assert_native_is_close(
        left.to(dtype),
        right.to(dtype),
        temperature,
        case,
        negatives=negatives,
        normalize=variant != "lengths",
        **chosen,
    )


# Every count meets every width, every temperature every form; small enough for each run.
SMALL = [
    (count, width, TEMPERATURES[(at + count) % 5], NEGATIVES[at % 3], VARIANTS[at % 3 if count > 3 else 0])
    for at, (count, width) in enumerate(itertools.product(COUNTS[:7], WIDTHS))
]
LARGE = [(1000, 59, 0.1), (1000, 128, 0.005), (1031, 64, 0.02), (1031, 100, 1.0), (385, 512, 0.01)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "width", "temperature", "negatives", "variant"), SMALL, ids=str)
def test_small_problems(
    count: int, width: int, temperature: float, negatives: str, variant: str, dtype: torch.dtype
) -> None:
    assert_grid_case_is_close(count, width, temperature, dtype, negatives, variant)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "width", "temperature"), LARGE, ids=str)
def test_large_problems(count: int, width: int, temperature: float, dtype: torch.dtype, negatives: str) -> None:
    assert_grid_case_is_close(count, width, temperature, dtype, negatives, "options")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the largest size takes some minutes on a busy machine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_whole_grid(count: int, width: int, dtype: torch.dtype) -> None:
    misses = []
    for temperature, negatives, variant in itertools.product(TEMPERATURES, NEGATIVES, VARIANTS):
        try:
            assert_grid_case_is_close(count, width, temperature, dtype, negatives, variant)
        except AssertionError as error:
            misses.append(str(error))
    assert not misses, "\n".join(misses)


def special(kind: str, count: int, width: int) -> tuple[Tensor, Tensor]:
    left, right = (side / width**0.5 for side in pair(count, width))
    if kind == "duplicates":
        left, right = (side[: count // 3].repeat(3, 1) for side in (left, right))
    elif kind == "zeros":
        left[::3], right[1::4] = 0, 0
    elif kind == "equal":
        left, right = left[:1].repeat(count, 1), left[:1].repeat(count, 1)
    elif kind == "planted":
        right = left.clone()
    elif kind == "large":
        left, right = left * 30, right * 30
    return left.float(), right.float()


@FORMS
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "lengths"])
@pytest.mark.parametrize("kind", ["duplicates", "zeros", "equal", "planted", "large"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize(("count", "width"), [(201, 64), (390, 128)], ids=["small", "large"])
def test_special_rows(count: int, width: int, temperature: float, kind: str, normalize: bool, negatives: str) -> None:
    left, right = special(kind, count, width)
    case = f"N={count} tau={temperature} {kind} {negatives} normalize={normalize}"
    chosen = {"negatives": negatives, "normalize": normalize, **options(len(left))}
    assert_native_is_close(left, right, temperature, case, **chosen)


@FORMS
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "lengths"])
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_bfloat16_rows_are_not_rounded_again(temperature: float, normalize: bool, negatives: str) -> None:
    """The reference in bfloat16 errs by percents; native must be as good as in float32, up to rounding its results."""
    left, right = (side / 8 for side in pair(600, 59, torch.bfloat16))
    chosen = {"negatives": negatives, "normalize": normalize, "backend": "native", **options(600)}
    half = results(left, right, temperature, torch.bfloat16, **chosen)
    full = results(left, right, temperature, torch.float32, **chosen)
    for name, mine, exact in zip(RESULTS, half, full, strict=True):
        error, scale = (mine.float() - exact).abs().max(), exact.abs().max()
        assert error <= (2**-7 if mine.ndim else 1e-5) * scale, f"{name}: {error:.2e} of {scale:.2e}"


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    before = _core.isa()
    yield _core.usable_isas()
    _core.set_isa(before)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "width", "temperature"), [(1200, 59, 0.1), (1200, 59, 0.01), (500, 300, 0.1)])
def test_every_isa_and_thread_count(
    count: int, width: int, temperature: float, dtype: torch.dtype, negatives: str, every_isa: list[str]
) -> None:
    left, right = pair(count, width, dtype)
    chosen = {"negatives": negatives, **options(count)}
    for isa in every_isa:
        _core.set_isa(isa)
        assert_native_is_close(left, right, temperature, f"{isa} {negatives}", **chosen)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(left, right, temperature, dtype, backend="native", **chosen))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [59, 300])
def test_equal_rows_have_no_gap(width: int, dtype: torch.dtype, every_isa: list[str]) -> None:
    """A positive is summed as the negatives are: 1,000 equal candidates are a loss of log 1,000, to the last digit."""
    row = pair(1, width, dtype)[0].repeat(1000, 1)
    for isa in every_isa:
        _core.set_isa(isa)
        loss = nt_xent(row, row, temperature=0.005, negatives="cross", backend="native")
        assert abs(loss.item() - math.log(1000)) < 1e-6, isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_in_parts(dtype: torch.dtype) -> None:
    """From 4,096 rows on a side tiles are too large to be worked on at once."""
    left, right = (side.to(dtype) for side in pair(2061, 24))
    assert_native_is_close(left, right, 0.1, "tiles in parts", negatives="simclr")


def test_small_problems_on_every_isa(every_isa: list[str]) -> None:
    left, right = pair(65, 59, torch.float32)
    for isa in every_isa:
        _core.set_isa(isa)
        assert_native_is_close(left, right, 0.005, isa, negatives="simclr", **options(65))


@pytest.fixture(scope="module")
def schedule_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program, kernels = tmp_path_factory.mktemp("model") / "nt_xent_schedule", Path(__file__).parents[2] / "csrc"
    source = Path(__file__).with_name("nt_xent_schedule.cpp")
    compiler = os.environ.get("CXX", "c++")  # what the kernels are built with
    subprocess.run([compiler, "-std=c++17", "-w", f"-I{kernels}", str(source), "-o", str(program)], check=True)
    return program


@FORMS
@pytest.mark.parametrize(
    ("count", "threads", "least"), [(1024, 16, 14), (1024, 2, 1.95), (1000, 16, 14), (1031, 16, 14), (4096, 16, 14)]
)
def test_all_threads_have_work(count: int, threads: int, least: float, negatives: str, schedule_model: Path) -> None:
    """A model: the kernel's own items, each as long as its products. How long they really take is a benchmark's."""
    arguments = [str(number) for number in (NEGATIVES.index(negatives), count, 128, threads)]
    told = subprocess.run([schedule_model, *arguments], capture_output=True, text=True, check=True)
    assert least <= float(told.stdout) <= threads


WRONG_NUMBERS = {
    "left_count": {"left_count": 0},
    "right_count": {"right_count": 4},
    "width": {"width": 2049},
    "dtype": {"dtype": 3},
    "form": {"form": -1},
    "temperature": {"temperature": float("nan")},
    "threads": {"threads": 0},
    "left_kept": {"left_kept": torch.tensor([2, 1])},
    "right_kept": {"right_kept": torch.tensor([0, 3])},
    "right_ids": {"right_ids": torch.tensor([0, -1], dtype=torch.int32)},
    "places": {"positive": torch.zeros(3, 8), "places": torch.tensor([0, 2], dtype=torch.int32)},
    "positive": {"positive": torch.zeros(3, 8), "form": 1},
    "right_bias and positive_bias": {"right_bias": torch.zeros(2, dtype=torch.float64)},
}


@pytest.mark.parametrize("argument", WRONG_NUMBERS)
def test_wrong_numbers_never_reach_the_kernel(argument: str) -> None:
    rows, ids = torch.zeros(3, 8), torch.tensor([0, 1], dtype=torch.int32)
    given = {"width": 8, "temperature": 0.1, "threads": 1, "losses": torch.zeros(4, dtype=torch.float64)}
    for side in ("left", "right"):
        given |= {side: rows, f"{side}_rows": 3, f"{side}_count": 2, f"{side}_ids": ids}
        given[f"{side}_kept"] = torch.tensor([0, 1])
    given |= WRONG_NUMBERS[argument]
    with pytest.raises(ValueError, match=f"^nt_xent: {argument} must"):
        _core.nt_xent_forward(_core.NTXentProblem(**given))


def test_auto_takes_native_where_it_can() -> None:
    left, right = pair(600, 59, torch.float32)
    assert torch.equal(nt_xent(left, right), nt_xent(left, right, backend="native"))
    left, right = left.double(), right.double()
    assert torch.equal(nt_xent(left, right), nt_xent(left, right, backend="reference"))
