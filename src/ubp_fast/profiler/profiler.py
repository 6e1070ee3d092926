"""Vectors of any moment, for any clients, from the model that a run has left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ubp_fast.features.scaling import DayStatistics
from ubp_fast.profiler.bundle import BUNDLE_FILE, load_bundle, load_day
from ubp_fast.profiler.parts import Blocks, Fitted, parts_of
from ubp_fast.profiles.blocks import Layout, compose
from ubp_fast.store.in_memory import Histories, memory_store

MODEL_FOLDER = "model"
# Clients whose features are in memory at once.
CLIENTS_AT_ONCE = 4_096


@dataclass(frozen=True)
class Profiler:
    """Turns events into vectors; `Profiler.load` opens what a run has learned.

    Attributes:
        directory: of the model.
        fitted: what was learned.
        layout: blocks of the vectors.
    """

    directory: Path
    fitted: Fitted
    layout: Layout

    @classmethod
    def load(cls, run: Path | str) -> Profiler:
        """Opens the model of a run, wherever it was copied to.

        Args:
            run: the run's directory, or its folder `model`.

        Raises:
            DataError: no model there, one of another format, or damaged.
        """
        directory = Path(run)
        if not (directory / BUNDLE_FILE).exists() and (directory / MODEL_FOLDER).is_dir():
            directory = directory / MODEL_FOLDER
        return cls(directory, *load_bundle(directory))

    def vectors(
        self,
        histories: Histories,
        client_ids: np.ndarray,
        at_s: int,
        blocks: Sequence[str] | None = None,
        day: DayStatistics | None = None,
    ) -> Iterator[np.ndarray]:
        """Vectors float16 of clients i64 [N], ascending, some thousand at a time."""
        layout = self.layout if blocks is None else self.layout.select(*blocks)
        names = tuple(block.name for block in layout.blocks)
        day = day or load_day(self.directory, at_s)
        for first in range(0, len(client_ids), CLIENTS_AT_ONCE):
            some = client_ids[first : first + CLIENTS_AT_ONCE]
            made = Blocks(self.fitted, memory_store(histories, some, at_s, self.fitted.vocabulary), at_s, day)
            yield compose(parts_of(self.fitted, made, day, names), day=day, layout=layout)[0]
