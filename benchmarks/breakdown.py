"""Where the time of a training step goes: CPU time of its parts, forward and backward, by what computes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

TABLES, LINEAR, ATTENTION, REST = "tables: lookup and gradient", "linear layers", "attention", "norms, dropout, rest"
TABLE_UPDATE, OTHER_UPDATE = "optimizer: tables", "optimizer: other weights"
# Time inside of one of these, children included, counts as the kind whose name it begins with.
_KINDS = {
    TABLES: ("aten::embedding", "aten::_embedding_bag", "ubp_fast::row_sparse", "_LookupBackward"),
    LINEAR: ("aten::linear", "aten::addmm", "aten::mm", "mkldnn::_linear_pointwise"),
    ATTENTION: (
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product",
        "aten::bmm",
        "aten::_softmax_backward",
        "ubp_fast::flash_attention",
    ),
}
Call = Callable[[], Tensor]


def cpu_ms_by_part(
    mixed: dict[str, Call],
    whole: dict[str, Call],
    optimizer: torch.optim.Optimizer,
    tables: Iterable[Tensor],
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    rounds: int = 3,
) -> dict[str, float]:
    """Median milliseconds of CPU time per part of one step.

    Args:
        mixed: parts (events, encoder) that are split into tables, linear layers, attention and rest, and added up.
        whole: other parts, reported under their names.
        optimizer: of all weights; it takes a step per round.
        tables: weights whose update is reported apart.
        precision: makes the context in which forward runs.
        rounds: of which the median is taken.
    """
    samples: dict[str, list[float]] = {}
    tables = list(tables)
    for _ in range(rounds):
        round_ms = dict.fromkeys((*_KINDS, REST), 0.0)
        for call in mixed.values():
            for name, milliseconds in _by_kind(call, precision).items():
                round_ms[name] += milliseconds
        for name, call in whole.items():
            round_ms[name] = _cpu_ms(lambda call=call: _there_and_back(call, precision))
        round_ms |= _update_ms(optimizer, tables)
        for name, milliseconds in round_ms.items():
            samples.setdefault(name, []).append(milliseconds)
    return {name: round(float(np.median(values)), 2) for name, values in samples.items()}


def _there_and_back(call: Call, precision: Callable[[], AbstractContextManager[object]]) -> None:
    with precision():
        result = call()
    result.backward(torch.ones_like(result))


def _cpu_ms(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def _by_kind(call: Call, precision: Callable[[], AbstractContextManager[object]]) -> dict[str, float]:
    """CPU time of one call, divided as the profiler's clock divides it."""
    wall_s = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        wall_s = time.perf_counter()
        cpu_ms = _cpu_ms(lambda: _there_and_back(call, precision))
        wall_s = time.perf_counter() - wall_s
    times = dict.fromkeys((*_KINDS, REST), 0.0)
    for event in profiler.events():
        kind = _kind(event.name)
        parent = event.cpu_parent
        while kind is not None and parent is not None:
            kind = None if _kind(parent.name) is not None else kind
            parent = parent.cpu_parent
        if kind is not None:
            times[kind] += cpu_ms * event.cpu_time_total / (1e6 * wall_s)
    times[REST] = cpu_ms - sum(times.values())
    return times


def _kind(name: str) -> str | None:
    return next((kind for kind, prefixes in _KINDS.items() if name.startswith(prefixes)), None)


def _update_ms(optimizer: torch.optim.Optimizer, tables: list[Tensor]) -> dict[str, float]:
    """The update of the tables and that of all other weights, apart."""
    optimizer.step()  # its state comes into being
    places = {id(table) for table in tables}
    others = [one for group in optimizer.param_groups for one in group["params"] if id(one) not in places]
    times = {}
    for name, hidden in ((TABLE_UPDATE, others), (OTHER_UPDATE, tables)):
        gradients = [one.grad for one in hidden]
        for one in hidden:
            one.grad = None
        times[name] = _cpu_ms(optimizer.step)
        for one, gradient in zip(hidden, gradients, strict=True):
            one.grad = gradient
    optimizer.zero_grad()
    return times
