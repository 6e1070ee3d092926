"""An embedding table whose training step touches the rows of the batch and nothing else.

`RowSparseEmbedding` is `nn.Embedding` until a row-sparse optimizer adopts it. From then on a lookup reads rows as the
dense optimizer would hold them now, and the gradient holds the rows of the batch only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.functional import embedding
from torch.nn.parallel import DistributedDataParallel

from ubp_fast.kernels import row_sparse
from ubp_fast.kernels.checks import require, require_dtype
from ubp_fast.kernels.transforms import innermost, is_transforming, outside_of_graphs
from ubp_fast.optim.ranks import Division, division_of_new
from ubp_fast.optim.table_weight import SHARDING, TableWeight, adopted, as_row_gradient, catch_up
from ubp_fast.optim.touched_rows import TouchedRows, check_weight, reserve

OP = "RowSparseEmbedding"


class _Lookup(torch.autograd.Function):
    """Rows of the present; the gradient is a sparse tensor over the distinct rows of the batch.

    On a GPU it is over all entries of the batch: the number of distinct ones would be waited for.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, touched: TouchedRows, ids: Tensor, padding_idx: int | None, is_dense: bool
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx, ctx.is_padded = touched.weight.shape, padding_idx, touched.is_padded
        ctx.is_dense = is_dense
        return touched.gather(ids)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        ids = ctx.saved_tensors[0].reshape(-1)
        grad_output = grad_output.reshape(len(ids), ctx.shape[1])
        is_transformed = (grad_output.requires_grad and torch.is_grad_enabled()) or is_transforming()
        is_dense = ctx.is_dense or is_transformed
        if ctx.padding_idx is not None:
            is_real = ids != ctx.padding_idx
            if ctx.is_padded or is_dense:
                grad_output = grad_output.masked_fill(~is_real[:, None], 0.0)
            else:
                ids, grad_output = ids[is_real], grad_output[is_real]
        if is_dense:
            return grad_output.new_zeros(ctx.shape).index_add(0, ids, grad_output), None, None, None, None
        if not ctx.is_padded:
            ids, grad_output = row_sparse.reduce(ids, grad_output)
        with warnings.catch_warnings():
            # PyTorch 2.11 and 2.12 say so in spite of `check_invariants` (their issue 178274).
            warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
            gradient = torch.sparse_coo_tensor(
                ids[None], grad_output, ctx.shape, is_coalesced=not ctx.is_padded, check_invariants=False
            )
        return as_row_gradient(gradient), None, None, None, None


