"""Scores of profiles: six tasks, by the challenge's fixed network and metrics, and by the models people really use."""

from __future__ import annotations

from ubp_fast.evaluation.evaluator import evaluate
from ubp_fast.evaluation.readers import READERS, EvaluationConfig, LabelScores, Sample, TaskScore
from ubp_fast.evaluation.scores import Scores
from ubp_fast.evaluation.tasks import TASKS, Metrics, Targets, Task, TaskTargets, build_targets

__all__ = [
    "READERS",
    "TASKS",
    "EvaluationConfig",
    "LabelScores",
    "Metrics",
    "Sample",
    "Scores",
    "Targets",
    "Task",
    "TaskScore",
    "TaskTargets",
    "build_targets",
    "evaluate",
]
