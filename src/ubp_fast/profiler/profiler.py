"""Vectors of any moment, for any clients, from the model that a run has left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ubp_fast.features.scaling import DayStatistics
from ubp_fast.profiler.bundle import BUNDLE_FILE, load_bundle, load_day, load_maps
from ubp_fast.profiler.parts import Blocks, Fitted, parts_of
from ubp_fast.profiler.reading import NewEvents, own_ids, read_new_events, seconds_of
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import Layout, compose
from ubp_fast.store.in_memory import Histories, memory_store

MODEL_FOLDER = "model"
# Clients whose features are in memory at once.
CLIENTS_AT_ONCE = 1_024


@dataclass(frozen=True)
class Profiler:
    """Turns events into vectors; `Profiler.load` opens what a run has learned.

    Attributes:
        directory: of the model.
        fitted: what was learned.
        layout: blocks of the vectors.
        maps: how the run numbered the text ids of items, see `read_new_events`.
    """

    directory: Path
    fitted: Fitted
    layout: Layout
    maps: Mapping[str, pl.DataFrame]

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
        return cls(directory, *load_bundle(directory), load_maps(directory))

    def embed(
        self,
        events: Any,
        at: int | str | date | datetime | None = None,
        clients: Sequence[Any] | np.ndarray | pl.Series | None = None,
        blocks: Sequence[str] | None = None,
    ) -> Profiles:
        """Vectors of clients from their events before a moment; nothing at or after it is looked at.

        A vector depends on the client's own events, on the moment and on the model alone, never on who is embedded
        beside it. At the run's own cutoff it is the run's, byte for byte. What is compared among clients (means and
        deviations) is that of the newest day at or before the moment on which all clients were embedded.

        Args:
            events: whole histories as a polars, pandas or Arrow table with the columns of the run's own table, or
                client_id, timestamp, kind, sku, url, query; a dict kind -> table in the organisers' layout, beside them
                "product_properties" of items that are new; a path to such a table or directory; or a source.
                Items, categories and pages that the run has not seen count as unknown, kinds that it has not seen
                are left out.
            at: seconds since 1970 UTC, a date (its midnight) or a date-time, UTC without a zone. None: just after the
                newest event.
            clients: ids as in the events, in the order of the result; one without events gets a vector, too. None:
                all that have an event before the moment, ascending.
            blocks: names of the blocks wanted, see `layout`; all when None.

        Returns:
            float16 vectors with layout. `own_ids` are the ids of the events; `client_ids` are these where they are
            integers, else numbers without meaning.

        Raises:
            DataError: events that break a rule; names column and row.
            UserError: another argument does.
        """
        found = read_new_events(events, self.fitted.recipe.table, self.maps)
        at_s = self._moment(at, found)
        own = found.active_before(at_s) if clients is None else own_ids(clients, found.clients.own)
        numbers = found.clients.find(own)
        ascending, place = np.unique(numbers, return_inverse=True)
        parts = list(self.vectors(found.histories, ascending, at_s, blocks))
        layout = self.layout if blocks is None else self.layout.select(*blocks)
        vectors = np.concatenate(parts) if parts else np.zeros((0, layout.width), np.float16)
        return Profiles(numbers, vectors[place], layout, own)

    def _moment(self, at: int | str | date | datetime | None, found: NewEvents) -> int:
        if at is not None:
            return seconds_of(at)
        return self.fitted.cutoff_s if found.last_s is None else found.last_s + 1

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
