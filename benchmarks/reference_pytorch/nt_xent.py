"""SimCLR's NT-Xent in PyTorch: as everybody writes it, and as well as we could write it without a kernel.

Both take left and right [N, E] of one dtype and compute in it; row i of left belongs to row i of right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

CHUNK = 512


def plain(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """0-d loss over the whole [2N, 2N] matrix."""
    rows = normalize(torch.cat((left, right)))
    similarity = ((rows / temperature) @ rows.T).fill_diagonal_(float("-inf"))
    count = len(left)
    own = torch.arange(count, device=rows.device)
    partner = torch.cat((own + count, own))
    return cross_entropy(similarity, partner)


def chunked(left: Tensor, right: Tensor, temperature: float, form: str, part: Callable[..., Tensor]) -> Tensor:
    """0-d loss in chunks of 4,096 rows, "cross" or "simclr"; backward computes each of them again.

    `part` is `chunk_loss`, or what a compiler makes of it.
    """
    rows, columns = normalize(left), normalize(right)
    own = torch.arange(len(left), device=left.device)
    partner, hidden = own, None
    if form == "simclr":
        rows = columns = torch.cat((rows, columns))
        partner, hidden = torch.cat((own + len(left), own)), torch.arange(2 * len(left), device=left.device)
    total = rows.new_zeros((), dtype=torch.promote_types(rows.dtype, torch.float32))
    for start in range(0, len(rows), 8 * CHUNK):
        chunk = slice(start, start + 8 * CHUNK)
        given = (rows[chunk], columns, partner[chunk], None if hidden is None else hidden[chunk], temperature)
        total = total + checkpoint(part, *given, use_reentrant=False)
    return total / len(rows)


def chunk_loss(rows: Tensor, columns: Tensor, partner: Tensor, hidden: Tensor | None, temperature: float) -> Tensor:
    """Sum of the cross-entropies of some rows, to whom the column `hidden` is no negative."""
    similarity = rows @ columns.T / temperature
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    if hidden is not None:
        places = torch.arange(len(columns), device=rows.device)
        similarity = similarity.masked_fill(places == hidden[:, None], float("-inf"))
    return cross_entropy(similarity, partner, reduction="sum")


def chunked_symmetric(left: Tensor, right: Tensor, temperature: float) -> Tensor:
    """0-d loss in blocks of 512 rows, each pair of blocks once per direction; needs |s| / temperature <= 80.

    The matrix is symmetric, so a block on the upper side gives the sums of its rows and of its columns. Nothing of
    it is kept; backward computes it again, adds both sides' probabilities and multiplies in place.
    """
    rows = normalize(torch.cat((left, right)))
    return _ChunkedSymmetric.apply(rows, temperature)


class _ChunkedSymmetric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, temperature: float) -> Tensor:
        sums = rows.new_zeros(len(rows))
        buffer = rows.new_empty(CHUNK, CHUNK)
        for first, second, block in _blocks(rows, temperature, buffer):
            sums[first] += block.sum(dim=1)
            if first != second:
                sums[second] += block.sum(dim=0)
        half = len(rows) // 2
        positive = (rows[:half] * rows[half:]).sum(dim=1) / temperature
        ctx.save_for_backward(rows, sums)
        ctx.temperature = temperature
        return (sums.log().sum() - 2 * positive.sum()) / len(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows, sums = ctx.saved_tensors
        half, inverse = len(rows) // 2, sums.reciprocal()
        gradient = torch.cat((rows[half:], rows[:half])).mul_(-2)
        buffer = rows.new_empty(CHUNK, CHUNK)
        for first, second, block in _blocks(rows, ctx.temperature, buffer):
            block.mul_(inverse[first, None] + inverse[None, second])
            gradient[first].addmm_(block, rows[second])
            if first != second:
                gradient[second].addmm_(block.T, rows[first])
        return gradient.mul_(grads[0] / (ctx.temperature * len(rows))), None


def _blocks(rows: Tensor, temperature: float, buffer: Tensor) -> Any:
    """(rows, columns, exponentials) of every block on and above the diagonal; the diagonal itself counts 0."""
    count = len(rows)
    for start in range(0, count, CHUNK):
        first = slice(start, min(start + CHUNK, count))
        for other in range(start, count, CHUNK):
            second = slice(other, min(other + CHUNK, count))
            block = buffer[: first.stop - first.start, : second.stop - second.start]
            torch.mm(rows[first] * (1 / temperature), rows[second].T, out=block)
            block.exp_()
            if start == other:
                block.fill_diagonal_(0)
            yield first, second, block
