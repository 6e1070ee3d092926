"""The challenge's six tasks: their labels, and its metrics."""

from ubp_fast.evaluation.tasks.metrics import Metrics
from ubp_fast.evaluation.tasks.targets import TASKS, Targets, Task, TaskTargets, build_targets, named_tasks

__all__ = ["TASKS", "Metrics", "Targets", "Task", "TaskTargets", "build_targets", "named_tasks"]
