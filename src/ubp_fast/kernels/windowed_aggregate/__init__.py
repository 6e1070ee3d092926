"""Counts, distinct counts, sums, recency and decayed counts per client and time window."""

from ubp_fast.kernels.windowed_aggregate.api import WindowedAggregate, windowed_aggregate

__all__ = ["WindowedAggregate", "windowed_aggregate"]
