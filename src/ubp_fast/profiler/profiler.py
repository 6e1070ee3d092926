"""Vectors of any moment, for any clients, from the model that a run has left."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import date, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.table import Table
from ubp_fast.events.split import DAY_S, utc_text
from ubp_fast.features.scaling import DayStatistics
from ubp_fast.files import is_url, scratch_directory, writing_to
from ubp_fast.profiler.bulk import write_in_parts
from ubp_fast.profiler.bundle import (
    BUNDLE_FILE,
    has_day,
    load_bundle,
    load_day,
    load_maps,
    model_folder,
    save_day,
    versions,
)
from ubp_fast.profiler.history import History
from ubp_fast.profiler.parts import Blocks, Fitted, Made, features_and_networks, measure, rows_of, vectors_of
from ubp_fast.profiler.reading import NewEvents, active_before, own_ids, read_new_events, seconds_of
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import Layout
from ubp_fast.profiles.publishing import objects_there, publish
from ubp_fast.progress import Progress
from ubp_fast.store.in_memory import Histories, memory_store

LATEST = "latest"
# Shares of the time for the progress: that features and statistics of everybody take, and what comes before sending.
MEASURING, BEFORE_SENDING = 0.7, 0.9
# Fewer clients than this part of the day before are not everybody.
SMALLEST_EVERYBODY = 0.5
# A moment so long after everything that is known is told to be far: recencies and counts of weeks say nothing there.
FAR_DAYS = 30
# Clients whose features are in memory at once.
CLIENTS_AT_ONCE = 4_096


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
        everybody: bool = False,
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
                are left out. Purchases must say pieces and money where those of the run's log did.
            at: a date (its midnight) or a date-time, without a zone by the shop's clock (`data.timezone`, UTC by
                default); or seconds since 1970 by that clock. None: just after the newest event.
            clients: ids as in the events, in the order of the result; one without events gets a vector, too. None:
                all that have an event before the moment, ascending.
            blocks: names of the blocks wanted, see `layout`; all when None.
            everybody: the events are those of all clients. Means and deviations among them are measured and kept in
                the model: from this moment on they are those that are compared with. Kept ones stay as they are.

        Returns:
            float16 vectors with layout. `own_ids` are the ids of the events; `client_ids` are these where they are
            integers, else numbers without meaning. A moment `FAR_DAYS` after all events that are known is warned of.

        Raises:
            DataError: events that break a rule; names column and row.
            UserError: another argument does.
        """
        with TemporaryDirectory() if everybody else nullcontext("") as folder:
            job = self._job(events, at, clients, blocks)
            for sentence in job.far_behind():
                warnings.warn(sentence, stacklevel=2)
            numbers = job.numbers
            rows: slice | np.ndarray = slice(None)
            if everybody:
                job = self._kept(job, clients, Path(folder), _silent)
            else:
                different, rows = np.unique(numbers, return_inverse=True)
                job = replace(job, numbers=different)
            vectors = job.make(0, len(job.numbers), _silent)[rows]
        return Profiles(numbers, vectors, job.layout, job.own_ids)

    def embed_to(
        self,
        output: Path | str,
        events: Any,
        at: int | str | date | datetime | None = None,
        clients: Sequence[Any] | np.ndarray | pl.Series | None = None,
        blocks: Sequence[str] | None = None,
        per_block: bool = False,
        progress: Progress | None = None,
        everybody: bool = False,
        told: Callable[[str], None] | None = None,
    ) -> int:
        """`embed` straight into files, see `write_in_parts`; returns the number of clients.

        Memory holds the events and some thousand vectors. Killed and called again, it continues and ends with the same
        bytes; what was there before is replaced when all is complete.

        Args:
            output: a directory, a table when the name ends in .parquet, or the URL of a folder in a bucket, see
                `ubp_fast.profiles.publishing`: the table lies among temporary files (TMPDIR) meanwhile, and begins anew
                after a kill.
            events, at, clients, blocks, everybody: as of `embed`.
            per_block: a column of the table per block.
            progress: called with (steps done, steps in all).
            told: called with a sentence where clients, or all, have no event before the moment, or where it lies
                `FAR_DAYS` after all events that are known.

        Raises:
            ObjectError: the store says no, or the folder of the URL holds something else.
        """
        if is_url(output):
            url, report = str(output), progress or _silent
            objects_there(url)  # what is refused there is said before the work, too
            with TemporaryDirectory(prefix="ubp_fast-") as folder:
                table = Path(folder) / "profiles.parquet"
                made = _share(report, 0.0, BEFORE_SENDING)
                number = self.embed_to(table, events, at, clients, blocks, per_block, made, everybody, told)
                publish(table, table.with_suffix(".json"), url, _share(report, BEFORE_SENDING, 1.0))
            return number
        job, target = self._job(events, at, clients, blocks), Path(output)
        if len(job.numbers) != len(np.unique(job.numbers)):
            raise UserError("clients: ids must be named once to be written, got some twice; remove the repeats")
        if told is not None:
            for sentence in (*job.without_events(), *job.far_behind()):
                told(sentence)
        report = progress or _silent
        scratch = target.with_name(f".{target.name}.everybody")
        with writing_to(target, "the output", scratch), scratch_directory(scratch) if everybody else nullcontext():
            if everybody:
                job = self._kept(job, clients, scratch, _share(report, 0.0, MEASURING))
                report = _share(report, MEASURING, 1.0) if job.made is not None else report
            write_in_parts(target, job.identity, job.numbers, job.own_ids, job.layout, job.make, per_block, report)
        return len(job.numbers)

    def of_histories(
        self, histories: Histories, client_ids: np.ndarray, at_s: int, blocks: Sequence[str] | None = None
    ) -> np.ndarray:
        """Vectors float16 [N, D] of clients i64 [N] at a moment, from histories by their numbers."""
        ids = pl.Series("client_id", client_ids)
        layout = self.layout if blocks is None else self.layout.select(*blocks)
        job = _Job(self, histories, at_s, load_day(self.directory, at_s), layout, client_ids, ids)
        return job.make(0, len(client_ids), _silent)

    def append(
        self,
        events: Any,
        at: int | str | date | datetime | None = None,
        progress: Progress | None = None,
        told: Callable[[str], None] | None = None,
    ) -> Profiles:
        """Adds events to those that the run has seen, and embeds all clients anew, into `latest/` of the run.

        Means and deviations among all clients are measured and kept: from then on they are those of that day. The
        vectors are those that whole histories give, byte for byte. Killed at any point and called again with the same
        events, it ends with the same files; events that were appended already are not added twice. Memory holds the
        events, a kilobyte per client, and some thousand vectors; those of the result stay in their file.

        Args:
            events: those that are new, as of `embed`.
            at: the moment, after all events; None: just after the newest one.
            progress: called with (steps done, steps in all).
            told: called with a sentence where the moment lies `FAR_DAYS` after the newest event.

        Raises:
            DataError: events that break a rule, or a folder that is no whole run.
            UserError: a moment at or before the newest event.
        """
        run = self.directory.parent
        before = History.of(run, self.fitted.cutoff_s, self.maps)
        fitted = self.fitted
        new = _new_events(
            events, fitted.recipe.table, before.maps, known=before.clients, amounts=fitted.vocabulary.amounts
        )
        now = before.with_events(new)
        last_s = now.histories.last_s
        at_s = last_s + 1 if at is None else self._seconds(at)
        if at_s <= last_s:
            raise UserError(f"at: must lie after the newest event ({utc_text(last_s)}), got {utc_text(at_s)}")
        numbers, own = now.population()
        report = progress or _silent
        job = _Job(self, now.histories, at_s, DayStatistics(), self.layout, numbers, own)
        if told is not None:
            for sentence in job.far_behind():
                told(sentence)
        with writing_to(run, "the run directory"):
            with scratch_directory(run / ".append.partial") as folder:
                job = job.measured(folder, _share(report, 0.0, MEASURING))
                save_day(self.directory, at_s, job.day)
                given = (job.identity, numbers, own, self.layout, job.make)
                write_in_parts(run / LATEST, *given, progress=_share(report, MEASURING, 0.95))
            profiles = replace(Profiles.load(run / LATEST), own_ids=own)
            profiles.write_parquet(run / f"{LATEST}.parquet")
            if now is not before:
                now.save(run)
        report(1, 1)
        return profiles

    def _kept(self, job: _Job, clients: object, folder: Path, progress: Progress) -> _Job:
        """The job of everybody, whose means and deviations are those of the model from now on."""
        if clients is not None or not len(job.numbers):
            raise UserError("everybody: must have the events of all clients, got a choice of clients or no events")
        if has_day(self.directory, job.at_s):
            return job
        usual = len(job.numbers) if job.day.num_clients is None else job.day.num_clients
        if len(job.numbers) < usual * SMALLEST_EVERYBODY:
            raise UserError(
                f"everybody: must be about the {usual} clients of the day before, got {len(job.numbers)}; embed some"
                " without it"
            )
        job = job.measured(folder, progress)
        save_day(self.directory, job.at_s, job.day)
        return job

    def _seconds(self, at: int | str | date | datetime) -> int:
        table = self.fitted.recipe.table
        return seconds_of(at, None if table is None else table.timezone)

    def _job(
        self,
        events: Any,
        at: int | str | date | datetime | None,
        clients: Sequence[Any] | np.ndarray | pl.Series | None,
        blocks: Sequence[str] | None,
    ) -> _Job:
        before_s = None if at is None else self._seconds(at)
        fitted = self.fitted
        amounts = fitted.vocabulary.amounts
        found = _new_events(events, fitted.recipe.table, self.maps, before_s, amounts=amounts)
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
        made: their features, where these were made already.
    """

    profiler: Profiler
    histories: Histories
    at_s: int
    day: DayStatistics
    layout: Layout
    numbers: np.ndarray
    own_ids: pl.Series
    made: Made | None = None

    def make(self, first: int, last: int, progress: Progress) -> np.ndarray:
        """Vectors float16 [last - first, D] of some of the clients; `progress` hears of all before the last ones."""
        fitted = self.profiler.fitted
        vectors = np.empty((last - first, self.layout.width), np.float16)
        for start in range(first, last, CLIENTS_AT_ONCE):
            end = min(start + CLIENTS_AT_ONCE, last)
            if self.made is None:
                store = memory_store(self.histories, self.numbers[start:end], self.at_s, fitted.vocabulary)
                made: Made = Blocks(fitted, store, self.at_s, self.day)
            else:
                made = rows_of(self.made, start, end)
            vectors[start - first : end - first] = vectors_of(fitted, made, self.day, self.layout)
            if end < last:
                progress(end, len(self.numbers))
        return vectors

    def without_events(self) -> Iterator[str]:
        """What is said of clients who did nothing before the moment: a wrong id or moment looks like that."""
        moment = utc_text(self.at_s)
        if not len(self.numbers):
            yield f"no client has an event before {moment}; check the events and the moment"
        idle = ~np.isin(self.numbers, active_before(self.histories, self.at_s))
        if idle.any():
            first, count = self.own_ids[int(np.argmax(idle))], int(idle.sum())
            who = f"client {first!r} has" if count == 1 else f"{count} clients, {first!r} first, have"
            yield f"{who} no event before {moment}: a vector of somebody who did nothing; check ids and moment"

    def far_behind(self) -> Iterator[str]:
        """What is said of a moment long after the events and all that the model has seen: a wrong year looks like that.

        Events of one client alone may end long before the shop's.
        """
        last_s = max(self.histories.last_s, self.profiler.fitted.cutoff_s - 1)
        days = (self.at_s - last_s) / DAY_S
        if self.histories.last_s and days > FAR_DAYS:  # without any event, that is what is said
            yield (
                f"the moment, {utc_text(self.at_s)}, lies {days:,.0f} days after the newest event that is known, of"
                f" {utc_text(last_s)[:10]}: everybody looks like somebody who has not come since; check the moment, or"
                " bring the events in between"
            )

    def measured(self, folder: Path, progress: Progress) -> _Job:
        """The job with the means and deviations among all its clients, and with their features in a folder."""
        fitted, day = self.profiler.fitted, DayStatistics(num_clients=len(self.numbers))
        store = memory_store(self.histories, self.numbers, self.at_s, fitted.vocabulary)
        made = Blocks(fitted, store, self.at_s, day, folder)
        names = features_and_networks(fitted.recipe)
        for done, name in enumerate(names):
            progress(done, len(names) + 1)
            made(name)
        progress(len(names), len(names) + 1)
        measure(fitted, made, day)
        return replace(self, day=DayStatistics(day.arrays), made=made)

    @property
    def identity(self) -> str:
        """A digest of everything that decides the vectors."""
        state = hashlib.blake2b(digest_size=16)
        state.update((self.profiler.directory / BUNDLE_FILE).read_bytes())
        state.update(repr((self.at_s, self.layout, versions())).encode())
        for name, array in sorted(self.day.arrays.items()):
            state.update(name.encode() + array.tobytes())
        state.update(self.numbers.tobytes())
        self.histories.digest_into(state.update)
        return state.hexdigest()


def _new_events(events: Any, *given: Any, **named: Any) -> NewEvents:
    """`read_new_events`; a remedy that is a setting of the run says so: `embed` takes none of them."""
    try:
        return read_new_events(events, *given, **named)
    except DataError as error:
        message = str(error).replace("data.path=", "events=")
        if any(f"data.{one.name}" in message for one in fields(Table)):
            message += "; data.* are settings of the run: write the events as its log is, or run it again with them"
        raise DataError(message) from error


def _silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def _share(progress: Progress, first: float, last: float) -> Progress:
    """Progress of a part of the work, from one share of the whole to another."""
    steps = 1_000

    def report(done: int, total: int) -> None:
        progress(round(steps * (first + (last - first) * done / max(total, 1))), steps)

    return report
