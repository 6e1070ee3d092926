"""An embedding table whose training step touches the rows of the batch and nothing else.

`RowSparseEmbedding` is `nn.Embedding` until a row-sparse optimizer adopts it. From then on a lookup reads rows as the
dense optimizer would hold them now, and the gradient holds the rows of the batch only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ubp_fast.kernels import row_sparse
from ubp_fast.optim.touched_rows import TouchedRows, reserve


class _Lookup(torch.autograd.Function):
    """Rows of the present; the gradient is a sparse tensor over the distinct rows of the batch.

    On a GPU it is over all entries of the batch: the number of distinct ones would be waited for.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, touched: TouchedRows, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.is_padded = weight.shape, padding_idx, touched.is_padded
        return touched.gather(ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        ids = ctx.saved_tensors[0].reshape(-1)
        grad_output = grad_output.reshape(len(ids), ctx.shape[1])
        if ctx.padding_idx is not None:
            is_real = ids != ctx.padding_idx
            if ctx.is_padded:
                grad_output = grad_output.masked_fill(~is_real[:, None], 0.0)
            else:
                ids, grad_output = ids[is_real], grad_output[is_real]
        if not ctx.is_padded:
            ids, grad_output = row_sparse.reduce(ids, grad_output)
        with warnings.catch_warnings():
            # PyTorch 2.11 and 2.12 say so in spite of `check_invariants` (their issue 178274).
            warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
            gradient = torch.sparse_coo_tensor(
                ids[None], grad_output, ctx.shape, is_coalesced=not ctx.is_padded, check_invariants=False
            )
        return gradient, None, None, None


class RowSparseEmbedding(nn.Embedding):
    """`nn.Embedding` for large tables: the same weights, the same results, and steps at the cost of the rows in use.

    Alone it is `nn.Embedding`. A row-sparse optimizer that is made with it (`RowSparseRAdamScheduleFree`,
    `RowSparseAdamW`) adopts it: from its first step on `weight` holds rows as of their last step. Lookups,
    `state_dict()` and a schedule-free optimizer's `eval()` bring them up to date; code that reads `weight` itself
    calls `catch_up()` before.

    Args:
        num_embeddings: rows N.
        embedding_dim: columns D.
        padding_idx: a row that starts as zeros and gets no gradient.
        device: as in `nn.Embedding`.
        dtype: float32, float64 or bfloat16. Lookups in a bfloat16 table give float32, and only a row-sparse optimizer
            trains it: its steps are rounded at random, any other's would be lost.
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
            vectors = super().forward(ids)
            return vectors.float() if vectors.dtype == torch.bfloat16 else vectors
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
