"""Problems for the tests of nt_xent, and one way to run them on every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from support.closeness import assert_matches_reference
from torch import Tensor

from ubp_fast.kernels.nt_xent import nt_xent

RESULTS = ("loss", "left", "right", "temperature")


def rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers [count, width], the same for every dtype up to its rounding."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(count: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Half of the rows are planted matches, so that the softmax is not flat."""
    left, right = rows(count, width, 1), rows(count, width, 2)
    right[::2] = left[::2] + 0.3 * right[::2]
    return left.to(dtype), right.to(dtype)


def options(count: int, seed: int = 3) -> dict[str, Tensor]:
    """Weights, three quarters of the rows valid, about two rows of each id."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.rand(count, generator=generator, dtype=torch.float64),
        "valid": torch.rand(count, generator=generator) < 0.7,
        "ids": torch.randint(0, max(1, count // 2), (count,), generator=generator),
    }


def facts(weight: Tensor | None, valid: Tensor | None, ids: Tensor | None) -> tuple[Tensor | None, ...]:
    """These options of pairs as the operator behind `nt_xent` takes them, between `negatives` and `normalize`."""
    return valid, None, ids, None, None, None, None, weight


def results(left: Tensor, right: Tensor, temperature: float, dtype: torch.dtype, **chosen: Any) -> list[Tensor]:
    """Loss and the gradients of left, right and temperature, computed in `dtype` from the given numbers.

    The temperature is a float32 number in every dtype: at 0.005 the rounding of 0.005 itself would show in the loss.
    """
    a, b = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (left, right))
    wide = torch.promote_types(dtype, torch.float32)
    tau = torch.tensor(temperature, dtype=torch.float32).to(wide).requires_grad_()
    loss = nt_xent(a, b, temperature=tau, **chosen)
    assert loss.dtype == wide
    loss.backward()
    return [loss.detach(), a.grad, b.grad, tau.grad]


def assert_native_is_close(left: Tensor, right: Tensor, temperature: float, case: object, **chosen: Any) -> None:
    """The project's bound for loss and all gradients of "native", in the dtype of the rows."""
    found = results(left, right, temperature, left.dtype, backend="native", **chosen)
    plain = results(left, right, temperature, left.dtype, backend="reference", **chosen)
    truth = results(left, right, temperature, torch.float64, backend="reference", **chosen)
    for name, mine, same, exact in zip(RESULTS, found, plain, truth, strict=True):
        assert_matches_reference(mine, same, exact, f"nt_xent {name}", case)


