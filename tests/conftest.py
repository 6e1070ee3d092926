"""What every test gets: a fixed seed, memory that is never zero by luck, the thread count it started with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ubp_fast.kernels import check_deferred


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--kills", type=int, default=12, help="how often test_torture kills a run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def same_thread_count() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_late_error() -> Iterator[None]:
    """A value check that failed on the device belongs to the test that caused it."""
    yield
    if torch.cuda.is_available():
        check_deferred()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN (integers: their lowest value), so that an output nobody wrote fails the test."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        fresh = make(*args, **kwargs)
        if fresh.device.type == "meta" or torch.compiler.is_compiling():
            return fresh
        with torch.no_grad():
            if fresh.is_floating_point():
                fresh.fill_(float("nan"))
            elif fresh.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
                fresh.fill_(torch.iinfo(fresh.dtype).min)
        return fresh

    return poisoned
