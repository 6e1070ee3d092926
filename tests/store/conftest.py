"""Small event directories, written by code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.shops import write_rows

from ubp_fast.events.read import EventDirectory


@pytest.fixture
def write_events() -> Callable[..., EventDirectory]:
    """Writes rows by kind; a purchase far in the future makes every directory a valid one."""
    return write_rows
