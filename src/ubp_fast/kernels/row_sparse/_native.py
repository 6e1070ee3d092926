"""The compiled CPU kernels: `csrc/row_sparse/cpu.cpp`, in the instruction set that suits the machine."""

from __future__ import annotations

import torch
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels.backends import unsupported_on_cpu
from ubp_fast.kernels.row_sparse.reference import Adam, AdamStep, RowTable, Rule, Step


def unsupported(table: Tensor) -> str | None:
    """Why tensors like this one cannot be computed here, or None."""
    return unsupported_on_cpu(table, (torch.float32,))


def gather(table: RowTable, rule: Rule, ids: Tensor) -> Tensor:
    """The weights of the rows `ids` at the present, [T, D]; writes nothing."""
    ids = ids.contiguous()
    output = torch.empty((len(ids), table.weight.shape[1]), dtype=torch.float32)
    places = (ids.data_ptr(), len(ids), output.data_ptr())
    _core.row_sparse_gather(_table(table), _rule(rule), *places, torch.get_num_threads())
    return output


def reduce(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending distinct ids [U] and the sums of their gradients [U, D], added in the order of the batch."""
    ids = ids.contiguous()
    gradient = gradient if gradient.stride(1) == 1 or gradient.shape[1] <= 1 else gradient.contiguous()
    count, width = gradient.shape
    order, distinct, start = (torch.empty(count + 1, dtype=torch.int64) for _ in range(3))
    groups = _core.row_sparse_group(ids.data_ptr(), count, order.data_ptr(), distinct.data_ptr(), start.data_ptr())
    sums = torch.empty((groups, width), dtype=torch.float32)
    sizes = (groups, width, gradient.stride(0))
    places = (gradient.data_ptr(), sums.data_ptr())
    _core.row_sparse_reduce(start.data_ptr(), order.data_ptr(), *sizes, *places, torch.get_num_threads())
    return distinct[:groups].clone(), sums


def update(table: RowTable, rule: Rule, ids: Tensor, gradient: Tensor, step: Step) -> None:
    """Brings the distinct rows `ids` to the present and takes one step with `gradient` [U, D]."""
    ids, gradient = ids.contiguous(), gradient.contiguous()
    make = _core.AdamStep if isinstance(step, AdamStep) else _core.ScheduleFreeStep
    places = (ids.data_ptr(), len(ids), gradient.data_ptr())
    _core.row_sparse_update(_table(table), _rule(rule), make(**step._asdict()), *places, torch.get_num_threads())


def catch_up(table: RowTable, rule: Rule, toward_z: float) -> None:
    """Brings all rows to the present (touched ones are at step 0 then); y moves towards z by the share `toward_z`."""
    _core.row_sparse_catch_up(_table(table), _rule(rule, toward_z), torch.get_num_threads())


def _rule(rule: Rule, toward_z: float = 0.0) -> _core.Adam | _core.ScheduleFree:
    if isinstance(rule, Adam):
        return _core.Adam(**rule._asdict())
    return _core.ScheduleFree(**rule._asdict(), toward_z=toward_z)


def _table(table: RowTable) -> _core.RowTable:
    rows, width = table.weight.shape
    sizes = {"rows": rows, "width": width, "slots": len(table.state), "now": len(table.history) - 1}
    return _core.RowTable(**table._asdict(), **sizes)
