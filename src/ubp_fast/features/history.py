"""What a block of features may look at, and what it gives: `History` in, `Column` out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ubp_fast.events.split import DAY_S
from ubp_fast.features.popular import LabelLists
from ubp_fast.kernels.windowed_aggregate import WindowedAggregate, windowed_aggregate
from ubp_fast.store.event_store import TIMELINE, EventStore


class Column(NamedTuple):
    """One feature of all clients: float [U]."""

    name: str
    unit: str
    values: np.ndarray


@dataclass(frozen=True)
class History:
    """What a block may look at.

    Attributes:
        store: event store.
        cutoff_s: only events before it.
        lists: name -> (original ids, popularity) of the label lists.
    """

    store: EventStore
    cutoff_s: int
    lists: LabelLists

    @property
    def length_days(self) -> float:
        """Days from the first event of the store to the cutoff: the recency of what never happened."""
        return max(0, self.cutoff_s - self.store.first_timestamp_s) / DAY_S

    def present(self, kinds: tuple[str, ...]) -> list[str]:
        """Those of the kinds that the store has."""
        return [kind for kind in kinds if kind == TIMELINE or kind in self.store.kinds]

    def times(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and timestamps of a kind or of the timeline."""
        columns = self.store.timeline if kind == TIMELINE else self.store.kind(kind)
        return columns.offsets, columns.timestamp_s

    def aggregate(self, kind: str, codes: np.ndarray | None = None, **arguments: object) -> WindowedAggregate:
        """`windowed_aggregate` of a kind up to the cutoff."""
        offsets, timestamp_s = self.times(kind)
        return windowed_aggregate(offsets, timestamp_s, codes, anchor_s=self.cutoff_s, **arguments)  # type: ignore[arg-type]


def windows_of(days: tuple[int, ...]) -> tuple[tuple[int | None, ...], list[str]]:
    """Lengths in seconds and names of windows, all history last."""
    return (*(length * DAY_S for length in days), None), [*(f"{length}d" for length in days), "all"]


def share_of(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


def or_mean(values: np.ndarray, has: np.ndarray) -> np.ndarray:
    """The values where there is one, elsewhere their mean."""
    return np.where(has, values, values[has].mean() if has.any() else 0.0)


class Block(Protocol):
    """A part of a feature set."""

    def columns(self, history: History) -> Iterator[Column]:
        """Its columns, names each once."""
        ...
