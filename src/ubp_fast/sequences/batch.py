"""The batch types of the project: event sequences packed end to end, and what belongs to the same client views.

Letters: T events of the whole batch, B client views, F static features. Row `cu_seqlens[b]` is the first event of view
b and `cu_seqlens[b + 1] - 1` its last one, oldest first; an empty history has two equal entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ubp_fast.events.schema import EVENT_KINDS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

VISIT, SEARCH = (1 + EVENT_KINDS.index(kind) for kind in ("page_visit", "search_query"))


class Place(NamedTuple):
    """Where packed events lie among those of all processes that share a step.

    Attributes:
        first_event: number of the first event here.
        first_sequence: number of the first sequence here, of those that have events.
        events: in all processes.
        sequences: in all processes, of those that have events.
    """

    first_event: int
    first_sequence: int
    events: int
    sequences: int


def places(is_chosen: Tensor, count: Callable[[], int]) -> Tensor:
    """Where a bool tensor [n] is True, `count()` times: int64 ascending. Nothing waits for a GPU.

    A CPU does not ask for the count: a number in place of a shape is one more graph for every compiler.
    """
    if is_chosen.device.type == "cpu":
        return is_chosen.nonzero()[:, 0]
    return torch.nonzero_static(is_chosen, size=count())[:, 0]


class Counts(NamedTuple):
    """What shapes of a step follow from.

    Attributes:
        visits: events that are visits.
        searches: events that are searches.
        with_events: sequences that have events.
        active: for each t how many sequences have more than t events; as many numbers as the longest has events. None
            in a batch of fixed sizes, in which nothing may follow from lengths.
    """

    visits: int
    searches: int
    with_events: int
    active: tuple[int, ...] | None


@dataclass(frozen=True)
class SequenceBatch:
    """Packed events of B views. All tensors int64 but `cu_seqlens` (int32).

    Attributes:
        kind: [T], 1 + index in EVENT_KINDS.
        sku: [T] dense id, 0 where the kind has no product.
        category: [T] dense id of the product's category, else 0.
        price: [T] dense id of the product's price bucket, else 0.
        url: [T] dense id, 0 where the kind has no page.
        codes: [T, 16] codes of the product's name or of the query, 0..255; zeros where there is neither.
        timestamp_s: [T] seconds since 1970 UTC, ascending inside a view.
        cu_seqlens: [B + 1] first row of each view, last entry T.
        cutoff_s: [B] the moment from which the view looks back (history) or ahead (future).
        client: [B] the client's row in the store.
        shared: where the events lie in a step that several processes share; None: all of it is here.
        counted: its `counts`, where a batch on a GPU has brought them along.
    """

    kind: Tensor
    sku: Tensor
    category: Tensor
    price: Tensor
    url: Tensor
    codes: Tensor
    timestamp_s: Tensor
    cu_seqlens: Tensor
    cutoff_s: Tensor
    client: Tensor
    shared: Place | None = None
    counted: Counts | None = None

    @property
    def num_tokens(self) -> int:
        """T, events in the batch."""
        return self.kind.shape[0]

    @property
    def num_sequences(self) -> int:
        """B, client views in the batch, empty ones included."""
        return self.client.shape[0]

    @property
    def first_rows(self) -> tuple[int, int]:
        """Numbers of the first event and of the first sequence that has events, in the step."""
        return (0, 0) if self.shared is None else self.shared[:2]

    @property
    def counts(self) -> Counts:
        """Those that came along, or counted: on a GPU that waits for everything launched before."""
        if self.counted is not None:
            return self.counted
        lengths = self.lengths()
        ended = torch.bincount(lengths).cumsum(0)[:-1]  # after t events
        visits, searches = (int((self.kind == kind).sum()) for kind in (VISIT, SEARCH))
        active = tuple((len(lengths) - ended).tolist())
        return Counts(visits, searches, active[0] if active else 0, active)

    def lengths(self) -> Tensor:
        """Events per view, int64 [B]."""
        return self.cu_seqlens.diff().long()

    def segments(self) -> Tensor:
        """The view of each event, int64 [T]."""
        return torch.repeat_interleave(self.lengths(), output_size=self.num_tokens)

    def age_s(self) -> Tensor:
        """Seconds from each event to its view's cutoff, int64 [T]; negative for future events."""
        return self.cutoff_s[self.segments()] - self.timestamp_s

    def steps_to_end(self) -> Tensor:
        """Distance of each event to the last one of its view, int64 [T]; 0 is the last event."""
        ends = self.cu_seqlens[1:].long()[self.segments()]
        return ends - 1 - torch.arange(self.num_tokens, device=self.kind.device)

    def map(self, function: Callable[[Tensor], Tensor]) -> SequenceBatch:
        """The batch with what `function` makes of every tensor."""
        names = (item.name for item in fields(self) if item.name not in ("shared", "counted"))
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **changed)


@dataclass(frozen=True)
class ViewBatch:
    """One training or inference step: B views of clients with everything known about them.

    Attributes:
        history: events before the cutoff, or None when the model reads no events.
        future: events of the target window, or None at inference.
        features: float32 [B, F] static features or joined profiles, or None.
        labels: float32 [B] or [B, n] per name; empty at inference.
        weight: float32 [B] loss weights of the views, or None for equal ones.
        group: processes of `torch.distributed` of which each has a part of the step's views; None: this one has all.
        all_views: views of the step in all processes; None: those that are here.
        first_view: number of the first view here among those of all processes.
        valid: bool [B], False in views that only fill a batch of fixed sizes, see `FixedSizes`: no loss counts them.
            None: all are views of clients.
    """

    history: SequenceBatch | None = None
    future: SequenceBatch | None = None
    features: Tensor | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None
    group: ProcessGroup | None = None
    all_views: int | None = None
    first_view: int = 0
    valid: Tensor | None = None

    @property
    def num_views(self) -> int:
        """B, the number of client views."""
        for part in (self.history, self.future):
            if part is not None:
                return part.num_sequences
        if self.features is None:
            raise ValueError("ViewBatch: history, future or features must be given, got none of them")
        return self.features.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> ViewBatch:
        """The batch with what `function` makes of every tensor."""
        return replace(
            self,
            history=None if self.history is None else self.history.map(function),
            future=None if self.future is None else self.future.map(function),
            features=None if self.features is None else function(self.features),
            labels={name: function(label) for name, label in self.labels.items()},
            weight=None if self.weight is None else function(self.weight),
            valid=None if self.valid is None else function(self.valid),
        )

    def to(self, device: torch.device | str) -> ViewBatch:
        """The same batch with every tensor on `device`; a GPU takes pinned tensors while the caller goes on.

        What shapes follow from is counted before: no model then waits for the device.
        """
        target = torch.device(device)
        batch = self
        if target.type != "cpu":
            batch = replace(self, history=_counted(self.history), future=_counted(self.future))
        return batch.map(lambda tensor: tensor.to(target, non_blocking=target.type == "cuda"))


def _counted(part: SequenceBatch | None) -> SequenceBatch | None:
    return None if part is None else replace(part, counted=part.counts)
