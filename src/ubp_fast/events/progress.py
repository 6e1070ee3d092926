"""How long work tells how far it is: `progress(steps done, steps in all)`."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]


class Steps:
    """Counts steps and reports each."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._count = progress, total, 0

    def done(self) -> None:
        """One more step is finished."""
        self._count += 1
        if self._progress is not None:
            self._progress(self._count, self._total)
