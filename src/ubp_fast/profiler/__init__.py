"""Vectors of any moment: what a run has learned, as files (`bundle`), and what applies it to events (`Profiler`)."""

from __future__ import annotations

from ubp_fast.profiler.profiler import Profiler

__all__ = ["Profiler"]
