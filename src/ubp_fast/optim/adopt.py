"""Which optimizer trains the tables of a model: one written rule."""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from ubp_fast.optim.row_sparse_adamw import RowSparseAdamW, unsupported_options
from ubp_fast.optim.row_sparse_embedding import RowSparseEmbedding

TableUpdates = Literal["auto", "row_sparse", "dense"]


def adopt_tables(optimizer: Optimizer, model: nn.Module, updates: TableUpdates) -> Optimizer:
    """The same optimizer, row-sparse for the model's `RowSparseEmbedding` tables where that gives the same result.

    Args:
        optimizer: made for the model's parameters, without any step taken.
        model: may hold tables.
        updates: "row_sparse" demands it; "auto" takes it for tables on the CPU that `RAdamScheduleFree` trains without
            weight decay or that `AdamW` or `Adam` train, and keeps `optimizer` otherwise; "dense" always keeps it.
            A table in bfloat16 demands it, too, on any device, and so does a divided one.

    Raises:
        ValueError: "row_sparse" for an optimizer that has no row-sparse form; "dense" for a table in bfloat16 or a
            divided one.
    """
    tables = _tables(model)
    if any(table.division is not None for table in tables):
        if updates == "dense":
            raise ValueError(
                "adopt_tables: updates must be 'auto' or 'row_sparse' for tables that are divided among processes, got"
                " 'dense'"
            )
        updates = "row_sparse"
    if any(table.weight.dtype == torch.bfloat16 for table in tables):
        if updates == "dense":
            raise ValueError(
                "adopt_tables: updates must be 'auto' or 'row_sparse' for tables in bfloat16, got 'dense';"
                " a dense step would round its results to the nearest number and lose small ones"
            )
        updates = "row_sparse"
    if not tables or updates == "dense":
        return optimizer
    reason = _unsupported(optimizer)
    if reason is not None:
        if updates == "row_sparse":
            raise ValueError(f"adopt_tables: optimizer must be row-sparse, got one that is not: {reason}; use 'auto'")
        return optimizer
    if updates == "auto" and any(table.weight.device.type != "cpu" for table in tables):
        return optimizer
    if _is_schedule_free(optimizer):
        from ubp_fast.optim.row_sparse_schedule_free import RowSparseRAdamScheduleFree

        return RowSparseRAdamScheduleFree(optimizer.param_groups, tables)
    return RowSparseAdamW(optimizer.param_groups, tables)


def release_tables(model: nn.Module) -> None:
    """After the last step: every table is a plain `nn.Embedding` again, and the optimizer's memory can go."""
    for table in _tables(model):
        table.release()


def _tables(model: nn.Module) -> list[RowSparseEmbedding]:
    return [module for module in model.modules() if isinstance(module, RowSparseEmbedding)]


def _unsupported(optimizer: Optimizer) -> str | None:
    # A subclass may step in other ways than the library does.
    if _is_schedule_free(optimizer):
        has_decay = any(group["weight_decay"] for group in optimizer.param_groups)
        return "weight decay moves every row in every step" if has_decay else None
    if type(optimizer) in (Adam, AdamW):
        reasons = (unsupported_options(group) for group in optimizer.param_groups)
        return next((f"{reason} has no row-sparse form" for reason in reasons if reason is not None), None)
    return f"{type(optimizer).__name__} has no row-sparse form"


def _is_schedule_free(optimizer: Optimizer) -> bool:
    # Whoever holds one has imported the library, which need not be there otherwise.
    library = sys.modules.get("schedulefree")
    return library is not None and type(optimizer) is library.RAdamScheduleFree
