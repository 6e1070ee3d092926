"""Checks of values without waiting for a GPU.

On the CPU an operator looks at the values it was given and raises at once. On a CUDA device looking means waiting for
everything that was launched before, so there the check runs on the device: a bad value leaves a code in one flag per
device, and the error is raised by the first later call of an operator that finds the flag copied back, or by
`check_deferred`, which waits for it. What was computed from bad values is NaN or zero until then; nothing outside the
tensors of the call is read or written.

`CUDA_LAUNCH_BLOCKING=1`, with which CUDA itself reports errors where they happen, makes these checks immediate, too,
with the offending row in the message.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_errors: list[Callable[[], Exception]] = []
_codes: dict[str, int] = {}


class _Flag:
    """The flag of one device, and the last copy of it that was asked for."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.value = torch.zeros(1, dtype=torch.int32, device=device)
        self.copy = torch.zeros(1, dtype=torch.int32, pin_memory=is_cuda)
        self.seen: np.ndarray = self.copy.numpy()
        self.arrival = torch.cuda.Event() if is_cuda else None
        self.is_under_way = False

    def has_arrived(self) -> bool:
        """The last copy is complete; asks for the next one where none is under way."""
        if not self.is_under_way:
            self.copy.copy_(self.value, non_blocking=True)
            if self.arrival is not None:
                self.arrival.record(torch.cuda.current_stream(self.value.device))
            self.is_under_way = True
        if self.arrival is not None and not self.arrival.query():
            return False
        self.is_under_way = False
        return True

    def clear(self, code: int) -> None:
        """Raises the error of a code, if it is one."""
        if code:
            self.value.zero_()
            self.is_under_way = False
            raise _errors[code - 1]()


_flags: dict[torch.device, _Flag] = {}


def is_deferred(device: torch.device) -> bool:
    """Checks on tensors of this device do not wait for it."""
    return device.type == "cuda" and os.environ.get("CUDA_LAUNCH_BLOCKING") != "1"


def code(make_error: Callable[[], Exception], key: str) -> int:
    """The number, > 0, that stands for an error; the same for the same key."""
    if key not in _codes:
        _errors.append(make_error)
        _codes[key] = len(_errors)
    return _codes[key]


def flag(device: torch.device) -> Tensor:
    """int32 [1] on the device, 0 until a check has failed; kernels write a code into it."""
    return _of(device).value


def fault(is_bad: Tensor, error: type[Exception], message: str) -> Tensor:
    """int32 [1]: the code of the error where the boolean `is_bad` (one element, on a device) is true, else 0."""
    number = code(lambda: error(f"{message} (found on the device, after the call that it is about)"), message)
    return is_bad.reshape(1).to(torch.int32) * number


def report(found: Tensor) -> None:
    """Raises on a later call if what `fault` has found, on a device whose checks are deferred, is not 0."""
    value = flag(found.device)
    torch.maximum(value, found, out=value)


def poll(device: torch.device) -> None:
    """Raises what has become known of earlier calls, without waiting; at the start of every public call."""
    found = _flags.get(device)
    if found is None or not is_deferred(device):
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    if found.has_arrived():
        found.clear(int(found.seen[0]))


def check_deferred(device: torch.device | str | None = None) -> None:
    """Waits for a device (None: for all that were used), and raises if a value check of an earlier call has failed.

    Call it where an error must not be later than a point: after a step while debugging, before a checkpoint is written.

    Raises:
        ValueError, IndexError: what the operator's documentation says about bad values.
    """
    wanted = None if device is None else torch.empty(0, device=device).device
    for where, found in list(_flags.items()):
        if wanted is None or where == wanted:
            found.clear(int(found.value.item()))


def _of(device: torch.device) -> _Flag:
    if device not in _flags:
        with torch.inference_mode(False):  # else nobody could write it outside of inference
            _flags[device] = _Flag(device)
    return _flags[device]
