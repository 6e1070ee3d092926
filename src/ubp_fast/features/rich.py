"""A rich feature set as a list of declared blocks: what strong systems of the RecSys Challenge 2025 added by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ubp_fast.features.history import Block, Column, History
from ubp_fast.features.item_blocks import Conversions, Diversity, MeanCodes, Prices
from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.features.popular import LabelLists
from ubp_fast.features.propensity import Propensities
from ubp_fast.features.time_blocks import Activity, Calendar, Gaps
from ubp_fast.store.event_store import EventStore


@dataclass(frozen=True)
class RichConfig:
    """Which blocks `rich_features` joins.

    Attributes:
        blocks: see `time_blocks.py`, `item_blocks.py`, `propensity.py`; one may be there twice if its names differ.
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
) -> FeatureMatrix:
    """The columns of all blocks, from events before the cutoff only.

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        lists: label lists as in `decayed_features`.
        config: blocks.

    Returns:
        [U, F] float32, finite, of comparable size (logarithms and shares); clients in the order of the store.
    """
    history = History(store, cutoff_s, lists)
    found: list[Column] = []
    for block in (config or RichConfig()).blocks:
        # float32 at once: the blocks together hold hundreds of columns.
        found += [column._replace(values=column.values.astype(np.float32)) for column in block.columns(history)]
    values = np.empty((store.num_clients, len(found)), np.float32)
    for index, column in enumerate(found):
        values[:, index] = column.values
    names, units = tuple(column.name for column in found), tuple(column.unit for column in found)
    return FeatureMatrix(np.array(store.client_ids), values, names, units)
