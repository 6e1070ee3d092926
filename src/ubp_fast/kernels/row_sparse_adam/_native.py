"""The compiled CPU kernels: `csrc/row_sparse_adam/cpu.cpp`, in the instruction set that suits the machine."""

from __future__ import annotations

import torch
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels.row_sparse_adam.reference import AdamRows, AdamRule


def unsupported(table: Tensor) -> str | None:
    """Why tensors like this one cannot be computed here, or None."""
    if table.device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {table.device}"
    if table.dtype != torch.float32:
        return f"it computes float32, the tensors are {table.dtype}"
    return None


def gather(rows: AdamRows, rule: AdamRule, ids: Tensor) -> Tensor:
    """The weights of the rows `ids` at the present, [T, D]; writes nothing."""
    ids = ids.contiguous()
    output = torch.empty((len(ids), rows.weight.shape[1]), dtype=torch.float32)
    threads = torch.get_num_threads()
    _core.row_sparse_adam_gather(*_table(rows), rule, ids.data_ptr(), len(ids), output.data_ptr(), threads)
    return output


def update(rows: AdamRows, rule: AdamRule, ids: Tensor, gradient: Tensor, step: tuple[float, float, float]) -> None:
    """Brings the distinct rows `ids` to the present and takes one step with `gradient` [U, D]."""
    ids, gradient = ids.contiguous(), gradient.contiguous()
    addresses = (ids.data_ptr(), len(ids), gradient.data_ptr())
    used, threads = rows.used.data_ptr(), torch.get_num_threads()
    _core.row_sparse_adam_update(*_table(rows), rule, *addresses, step, used, threads)


def catch_up(rows: AdamRows, rule: AdamRule) -> None:
    """Brings all rows to the present; the step of touched ones is 0 from then on."""
    _core.row_sparse_adam_catch_up(*_table(rows), rule, torch.get_num_threads())


def _table(rows: AdamRows) -> tuple[list[int], tuple[int, int, int, int]]:
    tensors = (rows.weight, rows.state, rows.slot, rows.last_step, rows.history)
    sizes = (rows.weight.shape[0], rows.weight.shape[1], len(rows.history) - 1, rows.state.shape[0])
    return [tensor.data_ptr() for tensor in tensors], sizes
