"""Gradients summed over the processes of a group, each of which then takes the same step.

Dense ones travel as one array per dtype, those of tables as distinct ids and the sum of each: what a step sends grows
with the rows in use, not with the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ubp_fast.kernels import row_sparse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NONE, _DENSE, _SPARSE = range(3)


def sum_gradients(parameters: Iterable[nn.Parameter], group: ProcessGroup) -> None:
    """Replaces every gradient by its sum over the processes, the same bits on each.

    A parameter without a gradient here gets that of the others; one without any anywhere stays without.

    Args:
        parameters: those of a model that all processes have alike, in the same order.
        group: the processes; all call this.
    """
    with torch._C.DisableTorchFunctionSubclass():  # tables as they lie in memory
        trained = [part for part in parameters if part.requires_grad]
        if not trained:
            return
        kinds = torch.tensor([_kind(part.grad) for part in trained], device=trained[0].device)
        dist.all_reduce(kinds, op=dist.ReduceOp.MAX, group=group)
        found = list(zip(trained, kinds.tolist(), strict=True))
        for dtype in dict.fromkeys(part.dtype for part in trained):
            _sum_dense([part for part, kind in found if kind == _DENSE and part.dtype == dtype], group)
        for part, kind in found:
            if kind == _SPARSE:
                part.grad = _summed_rows(part, group)


def _kind(gradient: Tensor | None) -> int:
    if gradient is None:
        return _NONE
    return _SPARSE if gradient.is_sparse else _DENSE


def _sum_dense(parts: list[nn.Parameter], group: ProcessGroup) -> None:
    if not parts:
        return
    gradients = [part.new_zeros(part.shape) if part.grad is None else part.grad for part in parts]
    flat = torch.cat([gradient.to_dense().reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.grad = values.view(part.shape)


def _summed_rows(part: nn.Parameter, group: ProcessGroup) -> Tensor:
    """The gradient of a table: rows of all processes, those of one process distinct."""
    gradient = part.grad
    if gradient is None:
        ids, sums = torch.empty(0, dtype=torch.int64, device=part.device), part.new_empty((0, part.shape[1]))
    elif gradient.dtype in row_sparse.FLOATS:
        ids, sums = row_sparse.reduce(gradient._indices()[0], gradient._values())
    else:
        gradient = gradient.coalesce()
        ids, sums = gradient._indices()[0], gradient._values()
    world = dist.get_world_size(group)
    sizes = [torch.empty(1, dtype=torch.int64, device=part.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(ids)], device=part.device), group=group)
    counts = torch.cat(sizes).tolist()
    all_ids, all_sums = (_gathered(values, counts, group) for values in (ids, sums))
    return torch.sparse_coo_tensor(all_ids[None], all_sums, part.shape, check_invariants=False)


def _gathered(values: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    padded = values.new_zeros((max(counts), *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
