"""Clipping by the norm of all gradients, sparse ones included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ubp_fast.kernels import deferred, row_sparse
from ubp_fast.optim.ranks import Division


def clip_gradient_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, divided: Mapping[nn.Parameter, Division] | None = None
) -> Tensor:
    """Scales all gradients so that their joint Euclidean norm is at most `max_norm`; returns the norm before.

    Equals `torch.nn.utils.clip_grad_norm_`, with which the gradient of a table waits for a GPU. Here nothing does but
    tables in bfloat16.

    Args:
        parameters: all that are trained; other gradients are the same in all processes that train as one.
        max_norm: the largest norm that stays.
        divided: those of which every process has some rows (`ranks.divided`): all processes call this.
    """
    with torch._C.DisableTorchFunctionSubclass():  # the gradients of tables, as they are
        return _clip(parameters, max_norm, divided or {})


def _clip(parameters: Iterable[nn.Parameter], max_norm: float, divided: Mapping[nn.Parameter, Division]) -> Tensor:
    gradients: list[Tensor] = []
    shared: list[Tensor] = []  # those that all processes have alike
    own: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        sums = own if parameter in divided else shared
        if not gradient.is_sparse:
            gradients.append(gradient)
            sums.append(gradient)
        elif deferred.is_deferred(gradient.device) and gradient.dtype in row_sparse.FLOATS:
            # Entries of one row are scaled apart and measured together.
            gradients.append(gradient._values())
            sums.append(row_sparse.reduce_padded(gradient._indices()[0], gradient._values())[1])
        else:
            parameter.grad = gradient.coalesce()
            gradients.append(parameter.grad._values())
            sums.append(gradients[-1])
    norm = torch.nn.utils.get_total_norm(shared)
    for division in [*divided.values()][:1]:
        square = torch.nn.utils.get_total_norm(own).double().square().to(norm.device)
        dist.all_reduce(square, group=division.group)
        norm = (norm.double().square() + square).sqrt().to(norm.dtype)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return norm
