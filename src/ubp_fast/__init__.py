"""ubp_fast: event logs in, one behavioral profile per client out.

run        from event logs to profiles, scores and a model
Profiler   vectors of any moment from the model of a run
Profiles   vectors of clients, their blocks and files
evaluate   scores of vectors
ProfileTransformer   events to vectors as a step of a scikit-learn pipeline
RelevanceScaler      vectors to the columns that a linear model of one label wants
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"
_HOMES = {
    "run": "ubp_fast.pipeline.command",
    "Profiler": "ubp_fast.profiler",
    "Profiles": "ubp_fast.profiles",
    "evaluate": "ubp_fast.evaluation",
    "ProfileTransformer": "ubp_fast.transformer",
    "RelevanceScaler": "ubp_fast.transformer",
}

__all__ = ["ProfileTransformer", "Profiler", "Profiles", "RelevanceScaler", "evaluate", "run"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: the kernels alone need none of it, and all of it takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ubp_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
