"""RAdamScheduleFree whose embedding tables are updated row by row: the dense optimizer's results at the rows' cost.

Parameters of other layers are stepped by the library itself. A table's rows without gradient follow closed forms
(`kernels.row_sparse`) and are brought up to date when they are next read, all of them once per switch between training
and evaluation. The state has the layout of `schedulefree.RAdamScheduleFree`: either loads what the other saved.

Source: Defazio et al. 2024; weight decay has no closed form here and must be 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from schedulefree import RAdamScheduleFree
from torch import Tensor

from ubp_fast.kernels.row_sparse import ScheduleFree, ScheduleFreeStep
from ubp_fast.optim.table_optimizer import TableOptimizer
from ubp_fast.optim.touched_rows import TouchedRows

# The smallest product of (1 - c) that is kept: a quotient of two of them must stay a normal number.
_SMALLEST_RETAINED, _SMALLEST_FACTOR = 1e-150, 1e-100


class ScheduleFreeTable(TouchedRows[ScheduleFree, ScheduleFreeStep]):
    """A table with z and exp_avg_sq of its touched rows."""

    names = ("z", "exp_avg_sq")

    def _first_at_rest(self) -> Tensor:
        return self.weight

    def _numbers(self, group: dict[str, Any]) -> tuple[ScheduleFree, ScheduleFreeStep]:
        """From what the library keeps in a group that has just stepped."""
        beta1, beta2 = group["betas"]
        step, learning_rate = group["k"], group["scheduled_lr"]
        bias_correction = 1 - beta2**step
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * beta2**step / bias_correction
        weight = step ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        average_weight = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        return _rule(group), ScheduleFreeStep(
            learning_rate=learning_rate,
            average_weight=average_weight,
            gradient_weight=learning_rate * (beta1 * (1 - average_weight) - 1),
            bias_correction=bias_correction,
            is_adaptive=length > 4.0,
        )

    @contextmanager
    def written(self) -> Iterator[None]:
        """The dense optimizer has a z of every row: one that never had a gradient and is written keeps its own."""
        before = self.weight.clone() if self.has_state else None
        yield
        if before is not None:
            is_new = (self.last_step < 0) & (self.weight != before.to(self.weight)).any(dim=1)
            ids, used = is_new.nonzero()[:, 0], int(self.used)
            slots = slice(used, used + len(ids))
            self.slot[ids] = torch.arange(used, used + len(ids), dtype=torch.int32, device=ids.device)
            self.state[slots, 0], self.state[slots, 1] = before[ids].to(self.state), 0.0
            self.last_step[ids] = 0
            self.used.add_(len(ids))

    def _record(self, step: ScheduleFreeStep) -> bool:
        self._kept *= max(1.0 - step.average_weight, _SMALLEST_FACTOR)
        self._history[self.steps].fill_(self._kept)
        return self._kept < _SMALLEST_RETAINED


class RowSparseRAdamScheduleFree(TableOptimizer, RAdamScheduleFree):
    """`schedulefree.RAdamScheduleFree` for a model with `RowSparseEmbedding` tables.

    Args:
        params: parameters or groups, as for the library's class; the tables' weights are among them.
        tables: the tables to adopt; they stay with this optimizer.
        options: as for the library's class.

    Raises:
        ValueError: a table's weight is not among the parameters, or its group has a weight decay.
    """

    _dense_step = staticmethod(inspect.unwrap(RAdamScheduleFree.step))

    def _touched_rows(self, weight: Tensor, group: dict[str, Any]) -> ScheduleFreeTable:
        return ScheduleFreeTable(weight, _rule(group))

    def _check_groups(self) -> None:
        for group in self.param_groups:
            if group["weight_decay"] and self._tables_of(group):
                raise ValueError(
                    "RowSparseRAdamScheduleFree: weight_decay must be 0 for tables,"
                    f" got {group['weight_decay']}; put other parameters into a group of their own"
                )

    @torch.no_grad()
    def eval(self) -> None:
        """Turns all weights from y, where gradients are taken, into x, the average that is to be used."""
        for group in self.param_groups:
            if group["train_mode"]:
                for touched in self._tables_of(group):
                    touched.catch_up(toward_z=1 - 1 / group["betas"][0])
        super().eval()

    @torch.no_grad()
    def train(self) -> None:
        """Turns all weights from x into y."""
        for group in self.param_groups:
            if not group["train_mode"]:
                for touched in self._tables_of(group):
                    touched.catch_up(toward_z=1 - group["betas"][0])
        super().train()


def _rule(group: dict[str, Any]) -> ScheduleFree:
    return ScheduleFree(float(group["betas"][1]), group["eps"])
