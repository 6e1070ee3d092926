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
) -> Features:
    """The columns of all blocks, of every client that needs a profile, from events before the cutoff only.

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        lists: label lists as in `decayed_features`.
        config: blocks.
        directory: the result is written there and mapped from there.

    Returns:
        [U, F] float32, finite, of comparable size (logarithms and shares); clients in the order of the store. What a
        client lacks, such as a price, is the mean of those that have it.
    """
    blocks = (config or RichConfig()).blocks

    def columns(history: History) -> Iterator[Column]:
        for block in blocks:
            yield from block.columns(history)

    return features_of(History.of(store, cutoff_s, lists), columns, directory, fill_missing=True)
