"""RAdamScheduleFree whose embedding tables are updated row by row: the dense optimizer's results at the rows' cost.

Parameters of other layers are stepped by the library itself. A table's rows without gradient follow closed forms
(`kernels.row_sparse`) and are brought up to date when they are next read, all of them once per switch between training
and evaluation. The state has the layout of `schedulefree.RAdamScheduleFree`: either loads what the other saved.

Source: Defazio et al. 2024; weight decay has no closed form here and must be 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from schedulefree import RAdamScheduleFree
from torch import Tensor

from ubp_fast.kernels import row_sparse
from ubp_fast.kernels.row_sparse import ScheduleFreeRows, ScheduleFreeStep
from ubp_fast.optim.row_sparse_embedding import RowSparseEmbedding
from ubp_fast.optim.touched_rows import TouchedRows, rows_of, split_state, table_gradients

# The library's step without the wrapper that torch adds to a class's `step`: hooks must run once, around ours.
_dense_step = inspect.unwrap(RAdamScheduleFree.step)
# The smallest product of (1 - c) that is kept: a quotient of two of them must stay a normal number.
_SMALLEST_RETAINED, _SMALLEST_FACTOR = 1e-150, 1e-100


class ScheduleFreeTable(TouchedRows):
    """A table with z and exp_avg_sq of its touched rows.

    Args:
        weight: the table [N, D], float32, float64 or bfloat16.
        beta2: decay of the second moment per step.
    """

    names = ("z", "exp_avg_sq")

    def __init__(self, weight: Tensor, beta2: float) -> None:
        super().__init__(weight)
        self.beta2 = beta2

    def _restart(self) -> None:
        self._retained = torch.ones(1024, dtype=torch.float64, device=self.weight.device)
        self.steps = 0

    def _first_at_rest(self) -> Tensor:
        return self._values

    @property
    def rows(self) -> ScheduleFreeRows:
        """The table for the kernels."""
        retained = self._retained[: self.steps + 1]
        return ScheduleFreeRows(self._values, self.state, self.slot, self.used, self.last_step, retained)

    def gather(self, ids: Tensor) -> Tensor:
        """Rows as of the present, [..., D]."""
        rows, places = self.part(ids.reshape(-1))
        return row_sparse.gather(rows, places).view(*ids.shape, self.weight.shape[1])

    def step(self, gradient: Tensor, step: ScheduleFreeStep) -> None:
        """Takes one step with a sparse gradient [N, D]."""
        ids, sums = rows_of(gradient, self.state_dtype)
        with self.changing(ids) as (rows, places):
            row_sparse.update(rows, places, sums, step)
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
        for ids in self.chunks():
            with self.changing(ids) as (rows, _):
                row_sparse.catch_up(rows, self.beta2, toward_z=toward_z)
        self._restart()


class RowSparseRAdamScheduleFree(RAdamScheduleFree):
    """`schedulefree.RAdamScheduleFree` for a model with `RowSparseEmbedding` tables.

    Args:
        params: parameters or groups, as for the library's class; the tables' weights are among them.
        tables: the tables to adopt; they stay with this optimizer.
        options: as for the library's class.

    Raises:
        ValueError: a table's weight is not among the parameters, or its group has a weight decay.
    """

    def __init__(self, params: Any, tables: Iterable[RowSparseEmbedding], **options: Any) -> None:
        super().__init__(params, **options)
        self._tables: dict[Tensor, ScheduleFreeTable] = {}
        beta2_of = {weight: group["betas"][1] for group in self.param_groups for weight in group["params"]}
        for table in tables:
            if table.weight not in beta2_of:
                raise ValueError("RowSparseRAdamScheduleFree: tables must have their weights in params, got another")
            self._tables[table.weight] = table.touched = ScheduleFreeTable(table.weight, beta2_of[table.weight])
        self._check_weight_decay()

    def _check_weight_decay(self) -> None:
        for group in self.param_groups:
            if group["weight_decay"] and self._touched(group):
                raise ValueError(
                    "RowSparseRAdamScheduleFree: weight_decay must be 0 for tables,"
                    f" got {group['weight_decay']}; put other parameters into a group of their own"
                )

    def _touched(self, group: dict[str, Any]) -> list[ScheduleFreeTable]:
        return [self._tables[weight] for weight in group["params"] if weight in self._tables]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step: dense parameters by the library, tables by their touched rows.

        Raises:
            ValueError: a table has a dense gradient (its weight was used outside its module).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_weight_decay()
        with table_gradients("RowSparseRAdamScheduleFree", self._tables) as gradients:
            _dense_step(self)
        for group in self.param_groups:
            numbers = _numbers(group)
            for weight in group["params"]:
                if weight in gradients:
                    self._tables[weight].step(gradients[weight], numbers)
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        """Turns all weights from y, where gradients are taken, into x, the average that is to be used."""
        for group in self.param_groups:
            if group["train_mode"]:
                for touched in self._touched(group):
                    touched.catch_up(toward_z=1 - 1 / group["betas"][0])
        super().eval()

    @torch.no_grad()
    def train(self) -> None:
        """Turns all weights from x into y."""
        for group in self.param_groups:
            if not group["train_mode"]:
                for touched in self._touched(group):
                    touched.catch_up(toward_z=1 - group["betas"][0])
        super().train()

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of `schedulefree.RAdamScheduleFree`; z of all rows comes into being."""
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
        others, taken = split_state(state_dict, self.param_groups, self._tables)
        super().load_state_dict(others)
        for weight, touched in self._tables.items():
            if "z" in taken[weight]:
                touched.load(taken[weight])
            else:
                touched.reset()


def _numbers(group: dict[str, Any]) -> ScheduleFreeStep:
    """The numbers of the step that a group has just taken, from what the library keeps in it."""
    beta1, beta2 = group["betas"]
    step, learning_rate = group["k"], group["scheduled_lr"]
    bias_correction = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / bias_correction
    weight = step ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
    average_weight = weight / group["weight_sum"] if group["weight_sum"] else 0.0
    return ScheduleFreeStep(
        learning_rate=learning_rate,
        average_weight=average_weight,
        gradient_weight=learning_rate * (beta1 * (1 - average_weight) - 1),
        beta2=beta2,
        bias_correction=bias_correction,
        eps=group["eps"],
        is_adaptive=length > 4.0,
    )
