"""The six tasks of the challenge.

| task | clients | label of a client in a target window |
|---|---|---|
| churn | those with a purchase before the cutoff | 1: no purchase |
| conversion | all | the same |
| propensity_category, _sku, _new_sku, _price | all | one 0/1 per listed category, sku, sku, price: bought |

Source: Synerise/recsys2025; conversion, new_sku and price are the challenge's three hidden tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as on the leaderboard.
        column: column of the purchases that its labels are values of; None: the label is "no purchase".
        active_only: only clients with a purchase before the cutoff take part.
    """

    name: str
    column: str | None = None
    active_only: bool = False


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("churn", active_only=True),
        Task("conversion"),
        Task("propensity_category", "category"),
        Task("propensity_sku", "sku"),
        Task("propensity_new_sku", "sku"),
        Task("propensity_price", "price"),
    )
}


def named_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, in the order given.

    Raises:
        ValueError: an unknown name, or one that occurs twice.
    """
    for position, name in enumerate(names):
        if name not in TASKS:
            raise ValueError(f"evaluation: tasks must be among {list(TASKS)}, got '{name}'")
        if name in names[:position]:
            raise ValueError(f"evaluation: tasks must be named once, got '{name}' twice")
    return [TASKS[name] for name in names]
