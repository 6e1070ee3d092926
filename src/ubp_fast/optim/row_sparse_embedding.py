"""An embedding table whose training step touches the rows of the batch and nothing else.

`RowSparseEmbedding` is `nn.Embedding` until a row-sparse optimizer adopts it. From then on a lookup reads rows as the
dense optimizer would hold them now, and the gradient holds the rows of the batch only.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ubp_fast.kernels import row_sparse
from ubp_fast.kernels.row_sparse import ScheduleFreeRows, ScheduleFreeStep

# The smallest product of (1 - c) that is kept: a quotient of two of them must stay a normal number.
_SMALLEST_RETAINED, _SMALLEST_FACTOR = 1e-150, 1e-100
_CHUNK_ROWS = 65_536


def reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros whose memory comes into being where it is written; on Linux in large pages."""
    count = math.prod(shape)
    if device.type != "cpu" or count == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Private: a forked process must not write into this one's weights.
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Rows lie anywhere: with small pages each costs several walks through the page table.
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class TouchedRows:
    """What RAdamScheduleFree knows about a table, row by row, each as it was after its last step.

    Memory grows with the rows that ever had a gradient: it is reserved for all, and comes into being when it is used.

    Args:
        weight: the table [N, D], float32 or float64.
        beta2: decay of the second moment per step.
    """

    def __init__(self, weight: Tensor, beta2: float) -> None:
        self.weight, self.beta2 = weight, beta2
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the weights."""
        rows, width = self.weight.shape
        self.state = reserve((rows, 2, width), self.weight.dtype, self.weight.device)
        self.slot = torch.zeros(rows, dtype=torch.int32, device=self.weight.device)
        self.used = torch.zeros(1, dtype=torch.int64, device=self.weight.device)
        self.last_step = torch.full((rows,), -1, dtype=torch.int32, device=self.weight.device)
        self.has_state = False
        self._restart()

    @property
    def _values(self) -> Tensor:
        return self.weight.detach()

    def _restart(self) -> None:
        self._retained = torch.ones(1024, dtype=torch.float64, device=self.weight.device)
        self.steps = 0

    @property
    def rows(self) -> ScheduleFreeRows:
        """The table for the kernels."""
        retained = self._retained[: self.steps + 1]
        return ScheduleFreeRows(self._values, self.state, self.slot, self.used, self.last_step, retained)

    def gather(self, ids: Tensor) -> Tensor:
        """Rows as of the present, [..., D]."""
        return row_sparse.gather(self.rows, ids)

    def step(self, gradient: Tensor, step: ScheduleFreeStep) -> None:
        """Takes one step with a sparse gradient [N, D]."""
        ids, sums = gradient._indices()[0], gradient._values()
        # Autograd forgets that a gradient was coalesced; several lookups of one step leave several parts.
        if not bool((ids[1:] > ids[:-1]).all()):
            ids, sums = row_sparse.reduce(ids, sums)
        row_sparse.update(self.rows, ids, sums, step)
        kept = float(self._retained[self.steps]) * max(1.0 - step.average_weight, _SMALLEST_FACTOR)
        if self.steps + 1 == len(self._retained):
            self._retained = torch.cat([self._retained, torch.ones_like(self._retained)])
        self.steps += 1
        self._retained[self.steps] = kept
        self.has_state = True
        if kept < _SMALLEST_RETAINED:
            self.catch_up()

    def catch_up(self, toward_z: float = 0.0) -> None:
        """Brings all touched rows to the present; y moves by the share `toward_z` of z - y."""
        if self.steps == 0 and toward_z == 0.0:
            return
        row_sparse.catch_up(self.rows, self.beta2, toward_z=toward_z)
        self._restart()

    def dense_state(self) -> dict[str, Tensor]:
        """z and exp_avg_sq [N, D] at the present as the dense optimizer holds them, in memory of their own."""
        self.catch_up()
        z, exp_avg_sq = self._values.clone(), torch.zeros_like(self._values)
        for ids in (self.last_step >= 0).nonzero()[:, 0].split(_CHUNK_ROWS):
            z[ids], exp_avg_sq[ids] = self.state[self.slot[ids].long()].unbind(1)
        return {"z": z, "exp_avg_sq": exp_avg_sq}

    def load(self, z: Tensor, exp_avg_sq: Tensor) -> None:
        """Takes the state of a dense optimizer; rows that show no trace of a gradient count as untouched."""
        self.reset()
        self.has_state = True
        used = 0
        for start in range(0, len(self.weight), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            is_touched = ((exp_avg_sq[part] != 0) | (z[part] != self._values[part])).any(dim=1)
            ids = start + is_touched.nonzero()[:, 0]
            self.slot[ids] = torch.arange(used, used + len(ids), dtype=torch.int32, device=ids.device)
            self.state[used : used + len(ids), 0], self.state[used : used + len(ids), 1] = z[ids], exp_avg_sq[ids]
            self.last_step[ids] = 0
            used += len(ids)
        self.used.fill_(used)


class _Lookup(torch.autograd.Function):
    """Rows of the present; the gradient is a coalesced sparse tensor over the distinct rows of the batch."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, touched: TouchedRows, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx = weight.shape, padding_idx
        return touched.gather(ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        ids = ctx.saved_tensors[0].reshape(-1)
        grad_output = grad_output.reshape(len(ids), ctx.shape[1])
        if ctx.padding_idx is not None:
            is_real = ids != ctx.padding_idx
            ids, grad_output = ids[is_real], grad_output[is_real]
        distinct, sums = row_sparse.reduce(ids, grad_output)
        gradient = torch.sparse_coo_tensor(distinct[None], sums, ctx.shape, is_coalesced=True, check_invariants=False)
        return gradient, None, None, None


class RowSparseEmbedding(nn.Embedding):
    """`nn.Embedding` for large tables: the same weights, the same results, and steps at the cost of the rows in use.

    Alone it is `nn.Embedding`. A row-sparse optimizer that is made with it (`RowSparseRAdamScheduleFree`) adopts it:
    while that optimizer is in training mode, `weight` holds rows as of their last step. Lookups, `state_dict()` and
    `optimizer.eval()` bring them up to date; code that reads `weight` itself calls `catch_up()` before.

    Args:
        num_embeddings: rows N.
        embedding_dim: columns D.
        padding_idx: a row that starts as zeros and gets no gradient.
        device: as in `nn.Embedding`.
        dtype: float32 or float64.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype, device = dtype or torch.get_default_dtype(), torch.device(device or torch.get_default_device())
        weight = reserve((num_embeddings, embedding_dim), dtype, device)
        super().__init__(num_embeddings, embedding_dim, padding_idx, _weight=weight)
        self.reset_parameters()
        self.touched: TouchedRows | None = None
        self.register_state_dict_pre_hook(_catch_up_before_saving)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        if self.touched is None:
            return super().forward(ids)
        return _Lookup.apply(self.weight, self.touched, ids, self.padding_idx)

    def catch_up(self) -> None:
        """Brings every row of `weight` to the present."""
        if self.touched is not None:
            self.touched.catch_up()

    def release(self) -> None:
        """Leaves the optimizer, which must not step again, and frees what it knew: `nn.Embedding` again."""
        self.catch_up()
        self.touched = None

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.catch_up()  # the rows that come are of the present
        super()._load_from_state_dict(*arguments, **options)


def _catch_up_before_saving(module: RowSparseEmbedding, *_: object) -> None:
    module.catch_up()
