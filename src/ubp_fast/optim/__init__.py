"""Optimizers that touch only the rows of a table that a batch uses."""

from ubp_fast.optim.adopt import TableUpdates, adopt_tables, release_tables
from ubp_fast.optim.gradient_norm import clip_gradient_norm
from ubp_fast.optim.row_sparse_adamw import RowSparseAdamW
from ubp_fast.optim.row_sparse_embedding import RowSparseEmbedding
from ubp_fast.optim.row_sparse_schedule_free import RowSparseRAdamScheduleFree

__all__ = [
    "RowSparseAdamW",
    "RowSparseEmbedding",
    "RowSparseRAdamScheduleFree",
    "TableUpdates",
    "adopt_tables",
    "clip_gradient_norm",
    "release_tables",
]
