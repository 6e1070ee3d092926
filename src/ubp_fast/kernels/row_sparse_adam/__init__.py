"""Exact Adam and AdamW steps for the touched rows of an embedding table."""

from ubp_fast.kernels.row_sparse_adam.api import catch_up, gather, update
from ubp_fast.kernels.row_sparse_adam.reference import AdamRows, AdamRule

__all__ = ["AdamRows", "AdamRule", "catch_up", "gather", "update"]
