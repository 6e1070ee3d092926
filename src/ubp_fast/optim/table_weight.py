"""What code that knows nothing of row-sparse steps sees of a table: a weight of the present, and a gradient to clip.

From its adoption on a table's parameter is a `TableWeight`. Whatever PyTorch function reads it, be it an average of
weights, a tied layer or a copy, finds every row brought to the present before, and what writes it leaves the optimizer
as a dense one would be left. Tensors that share its memory (`.data`, `detach()`, slices) do the same. Its gradient is a
`RowGradient`, which PyTorch's clipping functions scale like a dense one.

Not seen are reads outside of Python's functions: NumPy arrays and pointers are of the moment they were taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor as _is_wrapped
from torch._functorch import eager_transforms, vmap
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ubp_fast.kernels.checks import require
from ubp_fast.optim.touched_rows import TouchedRows, check_weight

# They read no number of the weight; all other functions do, those of versions to come included.
_ATTRIBUTES = (
    "_backward_hooks", "_base", "_version", "device", "dtype", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta",
    "is_mkldnn", "is_mps", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_xla", "itemsize", "layout",
    "names", "nbytes", "ndim", "output_nr", "requires_grad", "retains_grad", "shape",
)  # fmt: skip
_METHODS = (
    "__len__", "__dlpack_device__", "dim", "element_size", "get_device", "is_complex", "is_conj", "is_contiguous",
    "is_floating_point", "is_inference", "is_neg", "is_pinned", "is_shared", "is_signed", "ndimension", "nelement",
    "numel", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size",
    "storage_offset", "stride",
)  # fmt: skip
_NAMES: Any = Tensor  # its properties as the descriptors that they are
_GET_GRADIENT, _SET_DATA = _NAMES.grad.__get__, _NAMES.data.__set__
_WITHOUT_VALUES: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)),
    *(getattr(torch, name) for name in ("is_complex", "is_floating_point", "is_inference", "numel", "zeros_like")),
    *(_NAMES.grad.__set__, _NAMES.grad.__delete__, _NAMES.requires_grad.__set__, _NAMES._backward_hooks.__set__),
    torch._has_compatible_shallow_copy_type,
}
SHARDING = "release() it before it is sharded, and make an optimizer of PyTorch after"
_WRITES = {"__setitem__", "__set__", "set_", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"}


class _OfTable(Tensor):
    """Shares the memory of a table that is or was adopted."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _WITHOUT_VALUES:
                return func(*args, **kwargs)
            if func == _GET_GRADIENT:
                return as_row_gradient(func(*args))
            return _call(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._of_present().clone()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._of_present().__reduce_ex__(protocol)

    def _of_present(self) -> Tensor:
        """Without a tie to the optimizer: what a copy of the module alone holds."""
        with torch._C.DisableTorchFunctionSubclass():
            catch_up(self)
            return self.detach()


class TableView(_OfTable):
    """A view of an adopted table's weight: as long as it lives it shows what a dense optimizer would have made."""

    _weight: nn.Parameter


class TableWeight(_OfTable, nn.Parameter):
    """The parameter of an adopted table; copies and pickles of it are plain parameters."""

    touched: TouchedRows  # what the optimizer knows

    @staticmethod
    def adopt(weight: Tensor, touched: TouchedRows) -> None:
        """Makes one of a plain parameter, or of one that another optimizer has."""
        _watch_transforms()
        weight.__class__ = TableWeight
        weight.touched = touched  # type: ignore[attr-defined]

    def release(self) -> None:
        """A plain parameter again, of the present."""
        self.touched.catch_up()
        del self.touched
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    @property
    def _fsdp_flattened(self) -> bool:
        """What `FullyShardedDataParallel` asks a parameter before it takes it."""
        found = "FullyShardedDataParallel"
        raise ValueError(f"RowSparseEmbedding: an adopted table must stay in one piece, got {found}; {SHARDING}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self._of_present().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self._of_present(), self.requires_grad).__reduce_ex__(protocol)


class RowGradient(Tensor):
    """A table's gradient: sparse, and for PyTorch's clipping its stored rows, of which all others are zeros."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in _OF_ROWS and _OF_ROWS[name](*args[1:], **kwargs):
                result = func(*(_rows(part, not name.endswith("_")) for part in args), **kwargs)
                return args[0] if name.endswith("_") else result
            try:
                return as_row_gradient(func(*args, **kwargs))
            except (NotImplementedError, RuntimeError) as error:
                if "sparse" not in str(error).lower():
                    raise
            if not name.endswith("_"):
                return func(*_dense(args), **_dense(kwargs))
        raise TypeError(
            f"RowSparseEmbedding: {name} cannot change the gradient of a table, which is sparse; use"
            " ubp_fast.optim.clip_gradient_norm to clip it, or set weight.grad = weight.grad.to_dense() before"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return memo.setdefault(id(self), self.detach().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().__reduce_ex__(protocol)


def _is_one(number: Any) -> bool:
    return not isinstance(number, (list, tuple)) and (not isinstance(number, Tensor) or number.numel() == 1)


def _is_around_zero(low: Any = None, high: Any = None, **ends: Any) -> bool:
    low, high = ends.get("min", low), ends.get("max", high)
    return all(end is None or _is_one(end) for end in (low, high)) and (low or 0) <= 0 <= (high or 0)


def _is_of_all(order: Any = 2.0, dim: Any = None, keepdim: bool = False, **options: Any) -> bool:
    order = options.get("p", options.get("ord", order))
    return dim is None and not keepdim and (order == "fro" or (not isinstance(order, str) and float(order) > 0))


# With these arguments rows of zeros stay what they are, or add nothing to a norm.
_OF_ROWS: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(("mul_", "div_", "_foreach_mul_", "_foreach_div_"), _is_one),
    **dict.fromkeys(("norm", "linalg_vector_norm", "_foreach_norm"), _is_of_all),
    "clamp_": _is_around_zero,
    "_foreach_clamp_min_": _is_around_zero,
    "_foreach_clamp_max_": lambda high: _is_around_zero(None, high),
}


def _rows(part: Any, is_read: bool) -> Any:
    """The stored rows in the place of gradients, each row once; they share the gradient's memory."""
    if isinstance(part, (list, tuple)):
        return [_rows(item, is_read) for item in part]
    if not isinstance(part, RowGradient):
        return part
    if not part.is_coalesced():
        part.copy_(part.coalesce())
    rows = part._values()
    return rows.new_zeros(1) if is_read and rows.numel() == 0 else rows


def _dense(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _dense(item) for name, item in part.items()}
    if isinstance(part, (list, tuple)):
        return type(part)(_dense(item) for item in part)
    return part.to_dense() if isinstance(part, RowGradient) else part


def as_row_gradient(found: Any) -> Any:
    """The same object; where it is a sparse tensor, with the functions of a `RowGradient`."""
    if type(found) is Tensor and found.is_sparse:
        found.__class__ = RowGradient
    return found


def adopted(weight: Any) -> TouchedRows | None:
    """What the optimizer that has adopted this parameter knows about it; None for any other tensor."""
    return weight.touched if type(weight) is TableWeight else None


def catch_up(tensor: Tensor) -> None:
    """Brings the rows of the table to the present where the tensor is an adopted one's, or a view of it."""
    for weight in _weights(tensor):
        weight.touched.catch_up()


def _weights(values: Any) -> Iterator[TableWeight]:
    """The parameters of the adopted tables among nested arguments."""
    for found in _of_tables(values):
        weight = found._weight if isinstance(found, TableView) else found
        if isinstance(weight, TableWeight):  # else it was released since
            yield weight


def _of_tables(values: Any) -> Iterator[_OfTable]:
    if isinstance(values, _OfTable):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _of_tables(value)
    elif isinstance(values, dict):
        yield from _of_tables(tuple(values.values()))


@cache
def _watch_transforms() -> None:
    """`torch.func` wraps its arguments in C++ functions that ask no class; from now on tables are of the present."""
    for module, name in (
        (eager_transforms, "_wrap_for_grad"),
        (eager_transforms, "_wrap_functional_tensor"),
        (vmap, "_add_batch_dim"),
    ):
        setattr(module, name, _of_present(getattr(module, name)))


def _of_present(wrap: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(wrap)
    def of_present(tensor: Any, *arguments: Any) -> Any:
        catch_up(tensor)
        return wrap(tensor, *arguments)

    return of_present


@torch.compiler.disable
def _call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a function that reads or writes the numbers of tables."""
    tables = set(_weights((args, kwargs)))
    for weight in tables:
        weight.touched.catch_up()
    name = func.__name__
    if name in _WRITES or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs:
        result = _write(func, args, kwargs)
    else:
        result = _run(func, args, kwargs)
    for weight in tables:
        _mark(result, weight)
    return result


def _write(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a function that writes its first argument or `out`."""
    if func == _SET_DATA:
        shape = list(args[0].shape)
        check_weight(args[1])
        require(list(args[1].shape) == shape, "RowSparseEmbedding", "weight", f"keep its shape {shape}", args[1].shape)
    with ExitStack() as stack:
        written = set(_weights((args[:1], kwargs.get("out"))))
        for weight in written:
            stack.enter_context(weight.touched.written())
        result = _run(func, args, kwargs)
        for weight in written:
            weight.touched.bind(weight)  # `.data = ` brings memory of its own
    return result


def _run(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if _get_current_dispatch_mode() is None:
        return func(*args, **kwargs)
    with _as_plain((args, kwargs)):
        return func(*args, **kwargs)


@contextmanager
def _as_plain(values: Any) -> Iterator[None]:
    """Modes that record operations, such as that of `make_fx`, refuse tensors of other classes than PyTorch's own."""
    classes = {found: type(found) for found in _of_tables(values)}
    try:
        for found, kind in classes.items():
            found.__class__ = nn.Parameter if kind is TableWeight else Tensor  # type: ignore[assignment]
        yield
    finally:
        for found, kind in classes.items():
            found.__class__ = kind


def _mark(result: Any, weight: TableWeight) -> None:
    """Makes views of what shares the table's memory."""
    if isinstance(result, (list, tuple)):
        for part in result:
            _mark(part, weight)
    elif type(result) is Tensor and not _is_wrapped(result) and result.layout == torch.strided:
        is_view = result.device == weight.device and _address(result) == _address(weight)
        if is_view:
            result.__class__ = TableView
            result._weight = weight  # type: ignore[attr-defined]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
