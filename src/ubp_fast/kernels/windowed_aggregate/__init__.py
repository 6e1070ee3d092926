"""Counts, distinct counts, sums, recency and decayed counts per client and time window."""

from ubp_fast.kernels.windowed_aggregate.api import (
    WindowedAggregate,
    WindowedAggregator,
    window_aggregator,
    windowed_aggregate,
)
from ubp_fast.kernels.windowed_aggregate.histories import code_counts, row_sums
from ubp_fast.kernels.windowed_aggregate.sparse import SparseCounter, SparseCounts, windowed_counts_csr

__all__ = [
    "SparseCounter",
    "SparseCounts",
    "WindowedAggregate",
    "WindowedAggregator",
    "code_counts",
    "row_sums",
    "window_aggregator",
    "windowed_aggregate",
    "windowed_counts_csr",
]
