"""The organisers' layout of aggregated features from the event store, at full size: 320 columns by default.

Per kind of the store, in the order product_buy, add_to_cart, remove_from_cart, page_visit:

    [ events over all time | for each window, for each column, counts of the column's most frequent values ]

and for search_query the mean of the 16 query codes. Anchored at the cutoff, or like the organisers' code at the last
event of each kind, which then gives the columns of `organisers_features(time_sorted=True)` up to ties in the lists.
Up to 1,000 columns are one dense matrix, in a memory map if a directory is given; more become compressed sparse rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.features.popular import popular_values
from ubp_fast.features.sparse import DenseColumns, RowPart, SparseFeatureMatrix, side_by_side
from ubp_fast.features.writing import check_dtype, in_client_blocks
from ubp_fast.kernels.windowed_aggregate import SparseCounter, WindowedAggregator, row_sums, window_aggregator
from ubp_fast.store.event_store import EventStore, KindColumns

MOST_DENSE_COLUMNS = 1_000
ANCHORS = ("cutoff", "last_event")


@dataclass(frozen=True)
class CountsConfig:
    """What `count_features` counts.

    Attributes:
        windows_days: lengths of the windows in days, ascending. Source: the organisers' 1, 7, 30.
        top_values: most frequent values counted per column. Source: the organisers' 10.
        anchor: where windows end: "cutoff" (exclusive), or "last_event" of each kind before it (inclusive).
        dtype: "float32" or "float16" (counts above 65,504 are cut off) of a dense result.
    """

    windows_days: tuple[int, ...] = (1, 7, 30)
    top_values: int = 10
    anchor: str = "cutoff"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        days = [*self.windows_days]
        if not days or min(days) < 1 or sorted(set(days)) != days:
            raise ValueError(f"CountsConfig: windows_days must be > 0 and ascending, got {self.windows_days}")
        if self.top_values < 0:
            raise ValueError(f"CountsConfig: top_values must be >= 0, got {self.top_values}")
        if self.anchor not in ANCHORS:
            raise ValueError(f"CountsConfig: anchor must be one of {list(ANCHORS)}, got '{self.anchor}'")
        check_dtype(self.dtype)


class _Kind(NamedTuple):
    """One kind of events with its place in the matrix; searches have no slots."""

    columns: KindColumns
    first_column: int
    slots: np.ndarray | None
    num_slots: int
    anchor_s: int
    include_anchor: bool


def count_features(
    store: EventStore,
    cutoff_s: int,
    config: CountsConfig | None = None,
    directory: Path | None = None,
    lists_cutoff_s: int | None = None,
) -> FeatureMatrix | SparseFeatureMatrix:
    """Counts of every client, from events before the cutoff only.

    Args:
        store: event store.
        cutoff_s: seconds since 1970 UTC.
        config: windows, lists, anchor.
        directory: the result is written there and, if dense, mapped from there.
        lists_cutoff_s: the lists of frequent values are made from events before it, `cutoff_s` when None; see
            `aggregated_features`.

    Returns:
        Clients in the order of the store; sparse above 1,000 columns.
    """
    config = config or CountsConfig()
    kinds, names, units = _layout(store, cutoff_s, config, cutoff_s if lists_cutoff_s is None else lists_cutoff_s)
    windows_s = [days * DAY_S for days in config.windows_days]
    client_ids = np.array(store.client_ids)
    if len(names) > MOST_DENSE_COLUMNS:
        parts = [part for kind in kinds for part in _sparse_parts(kind, cutoff_s, windows_s)]
        sparse = SparseFeatureMatrix(client_ids, *side_by_side(parts), names, units)
        if directory is not None:
            sparse.save(directory)
        return sparse
    aggregators = [None if kind.slots is None else _aggregator(kind, windows_s) for kind in kinds]

    def fill(block: np.ndarray, first: int, last: int) -> None:
        for kind, aggregator in zip(kinds, aggregators, strict=True):
            if aggregator is None:
                means = _mean_codes(kind.columns, kind.columns.offsets[first : last + 1], cutoff_s)
                block[:, kind.first_column : kind.first_column + means.shape[1]] = means
                continue
            start, width = kind.first_column + 1, len(windows_s) * kind.num_slots
            shape = (last - first, len(windows_s), kind.num_slots)
            out = block[:, start : start + width].reshape(shape)  # a view: columns of a row lie side by side
            block[:, kind.first_column] = aggregator(first, last, out=out, threads=1).num_events

    return in_client_blocks(client_ids, names, units, fill, directory, config.dtype)


def _layout(
    store: EventStore, cutoff_s: int, config: CountsConfig, lists_cutoff_s: int
) -> tuple[list[_Kind], tuple[str, ...], tuple[str, ...]]:
    kinds: list[_Kind] = []
    names: list[str] = []
    units: list[str] = []
    for kind in store.kinds:
        columns = store.kind(kind)
        if columns.codes is not None:
            kinds.append(_Kind(columns, len(names), None, 0, cutoff_s, False))
            names += [f"{kind}_mean_code_{code}" for code in range(columns.codes.shape[1])]
            units += ["code"] * columns.codes.shape[1]
            continue
        popular = popular_values(store, kind, lists_cutoff_s, config.top_values)
        anchor_s, inclusive = cutoff_s, config.anchor == "last_event"
        if inclusive:
            before = columns.timestamp_s[columns.timestamp_s < cutoff_s]
            anchor_s = int(before.max()) if len(before) else cutoff_s - 1
        kinds.append(_Kind(columns, len(names), popular.slots, len(popular.labels), anchor_s, inclusive))
        counted = [f"{label}_{days}d" for days in config.windows_days for label in popular.labels]
        names += [f"{kind}_{name}" for name in ("count", *counted)]
        units += ["events"] * (1 + len(counted))
    return kinds, tuple(names), tuple(units)


def _aggregator(kind: _Kind, windows_s: list[int]) -> WindowedAggregator:
    columns = kind.columns
    return window_aggregator(
        columns.offsets,
        columns.timestamp_s,
        columns.item,
        anchor_s=kind.anchor_s,
        windows_s=windows_s,
        slots=kind.slots,
        num_slots=kind.num_slots,
        include_anchor=kind.include_anchor,
    )


def _mean_codes(columns: KindColumns, offsets: np.ndarray, cutoff_s: int) -> np.ndarray:
    """[clients, 16] float32 mean query codes, 0 for clients without a search."""
    assert columns.codes is not None
    sums, num_events = row_sums(offsets, columns.timestamp_s, columns.codes, before_s=cutoff_s)
    # float32 quotient of exact integers, as the organisers': rounding the float64 mean twice can give another float16.
    return sums.astype(np.float32) / np.maximum(num_events, 1).astype(np.float32)[:, None]


def _sparse_parts(kind: _Kind, cutoff_s: int, windows_s: list[int]) -> list[tuple[RowPart, int]]:
    """Sparse columns of one kind and the numbers of their first columns."""
    columns = kind.columns
    if kind.slots is None:
        return [(DenseColumns(_mean_codes(columns, columns.offsets, cutoff_s)), kind.first_column)]
    assert columns.item is not None
    counter = SparseCounter(
        columns.offsets,
        columns.timestamp_s,
        columns.item,
        anchor_s=kind.anchor_s,
        windows_s=windows_s,
        slots=kind.slots,
        num_slots=kind.num_slots,
        include_anchor=kind.include_anchor,
    )
    return [(DenseColumns(counter.num_events[:, None]), kind.first_column), (counter, kind.first_column + 1)]
