"""Transforms of PyTorch, for which operators take their plain reference: kernels compute numbers and nothing else.

Transforms are those of `torch.func`, forward-mode differentiation, and backwards that are batched or differentiated
again. They want to see PyTorch's own operations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _dispatch_tls_local_include_set,
    _len_torch_function_stack,
    _parse_dispatch_key,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from ubp_fast.kernels.backends import BackendUnavailable
from ubp_fast.kernels.checks import require

_BATCHED_BACKWARD: Any = _parse_dispatch_key("VmapMode")
# What PyTorch's dispatcher looks for in every call; modes, traces and transforms add to it.
_ALWAYS: int = (DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)).raw_repr()
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def outside_of_graphs(reason: str) -> Callable[[FunctionT], FunctionT]:
    """For a function that `torch.compile` calls and does not look into; where one graph is demanded it says why."""
    has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
    options = {"reason": f"{reason}; leave fullgraph out"} if has_reason else {}
    return torch.compiler.disable(**options)


def is_transforming() -> bool:
    """Inside of a transform of `torch.func`, of forward-mode differentiation or of a backward with batched gradients.

    Kernels compute numbers; a transform goes through the plain reference, which consists of PyTorch's operations.
    """
    if torch.compiler.is_compiling():
        return bool(_are_functorch_transforms_active())  # the one question that it answers inside of a graph
    return (
        peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _dispatch_tls_is_dispatch_key_included(_BATCHED_BACKWARD)
    )


def direct(op: Any) -> Callable[..., Any]:
    """The operator, or, where the dispatcher has nothing to do for it, its function alone, ten microseconds faster.

    Args:
        op: made by `torch.library.custom_op`; changes none of its arguments.
    """
    function: Callable[..., Any] = op._init_fn

    def call(*arguments: Any) -> Any:
        return (function if _is_unwatched(arguments) else op)(*arguments)

    return call


def _is_unwatched(arguments: Sequence[Any]) -> bool:
    """No gradient, graph, trace, mode, transform, profiler, nor a tensor that is more than its numbers."""
    if (
        torch.compiler.is_compiling()
        or _dispatch_tls_local_include_set().raw_repr() & ~_ALWAYS
        or _len_torch_function_stack()
        or _profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    is_differentiating = torch.is_grad_enabled()
    for part in arguments:
        if type(part) is Tensor:
            if part.is_neg() or part.is_meta or (is_differentiating and part.requires_grad):
                return False
        elif isinstance(part, Tensor):
            return False
    return True


def outside_of_transforms() -> AbstractContextManager[Any]:
    """Inside of it values may be looked at, those of `untransformed` tensors."""
    return temporarily_clear_interpreter_stack()


def untransformed(tensor: Tensor) -> Tensor:
    """What lies inside of a transform's wrappers, as far as no vmap maps over it."""
    while is_functorch_wrapped_tensor(tensor) and not is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def innermost(tensor: Tensor) -> Tensor:
    """What lies inside of all wrappers."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def require_constant(op: str, name: str, tensor: Tensor, remedy: str) -> None:
    """Raises ValueError where a derivative is wanted of what has none, and would be lost in silence."""
    is_tracked = tensor.requires_grad and torch.is_grad_enabled()
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        is_tracked = is_tracked or forward_ad.unpack_dual(tensor).tangent is not None
    require(not is_tracked, op, name, "need no derivative: there is none", "one that does", remedy)


def require_reference(op: str, backend: str) -> None:
    """Raises BackendUnavailable where a backend was named that has no part in transforms."""
    if backend not in ("auto", "reference"):
        raise BackendUnavailable(
            f"{op}: backend '{backend}' is unavailable: it has no second or forward-mode derivatives, and no transform"
            " of torch.func; use backend='auto'"
        )


def differentiable_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs_gradient: Sequence[bool],
    grad_output: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of a plain function at saved inputs, for a backward with `create_graph` or with batched gradients."""
    is_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One tensor may be several inputs, each with a gradient of its own.
        own = [
            part.view_as(part) if part is not None and need else part
            for part, need in zip(inputs, needs_gradient, strict=False)
        ]
        wanted = [part for part, need in zip(own, needs_gradient, strict=False) if part is not None and need]
        found = torch.autograd.grad(function(*own), wanted, grad_output, create_graph=is_graph, allow_unused=True)
    gradients = iter(found)
    return [
        next(gradients) if part is not None and need else None for part, need in zip(own, needs_gradient, strict=False)
    ]
