"""Means over the views of a step, wherever they are: in this process, or some in each process of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ubp_fast.sequences.batch import ViewBatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def mean_of_views(values: Tensor, batch: ViewBatch) -> Tensor:
    """The mean of numbers [B, ...] of a batch's valid views; with a group over those of all its processes.

    The gradient is that of the part here: the processes' gradients add up to that of the mean.
    """
    if batch.valid is not None:
        counted = batch.valid.view(-1, *[1] * (values.ndim - 1))
        return torch.where(counted, values, 0.0).sum() / counted.expand_as(values).sum().clamp(min=1)
    if batch.group is None:
        return values.mean()
    of_a_view = values[0].numel() if len(values) else 1
    return added(values.sum() / ((batch.all_views or 1) * of_a_view), batch.group)


def added(share: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of the processes' shares, the same number in each, with the gradient of the share that is here."""
    total = share.detach().clone()
    dist.all_reduce(total, group=group)
    return total + (share - share.detach())


def count_of_all(count: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of a count over the processes, without a gradient."""
    if group is None:
        return count
    total = count.detach().clone()
    dist.all_reduce(total, group=group)
    return total
