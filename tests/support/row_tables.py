"""Tables in the middle of row-sparse training, batches for them, and when two tables are the same."""

from __future__ import annotations

from typing import Any

import torch
from support.closeness import assert_matches_reference
from torch import Tensor

from ubp_fast.kernels.row_sparse import Adam, AdamStep, RowTable, ScheduleFree, ScheduleFreeStep

OP = "row_sparse"
# The usual ones; Adam without a first moment; one whose series would never end; one whose moments never fade away.
SCHEDULE_FREE, ADAM = ScheduleFree(0.99, 1e-8), Adam(0.9, 0.999, 1e-8)
RULES = [SCHEDULE_FREE, ADAM, Adam(0.0, 0.99, 1e-6), Adam(0.9, 0.9, 1e-8), Adam(0.95, 0.5, 1e-3)]
STEPS = {
    ScheduleFree: ScheduleFreeStep(1e-2, 0.125, -2e-3, 0.3, True),
    Adam: AdamStep(1e-2, 1.7, 0.995),
}
# rows, columns, ids, steps so far: nothing, one, odd sizes, more than one work item, the full width, past the horizon
CASES = [
    (1, 1, 0, 0),
    (1, 1, 1, 0),
    (7, 59, 20, 3),
    (300, 64, 257, 40),
    (40, 100, 1000, 9),
    (2100, 3, 65, 5),
    (60, 65, 80, 420),
]
Rule = ScheduleFree | Adam


def table(rule: Rule, rows: int, width: int, steps: int, *, scale: float = 1.0) -> RowTable:
    """A table in the middle of training: a third of the rows was never touched, and unused slots hold NaN.

    `scale` is that of Adam's gradients.
    """
    generator = torch.Generator().manual_seed(0)
    weight, z = (torch.randn(rows, width, generator=generator) for _ in range(2))
    last_step = torch.randint(0, steps + 1, (rows,), generator=generator, dtype=torch.int32)
    last_step[::3] = -1
    used = int((last_step >= 0).sum())
    slot = torch.full((rows,), -5, dtype=torch.int32)
    slot[last_step >= 0] = torch.randperm(used, generator=generator).int()
    if isinstance(rule, ScheduleFree):
        state = torch.stack([z, torch.rand(rows, width, generator=generator) ** 4], dim=1)
        shares = 1 / torch.arange(2, steps + 2, dtype=torch.float64)
        history = torch.cat([torch.ones(1).double(), 1 - shares]).cumprod(0)
    else:
        gradient = torch.randn(2, rows, width, generator=generator) * scale
        # Moments like those of a few steps, some columns without any.
        state = torch.stack([0.2 * gradient[0], 0.01 * gradient.square().sum(0)], dim=1)
        state[:, :, ::7] = 0
        numbers = torch.rand(steps + 1, 3, generator=generator, dtype=torch.float64)
        history = torch.stack([1e-2 * numbers[:, 0], 1 + numbers[:, 1], 1 - 1e-3 * numbers[:, 2]], dim=1)
        history[0] = float("nan")
    state[used:] = float("nan")
    return RowTable(weight, state, slot, torch.tensor([used]), last_step, history)


def longer(start: RowTable, share: float = 0.9) -> RowTable:
    """The table one step later."""
    last = start.history[-1:] * share if start.history.ndim == 1 else torch.tensor([STEPS[Adam]], dtype=torch.float64)
    return start._replace(history=torch.cat([start.history, last]))


def batch(rows: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    """Ids with many repetitions of the first rows, and gradients."""
    generator = torch.Generator().manual_seed(1)
    ids = (torch.rand(count, generator=generator) ** 3 * rows).long()
    return ids, torch.randn(count, width, generator=generator)


def copied(rows: RowTable, dtype: torch.dtype = torch.float32) -> RowTable:
    weight, state, *others = (part.clone() for part in rows)
    return RowTable(weight.to(dtype), state.to(dtype), *others)


def without_nan(rows: RowTable) -> RowTable:
    """What opcheck wants: it compares what was written with what was there."""
    return rows._replace(state=rows.state.nan_to_num(), history=rows.history.nan_to_num())


def assert_same_table(found: RowTable, plain: RowTable, truth: RowTable, case: Any) -> None:
    for name in ("slot", "used", "last_step"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    assert_matches_reference(found.weight, plain.weight, truth.weight, OP, (case, "weight"))
    used = int(truth.used)
    for column, name in enumerate(("first state", "second state")):
        parts = (one.state[:used, column] for one in (found, plain, truth))
        assert_matches_reference(*parts, OP, (case, name))
    assert found.state[used:].isnan().all()
