"""Which implementation of an operator runs: one written rule, never a silent fallback.

An operator hands in its implementations (modules with `unsupported(problem) -> str | None`) and the order in which
`backend="auto"` tries them. A backend that was named works or raises with its reason.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "native", "numba", "triton", "reference")
MIN_CAPABILITY = (8, 0)  # tensor cores for bfloat16, asynchronous copies
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # numbered as in csrc/common/dtype.h


class BackendUnavailable(RuntimeError):
    """The named backend cannot run this problem on this machine; the message says why."""


class Lazy(Mapping[str, ModuleType]):
    """Backends of an operator by name, each imported when it is first asked for."""

    def __init__(self, package: str, **modules: str) -> None:
        self._package, self._modules = package, modules

    def __getitem__(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self._package}.{self._modules[name]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def _unsupported(implementations: Mapping[str, ModuleType], name: str, problem: Any) -> str | None:
    try:
        module = implementations[name]
    except ImportError as error:
        return f"it cannot be imported ({error})"
    reason: str | None = module.unsupported(problem)
    return reason


def resolve(
    op: str, backend: str, implementations: Mapping[str, ModuleType], order: Sequence[str], problem: Any
) -> str:
    """Name of the implementation that runs.

    Args:
        op: operator name, for messages.
        backend: "auto" or a name.
        implementations: the implementations that exist.
        order: names that "auto" tries; the first one that supports the problem runs.
        problem: checked arguments, handed to `unsupported`.

    Raises:
        ValueError: `backend` is no backend's name.
        BackendUnavailable: it is one, but does not exist for this operator or does not support the problem.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {list(BACKENDS)}, got '{backend}'")
    if backend != "auto":
        if backend not in implementations:
            raise BackendUnavailable(
                f"{op}: backend '{backend}' does not exist in this version; use one of {['auto', *implementations]}"
            )
        reason = _unsupported(implementations, backend, problem)
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend '{backend}' is unavailable: {reason}; use backend='auto'")
        return backend
    reasons = []
    for name in order:
        reason = _unsupported(implementations, name, problem)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailable(f"{op}: no backend supports this problem: {'; '.join(reasons)}")


def unsupported_dtype(tensor: Tensor, dtypes: Collection[torch.dtype] = DTYPES) -> str | None:
    """Why a kernel that computes these dtypes cannot take the tensor, or None."""
    if tensor.dtype in dtypes:
        return None
    *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"it computes {', '.join(names) + ' and ' if names else ''}{last}, the tensors are {tensor.dtype}"


def unsupported_on_cpu(tensor: Tensor, dtypes: Collection[torch.dtype] = DTYPES) -> str | None:
    """Why the compiled CPU kernels cannot take the tensor, or None."""
    if tensor.device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {tensor.device}"
    return unsupported_dtype(tensor, dtypes)


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device, or None."""
    is_interpreted = (
        os.environ.get("TRITON_INTERPRET") == "1"
    )  # Triton's own switch; it reads it when kernels are defined
    if device.type != "cuda" and not is_interpreted:
        return f"it computes on a CUDA device, the tensors are on {device}"
    if device.type == "cuda" and capability(device) < MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, {device} has {capability(device)}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, (0, 0) of any other; looked up once."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def on_device(device: torch.device) -> torch.cuda.device:
    """Where Triton launches: on the tensors' card, which need not be the current one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