class RowSparseEmbedding(nn.Embedding):
    """`nn.Embedding` for large tables: the same weights, the same results, and steps at the cost of the rows in use.

    Alone it is `nn.Embedding`. A row-sparse optimizer that is made with it (`RowSparseRAdamScheduleFree`,
    `RowSparseAdamW`) adopts it: from its first step on the memory of `weight` holds rows as of their last step. What
    reads the parameter through PyTorch, here or elsewhere, brings them to the present before, all of them, at a dense
    step's cost; lookups bring theirs alone. Copies and pickles of the module alone are not adopted.

    Args:
        num_embeddings: rows N.
        embedding_dim: columns D.
        padding_idx: a row that starts as zeros and gets no gradient.
        device: as in `nn.Embedding`.
        dtype: float32, float64 or bfloat16. Lookups in a bfloat16 table give float32, and only a row-sparse optimizer
            trains it: its steps are rounded at random, any other's would be lost.
        options: the others of `nn.Embedding`, as it has them by default: none has a row-sparse form.

    Attributes:
        division: of a table made inside `ranks.divided_tables`: `weight` holds the rows of this process, and a lookup,
            of any id, is one of all processes. None: all rows are here.

    Raises:
        ValueError: an option that has no row-sparse form.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        weight, is_frozen = options.pop("_weight", None), options.pop("_freeze", False)
        for name, value in options.items():
            require(name in _OPTIONS, OP, "options", f"be of {_OPTIONS}", name)
            require(name == "norm_type" or not value, OP, name, "be left out", value, "use nn.Embedding")
        division, rows = None if weight is not None else division_of_new(int(num_embeddings)), int(num_embeddings)
        if division is not None:
            rows = division.count
            padding_idx = None if padding_idx is None else division.place(padding_idx)
        if weight is None:
            dtype, device = dtype or torch.get_default_dtype(), torch.device(device or torch.get_default_device())
            start = reserve((rows, int(embedding_dim)), dtype, device)
        else:
            start = weight.to(device=device, dtype=dtype)
        self._answer, self.division = False, division
        super().__init__(rows, embedding_dim, padding_idx, _weight=start, _freeze=is_frozen)
        self.num_embeddings = num_embeddings
        if weight is None:
            self.reset_parameters()

    @property
    def touched(self) -> TouchedRows | None:
        """What the optimizer that has adopted the table knows about it."""
        return adopted(self.weight)

    @property
    def sparse(self) -> bool:
        """Whether gradients are sparse: so on a CPU once the table is adopted.

        `DistributedDataParallel` asks when it wraps the module and holds to the answer; so do lookups inside of it.
        """
        self._answer = self.touched is not None and self.weight.device.type == "cpu"
        return self._answer

    @sparse.setter
    def sparse(self, is_sparse: bool) -> None:
        require(not is_sparse, OP, "sparse", "be left out", is_sparse, "an optimizer that adopts the table decides it")

    def reset_parameters(self) -> None:
        """As in `nn.Embedding`; a divided table gets its rows of what a whole one would get."""
        if self.division is None:
            super().reset_parameters()
            return
        with torch.no_grad():
            self.division.draw(self.weight)
        self._fill_padding_idx_with_zero()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        whole = state_dict.get(f"{prefix}weight")
        if self.division is not None and whole is not None and len(whole) == self.num_embeddings:
            state_dict = {**state_dict, f"{prefix}weight": self.division.own(whole)}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 or int32 [...] -> [..., D]."""
        require_dtype(OP, "ids", ids, (torch.int64, torch.int32))
        return self._own_rows(ids) if self.division is None else self._rows_of_all(self.division, ids)

    @torch.compiler.disable
    def _rows_of_all(self, division: Division, ids: Tensor) -> Tensor:
        return division.lookup(self._own_rows, ids.long())

    def _own_rows(self, ids: Tensor) -> Tensor:
        weight, is_compiling = self.weight, torch.compiler.is_compiling()
        if type(weight) is TableWeight:
            return self._outside_of_graph(weight, ids) if is_compiling else self._rows_of_present(weight, ids)
        if not is_compiling and is_functorch_wrapped_tensor(weight):
            catch_up(innermost(weight))
        return self._plain(weight, ids)

    def _plain(self, weight: Tensor, ids: Tensor) -> Tensor:
        vectors = embedding(ids, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)
        return vectors.float() if vectors.dtype == torch.bfloat16 else vectors

    @outside_of_graphs("a RowSparseEmbedding that an optimizer has adopted is read outside of the graph")
    def _outside_of_graph(self, weight: TableWeight, ids: Tensor) -> Tensor:
        return self._rows_of_present(weight, ids)

    def _rows_of_present(self, weight: TableWeight, ids: Tensor) -> Tensor:
        if is_transforming() or torch._C._is_tracing():
            # There PyTorch's own lookup, after all rows have been brought to the present.
            return self._plain(weight, ids)
        is_dense = not self._answer and DistributedDataParallel._active_ddp_module is not None
        ids = ids if ids.dtype == torch.int64 else ids.long()
        return _Lookup.apply(weight, weight.touched, ids, self.padding_idx, is_dense)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)  # FSDP writes past `register_parameter` where a module has none of its own

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`; refused is a shard in the place of an adopted weight, which its optimizer would lose."""
        is_whole = param is None or type(param) in (nn.Parameter, TableWeight)
        is_adopted = type(self._parameters.get(name)) is TableWeight
        require(is_whole or not is_adopted, OP, "an adopted table", "stay in one piece", type(param).__name__, SHARDING)
        super().register_parameter(name, param)

    def catch_up(self) -> None:
        """Brings every row in the memory of `weight` to the present, for who reads it without PyTorch."""
        catch_up(self.weight)

    def release(self) -> None:
        """Leaves the optimizer, which must not step again, and frees what it knew: `nn.Embedding` again."""
        if isinstance(self.weight, TableWeight):
            self.weight.release()

    def trainable(self) -> Tensor:
        """The weight, for an optimizer that adopts it.

        Raises:
            ValueError: it is no plain parameter, or an option was set that has no row-sparse form.
        """
        for name in ("max_norm", "scale_grad_by_freq"):
            require(not getattr(self, name), OP, name, "be left out", getattr(self, name), "use another optimizer")
        kind = type(self.weight)
        is_plain = kind is TableWeight or (kind is nn.Parameter and not hasattr(self.weight, "_fsdp_flattened"))
        remedy = "a table that is sharded, fake or computed from other parameters takes an optimizer of PyTorch"
        require(is_plain, OP, "weight", "be a parameter in one piece", kind.__name__, remedy)
        check_weight(self.weight)
        return self.weight

    def _replicate_for_data_parallel(self) -> nn.Module:
        found = "nn.DataParallel"
        require(
            self.touched is None, OP, "an adopted table", "stay on one device", found, "use DistributedDataParallel"
        )
        return super()._replicate_for_data_parallel()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}" + (
            "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        )


_OPTIONS = ["max_norm", "norm_type", "scale_grad_by_freq", "sparse", "_weight", "_freeze"]
