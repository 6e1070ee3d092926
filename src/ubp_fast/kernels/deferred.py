"""Faults that kernels find on a GPU: written into a flag on the device and raised later, without a wait per call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_flags: dict[torch.device, Tensor] = {}
_codes: dict[str, int] = {}
_errors: list[Callable[[], Exception]] = []


def is_deferred(device: torch.device) -> bool:
    """Whether checks on this device do not wait for their result."""
    return device.type == "cuda"


def flag(device: torch.device) -> Tensor:
    """int32 [1] on the device, 0 while no kernel has found a fault; shared by all kernels."""
    if device not in _flags:
        _flags[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device]


def code(make_error: Callable[[], Exception], key: str) -> int:
    """The number that kernels write for a fault, from 1 on, the same for the same key."""
    if key not in _codes:
        _errors.append(make_error)
        _codes[key] = len(_errors)
    return _codes[key]


def poll(device: torch.device) -> None:
    """Raises an earlier fault that has become known, without waiting."""
    if device.type == "cpu":
        check(device)


def check(device: torch.device | None = None) -> None:
    """Waits for the device (None: for all), raises the fault if there is one, and clears the flag."""
    for one in [*_flags] if device is None else [device]:
        found = int(flag(one).cpu().numpy()[0])
        if found:
            flag(one).zero_()
            raise _errors[found - 1]()
