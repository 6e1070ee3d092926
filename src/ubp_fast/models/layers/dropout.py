"""Dropout whose draws belong to the rows of a step, wherever they are: sixteen bits per value, and no mask in memory.

The bits of four values are a SplitMix64 hash of their number in the whole step, so a process that has some of the rows
draws for them what one process draws for all, and backward draws once more what nobody kept. On a CPU that takes half
of the time of a generator, and a third of `nn.functional.dropout`'s. Source: Steele et al. 2014 (SplitMix64).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ubp_fast.compiled import njit
from ubp_fast.kernels.backends import DTYPES, on_device, triton_unavailable
from ubp_fast.kernels.graphs import drawn_seed

_WORDS = 2**16
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BLOCK = 512  # words whose draws stay in the first cache
# Values are chosen as bit patterns, whatever their dtype means.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@njit
def _fill(words: np.ndarray, seed: np.uint64, first: np.uint64) -> None:
    for at in range(words.size):
        word = seed + (first + np.uint64(at)) * np.uint64(_GAMMA)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(_FIRST)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(_SECOND)
        words[at] = word ^ (word >> np.uint64(31))


@njit
def _choose(values: np.ndarray, draws: np.ndarray, least: int, output: np.ndarray) -> None:
    for at in range(values.size):
        output[at] = values[at] if draws[at] >= least else 0


@njit
def _drop(values: np.ndarray, seed: np.uint64, first: int, least: int, output: np.ndarray) -> None:
    """Draws for the values that number `first` in the step and those after it, block by block."""
    words = np.empty(min(_BLOCK, values.size // 4 + 2), np.uint64)
    draws = words.view(np.int16)
    word, skipped, begin = first // 4, first % 4, 0
    while begin < values.size:
        _fill(words, seed, np.uint64(word))
        end = min(begin + draws.size - skipped, values.size)
        _choose(values[begin:end], draws[skipped:], least, output[begin:end])
        word, skipped, begin = word + words.size, 0, end


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _shifted(words: Tensor, bits: int) -> Tensor:
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _hashed(seed: int | Tensor, first: int, count: int, device: torch.device | None = None) -> Tensor:
    """What `_fill` gives, in tensors of any device."""
    words = seed + torch.arange(first, first + count, device=device) * _signed(_GAMMA)
    words = (words ^ _shifted(words, 30)) * _signed(_FIRST)
    words = (words ^ _shifted(words, 27)) * _signed(_SECOND)
    return words ^ _shifted(words, 31)


def _draws(count: int, seed: int | Tensor, first: int, device: torch.device | None = None) -> Tensor:
    """Sixteen bits each for the values first .. first + count - 1 of a step, int16 [count]."""
    first_word, skipped = divmod(first, 4)
    words = _hashed(seed, first_word, (skipped + count + 3) // 4, device)
    return words.view(torch.int16)[skipped : skipped + count]


def _by_triton(values: Tensor, seed: int | Tensor, first: int, least: int, scale: float) -> Tensor:
    """The same in one launch, where the tensors of `_draws` take seventeen."""
    from ubp_fast.models.layers.dropout_kernel import VALUES, drop_kernel

    given = values.contiguous()
    output = torch.empty_like(given)
    if given.numel():
        held = seed if isinstance(seed, Tensor) else None
        numbers = (0 if isinstance(seed, Tensor) else seed, first, given.numel(), least, scale)
        with on_device(given.device):
            drop_kernel[(-(-given.numel() // VALUES),)](
                given, held, output, *numbers, IS_HELD=held is not None, BLOCK=VALUES
            )
    return output


@torch.library.custom_op(
    "ubp_fast::dropout",
    mutates_args=(),
    schema="(Tensor values, Tensor seed, SymInt first, int dropped) -> Tensor",
)
def _op(values, seed, first, dropped):
    """Drops `dropped` of 2^16 values; the first one has the number `first` in its step."""
    least, scale = dropped - _WORDS // 2, _WORDS / (_WORDS - dropped)
    # That of a captured step lies on the device, another number in every replay.
    number = int(seed) if seed.device.type == "cpu" else seed
    if values.device.type == "cuda" and values.dtype in DTYPES and triton_unavailable(values.device) is None:
        return _by_triton(values, number, first, least, scale)
    if values.device.type != "cpu":
        draws = _draws(values.numel(), number, first, values.device)
        return torch.where((draws >= least).view(values.shape), values * scale, 0)
    output = torch.empty_like(values, memory_format=torch.contiguous_format)
    bits = _BITS[values.element_size()]
    flat, flat_output = (part.view(bits).view(-1).numpy() for part in (values.contiguous(), output))
    _drop(flat, np.uint64(number), first, least, flat_output)
    return output.mul_(scale)


@_op.register_fake
def _fake(values, *_):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, seed, *ctx.options = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad_output):
    return _op(grad_output, *ctx.saved_tensors, *ctx.options), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def dropout(values: Tensor, share: float, is_training: bool, first_row: int = 0) -> Tensor:
    """Sets a random share of the values to 0 and scales the others so that the mean stays.

    Args:
        values: any float tensor [rows, ...].
        share: of values to drop, 0 <= share < 1; rounded to a multiple of 2^-16.
        is_training: otherwise the values stay as they are.
        first_row: number of the first row among those of all processes.

    Returns:
        Shape and dtype of values. A seed from torch's generator of the CPU decides, also without any row; device and
        number of threads do not.

    Raises:
        ValueError: share is not in [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"dropout: share must be in [0, 1), got {share}")
    dropped = min(round(share * _WORDS), _WORDS - 1)
    if not is_training or dropped == 0:
        return values
    # Drawn outside of the operator: a compiler may take two equal calls of it for one.
    seed = drawn_seed()
    found: Tensor = _op(values, seed, first_row * values.shape[1:].numel(), dropped)
    return found


class RowSequential(nn.Sequential):
    """`nn.Sequential` of [rows, ...] that knows the number of its first row, by which its `nn.Dropout`s draw."""

    def forward(self, rows: Tensor, first_row: int = 0) -> Tensor:
        for part in self:
            rows = dropout(rows, part.p, self.training, first_row) if isinstance(part, nn.Dropout) else part(rows)
        return rows
