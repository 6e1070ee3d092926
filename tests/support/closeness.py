"""When a fast result counts as equal to the reference: one rule for every operator, dtype and machine."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_matches_reference(found: Tensor, reference: Tensor, truth: Tensor, op: str, case: object) -> None:
    """Asserts that `found` errs at most twice as much as the reference in the same dtype, plus a rounding band.

    bound = 2 * error(reference) + 4 * eps(dtype) * max|truth|, with error = largest distance to the truth.

    Args:
        found: the result under test.
        reference: the reference's result on the same inputs, in the same dtype.
        truth: the reference's result on the same inputs converted to float64.
        op: what was computed, for the message.
        case: its inputs, for the message.
    """
    name = f"{op} [{case}, {found.dtype}]"
    assert found.shape == truth.shape, f"{name}: shape {list(found.shape)}, wanted {list(truth.shape)}"
    assert found.dtype == reference.dtype, f"{name}: the reference has dtype {reference.dtype}"
    if truth.numel() == 0:
        return
    scale = truth.double().abs().max().item()
    bound = 2 * _distance(reference, truth).max().item() + 4 * torch.finfo(found.dtype).eps * scale
    distance = _distance(found, truth).flatten()
    worst = int(distance.nan_to_num(nan=float("inf")).argmax())
    error = distance[worst].item()
    if not (error <= bound):  # also when either of them is NaN
        index = tuple(int(part) for part in torch.unravel_index(torch.tensor(worst), truth.shape))
        raise AssertionError(
            f"{name}: error {error:.3e} > bound {bound:.3e} at {index}: "
            f"{found.flatten()[worst].item()} instead of {truth.flatten()[worst].item()}"
        )


def _distance(found: Tensor, truth: Tensor) -> Tensor:
    return (found.detach().double() - truth.detach().double()).abs()
