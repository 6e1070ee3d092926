"""nt_xent of queries among other candidates: against its definition, the forms of pairs, its options and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.contrastive_cases import (
    RECTANGULAR,
    Rectangular,
    assert_rectangular_is_close,
    options,
    pair,
    rectangular,
    rectangular_results,
    rows,
)
from torch import Tensor
from torch.nn import functional

from ubp_fast import _core
from ubp_fast.kernels.nt_xent import nt_xent

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = pytest.mark.parametrize("case", RECTANGULAR, ids=str)


def by_hand(
    queries: Tensor,
    candidates: Tensor,
    positive: Tensor,
    temperature: float,
    normalize: bool,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    candidate_valid: Tensor | None = None,
    ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    candidate_bias: Tensor | None = None,
) -> list[float]:
    """Weight times loss of each row by the definition, one number at a time."""

    def unit(row: Tensor) -> Tensor:
        return row / row.norm() if normalize and row.norm() > 0 else row

    losses = []
    for i, query in enumerate(map(unit, queries)):
        if valid is not None and not valid[i]:
            losses.append(0.0)
            continue
        place = -1 if positive.is_floating_point() else int(positive[i])
        own = float(query @ unit(positive[i] if place < 0 else candidates[place])) / temperature
        own += float(candidate_bias[place]) if candidate_bias is not None and place >= 0 else 0.0
        gaps = [0.0]
        for j, candidate in enumerate(map(unit, candidates)):
            is_out = candidate_valid is not None and not candidate_valid[j]
            is_same = ids is not None and candidate_ids is not None and ids[i] == candidate_ids[j]
            if j == place or is_out or is_same:
                continue
            bias = 0.0 if candidate_bias is None else float(candidate_bias[j])
            gaps.append(float(query @ candidate) / temperature + bias - own)
        top = max(gaps)
        loss = top + math.log(math.fsum(math.exp(gap - top) for gap in gaps))
        losses.append(loss * (1.0 if weight is None else float(weight[i])))
    return losses


@pytest.mark.parametrize("case", [case for case in RECTANGULAR if case.is_small], ids=str)
def test_equals_the_definition(case: Rectangular) -> None:
    queries, candidates, positive, chosen = rectangular(case)
    more = {"temperature": case.temperature, "normalize": case.normalize, **chosen}
    wanted = torch.tensor(by_hand(queries, candidates, positive, **more), dtype=torch.float64)
    found = {
        kind: nt_xent(queries, candidates, positive=positive, reduction=kind, **more)
        for kind in ("none", "sum", "mean")
    }
    torch.testing.assert_close(found["none"], wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["sum"], wanted.sum(), rtol=1e-10, atol=1e-10)
    weight = chosen.get("weight", torch.ones(case.queries)).double()
    total = weight[chosen["valid"]].sum() if "valid" in chosen else weight.sum()
    torch.testing.assert_close(found["mean"], wanted.sum() / total.clamp_min(1e-300), rtol=1e-10, atol=1e-10)


@CASES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_matches_reference(case: Rectangular, dtype: torch.dtype) -> None:
    assert_rectangular_is_close(case, dtype, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_and_number_of_threads(dtype: torch.dtype) -> None:
    before, threads = _core.isa(), torch.get_num_threads()
    tall, wide = RECTANGULAR[8], RECTANGULAR[9]
    try:
        for isa in _core.usable_isas():
            _core.set_isa(isa)
            assert_rectangular_is_close(wide, dtype, "native")
            found = []
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append([*rectangular_results(tall, dtype, "native"), *rectangular_results(wide, dtype, "native")])
            assert all(map(torch.equal, *found))
    finally:
        _core.set_isa(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("has_rows", [False, True], ids=["places", "rows"])
def test_gradcheck(has_rows: bool) -> None:
    case = Rectangular(5, 7, 4, 0.4, "wvib", has_rows=has_rows, reduction="none")
    queries, candidates, positive, chosen = rectangular(case)
    chosen["valid"][:3] = True
    tau = torch.tensor(0.4, dtype=torch.float64)
    leaves = [part.requires_grad_() for part in (queries, candidates, tau, *((positive,) if has_rows else ()))]

    def loss(a: Tensor, b: Tensor, t: Tensor, p: Tensor = positive) -> Tensor:
        return nt_xent(a, b, positive=p, temperature=t, reduction="none", **chosen)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("used", [(), ("weight", "valid", "ids")], ids=["plain", "options"])
def test_pairs_are_a_case_of_it(used: tuple[str, ...]) -> None:
    left, right = pair(300, 24, torch.float32)
    chosen = {name: value for name, value in options(300).items() if name in used}
    of_candidates = {f"candidate_{name}": value for name, value in chosen.items() if name != "weight"}
    both = torch.cat((left, right))
    ids = chosen.get("ids", torch.arange(300))
    twice = {name: value.repeat(2) for name, value in {**chosen, "ids": ids}.items()}
    twice |= {f"candidate_{name}": twice[name] for name in ("ids", *(["valid"] if "valid" in used else []))}
    partner = torch.cat((torch.arange(300, 600), torch.arange(300)))
    places = torch.arange(300)
    forms = {
        "cross": lambda: nt_xent(left, right, positive=places, **chosen, **of_candidates),
        "simclr": lambda: nt_xent(both, both, positive=partner, **twice),
    }
    for negatives, rectangular_form in forms.items():
        wanted = nt_xent(left, right, negatives=negatives, **chosen)
        torch.testing.assert_close(rectangular_form(), wanted, rtol=2e-6, atol=0)


def test_log_q_correction_undoes_the_drawing() -> None:
    """Candidates drawn twice as often with a bias of -log 2 count once: each copy is half a negative."""
    queries, candidates = rows(6, 8, 1), rows(20, 8, 2)
    places = torch.arange(6)
    drawn = torch.cat((candidates, candidates[10:]))
    bias = torch.zeros(30, dtype=torch.float64)
    bias[10:] = -math.log(2.0)
    found = nt_xent(queries, drawn, positive=places, candidate_bias=bias)
    torch.testing.assert_close(found, nt_xent(queries, candidates, positive=places))


def test_biases_of_pairs() -> None:
    left, right = pair(40, 12, torch.float32)
    bias = torch.linspace(-2, 3, 40)
    logits = functional.normalize(left) @ functional.normalize(right).T / 0.1 + bias
    torch.testing.assert_close(
        nt_xent(left, right, candidate_bias=bias), functional.cross_entropy(logits, torch.arange(40))
    )


def test_a_queue_of_past_rows() -> None:
    """Positives that are no candidates, as with a queue: logits are the positive's and the queue's."""
    queries, keys, queue = rows(9, 8, 1), rows(9, 8, 2), rows(50, 8, 3)
    units = [functional.normalize(part) for part in (queries, keys, queue)]
    logits = torch.cat(((units[0] * units[1]).sum(1, keepdim=True), units[0] @ units[2].T), dim=1) / 0.2
    wanted = functional.cross_entropy(logits, torch.zeros(9, dtype=torch.int64))
    torch.testing.assert_close(nt_xent(queries, queue, positive=keys, temperature=0.2), wanted)


def test_rows_of_pairs_add_up() -> None:
    left, right = pair(30, 7)
    chosen = options(30)
    for negatives in ("cross", "symmetric", "simclr"):
        each = nt_xent(left, right, negatives=negatives, reduction="none", **chosen)
        assert each.shape == (30,)
        assert not each[~chosen["valid"]].any()
        torch.testing.assert_close(nt_xent(left, right, negatives=negatives, reduction="sum", **chosen), each.sum())
        total = chosen["weight"][chosen["valid"]].sum()
        torch.testing.assert_close(nt_xent(left, right, negatives=negatives, **chosen), each.sum() / total)


GOOD, PLACES = torch.ones(3, 4), torch.tensor([0, 1, 4])
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"positive": None}, ValueError, r"right must have shape \[N, E\] = \[3, 4\] .* need `positive`"),
    ({"right": torch.ones(5, 3)}, ValueError, r"right must have shape .* got \[5, 3\]"),
    ({"positive": torch.tensor([0, 1, 5])}, ValueError, r"positive must be a row of right, 0..4, got 5 in row 2"),
    ({"positive": torch.tensor([0, -1, 2])}, ValueError, r"positive must be a row of right, 0..4, got -1 in row 1"),
    ({"positive": torch.tensor([0, 1])}, ValueError, r"positive must have shape \[N\] = \[3\], got \[2\]"),
    ({"positive": PLACES.int()}, TypeError, "positive must be int64"),
    ({"positive": torch.ones(5, 4)}, ValueError, r"positive must have shape \[N, E\] = \[3, 4\]"),
    ({"positive": torch.ones(3, 4) * math.inf}, ValueError, "positive must be finite in every valid row"),
    ({"positive": torch.ones(3, 4).double()}, TypeError, "positive must have the dtype of left"),
    ({"right": torch.ones(0, 4)}, ValueError, "right must hold the positives of 3 queries, got no row"),
    (
        {"candidate_valid": torch.arange(5) != 4},
        ValueError,
        "positive must be valid where the query is, got 4 in row 2",
    ),
    ({"ids": torch.arange(3)}, ValueError, "ids and candidate_ids must be given together"),
    ({"candidate_ids": torch.arange(3)}, ValueError, r"candidate_ids must have shape \[M\] = \[5\]"),
    ({"candidate_bias": torch.arange(5)}, TypeError, "candidate_bias must be floating"),
    ({"candidate_bias": torch.full((5,), math.inf)}, ValueError, "candidate_bias must be finite, got inf in row 0"),
    ({"negatives": "symmetric"}, ValueError, "negatives must be 'cross' with positive"),
    ({"reduction": "max"}, ValueError, "reduction must be one of"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    good = {"left": GOOD, "right": torch.ones(5, 4), "positive": PLACES}
    nt_xent(**good)
    with pytest.raises(error, match=f"^nt_xent: {text}"):
        nt_xent(**{**good, **change})


def test_what_is_not_valid_may_be_anything() -> None:
    queries, candidates, places, chosen = rectangular(Rectangular(9, 12, 6, 0.1, "wvib"))
    keep, kept = chosen["valid"], chosen["candidate_valid"]
    queries[~keep], places[~keep], chosen["weight"][~keep] = math.nan, 99, -1.0
    candidates[~kept], chosen["candidate_bias"][~kept] = math.inf, math.nan
    for kind, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        a, b = (side.to(kind, copy=True).requires_grad_() for side in (queries, candidates))
        loss = nt_xent(a, b, positive=places, backend=backend, **chosen)
        loss.backward()
        few = {name: part[keep if len(part) == 9 else kept] for name, part in chosen.items()}
        number = torch.cumsum(kept, 0) - 1
        inside = number[places[keep]]
        wanted = nt_xent(a[keep], b[kept], positive=inside, backend=backend, **few)
        torch.testing.assert_close(loss, wanted)
        assert a.grad is not None and b.grad is not None
        assert not a.grad[~keep].any() and not b.grad[~kept].any() and a.grad.isfinite().all()
