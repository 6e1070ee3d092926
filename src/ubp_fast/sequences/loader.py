"""Batches and labels straight from the memory-mapped store: a few array operations, no work per client in Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ubp_fast.compiled import njit
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.schema import EVENT_KINDS, NUM_CODES, LabelLists
from ubp_fast.events.split import DAY_S
from ubp_fast.features.scaling import Rows
from ubp_fast.sequences.batch import SEARCH, VISIT, Place, SequenceBatch, ViewBatch
from ubp_fast.sequences.padding import FixedSizes
from ubp_fast.sequences.sampling import Views, epoch_order, rows_at, token_rows

if TYPE_CHECKING:
    from ubp_fast.store.event_store import EventStore


# Views whose events and features a digest looks at.
LOOKED_AT = 1024


class DenseRows(Protocol):
    """Anything that gives chosen rows as a dense float32 array, such as `ubp_fast.events.labels.LabelMatrix`."""

    def dense(self, rows: np.ndarray) -> np.ndarray: ...


def history_range(store: EventStore, views: Views, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Timeline rows [start, end) of the last `max_length` events before each cutoff, two int64 [N]."""
    end = rows_at(store, "timeline", views)
    return np.maximum(end - max_length, store.timeline.offsets[views.row]), end


def future_range(store: EventStore, views: Views, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Timeline rows [start, end) of the first `max_length` events in [cutoff, cutoff + window), two int64 [N].

    Raises:
        ValueError: a window reaches beyond the store's cutoff, so that its events could not be known.
    """
    window_s = store.target_days * DAY_S
    check_windows_inside(store, views, window_s)
    start = rows_at(store, "timeline", views)
    return start, np.minimum(rows_at(store, "timeline", views, window_s), start + max_length)


def check_windows_inside(store: EventStore, views: Views, window_s: int) -> None:
    """Raises ValueError when a target window ends after the store's cutoff."""
    if len(views.cutoff_s) and int(views.cutoff_s.max()) + window_s > store.cutoff_s:
        raise ValueError(
            f"target window: cutoff_s + {window_s} must be <= the store's cutoff {store.cutoff_s},"
            f" got cutoff {int(views.cutoff_s.max())}; use an earlier cutoff"
        )


def item_ids(store: EventStore, name: str) -> np.ndarray:
    """Dense sku or url ids, int32 [N], of a kind that is not a search."""
    item = store.kind(name).item
    assert item is not None, name
    return item


def window_labels(store: EventStore, views: Views, label_lists: LabelLists) -> dict[str, np.ndarray | LabelMatrix]:
    """Labels of N views under the names the models use.

    Args:
        store: must reach to the end of every view's window.
        views: N client views.
        label_lists: as `make_label_lists` gives them: `propensity_<column>` -> (original ids int64 [n], popularity).

    Returns:
        `churn` float32 [N], 1 when nothing is bought in the window, and per list `buy_<column>`, a LabelMatrix [N, n];
        with an add_to_cart table also `add` float32 [N], 1 when anything is put into the cart, and `add_<column>`.

    Raises:
        ValueError: a window reaches beyond the store's cutoff, or a list is about something else.
    """
    window_s = store.target_days * DAY_S
    check_windows_inside(store, views, window_s)
    labels: dict[str, np.ndarray | LabelMatrix] = {}
    for kind, prefix in (("product_buy", "buy"), ("add_to_cart", "add")):
        if kind not in store.kinds:
            continue
        start, end = rows_at(store, kind, views), rows_at(store, kind, views, window_s)
        happened = end > start
        if prefix == "buy":
            labels["churn"] = (~happened).astype(np.float32)
        else:
            labels["add"] = happened.astype(np.float32)
        rows, _ = token_rows(start, end)
        view = np.repeat(np.arange(len(start)), end - start)
        sku = item_ids(store, kind)[rows]
        for name, (ids, _) in label_lists.items():
            label = store.label_of_sku(name, ids)[sku]
            kept = label >= 0
            matrix = LabelMatrix.from_pairs(view[kept], label[kept], len(start), len(ids))
            labels[f"{prefix}_{name.removeprefix('propensity_')}"] = matrix
    return labels


def last_different(
    store: EventStore, first: np.ndarray, end: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the last `max_length` events in [first[i], end[i]) that are no repeats, end to end; where each i begins.

    A repeat is a visit or search of a client in the same second as an earlier one of the same page, or with the same
    codes. Pages that share the id "unknown" are one page here.

    Returns:
        int64 [T], int64 [N + 1].
    """
    timeline = store.timeline
    rows, counts = np.empty((len(first), max_length), np.int64), np.empty(len(first), np.int64)
    url = store.embedding_rows("url", item_ids(store, "page_visit"))
    codes = store.kind("search_query").codes
    assert codes is not None
    columns = (timeline.timestamp_s, timeline.kind, timeline.row, url, codes)
    _last_different(first, end, *map(np.asarray, columns), rows, counts)
    kept = np.arange(max_length) >= max_length - counts[:, None]
    return rows[kept], np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


@njit
def _last_different(first, end, timestamp_s, kind, row, url, codes, rows, counts):  # pragma: no cover - compiled
    for view in range(first.size):
        place, at = rows.shape[1], end[view] - 1
        while at >= first[view] and place > 0:
            is_repeat, earlier = False, at - 1
            # Rows of one second lie kind by kind.
            while earlier >= first[view] and timestamp_s[earlier] == timestamp_s[at] and kind[earlier] == kind[at]:
                if kind[at] == VISIT:
                    is_repeat = url[row[earlier]] == url[row[at]]
                elif kind[at] == SEARCH:
                    is_repeat = (codes[row[earlier]] == codes[row[at]]).all()
                if is_repeat:
                    break
                earlier -= 1
            if not is_repeat:
                place -= 1
                rows[view, place] = at
            at -= 1
        counts[view] = rows.shape[1] - place


def assemble(store: EventStore, views: Views, rows: np.ndarray, offsets: np.ndarray) -> SequenceBatch:
    """Packs timeline rows offsets[i]..offsets[i + 1] of `rows` for each view into one batch."""
    timeline = store.timeline
    kind, row = timeline.kind[rows], timeline.row[rows]
    sku, url = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    codes = np.zeros((len(rows), NUM_CODES), np.int64)
    for name in store.kinds:
        chosen = np.flatnonzero(kind == 1 + EVENT_KINDS.index(name))
        query_codes = store.kind(name).codes
        if query_codes is not None:
            codes[chosen] = query_codes[row[chosen]]
        elif name == "page_visit":
            url[chosen] = item_ids(store, name)[row[chosen]]
        else:
            sku[chosen] = item_ids(store, name)[row[chosen]]
            codes[chosen] = store.products.name[sku[chosen]]
    arrays = {
        "kind": kind.astype(np.int64),
        "sku": store.embedding_rows("sku", sku),
        "category": store.products.category[sku].astype(np.int64),
        "price": store.products.price[sku].astype(np.int64),
        "url": store.embedding_rows("url", url),
        "codes": codes,
        "timestamp_s": timeline.timestamp_s[rows].astype(np.int64),
        "cu_seqlens": offsets.astype(np.int32),
        "cutoff_s": views.cutoff_s.copy(),
        "client": views.row.copy(),
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return SequenceBatch(**tensors)


class ViewLoader:
    """Iterates over `ViewBatch`es of the given views; the same arguments give the same batches.

    Args:
        store: where events come from; None when only features and labels are wanted.
        views: N client views.
        batch_size: views per batch; the last batch may be smaller.
        history_length: events of history at most, None for batches without history.
        drop_repeats: leave visits and searches out of it that an equal one of the same second precedes.
        future_length: events of the target window at most, None for batches without future.
        features: float32 [N, F], row i belongs to view i; an array or what makes the rows that are asked for.
        labels: name -> float array [N] or label matrix with N rows.
        weight: float [N], loss weights.
        shuffle_seed: None keeps the order of `views`; otherwise each epoch has its own order, see `set_epoch`.

    Attributes:
        pins: batches lie in pinned memory, from which a GPU takes them without waiting.
        fills: what makes all batches of an epoch equal in size, see `fixed_sizes`; None: they are as they come.

    Raises:
        ValueError: lengths that do not fit together, or a target window beyond the store's cutoff.
    """

    def __init__(
        self,
        store: EventStore | None,
        views: Views,
        *,
        batch_size: int,
        history_length: int | None = None,
        drop_repeats: bool = False,
        future_length: int | None = None,
        features: Rows | None = None,
        labels: Mapping[str, np.ndarray | DenseRows] | None = None,
        weight: np.ndarray | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"ViewLoader: batch_size must be >= 1, got {batch_size}")
        if store is None and (history_length is not None or future_length is not None):
            raise ValueError("ViewLoader: store must be given for batches with history or future, got None")
        for name, array in (("features", features), ("weight", weight)):
            if array is not None and len(array) != len(views.row):
                raise ValueError(f"ViewLoader: {name} must have {len(views.row)} rows like views, got {len(array)}")
        self.store, self.views, self.batch_size, self.shuffle_seed = store, views, batch_size, shuffle_seed
        self.features, self.labels, self.weight = features, dict(labels or {}), weight
        self.epoch, self.first_batch, self.pins = 0, 0, False
        self.fills: FixedSizes | None = None
        self._most_events = max(history_length or 1, future_length or 1)
        self._rank, self._world = 0, 1
        self._history = self._future = None
        self._longest = history_length if drop_repeats else None
        if store is not None and history_length is not None:
            self._history = history_range(store, views, history_length)
            if drop_repeats:
                self._history = (store.timeline.offsets[views.row], self._history[1])
        if store is not None and future_length is not None:
            self._future = future_range(store, views, future_length)

    @property
    def num_views(self) -> int:
        """N, the number of views of one epoch."""
        return len(self.views.row)

    def __len__(self) -> int:
        """Batches per epoch."""
        return (self.num_views + self.batch_size - 1) // self.batch_size

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the order of the next pass and where it begins; without a seed the order never changes."""
        self.epoch, self.first_batch = epoch, first_batch

    def share(self, rank: int, world: int) -> None:
        """Every batch is divided among `world` processes, in the order of its views; this one has part `rank`.

        The parts of all processes are the batches of one: as many, of the same views. A part may have no view.
        """
        if not 0 <= rank < world:
            raise ValueError(f"ViewLoader: rank must be in 0..world - 1, got rank {rank} of {world}")
        self._rank, self._world = rank, world

    def fixed_sizes(self) -> FixedSizes:
        """What fills the batches of this loader up to one size."""
        return FixedSizes(self._most_events, self.batch_size)

    def digest(self) -> str:
        """Hex digest of what a training sees: all views with their order, lengths, weights and labels.

        Of the content of events and features that of `LOOKED_AT` views at most, spread evenly.
        """
        state = hashlib.blake2b(repr((self.batch_size, self._longest, self.shuffle_seed)).encode(), digest_size=8)

        def add(values: Tensor | np.ndarray) -> Any:
            state.update(repr((tuple(values.shape), str(values.dtype))).encode())
            state.update(np.ascontiguousarray(values).data)
            return values

        arrays = [*self.views, *(self._history or ()), *(self._future or ())]
        for array in arrays if self.weight is None else [*arrays, self.weight]:
            add(array)
        for name, label in self.labels.items():
            state.update(name.encode())
            if isinstance(label, LabelMatrix):
                add(label.indptr)
                add(label.indices)
            elif isinstance(label, np.ndarray):
                add(label)
        self.batch(np.unique(np.linspace(0, self.num_views - 1, LOOKED_AT).astype(np.int64))).map(add)
        return state.hexdigest()

    def batch(self, chosen: np.ndarray, mine: slice | None = None) -> ViewBatch:
        """The batch of the views with the given numbers, int64 [B]; with `mine` that part, which knows its place."""
        whole, part = chosen, slice(0, len(chosen)) if mine is None else mine
        chosen = whole[part]
        views = Views(self.views.row[chosen], self.views.cutoff_s[chosen])

        def packed(bounds: tuple[np.ndarray, np.ndarray] | None, longest: int | None = None) -> SequenceBatch | None:
            if bounds is None or self.store is None:
                return None
            first, end = bounds[0][whole], bounds[1][whole]
            every = token_rows(first, end) if longest is None else last_different(self.store, first, end, longest)
            rows, offsets = every
            here = offsets[part.start : part.stop + 1]
            made = assemble(self.store, views, rows[here[0] : here[-1]], here - here[0])
            if mine is None:
                return made
            has_events = np.diff(offsets) > 0
            place = Place(int(here[0]), int(has_events[: part.start].sum()), len(rows), int(has_events.sum()))
            return replace(made, shared=place)

        return ViewBatch(
            history=packed(self._history, self._longest),
            future=packed(self._future),
            features=None if self.features is None else _float_tensor(self.features[chosen]),
            labels={name: _label_rows(label, chosen) for name, label in self.labels.items()},
            weight=None if self.weight is None else _float_tensor(self.weight[chosen]),
        )

    def __iter__(self) -> Iterator[ViewBatch]:
        """The rest of an epoch; the next batch is assembled in the background while the caller works on this one."""
        if self.shuffle_seed is None:
            order = np.arange(self.num_views)
        else:
            order = epoch_order(self.num_views, self.shuffle_seed, self.epoch)
        begins = range(self.first_batch * self.batch_size, self.num_views, self.batch_size)
        parts = [order[begin : begin + self.batch_size] for begin in begins]
        with ThreadPoolExecutor(1, thread_name_prefix="view-loader") as pool:
            pending = [pool.submit(self._part, part) for part in parts[:1]]
            for part in [*parts[1:], None]:
                if not pending:
                    return
                batch = pending.pop().result()
                if part is not None:
                    pending.append(pool.submit(self._part, part))
                yield batch

    def _part(self, chosen: np.ndarray) -> ViewBatch:
        ends = np.cumsum([0, *map(len, np.array_split(chosen, self._world))]).tolist()
        mine = slice(ends[self._rank], ends[self._rank + 1])
        batch = self.batch(chosen) if self._world == 1 else self.batch(chosen, mine)
        batch = replace(batch, all_views=len(chosen), first_view=mine.start)
        if self.fills is not None:
            batch = self.fills(batch)
        return batch.map(Tensor.pin_memory) if self.pins else batch


def _float_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _label_rows(label: np.ndarray | DenseRows, chosen: np.ndarray) -> Tensor:
    if isinstance(label, np.ndarray):
        return _float_tensor(label[chosen])
    return torch.as_tensor(label.dense(chosen), dtype=torch.float32)
