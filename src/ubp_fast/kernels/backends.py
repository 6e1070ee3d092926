"""Which implementation of an operator runs: one written rule, never a silent fallback.

An operator hands in its implementations (modules with `unsupported(problem) -> str | None`) and the order in which
`backend="auto"` tries them. A backend that was named works or raises with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

BACKENDS = ("auto", "native", "numba", "triton", "cuda", "reference")


class BackendUnavailable(RuntimeError):
    """The named backend cannot run this problem on this machine; the message says why."""


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
        reason = implementations[backend].unsupported(problem)
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend '{backend}' is unavailable: {reason}; use backend='auto'")
        return backend
    reasons = []
    for name in order:
        reason = implementations[name].unsupported(problem)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailable(f"{op}: no backend supports this problem: {'; '.join(reasons)}")
