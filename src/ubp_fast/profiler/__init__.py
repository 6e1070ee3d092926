"""Vectors of any moment: what a run has learned, as files (`bundle`), what applies it to events (`Profiler`), and what
takes clients out of a run (`forget`)."""

from __future__ import annotations

from ubp_fast.profiler.forgetting import forget
from ubp_fast.profiler.profiler import Profiler

__all__ = ["Profiler", "forget"]
