"""Dropout on a CPU at the speed of memory: sixteen random bits per value from SFC64, and no mask.

`nn.functional.dropout` draws one Mersenne twister number per value and multiplies by a mask that it converts to the
values' dtype: together a sixth of a training step in bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ubp_fast.compiled import njit

_WORDS = 2**16


# Values are chosen as bit patterns, whatever their dtype means.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@njit
def _choose(values: np.ndarray, words: np.ndarray, least: int, output: np.ndarray) -> None:
    for at in range(values.size):
        output[at] = values[at] if words[at] >= least else 0


def _drop(values: Tensor, words: np.ndarray, least: int, scale: float) -> Tensor:
    values = values.contiguous()
    output = torch.empty_like(values)
    bits = _BITS[values.element_size()]
    _choose(values.view(bits).view(-1).numpy(), words, least, output.view(bits).view(-1).numpy())
    return output.mul_(scale)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, words: np.ndarray, least: int, scale: float) -> Tensor:
        ctx.draw = (words, least, scale)
        return _drop(values.detach(), *ctx.draw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        return _drop(grad_output, *ctx.draw), None, None, None


def dropout(values: Tensor, share: float, is_training: bool) -> Tensor:
    """Sets a random share of the values to 0 and scales the others so that the mean stays.

    Args:
        values: any float tensor; on a GPU this is `nn.functional.dropout`.
        share: of values to drop, 0 <= share < 1; on a CPU rounded to a multiple of 2^-16.
        is_training: otherwise the values stay as they are.

    Returns:
        Shape and dtype of values. `torch.manual_seed` governs it, the number of threads does not.

    Raises:
        ValueError: share is not in [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"dropout: share must be in [0, 1), got {share}")
    if values.device.type != "cpu":
        return functional.dropout(values, share, is_training)
    dropped = min(round(share * _WORDS), _WORDS - 1)
    if not is_training or dropped == 0:
        return values
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-values.numel() // 4), dtype=np.uint64)
    return _Drop.apply(values, words.view(np.int16), dropped - _WORDS // 2, _WORDS / (_WORDS - dropped))
