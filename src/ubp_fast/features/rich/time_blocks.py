"""Blocks about time: how much and how recently, in what rhythm, when in the week.

Counts and days come as log1p, shares lie in [0, 1]. What a client lacks (a gap) is NaN. A kind may be "timeline", all
kinds together; kinds that the shop does not have give no columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ubp_fast.events.schema import EVENT_KINDS
from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History, known_where, share_of, windows_of
from ubp_fast.store.event_store import TIMELINE, rows_before

EVERYTHING = (*EVENT_KINDS, TIMELINE)
SESSION_PAUSE_S = 1_800


@dataclass(frozen=True)
class Activity:
    """How much and how recently.

    Attributes:
        kinds: kinds of events, "timeline" for all together.
        windows_days: ascending; all history is added.
        half_lives_days: of decayed numbers of events.
    """

    kinds: tuple[str, ...] = EVERYTHING
    windows_days: tuple[int, ...] = (1, 7, 14, 30, 60, 90)
    half_lives_days: tuple[float, ...] = (1.0, 3.0, 7.0, 14.0, 30.0, 60.0, 180.0)

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        windows_s, windows = windows_of(self.windows_days)
        half_lives_s = [days * DAY_S for days in self.half_lives_days]
        for kind in history.present(self.kinds):
            found = history.aggregate(self, kind, windows_s=windows_s, half_lives_s=half_lives_s, periods_s=(DAY_S,))
            for index, window in enumerate(windows):
                yield Column(f"{kind}_events_{window}", "log1p events", np.log1p(found.totals[:, index]))
                days = found.distinct_times[:, index, 0]
                yield Column(f"{kind}_active_days_{window}", "log1p days", np.log1p(days))
            for index, (shorter, longer) in enumerate(itertools.pairwise(windows)):
                yield Column(f"{kind}_share_{shorter}_of_{longer}", "share", found.ratios[:, index])
            for index, days in enumerate(self.half_lives_days):
                decayed = np.log1p(found.decayed_totals[:, index])
                yield Column(f"{kind}_decayed_{days:g}d", "log1p events", decayed)
            never = found.last_age_s < 0
            for name, age_s in (("last", found.last_age_s), ("first", found.first_age_s)):
                days = np.where(never, history.length_days, age_s / DAY_S)
                yield Column(f"{kind}_{name}", "log1p days", np.log1p(days))
            yield Column(f"{kind}_span", "log1p days", np.log1p(found.span_s / DAY_S))


@dataclass(frozen=True)
class Gaps:
    """Rhythm: times between days with an event.

    Attributes:
        kinds: kinds of events, "timeline" for all together.
    """

    kinds: tuple[str, ...] = ("product_buy", "add_to_cart", TIMELINE)

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        for kind in history.present(self.kinds):
            offsets, timestamp_s, *_ = history.events(kind)
            count = rows_before(offsets, timestamp_s, history.cutoff_s) - offsets[:-1]
            client = np.repeat(np.arange(len(count)), count)
            rows = np.arange(len(client)) + np.repeat(offsets[:-1] - (np.cumsum(count) - count), count)
            time_s = np.asarray(timestamp_s)[rows].astype(np.int64)
            inside = client[1:] == client[:-1]
            pauses = np.diff(time_s)[inside] > SESSION_PAUSE_S
            sessions = np.bincount(client[1:][inside][pauses], minlength=len(count)) + (count > 0)
            yield Column(f"{kind}_sessions", "log1p sessions", np.log1p(sessions))

            steps = np.diff(time_s // DAY_S)
            is_gap = inside & (steps > 0)
            owner, gap = client[1:][is_gap], steps[is_gap].astype(np.float64)
            gaps = np.bincount(owner, minlength=len(count))
            has = gaps > 0
            mean = share_of(np.bincount(owner, gap, minlength=len(count)), gaps)
            square = share_of(np.bincount(owner, gap**2, minlength=len(count)), gaps)
            last = np.zeros(len(count))
            last[owner] = gap  # the rows of a client ascend, so its newest gap is what stays
            newest = np.full(len(count), history.cutoff_s)
            newest[client] = time_s
            overdue = (history.cutoff_s - newest) / DAY_S / np.maximum(mean, 1)
            yield Column(f"{kind}_gap_mean", "log1p days", known_where(has, np.log1p(mean)))
            deviation = np.sqrt(np.maximum(square - mean**2, 0))
            yield Column(f"{kind}_gap_deviation", "log1p days", known_where(has, np.log1p(deviation)))
            yield Column(f"{kind}_gap_last", "log1p days", known_where(has, np.log1p(last)))
            yield Column(f"{kind}_overdue", "log1p gaps", known_where(has, np.log1p(overdue)))


@dataclass(frozen=True)
class Calendar:
    """When in the week (UTC) and in the day.

    Attributes:
        kinds: kinds of events, "timeline" for all together.
        hours_per_bin: width of the parts of a day; divides 24.
    """

    kinds: tuple[str, ...] = ("product_buy", "add_to_cart", TIMELINE)
    hours_per_bin: int = 4

    def __post_init__(self) -> None:
        if self.hours_per_bin < 1 or 24 % self.hours_per_bin:
            raise ValueError(f"Calendar: hours_per_bin must divide 24, got {self.hours_per_bin}")

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        hour_of_week = np.arange(7 * 24)
        slots = np.stack((hour_of_week // 24, 7 + hour_of_week % 24 // self.hours_per_bin), axis=1)
        names = [
            *(f"weekday_{day}" for day in range(7)),
            *(f"hour_{hour}" for hour in range(0, 24, self.hours_per_bin)),
        ]
        for kind in history.present(self.kinds):
            # 1970-01-01 was a Thursday, weekday 3.
            hours = (history.events(kind).timestamp_s // 3_600 + 3 * 24) % (7 * 24)
            hours = hours.astype(np.int32)
            found = history.aggregate(self, kind, codes=hours, windows_s=(None,), slots=slots, num_slots=len(names))
            for slot, name in enumerate(names):
                yield Column(f"{kind}_{name}", "share", share_of(found.counts[:, 0, slot], found.totals[:, 0]))
