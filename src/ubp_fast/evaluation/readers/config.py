"""How profiles are scored."""

from __future__ import annotations

from dataclasses import dataclass

from ubp_fast.evaluation.tasks import TASKS, named_tasks
from ubp_fast.events.schema import UserError

READERS = ("network", "linear", "boosting", "neighbours")


@dataclass(frozen=True)
class EvaluationConfig:
    """How profiles are scored; the defaults are the organisers'.

    Attributes:
        tasks: names of the tasks.
        readers: who reads the vectors, some of `READERS`.
        orders: K repetitions, which standard errors are taken over. network: 1 = rows in the submitted order; K > 1 = K
            seeded orders of the clients, the same for every submission. boosting: K samples of labels, each with
            another seed. linear, neighbours: the labels dealt into K samples.
        seed: of row orders, folds and trees (the network always starts from the organisers' seed).
        precision: network: "fp32", or "bf16": products inside the residual blocks in bfloat16; the first and the last
            layer, the parameters and the optimizer stay float32.
        epochs: network: the best of these counts.
        batch_size: network: rows per step.
        learning_rate: network: of AdamW.
        labels_per_task: boosting: labels in a sample of each task; None: every tenth.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    readers: tuple[str, ...] = ("network",)
    orders: int = 1
    seed: int = 0
    precision: str = "fp32"
    epochs: int = 3
    batch_size: int = 128
    learning_rate: float = 1e-3
    labels_per_task: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "readers", tuple(self.readers))
        named_tasks(self.tasks)
        if not self.readers or len(set(self.readers)) < len(self.readers) or not set(self.readers) <= set(READERS):
            raise UserError(f"evaluation: readers must be different ones of {list(READERS)}, got {list(self.readers)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"EvaluationConfig: precision must be 'fp32' or 'bf16', got '{self.precision}'")
        if self.seed < 0:
            raise UserError(f"evaluation: seed must be >= 0, got {self.seed}")
        for name in ("orders", "epochs", "batch_size", "labels_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"EvaluationConfig: {name} must be >= 1, got {value}")
        if not self.learning_rate > 0:
            raise ValueError(f"EvaluationConfig: learning_rate must be > 0, got {self.learning_rate}")
