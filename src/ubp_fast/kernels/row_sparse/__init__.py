"""Exact optimizer steps for the touched rows of an embedding table."""

from ubp_fast.kernels.row_sparse.api import catch_up, gather, reduce, update
from ubp_fast.kernels.row_sparse.reference import ScheduleFreeRows, ScheduleFreeStep

__all__ = ["ScheduleFreeRows", "ScheduleFreeStep", "catch_up", "gather", "reduce", "update"]
