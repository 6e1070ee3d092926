"""Adam and AdamW whose embedding tables are updated row by row: the dense optimizer's results at the rows' cost.

Parameters of other layers are stepped by torch itself. A table's rows without gradient follow sums that are the same
for every row (`kernels.row_sparse_adam`) and are brought up to date when they are next read. Weight decay moves every
row in every step, by a factor: it is applied then, too. The state has the layout of `torch.optim.AdamW`: either loads
what the other saved.

Source: Kingma and Ba 2015; Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from ubp_fast.kernels import row_sparse_adam
from ubp_fast.kernels.row_sparse_adam import AdamRows, AdamRule
from ubp_fast.optim.row_sparse_embedding import RowSparseEmbedding
from ubp_fast.optim.touched_rows import TouchedRows, rows_of, split_state, table_gradients

# torch's step without the wrapper that it adds to a class's `step`: hooks must run once, around ours.
_dense_step = inspect.unwrap(Adam.step)
# Every call reads the history once, and the decay of one history must stay a number with all its digits.
_LONGEST_HISTORY, _SMALLEST_KEPT = 8192, 1e-3


class AdamTable(TouchedRows):
    """A table with exp_avg and exp_avg_sq of its touched rows.

    Args:
        weight: the table [N, D], float32, float64 or bfloat16.
        rule: decays of the moments and eps.
    """

    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, weight: Tensor, rule: AdamRule) -> None:
        super().__init__(weight)
        self.rule = rule

    def reset(self) -> None:
        super().reset()
        self.count = 0  # steps ever

    def _restart(self) -> None:
        self._history = torch.ones((1024, 3), dtype=torch.float64, device=self.weight.device)
        self.steps, self._kept = 0, 1.0

    def _first_at_rest(self) -> Tensor:
        return torch.zeros((), dtype=self.state_dtype, device=self.weight.device).expand(self.weight.shape)

    @property
    def rows(self) -> AdamRows:
        """The table for the kernels."""
        history = self._history[: self.steps + 1]
        return AdamRows(self._values, self.state, self.slot, self.used, self.last_step, history)

    def gather(self, ids: Tensor) -> Tensor:
        """Rows as of the present, [..., D]."""
        rows, places = self.part(ids.reshape(-1))
        return row_sparse_adam.gather(rows, self.rule, places).view(*ids.shape, self.weight.shape[1])

    def step(self, gradient: Tensor, rule: AdamRule, learning_rate: float, weight_decay: float) -> None:
        """Takes one step with a sparse gradient [N, D]."""
        if rule != self.rule:
            self.catch_up()
            self.rule = rule
        self.count += 1
        rate = learning_rate / (1 - rule.beta1**self.count)
        root = 1 / math.sqrt(1 - rule.beta2**self.count)
        numbers = (rate, root, 1 - learning_rate * weight_decay)
        ids, sums = rows_of(gradient, self.state_dtype)
        with self.changing(ids) as (rows, places):
            row_sparse_adam.update(rows, rule, places, sums, numbers)
        if self.steps + 1 == len(self._history):
            self._history = torch.cat([self._history, torch.ones_like(self._history)])
        self.steps += 1
        self._history[self.steps] = torch.tensor(numbers, dtype=torch.float64)
        self._kept *= numbers[2]
        self.has_state = True
        if self.steps == _LONGEST_HISTORY or self._kept < _SMALLEST_KEPT:
            self.catch_up()

    def catch_up(self) -> None:
        """Brings all rows to the present, those that only decay included."""
        if self.steps:
            for ids in self.chunks():
                with self.changing(ids) as (rows, _):
                    row_sparse_adam.catch_up(rows, self.rule)
            self._restart()

    def _left_behind(self) -> Tensor:
        # Weight decay moves rows that never had a gradient as well.
        return super()._left_behind() if self._kept == 1.0 else torch.arange(len(self.weight), device=self.slot.device)


class RowSparseAdamW(AdamW):
    """`torch.optim.AdamW` for a model with `RowSparseEmbedding` tables; with `weight_decay=0` it is `Adam`.

    Args:
        params: parameters or groups, as for `AdamW`; the tables' weights are among them.
        tables: the tables to adopt; they stay with this optimizer.
        options: as for `AdamW`.

    Raises:
        ValueError: a table's weight is not among the parameters, or its group has an option without row-sparse form.
    """

    def __init__(self, params: Any, tables: Iterable[RowSparseEmbedding], **options: Any) -> None:
        super().__init__(params, **options)
        self._tables: dict[Tensor, AdamTable] = {}
        group_of = {weight: group for group in self.param_groups for weight in group["params"]}
        for table in tables:
            if table.weight not in group_of:
                raise ValueError("RowSparseAdamW: tables must have their weights in params, got another")
            self._tables[table.weight] = table.touched = AdamTable(table.weight, _rule(group_of[table.weight]))
        self._check_groups()

    def _check_groups(self) -> None:
        for group in self.param_groups:
            reason = unsupported_options(group)
            if reason is not None and any(weight in self._tables for weight in group["params"]):
                raise ValueError(f"RowSparseAdamW: groups of tables must go without {reason}; put them into another")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step: dense parameters by torch, tables by their touched rows.

        Raises:
            ValueError: a table has a dense gradient (its weight was used outside its module).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        with table_gradients("RowSparseAdamW", self._tables) as gradients:
            _dense_step(self)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight in gradients:
                    numbers = (_rule(group), float(group["lr"]), group["weight_decay"])
                    self._tables[weight].step(gradients[weight], *numbers)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of `torch.optim.AdamW`; moments of all rows come into being."""
        for weight, touched in self._tables.items():
            if touched.has_state:
                count = torch.tensor(float(touched.count))
                self.state[weight] = {"step": count, **touched.dense_state()}
        try:
            return super().state_dict()
        finally:
            for weight in self._tables:
                self.state.pop(weight, None)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of this class or of a dense one; the tables' weights are loaded before.

        Raises:
            ValueError: the state is that of other parameters.
        """
        others, taken = split_state(state_dict, self.param_groups, self._tables)
        super().load_state_dict(others)
        for weight, touched in self._tables.items():
            touched.reset()
            if "exp_avg" in taken[weight]:
                touched.load(taken[weight])
                touched.count = int(taken[weight]["step"])


def unsupported_options(group: dict[str, Any]) -> str | None:
    """The option of a parameter group of `Adam` or `AdamW` that has no row-sparse form, or None."""
    for name in ("amsgrad", "maximize", "capturable", "differentiable"):
        if group[name]:
            return name
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        return "weight decay inside the gradient"
    if group["eps"] <= 0:
        return "eps = 0"
    return "lr * weight_decay >= 1" if float(group["lr"]) * group["weight_decay"] >= 1 else None


def _rule(group: dict[str, Any]) -> AdamRule:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return AdamRule(beta1, beta2, group["eps"])
