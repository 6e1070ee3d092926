"""A rich feature set as a list of declared blocks: what strong systems of the RecSys Challenge 2025 added by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ubp_fast.events.schema import LabelLists
from ubp_fast.features.history import Block, Column, History, features_of
from ubp_fast.features.matrix import Features
from ubp_fast.features.rich.item_blocks import Conversions, Diversity, MeanCodes, Prices
from ubp_fast.features.rich.propensity import Propensities
from ubp_fast.features.rich.time_blocks import Activity, Calendar, Gaps
from ubp_fast.features.scaling import DayStatistics
from ubp_fast.store.event_store import EventStore


@dataclass(frozen=True)
class RichConfig:
    """Which blocks `rich_features` joins.

    Attributes:
        blocks: see the modules of this folder; one may be there twice if its names differ.
    """

    blocks: tuple[Block, ...] = (
        Activity(),
        Gaps(),
        Diversity(),
        Calendar(),
        Prices(),
        Conversions(),
        MeanCodes(),
        Propensities(),
    )


def rich_features(
    store: EventStore,
    cutoff_s: int,
    lists: LabelLists,
    config: RichConfig | None = None,
    directory: Path | None = None,
    day: DayStatistics | None = None,
    name: str = "rich",
) -> Features:
    """The columns of all blocks, of every client that needs a profile, from events before the cutoff only.

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        lists: label lists as in `decayed_features`.
        config: blocks.
        directory: the result is written there and mapped from there.
        day: what is compared among all clients: what stands for that which a client lacks, such as a price, and the
            rates of `Propensities`. None: they are measured among the clients of the store.
        name: of the set among the statistics of the day.

    Returns:
        [U, F] float32, finite, of comparable size (logarithms and shares); clients in the order of the store.
    """
    blocks = (config or RichConfig()).blocks

    def columns(history: History) -> Iterator[Column]:
        for block in blocks:
            yield from block.columns(history)

    history = History.of(store, cutoff_s, lists, day)
    return features_of(history, columns, directory, missing=f"{name}.missing")
