"""What reads a vector: the models that people put behind one, each taught and scored by the same rule.

A reader learns a task's labels in the train window (that after the vectors' cutoff) and is scored on the
validation window (the next one): same clients, same vectors. What it chooses, it chooses inside the train
window.

| reader | what |
|---|---|
| network | the organisers' fixed network, their metrics and their score |
| linear | ridge regression, scaling and penalty chosen by folds |
| boosting | gradient-boosted trees (LightGBM), fixed settings, a sample of the labels |
| neighbours | the share of a client's 50 nearest that have the label, as a vector index gives it |
"""

from ubp_fast.evaluation.readers.config import READERS, EvaluationConfig
from ubp_fast.evaluation.readers.reader import LabelScores, Reader, ReaderData, Sample, TaskScore, reader_named

__all__ = ["READERS", "EvaluationConfig", "LabelScores", "Reader", "ReaderData", "Sample", "TaskScore", "reader_named"]
