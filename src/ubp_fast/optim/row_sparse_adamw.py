"""Adam and AdamW whose embedding tables are updated row by row: the dense optimizer's results at the rows' cost.

Parameters of other layers are stepped by torch itself. A table's rows without gradient follow sums that are the same
for every row (`kernels.row_sparse`) and are brought up to date when they are next read. Weight decay moves every row in
every step, by a factor: it is applied then, too. The state has the layout of `torch.optim.AdamW`: either loads what the
other saved.

Source: Kingma and Ba 2015; Loshchilov and Hutter 2019.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from ubp_fast.kernels import row_sparse
from ubp_fast.kernels.row_sparse import AdamStep
from ubp_fast.optim.table_optimizer import TableOptimizer
from ubp_fast.optim.touched_rows import TouchedRows

# Every call reads the history once, and the decay of one history must stay a number with all its digits.
_LONGEST_HISTORY, _SMALLEST_KEPT = 8192, 1e-3


class AdamTable(TouchedRows[row_sparse.Adam, AdamStep]):
    """A table with exp_avg and exp_avg_sq of its touched rows."""

    names = ("exp_avg", "exp_avg_sq")
    history_columns = (3,)
    numbers = (*TouchedRows.numbers, "count")

    def reset(self) -> None:
        super().reset()
        self.count = 0  # steps ever

    def _first_at_rest(self) -> Tensor:
        return torch.zeros((), dtype=self.state_dtype, device=self.weight.device).expand(self.weight.shape)

    def _numbers(self, group: dict[str, Any]) -> tuple[row_sparse.Adam, AdamStep]:
        rule, learning_rate = _rule(group), float(group["lr"])
        self.count += 1
        rate = learning_rate / (1 - rule.beta1**self.count)
        root = 1 / math.sqrt(1 - rule.beta2**self.count)
        return rule, AdamStep(rate, root, 1 - learning_rate * group["weight_decay"])

    def _record(self, step: AdamStep) -> bool:
        for column, number in enumerate(step):
            self._history[self.steps, column].fill_(number)
        self._kept *= step.keep
        return self.steps == _LONGEST_HISTORY or self._kept < _SMALLEST_KEPT

    def _left_behind(self) -> Tensor:
        # Weight decay moves rows that never had a gradient as well.
        return super()._left_behind() if self._kept == 1.0 else torch.arange(len(self.weight), device=self.slot.device)

    def dense_state(self) -> dict[str, Tensor]:
        """As `torch.optim.AdamW` has it, the number of steps included."""
        return {"step": torch.tensor(float(self.count)), **super().dense_state()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state of `torch.optim.AdamW`."""
        super().load(state)
        self.count = int(state["step"])


class RowSparseAdamW(TableOptimizer, AdamW):
    """`torch.optim.AdamW` for a model with `RowSparseEmbedding` tables; with `weight_decay=0` it is `Adam`.

    Args:
        params: parameters or groups, as for `AdamW`; the tables' weights are among them.
        tables: the tables to adopt; they stay with this optimizer.
        options: as for `AdamW`.

    Raises:
        ValueError: a table's weight is not among the parameters, or its group has an option without row-sparse form.
    """

    _dense_step = staticmethod(inspect.unwrap(Adam.step))

    def _touched_rows(self, weight: Tensor, group: dict[str, Any]) -> AdamTable:
        return AdamTable(weight, _rule(group))

    def _check_groups(self) -> None:
        for group in self.param_groups:
            reason = unsupported_options(group)
            if reason is not None and self._tables_of(group):
                raise ValueError(f"RowSparseAdamW: groups of tables must go without {reason}; put them into another")


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


def _rule(group: dict[str, Any]) -> row_sparse.Adam:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return row_sparse.Adam(beta1, beta2, group["eps"])
