"""Vectors of any moment, for any clients, from the model that a run has left."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from ubp_fast.events.schema import UserError
from ubp_fast.events.split import utc_text
from ubp_fast.features.scaling import DayStatistics
from ubp_fast.profiler.bulk import write_in_parts
from ubp_fast.profiler.bundle import BUNDLE_FILE, load_bundle, load_day, load_maps, model_folder, save_day
from ubp_fast.profiler.history import History
from ubp_fast.profiler.parts import Blocks, Fitted, vectors_of
from ubp_fast.profiler.reading import own_ids, read_new_events, seconds_of
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import Layout
from ubp_fast.progress import Progress
from ubp_fast.store.in_memory import Histories, memory_store

LATEST = "latest"
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
        directory = model_folder(Path(run))
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
        job = self._job(events, at, clients, blocks)
        parts = [job.make(first, first + CLIENTS_AT_ONCE) for first in range(0, len(job.ascending), CLIENTS_AT_ONCE)]
        vectors = np.concatenate(parts) if parts else np.zeros((0, job.layout.width), np.float16)
        place = np.searchsorted(job.ascending, job.numbers)
        return Profiles(job.numbers, vectors[place], job.layout, job.own_ids)

    def embed_to(
        self,
        output: Path | str,
        events: Any,
        at: int | str | date | datetime | None = None,
        clients: Sequence[Any] | np.ndarray | pl.Series | None = None,
        blocks: Sequence[str] | None = None,
        per_block: bool = False,
        progress: Progress | None = None,
    ) -> int:
        """`embed` straight into files, see `write_in_parts`; returns the number of clients.

        Memory holds the events and some thousand vectors. Killed and called again, it continues and ends with the same
        bytes; what was there before is replaced when all is complete.

        Args:
            output: a directory, or a table when the name ends in .parquet.
            events, at, clients, blocks: as of `embed`.
            per_block: a column of the table per block.
            progress: called with (clients done, clients in all).
        """
        job = self._job(events, at, clients, blocks)
        if len(job.numbers) != len(job.ascending):
            raise UserError("clients: ids must be named once to be written, got some twice; remove the repeats")

        def make(first: int, last: int) -> np.ndarray:
            numbers = job.numbers[first:last]
            order = np.argsort(numbers)
            vectors = np.empty((len(numbers), job.layout.width), np.float16)
            for start in range(0, len(numbers), CLIENTS_AT_ONCE):
                some = order[start : start + CLIENTS_AT_ONCE]
                vectors[some] = job.vectors(numbers[some])
            return vectors

        write_in_parts(*(Path(output), job.identity, job.numbers, job.own_ids, job.layout, make), per_block, progress)
        return len(job.numbers)

    def of_histories(self, histories: Histories, client_ids: np.ndarray, at_s: int) -> np.ndarray:
        """Vectors float16 [N, D] of clients i64 [N] at a moment, from histories by their numbers."""
        ids = pl.Series("client_id", client_ids)
        job = _Job(self, histories, at_s, load_day(self.directory, at_s), self.layout, client_ids, ids)
        starts = range(0, len(client_ids), CLIENTS_AT_ONCE)
        return np.concatenate([job.vectors(client_ids[first : first + CLIENTS_AT_ONCE]) for first in starts])

    def append(self, events: Any, at: int | str | date | datetime | None = None) -> Profiles:
        """Adds events to those that the run has seen, and embeds all clients anew, into `latest/` of the run.

        Means and deviations among all clients are measured and kept: from then on they are those of that day. The
        vectors are those that whole histories give, byte for byte. Killed at any point and called again with the same
        events, it ends with the same files; events that were appended already are not added twice.

        Args:
            events: those that are new, as of `embed`.
            at: the moment, after all events; None: just after the newest one.

        Raises:
            DataError: events that break a rule, or a folder that is no whole run.
            UserError: a moment at or before the newest event.
        """
        run = self.directory.parent
        before = History.of(run, self.fitted.cutoff_s, self.maps)
        new = read_new_events(events, self.fitted.recipe.table, before.maps, known=before.clients)
        now = before.with_events(new)
        last_s = now.histories.last_s
        at_s = last_s + 1 if at is None else seconds_of(at)
        if at_s <= last_s:
            raise UserError(f"at: must lie after the newest event ({utc_text(last_s)}), got {utc_text(at_s)}")
        numbers, own = now.population()
        day = DayStatistics()
        with TemporaryDirectory(dir=run) as folder:
            made = Blocks(
                self.fitted, memory_store(now.histories, numbers, at_s, self.fitted.vocabulary), at_s, day, Path(folder)
            )
            vectors = vectors_of(self.fitted, made, day, self.layout)
        profiles = Profiles(numbers, vectors, self.layout, own)
        save_day(self.directory, at_s, day)
        profiles.save(run / LATEST)
        profiles.write_parquet(run / f"{LATEST}.parquet")
        if now is not before:
            now.save(run)
        return profiles

    def _job(
        self,
        events: Any,
        at: int | str | date | datetime | None,
        clients: Sequence[Any] | np.ndarray | pl.Series | None,
        blocks: Sequence[str] | None,
    ) -> _Job:
        before_s = None if at is None else seconds_of(at)
        found = read_new_events(events, self.fitted.recipe.table, self.maps, before_s)
        just_after_s = self.fitted.cutoff_s if found.last_s is None else found.last_s + 1
        at_s = just_after_s if before_s is None else before_s
        own = found.wanted_before(at_s) if clients is None else own_ids(clients, found.clients.own)
        layout = self.layout if blocks is None else self.layout.select(*blocks)
        return _Job(self, found.histories, at_s, load_day(self.directory, at_s), layout, found.clients.find(own), own)


@dataclass(frozen=True)
class _Job:
    """Clients to embed.

    Attributes:
        profiler: the model.
        histories: their events.
        at_s: the moment.
        day: what is compared among all clients.
        layout: of the vectors.
        numbers: i64 [N], of the clients in the order of the result.
        own_ids: their own ids.
    """

    profiler: Profiler
    histories: Histories
    at_s: int
    day: DayStatistics
    layout: Layout
    numbers: np.ndarray
    own_ids: pl.Series

    @cached_property
    def ascending(self) -> np.ndarray:
        """Different clients, i64."""
        return np.unique(self.numbers)

    def make(self, first: int, last: int) -> np.ndarray:
        """Vectors float16 of some of the ascending clients."""
        return self.vectors(self.ascending[first:last])

    def vectors(self, client_ids: np.ndarray) -> np.ndarray:
        """Vectors float16 [N, D] of clients i64 [N], ascending."""
        fitted = self.profiler.fitted
        store = memory_store(self.histories, client_ids, self.at_s, fitted.vocabulary)
        made = Blocks(fitted, store, self.at_s, self.day)
        return vectors_of(fitted, made, self.day, self.layout)

    @property
    def identity(self) -> str:
        """A digest of everything that decides the vectors."""
        state = hashlib.blake2b(digest_size=16)
        state.update((self.profiler.directory / BUNDLE_FILE).read_bytes())
        state.update(repr((self.at_s, self.layout)).encode())
        for name, array in sorted(self.day.arrays.items()):
            state.update(name.encode() + array.tobytes())
        state.update(self.numbers.tobytes())
        self.histories.digest_into(state.update)
        return state.hexdigest()
