"""The compiled CPU kernels: `csrc/row_sparse/cpu.cpp`, in the instruction set that suits the machine."""

from __future__ import annotations

import torch
from torch import Tensor

from ubp_fast import _core
from ubp_fast.kernels.row_sparse.reference import ScheduleFreeRows, ScheduleFreeStep


def unsupported(table: Tensor) -> str | None:
    """Why tensors like this one cannot be computed here, or None."""
    if table.device.type != "cpu":
        return f"it computes on the CPU, the tensors are on {table.device}"
    if table.dtype != torch.float32:
        return f"it computes float32, the tensors are {table.dtype}"
    return None


def gather(rows: ScheduleFreeRows, ids: Tensor) -> Tensor:
    """y of the rows `ids` at the present, [T, D]; writes nothing."""
    ids = ids.contiguous()
    output = torch.empty((len(ids), rows.weight.shape[1]), dtype=torch.float32)
    addresses, sizes = _table(rows)
    _core.row_sparse_gather(addresses, sizes, ids.data_ptr(), len(ids), output.data_ptr(), torch.get_num_threads())
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
    threads = torch.get_num_threads()
    _core.row_sparse_reduce(start.data_ptr(), order.data_ptr(), sizes, gradient.data_ptr(), sums.data_ptr(), threads)
    return distinct[:groups].clone(), sums


def update(rows: ScheduleFreeRows, ids: Tensor, gradient: Tensor, step: ScheduleFreeStep) -> None:
    """Brings the distinct rows `ids` to the present and takes one step with `gradient` [U, D]."""
    ids, gradient = ids.contiguous(), gradient.contiguous()
    addresses, sizes = _table(rows)
    threads = torch.get_num_threads()
    _core.row_sparse_update(
        addresses,
        sizes,
        ids.data_ptr(),
        len(ids),
        gradient.data_ptr(),
        step[:6],
        step.is_adaptive,
        rows.used.data_ptr(),
        threads,
    )


def catch_up(rows: ScheduleFreeRows, beta2: float, toward_z: float) -> None:
    """Brings all touched rows to the present (step 0 from then on) and moves y towards z by the share `toward_z`."""
    addresses, sizes = _table(rows)
    _core.row_sparse_catch_up(addresses, sizes, beta2, toward_z, torch.get_num_threads())


def _table(rows: ScheduleFreeRows) -> tuple[list[int], tuple[int, int, int, int]]:
    tensors = (rows.weight, rows.state, rows.slot, rows.last_step, rows.retained)
    sizes = (rows.weight.shape[0], rows.weight.shape[1], len(rows.retained) - 1, rows.state.shape[0])
    return [tensor.data_ptr() for tensor in tensors], sizes
