"""Decayed features: what clients keep doing; a purchase from one half-life ago counts half of one from today."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ubp_fast.events.schema import SKU_KINDS, LabelLists
from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History, features_of, windows_of
from ubp_fast.features.matrix import Features
from ubp_fast.features.popular import label_slots
from ubp_fast.store.event_store import EventStore

# In the name of a column: a count of one label, not a summary.
OF_LABEL = "_decayed_"


@dataclass(frozen=True)
class DecayedConfig:
    """What `decayed_features` measures.

    Attributes:
        label_kinds: kinds whose events are counted per label.
        half_life_days: of the counts per label.
        activity_half_lives_days: of the counts per kind.
        active_windows_days: windows in which active days are counted, besides all history.
    """

    label_kinds: tuple[str, ...] = ("product_buy", "add_to_cart")
    half_life_days: float = 60.0
    activity_half_lives_days: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 60.0, 180.0)
    active_windows_days: tuple[int, ...] = (14, 30, 90)

    def __post_init__(self) -> None:
        unknown = set(self.label_kinds) - set(SKU_KINDS)
        if unknown:
            raise ValueError(f"DecayedConfig: label_kinds must be among {list(SKU_KINDS)}, got {sorted(unknown)}")


def decayed_features(
    store: EventStore,
    cutoff_s: int,
    lists: LabelLists,
    config: DecayedConfig | None = None,
    directory: Path | None = None,
) -> Features:
    """Decayed interests of every client that needs a profile.

    Args:
        store: event store.
        cutoff_s: events before it are seen, seconds since 1970 UTC.
        lists: name -> (original ids, popularity). The last word of a name says what the ids are: category, sku or
            price. Only lists made from history before the profiles' cutoff keep the result free of leaks.
        config: half-lives and kinds.
        directory: the result is written there and mapped from there.

    Returns:
        [U, F] float32 >= 0: log1p of the decayed count per label kind, list and label; per kind of the store log1p of
        decayed activity, of days since the last and first event and of active days. Clients in the order of the store.
    """
    config = config or DecayedConfig()
    slots, labels = label_slots(store, lists)
    windows_s, windows = windows_of(config.active_windows_days)

    def of_labels(history: History, kind: str) -> Column:
        found = history.decayed(kind, (config.half_life_days,), slots, len(labels))
        logarithms = np.zeros((len(history.rows), len(labels)), np.float32)
        client = np.repeat(np.arange(len(logarithms)), np.diff(found.offsets))
        logarithms[client, found.slots] = np.log1p(found.counts[:, 0])
        return Column(tuple(f"{kind}{OF_LABEL}{label}" for label in labels), "log1p events", logarithms)

    def activity(history: History, kind: str) -> Iterator[Column]:
        half_lives_s = tuple(days * DAY_S for days in config.activity_half_lives_days)
        found = history.aggregate("activity", kind, windows_s=windows_s, half_lives_s=half_lives_s, periods_s=(DAY_S,))
        for index, days in enumerate(config.activity_half_lives_days):
            yield Column(f"{kind}_activity_{days:g}d", "events", found.decayed_totals[:, index])
        yield from history.recency(found, kind)
        for index, window in enumerate(windows):
            yield Column(f"{kind}_active_days_{window}", "days", found.distinct_times[:, index, 0])

    def columns(history: History) -> Iterator[Column]:
        for kind in store.kinds:
            if kind in config.label_kinds and labels:
                yield of_labels(history, kind)
            for name, unit, values in activity(history, kind):
                yield Column(name, f"log1p {unit}", np.log1p(values))

    return features_of(History.of(store, cutoff_s, lists), columns, directory, sparse=True)
