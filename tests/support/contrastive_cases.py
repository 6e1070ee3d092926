"""Problems for the tests of nt_xent, and one way to run them on every backend."""

from __future__ import annotations

from typing import Any

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
