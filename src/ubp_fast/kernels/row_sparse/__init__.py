"""Exact optimizer steps for the touched rows of an embedding table."""

from ubp_fast.kernels.row_sparse.api import FLOATS, catch_up, gather, reduce, reduce_padded, update
from ubp_fast.kernels.row_sparse.reference import Adam, AdamStep, RowTable, ScheduleFree, ScheduleFreeStep

__all__ = [
    "FLOATS",
    "Adam",
    "AdamStep",
    "RowTable",
    "ScheduleFree",
    "ScheduleFreeStep",
    "catch_up",
    "gather",
    "reduce",
    "reduce_padded",
    "update",
]
