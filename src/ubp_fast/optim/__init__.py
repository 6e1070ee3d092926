"""Optimizers that touch only the rows of a table that a batch uses."""

from ubp_fast.optim.row_sparse_embedding import RowSparseEmbedding
from ubp_fast.optim.row_sparse_schedule_free import RowSparseRAdamScheduleFree

__all__ = ["RowSparseEmbedding", "RowSparseRAdamScheduleFree"]
