"""The organisers' layout of aggregated features from the event store, at full size: 320 columns by default.

Who needs them once and nothing else needs no store: `ubp_fast.features.once`.

Per kind with events, in the order product_buy, add_to_cart, remove_from_cart, page_visit:

    [ events over all time | for each window, for each column, counts of the column's most frequent values ]

and for search_query the mean of the 16 query codes. Anchored at the cutoff, or like the organisers' code at the last
event of each kind, which then gives the columns of `organisers_features(time_sorted=True)` up to ties in the lists.
Up to 1,000 columns are one dense matrix, in a memory map if a directory is given; more become compressed sparse rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ubp_fast.events.schema import NUM_CODES
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.features.popular import PopularValues, popular_values
from ubp_fast.features.sparse import DenseColumns, RowPart, SparseFeatureMatrix, side_by_side
from ubp_fast.features.writing import check_dtype, in_client_blocks
from ubp_fast.kernels.windowed_aggregate import SparseCounter, row_sums, window_aggregator
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


class CountedKind(NamedTuple):
    """Events of one kind with items, and which of them are counted.

    Attributes:
        kind: its name.
        columns: by client and time; events that are too old for every window or in no list may be missing.
        popular: the lists of frequent values.
        anchor_s: end of the windows, seconds since 1970 UTC.
        include_anchor: events at the anchor count.
        num_events: i64 [U], events of every client over all time; None when `columns` hold them all.
    """

    kind: str
    columns: KindColumns
    popular: PopularValues
    anchor_s: int
    include_anchor: bool
    num_events: np.ndarray | None = None


class SearchedKind(NamedTuple):
    """Searches.

    Attributes:
        kind: its name.
        mean_codes: (first, last) -> [last - first, 16] float32, mean query codes of these clients.
    """

    kind: str
    mean_codes: Callable[[int, int], np.ndarray]


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
    lists_s = cutoff_s if lists_cutoff_s is None else lists_cutoff_s
    kinds = [_stored_kind(store, kind, cutoff_s, config, lists_s) for kind in store.kinds]
    return counted_matrix(np.array(store.client_ids), kinds, config, directory)


def counted_matrix(
    client_ids: np.ndarray,
    kinds: Sequence[CountedKind | SearchedKind],
    config: CountsConfig,
    directory: Path | None,
) -> FeatureMatrix | SparseFeatureMatrix:
    """The matrix of some kinds side by side; clients i64 [U] in the order of the kinds' columns."""
    names: list[str] = []
    units: list[str] = []
    first_columns: list[int] = []
    for kind in kinds:
        first_columns.append(len(names))
        more = _names(kind, config)
        names, units = names + more, units + [_unit(kind)] * len(more)
    placed = list(zip(kinds, first_columns, strict=True))
    if len(names) > MOST_DENSE_COLUMNS:
        parts = [part for kind, column in placed for part in _sparse_parts(kind, column, config, len(client_ids))]
        sparse = SparseFeatureMatrix(client_ids, *side_by_side(parts), tuple(names), tuple(units))
        if directory is not None:
            sparse.save(directory)
        return sparse
    fills = [_dense_fill(kind, column, config) for kind, column in placed]

    def fill(block: np.ndarray, first: int, last: int) -> None:
        for one in fills:
            one(block, first, last)

    return in_client_blocks(client_ids, tuple(names), tuple(units), fill, directory, config.dtype)


def mean_codes(sums: np.ndarray, num_events: np.ndarray) -> np.ndarray:
    """Mean query codes float32 [U, 16] from their sums; 0 for clients without a search."""
    # float32 quotient of exact integers, as the organisers': rounding the float64 mean twice can give another float16.
    return sums.astype(np.float32) / np.maximum(num_events, 1).astype(np.float32)[:, None]


def _stored_kind(
    store: EventStore, kind: str, cutoff_s: int, config: CountsConfig, lists_cutoff_s: int
) -> CountedKind | SearchedKind:
    columns = store.kind(kind)
    if columns.codes is not None:
        rows = (columns.timestamp_s, columns.codes)

        def means(first: int, last: int) -> np.ndarray:
            return mean_codes(*row_sums(columns.offsets[first : last + 1], *rows, before_s=cutoff_s))

        return SearchedKind(kind, means)
    anchor_s, inclusive = cutoff_s, config.anchor == "last_event"
    if inclusive:
        before = columns.timestamp_s[columns.timestamp_s < cutoff_s]
        anchor_s = int(before.max()) if len(before) else cutoff_s - 1
    return CountedKind(
        kind, columns, popular_values(store, kind, lists_cutoff_s, config.top_values), anchor_s, inclusive
    )


def _names(kind: CountedKind | SearchedKind, config: CountsConfig) -> list[str]:
    if isinstance(kind, SearchedKind):
        return [f"{kind.kind}_mean_code_{code}" for code in range(NUM_CODES)]
    counted = [f"{label}_{days}d" for days in config.windows_days for label in kind.popular.labels]
    return [f"{kind.kind}_{name}" for name in ("count", *counted)]


def _unit(kind: CountedKind | SearchedKind) -> str:
    return "code" if isinstance(kind, SearchedKind) else "events"


def _dense_fill(
    kind: CountedKind | SearchedKind, first_column: int, config: CountsConfig
) -> Callable[[np.ndarray, int, int], None]:
    """Writes the kind's columns of the clients first..last into a block of rows."""
    if isinstance(kind, SearchedKind):

        def write(block: np.ndarray, first: int, last: int) -> None:
            block[:, first_column : first_column + NUM_CODES] = kind.mean_codes(first, last)

        return write
    aggregator = window_aggregator(*_histories(kind), **_windows(kind, config))
    num_windows, num_slots = len(config.windows_days), len(kind.popular.labels)

    def count(block: np.ndarray, first: int, last: int) -> None:
        start, shape = first_column + 1, (last - first, num_windows, num_slots)
        out = block[:, start : start + num_windows * num_slots].reshape(shape)  # a view: columns of a row lie together
        found = aggregator(first, last, out=out, threads=1).num_events
        block[:, first_column] = found if kind.num_events is None else kind.num_events[first:last]

    return count


def _histories(kind: CountedKind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert kind.columns.item is not None
    return kind.columns.offsets, kind.columns.timestamp_s, kind.columns.item


def _windows(kind: CountedKind, config: CountsConfig) -> dict[str, Any]:
    """What is counted of the histories, as the aggregation takes it."""
    return {
        "anchor_s": kind.anchor_s,
        "windows_s": [days * DAY_S for days in config.windows_days],
        "slots": kind.popular.slots,
        "num_slots": len(kind.popular.labels),
        "include_anchor": kind.include_anchor,
    }


def _sparse_parts(
    kind: CountedKind | SearchedKind, first_column: int, config: CountsConfig, num_clients: int
) -> list[tuple[RowPart, int]]:
    """Sparse columns of one kind and the numbers of their first columns."""
    if isinstance(kind, SearchedKind):
        return [(DenseColumns(kind.mean_codes(0, num_clients)), first_column)]
    counter = SparseCounter(*_histories(kind), **_windows(kind, config))
    num_events = counter.num_events if kind.num_events is None else kind.num_events
    return [(DenseColumns(num_events[:, None]), first_column), (counter, first_column + 1)]
