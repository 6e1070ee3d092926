"""A stubbed device: what would wait for a GPU raises on the CPU, and what a graph would capture is replayed there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ubp_fast.kernels import deferred

# What needs a number from the device, or a shape that only the device knows.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "equal",
    "is_nonzero",
    "_coalesce",
}


class WouldWait(AssertionError):
    """A call that reads from the device."""


class _Watched(TorchDispatchMode):
    """Looks at every operation, also at those inside of the project's own operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "ubp_fast":  # its function, so that what it calls comes here, too
            with self:
                return OPDEFS[f"ubp_fast::{name}"]._init_fn(*args, **kwargs)
        is_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        if name in WAITING or is_mask:
            raise WouldWait(f"{func} waits for the device")
        return func(*args, **kwargs)


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Value checks are deferred as on a CUDA device, and what would wait for one raises `WouldWait`."""
    with monkeypatch.context() as stubbed:
        stubbed.setattr(deferred, "is_deferred", lambda device: True)
        with _Watched():
            yield
        deferred.check_deferred()


class Recorder(TorchDispatchMode):
    """What a CUDA graph does: the operations of the first time once more, on the same memory, with the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:  # what the host draws is the graph's for ever
            self.calls.append((func, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            parts = zip(*(tree_leaves(found) for found in (before, func(*args, **kwargs))), strict=True)
            for old, new in parts:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    assert old.shape == new.shape, f"{func} has another shape than when it was captured"
                    old.copy_(new)


def recorded(step: Callable[[], Any], fill: Callable[[], None], device: torch.device) -> tuple[Any, Any]:
    """In place of `graphs._recorded` where there is no GPU."""
    step()
    fill()
    with Recorder() as recorder:
        found = step()
    return found, recorder.replay
