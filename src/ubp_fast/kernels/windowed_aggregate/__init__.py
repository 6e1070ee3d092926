"""Counts, distinct counts, sums, recency and decayed counts per client and time window."""

from __future__ import annotations

import importlib
from typing import Any

from ubp_fast.kernels.windowed_aggregate.api import (
    WindowedAggregate,
    WindowedAggregator,
    window_aggregator,
    windowed_aggregate,
)

# Compiled by Numba and imported with their first use.
_MODULES = {
    **dict.fromkeys(("SparseCounter", "SparseDecay", "sparse_decay"), "sparse"),
    **dict.fromkeys(("code_counts", "row_sums"), "histories"),
}

__all__ = ["WindowedAggregate", "WindowedAggregator", "window_aggregator", "windowed_aggregate", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