def assert_small_probabilities_count(dtype: torch.dtype, backend: str, device: str | torch.device) -> None:
    """Near matches: each negative weighs about 1e-7, which float16 alone rounds to a few multiples of 6e-8.

    What the negatives weigh in all is what the positive loses, so that the whole gradient is of their size. The loss is
    scaled as mixed-precision training does it, for gradients that float16 can hold.
    """
    left = rows(48, 64, 1, dtype)
    right = (left + 0.02 * rows(48, 64, 2, dtype)).to(dtype)
    gradients = []
    for kind, where, name in ((dtype, device, backend), (torch.float64, "cpu", "reference")):
        sides = [side.to(where, kind, copy=True).requires_grad_() for side in (left, right)]
        loss = nt_xent(*sides, temperature=0.062, negatives="symmetric", backend=name)
        (loss * 2.0**21).backward()
        gradients.append([side.grad.double().cpu() for side in sides])
    for mine, truth in zip(*gradients, strict=True):
        assert (mine - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()


class Rectangular(NamedTuple):
    """Queries among candidates: sizes, temperature, which options, how the positives are given, the reduction."""

    queries: int
    candidates: int
    width: int
    temperature: float
    used: str = ""  # letters of OPTIONS
    has_rows: bool = False  # positives as rows, else their places
    normalize: bool = True
    reduction: str = "mean"

    @property
    def is_small(self) -> bool:
        """Few enough rows for an interpreter."""
        return self.queries * self.candidates < 10_000


OPTIONS = {
    "w": ("weight",),
    "v": ("valid", "candidate_valid"),
    "i": ("ids", "candidate_ids"),
    "b": ("candidate_bias",),
}
RECTANGULAR = [
    Rectangular(1, 1, 5, 0.1),
    Rectangular(3, 70, 16, 0.1, "b"),
    Rectangular(70, 3, 59, 0.02, "wv", reduction="sum"),
    Rectangular(65, 130, 64, 0.05, "wvib", reduction="none"),
    Rectangular(33, 20, 8, 0.01, "i", has_rows=True),
    Rectangular(20, 65, 100, 0.3, "wvib", has_rows=True, normalize=False, reduction="none"),
    Rectangular(0, 9, 3, 0.1, "wv"),
    Rectangular(9, 0, 3, 0.1, "", has_rows=True),
    Rectangular(1500, 200, 128, 0.02, "v"),
    Rectangular(210, 1500, 100, 0.1, "wvib", reduction="none"),
    Rectangular(200, 1500, 128, 0.01, "vb", has_rows=True),
    Rectangular(390, 1031, 59, 0.1, "wvi", has_rows=True, normalize=False),
]


def rectangular(case: Rectangular) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Queries, candidates, positives and the options of a case, float64; some queries share a positive."""
    generator = torch.Generator().manual_seed(case.queries + case.candidates)
    scale = 1.0 if case.normalize else case.width**-0.5
    queries, candidates = rows(case.queries, case.width, 1), rows(case.candidates, case.width, 2)
    places = torch.randint(0, max(1, case.candidates), (case.queries,), generator=generator)
    for query in range(0, case.queries if case.candidates else 0, 2):  # one after the other: some share a place
        candidates[places[query]] = queries[query] + 0.3 * candidates[places[query]]
    ids = (max(1, case.queries // 2),)
    found = {
        "weight": torch.rand(case.queries, generator=generator, dtype=torch.float64),
        "valid": torch.rand(case.queries, generator=generator) < 0.7,
        "candidate_valid": torch.rand(case.candidates, generator=generator) < 0.8,
        "ids": torch.randint(0, *ids, (case.queries,), generator=generator),
        "candidate_ids": torch.randint(0, *ids, (case.candidates,), generator=generator),
        "candidate_bias": 2 * torch.randn(case.candidates, generator=generator, dtype=torch.float64),
    }
    positive: Tensor = rows(case.queries, case.width, 3) * scale if case.has_rows else places
    if case.has_rows:
        positive[::2] = queries[::2] * scale + 0.1 * positive[::2]
    else:
        found["candidate_valid"][places] = True
    chosen = {name: found[name] for letter in case.used for name in OPTIONS[letter]}
    return queries * scale, candidates * scale, positive, chosen


def rectangular_results(
    case: Rectangular, dtype: torch.dtype, backend: str, device: str | torch.device = "cpu", kind: Any = None
) -> list[Tensor]:
    """Loss and all gradients of a case whose numbers are of `dtype`, computed in `kind`; row losses count unequally."""
    queries, candidates, positive, chosen = rectangular(case)
    kind = kind or dtype
    leaves = [
        side.to(dtype).to(device, kind).requires_grad_()
        for side in (queries, candidates, *((positive,) if case.has_rows else ()))
    ]
    wide = torch.promote_types(kind, torch.float32)
    tau = torch.tensor(case.temperature, dtype=torch.float32).to(wide).to(device).requires_grad_()
    loss = nt_xent(
        *leaves[:2],
        positive=leaves[2] if case.has_rows else positive.to(device),
        temperature=tau,
        normalize=case.normalize,
        reduction=case.reduction,
        backend=backend,
        **{name: value.to(device) for name, value in chosen.items()},
    )
    assert loss.dtype == wide
    (loss * torch.linspace(-1, 2, loss.numel(), device=device)).sum().backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (*leaves, tau)]
    return [part.cpu() for part in (loss.detach(), *gradients)]


def assert_rectangular_is_close(
    case: Rectangular, dtype: torch.dtype, backend: str, device: str | torch.device = "cpu"
) -> None:
    """The project's bound for the loss and every gradient."""
    found = rectangular_results(case, dtype, backend, device)
    plain = rectangular_results(case, dtype, "reference")
    truth = rectangular_results(case, dtype, "reference", kind=torch.float64)
    names = ("loss", "left", "right", *(("positive",) if case.has_rows else ()), "temperature")
    for name, *parts in zip(names, found, plain, truth, strict=True):
        assert_matches_reference(*parts, f"nt_xent {name}", case)
