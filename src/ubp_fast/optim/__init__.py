"""Optimizers that touch only the rows of a table that a batch uses.

Needs torch and numpy alone, except `RowSparseRAdamScheduleFree`, which is loaded with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ubp_fast.optim.adopt import TableUpdates, adopt_tables, release_tables
from ubp_fast.optim.gradient_norm import clip_gradient_norm
from ubp_fast.optim.row_sparse_adamw import RowSparseAdamW
from ubp_fast.optim.row_sparse_embedding import RowSparseEmbedding

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name == "RowSparseRAdamScheduleFree":
        from ubp_fast.optim.row_sparse_schedule_free import RowSparseRAdamScheduleFree

        return RowSparseRAdamScheduleFree
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
