"""Tables in the middle of row-sparse training, batches for them, and when two tables are the same."""

from __future__ import annotations

from typing import Any

import torch
from support.closeness import assert_matches_reference
from torch import Tensor

from ubp_fast.kernels.row_sparse import ScheduleFreeRows, ScheduleFreeStep

OP = "row_sparse"
STEP = ScheduleFreeStep(1e-2, 0.125, -2e-3, 0.99, 0.3, 1e-8, True)
# rows, columns, ids, steps so far: nothing, one, odd sizes, more than one work item, the full width
CASES = [(1, 1, 0, 0), (1, 1, 1, 0), (7, 59, 20, 3), (300, 64, 257, 40), (40, 100, 1000, 9), (2100, 3, 65, 5)]


def table(rows: int, width: int, steps: int, *, seed: int = 0) -> ScheduleFreeRows:
    """A table in the middle of training: a third of the rows was never touched, and unused slots hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    weight, z = (torch.randn(rows, width, generator=generator) for _ in range(2))
    state = torch.stack([z, torch.rand(rows, width, generator=generator) ** 4], dim=1)
    last_step = torch.randint(0, steps + 1, (rows,), generator=generator, dtype=torch.int32)
    last_step[::3] = -1
    used = int((last_step >= 0).sum())
    slot = torch.full((rows,), -5, dtype=torch.int32)
    slot[last_step >= 0] = torch.randperm(used, generator=generator).int()
    state[used:] = float("nan")
    shares = 1 / torch.arange(2, steps + 2, dtype=torch.float64)
    retained = torch.cat([torch.ones(1).double(), 1 - shares]).cumprod(0)
    return ScheduleFreeRows(weight, state, slot, torch.tensor([used]), last_step, retained)


def batch(rows: int, width: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Ids with many repetitions of the first rows, and gradients."""
    generator = torch.Generator().manual_seed(1)
    ids = (torch.rand(count, generator=generator) ** 3 * rows).long()
    return ids, torch.randn(count, width, generator=generator).to(dtype)


def copied(rows: ScheduleFreeRows, dtype: torch.dtype = torch.float32) -> ScheduleFreeRows:
    weight, state, *others = (part.clone() for part in rows)
    return ScheduleFreeRows(weight.to(dtype), state.to(dtype), *others)


def assert_same_table(found: ScheduleFreeRows, plain: ScheduleFreeRows, truth: ScheduleFreeRows, case: Any) -> None:
    for name in ("slot", "used", "last_step"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert_matches_reference(found.weight, plain.weight, truth.weight, OP, (case, "weight"))
    used = int(truth.used)
    for column, name in enumerate(("z", "exp_avg_sq")):
        parts = (one.state[:used, column] for one in (found, plain, truth))
        assert_matches_reference(*parts, OP, (case, name))
    assert found.state[used:].isnan().all()
