"""A training step as one CUDA graph: what the host launched kernel by kernel is one launch.

    step = CapturedStep(model.loss, model)
    fills = loader.fixed_sizes()
    for batch in loader:
        terms = step(fills(batch).to("cuda"))      # .grad of all parameters is that of the sum of the terms
        optimizer.step()

A graph replays what was launched once: the same kernels on the same memory with the numbers that the host knew then. So
batches are of one size (`ubp_fast.sequences.FixedSizes`) and are copied to where the graph reads them; seeds that the
host draws (`drawn_seed`) are too; and no part of the step asks the device for a number. Optimizers stay outside, whose
numbers change from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ubp_fast.kernels.backends import BackendUnavailable

_MOST_SEEDS = 1024
_WARM_UPS = 2  # the first call of a kernel compiles it, or makes room that later ones use
_places: Iterator[Tensor] | None = None


class _Batch(Protocol):
    """Anything that holds tensors, in an order that is always the same."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Any: ...


BatchT = TypeVar("BatchT", bound=_Batch)
_Found = tuple[Tensor, tuple[Tensor | None, ...]]


def drawn_seed() -> Tensor:
    """A seed int64 [] from torch's generator of the CPU; in a step that is captured, the place of it on the device."""
    return torch.randint(2**63 - 1, (), device="cpu") if _places is None else next(_places)


class CapturedStep(Generic[BatchT]):
    """A loss and its gradients, captured with the first batch, and again with one of other sizes.

    Terms and gradients are those of the loss itself. Nothing is launched by name: a profiler shows the kernels, Python
    code of the loss runs when it is captured alone. The memory of a step, activations included, stays reserved.

    Args:
        loss: batch -> terms; the gradients are those of their sum.
        module: what it computes with; `requires_grad` of its parameters stays as it is.

    Raises:
        BackendUnavailable: with the first batch, parameters that are not on a CUDA device, or a step that a graph
            cannot hold, since it waits for the device.
    """

    def __init__(self, loss: Callable[[BatchT], Mapping[str, Tensor]], module: nn.Module) -> None:
        self._loss, self._module = loss, module
        self._facts: list[Any] = []

    def __call__(self, batch: BatchT) -> dict[str, Tensor]:
        """The terms of the loss; `.grad` of every parameter holds the gradient, and no longer what it held before.

        A gradient lies in the graph's memory: the next call overwrites it.
        """
        given = _tensors(batch)
        facts = [(part.shape, part.dtype, part.device) for part in given]
        if facts != self._facts:
            self._capture(batch)
            self._facts = facts
        self._fill(given)
        drawn = torch.randint(2**63 - 1, (self._drawn,), device="cpu")
        is_cuda = self._seeds.device.type == "cuda"
        # What is copied is pinned memory of this step alone: the host may be steps ahead.
        self._seeds[: self._drawn].copy_(drawn.pin_memory() if is_cuda else drawn, non_blocking=True)
        self._replay()
        values, gradients = self._found
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return dict(zip(self._names, values.clone().unbind(), strict=True))

    def _fill(self, given: list[Tensor]) -> None:
        for place, part in zip(_tensors(self._batch), given, strict=True):
            place.copy_(part, non_blocking=True)

    def _capture(self, batch: BatchT) -> None:
        self._batch: BatchT = batch.map(torch.clone)
        self._parameters = [part for part in self._module.parameters() if part.requires_grad]
        device = self._parameters[0].device
        self._seeds = torch.zeros(_MOST_SEEDS, dtype=torch.int64, device=device)
        given = _tensors(batch)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), _kept(self._module):
            # Written again before it is captured: what a kernel found out of offsets is no longer known then, and
            # becomes a part of the graph.
            self._found, self._replay = _recorded(self._step, lambda: self._fill(given), device)

    def _step(self) -> _Found:
        device = self._seeds.device.type
        with _seeds_from(self._seeds) as count:
            # Copies of weights in bfloat16 that an earlier step left would be replayed with the weights of then.
            is_low, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            with torch.enable_grad(), torch.autocast(device, dtype, enabled=is_low, cache_enabled=False):
                terms = dict(self._loss(self._batch))
                values = torch.stack(list(terms.values()))
            with torch.autocast(device, enabled=False):
                gradients = torch.autograd.grad(values.sum(), self._parameters, allow_unused=True)
        self._drawn, self._names = count(), list(terms)
        return values.detach(), gradients


def _recorded(step: Callable[[], _Found], fill: Callable[[], None], device: torch.device) -> tuple[_Found, Any]:
    """What a captured step leaves, each time after the call of the function beside it."""
    if device.type != "cuda":
        raise BackendUnavailable(f"CapturedStep: parameters must be on a CUDA device, got {device}")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    fill()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            found = step()
    except RuntimeError as error:
        raise BackendUnavailable(
            f"CapturedStep: a step must not wait for the device, got one that cannot be captured: {error}"
        ) from error
    return found, graph.replay


def _tensors(batch: _Batch) -> list[Tensor]:
    found: list[Tensor] = []

    def take(part: Tensor) -> Tensor:
        found.append(part)
        return part

    batch.map(take)
    return found


@contextmanager
def _seeds_from(places: Tensor) -> Iterator[Callable[[], int]]:
    """Seeds come from the places, one after the other; gives what tells how many were asked for."""
    global _places
    taken: list[Tensor] = []

    def take() -> Iterator[Tensor]:
        for place in places.unbind():
            taken.append(place)
            yield place

    before, _places = _places, take()
    try:
        yield lambda: len(taken)
    finally:
        _places = before


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Steps that are not steps of the training leave buffers, such as counts of a metric, as they were."""
    before = [part.clone() for part in module.buffers()]
    yield
    for part, value in zip(module.buffers(), before, strict=True):
        part.copy_(value)
