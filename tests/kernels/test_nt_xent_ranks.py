"""nt_xent over several processes equals nt_xent in one: values and every gradient, in all forms, by both exchanges."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.contrastive_cases import options, pair
from support.ranks import run_ranks
from torch import Tensor

from ubp_fast.kernels.nt_xent import NTXentLoss, nt_xent
from ubp_fast.kernels.nt_xent.api import NEGATIVES

SIZES = (3, 0, 64, 300)
CASES = [
    *itertools.product(NEGATIVES, ("gather", "ring"), ("float64", "float32"), (True,)),
    *itertools.product(NEGATIVES, ("gather", "ring"), ("float64",), (False,)),
    *itertools.product(("symmetric",), ("gather", "ring"), ("bfloat16",), (True,)),
]


def problem(negatives: str, dtype: str, has_options: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    left, right = pair(sum(SIZES), 24, getattr(torch, dtype))
    if not has_options:
        return left, right, {}
    chosen = options(sum(SIZES))
    if negatives == "cross":
        chosen["candidate_bias"] = torch.linspace(-1, 2, sum(SIZES))
    return left, right, chosen


def results(part: slice, case: tuple[str, str, str, bool], group: Any, reduction: str = "mean") -> list[Tensor]:
    """Loss, and gradients of these rows and of the temperature."""
    negatives, exchange, dtype, has_options = case
    left, right, chosen = problem(negatives, dtype, has_options)
    left, right = (side[part].clone().requires_grad_() for side in (left, right))
    module = NTXentLoss(0.1, negatives, learn_temperature=True).to(torch.float64)
    more = {name: value[part] for name, value in chosen.items()}
    more |= {} if group is None else {"group": group, "exchange": exchange}
    loss = nt_xent(left, right, temperature=module.temperature, negatives=negatives, reduction=reduction, **more)
    (2 * loss.sum()).backward()
    assert left.grad is not None and right.grad is not None and module.log_temperature is not None
    return [loss.detach(), left.grad, right.grad, module.log_temperature.grad]


def on_a_rank(rank: int) -> dict[str, Any]:
    first = sum(SIZES[:rank])
    part, group = slice(first, first + SIZES[rank]), dist.group.WORLD
    found: dict[str, Any] = {repr(case): results(part, case, group) for case in CASES}
    case = ("symmetric", "ring", "float64", True)
    found |= {reduction: results(part, case, group, reduction) for reduction in ("sum", "none")}
    found["module"] = NTXentLoss(0.1)(torch.eye(4)[rank : rank + 1], torch.eye(4)[rank : rank + 1], group=group)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("ids must be the same", {"ids": None if rank else torch.tensor([1])}),
        ("exchange must be one of", {"exchange": "tree"}),
        ("positive must be None with a group", {"positive": torch.zeros(1, dtype=torch.int64)}),
    ]
    for text, change in wrong:
        with pytest.raises(ValueError, match=text):
            nt_xent(torch.ones(1, 3), torch.ones(1, 3), **{"group": group, **change})
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(on_a_rank, len(SIZES), tmp_path_factory.mktemp("ranks"))


def assert_equal_to_one_process(ranks: list[dict[str, Any]], key: str, wanted: list[Tensor], dtype: str) -> None:
    loss, left, right, tau = zip(*(rank[key] for rank in ranks), strict=True)
    tolerance = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 8e-3}[dtype]
    found = [torch.cat(loss) if loss[0].ndim else loss[0], torch.cat(left), torch.cat(right), sum(tau)]
    if not loss[0].ndim:
        assert all(torch.equal(one, loss[0]) for one in loss)
    for name, mine, one in zip(("loss", "left", "right", "temperature"), found, wanted, strict=True):
        error, scale = (mine.double() - one.double()).abs().max(), one.double().abs().max()
        assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process(case: tuple[str, str, str, bool], ranks: list[dict[str, Any]]) -> None:
    assert_equal_to_one_process(ranks, repr(case), results(slice(None), case, None), case[2])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sums_and_losses_of_rows(reduction: str, ranks: list[dict[str, Any]]) -> None:
    case = ("symmetric", "ring", "float64", True)
    assert_equal_to_one_process(ranks, reduction, results(slice(None), case, None, reduction), "float64")


def test_module_takes_a_group(ranks: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(ranks[0]["module"], NTXentLoss(0.1)(torch.eye(4), torch.eye(4)))


def dies(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("rank 1 is gone")
    rows = torch.ones(2, 3, requires_grad=True)
    nt_xent(rows, rows, group=dist.group.WORLD)


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"rank 1 is gone|Connection (reset|closed)"):
        run_ranks(dies, 2, tmp_path)
