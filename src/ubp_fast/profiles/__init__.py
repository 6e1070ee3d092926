"""Profiles: one vector per client, as files that the organisers' validator accepts."""

from __future__ import annotations

from ubp_fast.profiles.blocks import MAX_DIM, Layout
from ubp_fast.profiles.matrix import Profiles
from ubp_fast.profiles.validator import Problem, Validation, validate

__all__ = ["MAX_DIM", "Layout", "Problem", "Profiles", "Validation", "validate"]
