"""What row-sparse optimizers share: tables step by their touched rows, everything else as in the dense optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cache
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ubp_fast.kernels.checks import require
from ubp_fast.optim.row_sparse_embedding import RowSparseEmbedding
from ubp_fast.optim.table_weight import TableWeight, adopted
from ubp_fast.optim.touched_rows import TouchedRows


class TableOptimizer(Optimizer):
    """Comes before the dense optimizer among the bases of a class, which says how one steps and which tables fit.

    Args:
        params: parameters or groups, as for the dense optimizer; the tables' weights are among them.
        tables: the tables to adopt; they stay with this optimizer.
        options: as for the dense optimizer.

    Raises:
        ValueError: a table's weight is not among the parameters, or its group has an option without row-sparse form.
    """

    # The dense step without the wrapper that torch adds to a class's `step`: hooks must run once, around ours.
    _dense_step: ClassVar[Callable[[Any], Any]]

    def __init__(self, params: Any, tables: Iterable[RowSparseEmbedding], **options: Any) -> None:
        super().__init__(params, **options)
        name = type(self).__name__
        self._tables: dict[Tensor, TouchedRows] = {}
        group_of = {weight: group for group in self.param_groups for weight in group["params"]}
        weights = {table.trainable(): table for table in tables}
        for weight in weights:
            require(weight in group_of, name, "tables", "have their weights in params", "another")
            if isinstance(weight, TableWeight):  # it belongs to the newest optimizer
                weight.release()
            self._tables[weight] = self._touched_rows(weight, group_of[weight])
        self._check_groups()
        self._adopt()

    def _adopt(self) -> None:
        _serve_other_optimizers()
        for weight, touched in self._tables.items():
            TableWeight.adopt(weight, touched)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": self._tables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for weight, touched in state.get("_tables", {}).items():
            touched.restore(weight)
        if "_tables" in state:
            self._adopt()

    def _touched_rows(self, weight: Tensor, group: dict[str, Any]) -> TouchedRows:
        raise NotImplementedError

    def _check_groups(self) -> None:
        """Raises ValueError when a group of tables has an option without row-sparse form."""
        raise NotImplementedError

    def _tables_of(self, group: dict[str, Any]) -> list[TouchedRows]:
        return [self._tables[weight] for weight in group["params"] if weight in self._tables]

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step: dense parameters by the dense optimizer, tables by the rows that have a gradient.

        Raises:
            ValueError: another optimizer has taken a table over.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        for weight, touched in self._tables.items():
            if adopted(weight) is not touched:
                raise ValueError(
                    f"{type(self).__name__}: tables must be its own, got one that was released or adopted anew"
                )
        gradients = self._gradients()
        try:
            self._set_gradients(dict.fromkeys(gradients))
            type(self)._dense_step(self)
        finally:
            self._set_gradients(gradients)
        with torch._C.DisableTorchFunctionSubclass():
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight in gradients:
                        self._tables[weight].step(gradients[weight], group)
        return loss

    def _gradients(self) -> dict[Tensor, Tensor]:
        with torch._C.DisableTorchFunctionSubclass():
            return {weight: weight.grad for weight in self._tables if weight.grad is not None}

    def _set_gradients(self, gradients: Mapping[Tensor, Tensor | None]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for weight, gradient in gradients.items():
                weight.grad = gradient

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of the dense optimizer; that of all rows comes into being."""
        for weight, touched in self._tables.items():
            if touched.has_state:
                self.state[weight] = touched.dense_state()
        try:
            return super().state_dict()
        finally:
            for weight in self._tables:
                self.state.pop(weight, None)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of this class or of the dense one; the tables' weights are loaded before.

        Raises:
            ValueError: the state is that of other parameters.
        """
        # torch casts what it loads to the dtype of the weight: that of a table in bfloat16 would lose digits.
        places = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        # Other numbers of parameters are for torch to refuse.
        place_of = {weight: place for weight, place in zip(weights, places, strict=False) if weight in self._tables}
        state = state_dict["state"]
        others = {place: values for place, values in state.items() if place not in place_of.values()}
        super().load_state_dict({**state_dict, "state": others})
        for weight, touched in self._tables.items():
            taken = state.get(place_of[weight], {})
            if touched.names[0] in taken:
                touched.load(taken)
            else:
                touched.reset()

    def exact_state(self) -> dict[str, Any]:
        """The state from which training goes on with the same bytes; `state_dict` brings all rows to the present.

        Belongs to the memory of the tables' weights as it is, with rows of different steps. Tensors share memory.
        """
        tables = [touched.exact_state() for touched in self._tables.values()]
        return {"tables": tables, "others": super().state_dict()}

    @torch.no_grad()
    def load_exact_state(self, exact: Mapping[str, Any]) -> None:
        """Takes what `exact_state` gave; the weights are to hold what their memory held then.

        Raises:
            ValueError: the state is that of other parameters.
        """
        super().load_state_dict(deepcopy(exact["others"]))
        for touched, taken in zip(self._tables.values(), exact["tables"], strict=True):
            touched.load_exact_state(taken)


@cache
def _serve_other_optimizers() -> None:
    register_optimizer_step_pre_hook(_with_dense_gradients)


def _with_dense_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Before the step of an optimizer that has not adopted the tables among its parameters: they get dense gradients.

    Nearly all optimizers refuse sparse ones; `SparseAdam` takes no others.
    """
    own = optimizer._tables if isinstance(optimizer, TableOptimizer) else {}
    tables = [
        weight
        for group in optimizer.param_groups
        for weight in group["params"]
        if type(weight) is TableWeight and weight not in own
    ]
    if not tables or isinstance(optimizer, SparseAdam):
        return None
    _make_dense(tables)
    closure = kwargs.get("closure") or next(filter(callable, args[1:]), None)
    if closure is None:
        return None

    def dense_closure() -> Any:
        loss = closure()
        _make_dense(tables)
        return loss

    swap = lambda value: dense_closure if value is closure else value  # noqa: E731
    return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}


def _make_dense(tables: list[TableWeight]) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        for weight in tables:
            if weight.grad is not None and weight.grad.is_sparse:
                weight.grad = weight.grad.to_dense()
