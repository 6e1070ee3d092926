"""Batches of fixed sizes, for what has to know shapes beforehand, such as a CUDA graph.

A batch is filled up with views of nobody: they come last, some of them have events, of every kind of content as many as
are missing, and no loss counts them (`ViewBatch.valid`). Nothing that follows from a number of events then changes from
batch to batch: neither how many of them are visits, nor how many views have any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ubp_fast.events.schema import EVENT_KINDS
from ubp_fast.sequences.batch import SEARCH, VISIT, Counts, SequenceBatch, ViewBatch

_ITEM = 1 + EVENT_KINDS.index("product_buy")
_KINDS = (_ITEM, VISIT, SEARCH)
_OF_EVENTS = ("sku", "category", "price", "url", "codes", "timestamp_s")


@dataclass
class _PackedSizes:
    """Of one of the packed parts of a batch.

    Attributes:
        longest: events of a sequence at most.
        events: with a product, visits and searches.
        with_events: sequences that have any.
    """

    longest: int
    events: tuple[int, ...] = (0, 0, 0)
    with_events: int = 0

    def grow(self, counts: tuple[int, ...], with_events: int) -> None:
        """Makes room for a batch with so many events of each content and so many sequences that have any."""
        events = [_at_least(fixed, count) for fixed, count in zip(self.events, counts, strict=True)]
        self.with_events = _at_least(self.with_events, with_events)
        missing, filling = sum(events) - sum(counts), self.with_events - with_events
        if missing < filling:  # each of the sequences that fill up has one event at least
            most = events.index(max(events))
            events[most] = _at_least(events[most], events[most] + filling - missing)
            missing = sum(events) - sum(counts)
        # And none is longer than those of clients.
        self.with_events = with_events + max(filling, math.ceil(missing / self.longest))
        self.events = tuple(events)

    def padded(self, part: SequenceBatch, counts: tuple[int, ...], with_events: int, views: int) -> SequenceBatch:
        missing = [fixed - count for fixed, count in zip(self.events, counts, strict=True)]
        total, filling = sum(missing), self.with_events - with_events
        lengths = torch.zeros(views - part.num_sequences, dtype=torch.int64)
        if filling:
            lengths[:filling] = total // filling
            lengths[: total % filling] += 1
        kind = torch.tensor(_KINDS).repeat_interleave(torch.tensor(missing))
        more: dict[str, Any] = {name: _more(getattr(part, name), total) for name in _OF_EVENTS}
        more |= {name: _more(getattr(part, name), len(lengths)) for name in ("cutoff_s", "client")}
        ends = part.cu_seqlens[-1:] + lengths.cumsum(0, dtype=torch.int32)
        return replace(
            part,
            kind=torch.cat([part.kind, kind]),
            cu_seqlens=torch.cat([part.cu_seqlens, ends]),
            counted=Counts(self.events[1], self.events[2], self.with_events, None),
            **more,
        )


class FixedSizes:
    """Fills batches up to sizes that are the same for all; where one does not fit, they grow for all that follow.

    What a valid view gets does not depend on the views that fill up, but for the last digits.

    Args:
        longest: events of a view at most, history or future.
        views: of clients in a batch, at most.

    Raises:
        ValueError: a batch that is a part of one, or that has more views.
    """

    def __init__(self, longest: int, views: int) -> None:
        self._most, self._views = views, views
        self._parts = {name: _PackedSizes(longest) for name in ("history", "future")}

    def __call__(self, batch: ViewBatch) -> ViewBatch:
        here = batch.num_views
        if here > self._most or batch.all_views not in (None, here):
            raise ValueError(f"FixedSizes: a batch must be whole and have at most {self._most} views, got {here}")
        parts: dict[str, tuple[SequenceBatch, tuple[int, ...], int]] = {}
        for name, sizes in self._parts.items():
            part = getattr(batch, name)
            if part is not None:
                found = part.counts
                counts = (part.num_tokens - found.visits - found.searches, found.visits, found.searches)
                sizes.grow(counts, found.with_events)
                self._views = _at_least(self._views, here + sizes.with_events - found.with_events)
                parts[name] = (part, counts, found.with_events)
        missing = self._views - here
        padded = {name: self._parts[name].padded(*given, self._views) for name, given in parts.items()}
        return replace(
            batch,
            features=None if batch.features is None else _more(batch.features, missing),
            labels={name: _more(label, missing) for name, label in batch.labels.items()},
            weight=None if batch.weight is None else _more(batch.weight, missing),
            valid=torch.arange(self._views) < here,
            **padded,  # type: ignore[arg-type]
        )


def _more(values: Tensor, rows: int) -> Tensor:
    """With so many rows of zeros behind it."""
    return torch.cat([values, values.new_zeros(rows, *values.shape[1:])])


def _at_least(fixed: int, needed: int) -> int:
    """The size as it is where it suffices, else one that leaves room for batches like this one."""
    return fixed if needed <= fixed else needed + max(needed // 8, 2 * math.isqrt(needed))
