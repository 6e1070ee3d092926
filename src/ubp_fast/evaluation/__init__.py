"""Scores of profiles by the challenge's rules: six tasks, one fixed network, exact metrics."""

from __future__ import annotations

from ubp_fast.evaluation.evaluator import evaluate
from ubp_fast.evaluation.metrics import Metrics
from ubp_fast.evaluation.probe import EvaluationConfig
from ubp_fast.evaluation.scores import Scores, TaskScore
from ubp_fast.evaluation.tasks import TASKS, Targets, Task, TaskTargets, build_targets

__all__ = [
    "TASKS",
    "EvaluationConfig",
    "Metrics",
    "Scores",
    "Targets",
    "Task",
    "TaskScore",
    "TaskTargets",
    "build_targets",
    "evaluate",
]
