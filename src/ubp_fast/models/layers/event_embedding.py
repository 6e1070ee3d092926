"""One vector per event: what the event is about (by kind), and how long before the cutoff it happened.

`ProjectedEventEmbedding` (contrastive model, docs/winner.md 3.3, 3.4): concatenated tables, one Linear + ReLU per kind
of content. `ConcatenatedEventEmbedding` (multi-task model, docs/winner.md 4.3): [kind | content | day | week],
ReLU(Linear) for items.
Both look up each table only for the events that have the field, and have parameters only for the kinds that exist.
Packed events [T] -> float [T, width].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.events.schema import EVENT_KINDS
from ubp_fast.events.split import DAY_S
from ubp_fast.models.layers.linear import Linear
from ubp_fast.optim import RowSparseEmbedding
from ubp_fast.sequences.batch import SEARCH, VISIT, SequenceBatch, places

if TYPE_CHECKING:
    from ubp_fast.store.event_store import EventStore

TableDtype = Literal["float32", "bfloat16"]

_NUM_CODE_VALUES = 256


class EventSizes(NamedTuple):
    """Rows of the embedding tables (largest dense id + 1) and the event kinds that exist."""

    num_skus: int
    num_categories: int
    num_prices: int
    num_urls: int
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, store: EventStore) -> EventSizes:
        """The sizes of a store's vocabularies."""
        return cls(store.num_skus, store.num_categories, store.num_prices, store.num_urls, tuple(store.kinds))

    @property
    def has_visits(self) -> bool:
        return "page_visit" in self.kinds

    @property
    def has_searches(self) -> bool:
        return "search_query" in self.kinds


class PiecewiseLinearEncoding(nn.Module):
    """Encodes a number by how far it has come through each of a row of bins: 0 before, 1 behind, linear inside.

    Args:
        bins: number of bins n.

    The edges are a buffer [n + 1], part of the state; bins of no width are steps. Source: Gorishniy et al. 2022, 3.1.
    """

    edges: Tensor

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.register_buffer("edges", torch.arange(bins + 1, dtype=torch.float32))

    def forward(self, value: Tensor) -> Tensor:
        """float32 [T] -> float32 [T, n]."""
        width = self.edges.diff().clamp(min=1e-6)
        return ((value[:, None] - self.edges[:-1]) / width).clamp(0.0, 1.0)


class CodeEmbedding(nn.Module):
    """Mean of the vectors of 16 product-quantisation codes, one table for names and queries: [T, 16] -> [T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(_NUM_CODE_VALUES, width, mode="mean")

    def forward(self, codes: Tensor) -> Tensor:
        return self.table(codes)


def _check_table_dtype(name: str, dtype: str) -> None:
    if dtype not in get_args(TableDtype):
        raise ValueError(f"{name}: table_dtype must be 'float32' or 'bfloat16', got '{dtype}'")


def _large_table(rows: int, width: int, dtype: TableDtype) -> RowSparseEmbedding:
    return RowSparseEmbedding(rows, width, dtype=getattr(torch, dtype))


def _by_content(batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of product events, of visits and of searches, three int64."""
    is_visit, is_search = batch.kind == VISIT, batch.kind == SEARCH
    return (
        places(~(is_visit | is_search), lambda: batch.num_tokens - batch.counts.visits - batch.counts.searches),
        places(is_visit, lambda: batch.counts.visits),
        places(is_search, lambda: batch.counts.searches),
    )


def _interleave(parts: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Puts the vectors of `parts` at their `rows` of the packed batch."""
    order = torch.cat(rows)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    dtype = parts[0].dtype
    return torch.cat([part.to(dtype) for part in parts]).index_select(0, place)


@dataclass(frozen=True)
class ProjectedEventConfig:
    """Widths of the contrastive model's event vector."""

    kind_width: int = 8  # columns; docs/winner.md 3.4
    sku_width: int = 384  # columns; docs/winner.md 3.4
    category_width: int = 96  # columns; docs/winner.md 3.4
    price_width: int = 16  # columns; docs/winner.md 3.4
    code_width: int = 384  # columns, mean of the 16 code vectors; docs/winner.md 3.4
    url_width: int = 128  # columns; docs/winner.md 3.4
    age_width: int = 256  # columns of the encoded age; docs/winner.md 3.3
    age_bins: int = 256  # quantile bins of the age; docs/winner.md 3.3
    width: int = 512  # columns of the event vector; docs/winner.md 3.4
    table_dtype: TableDtype = "float32"  # of products and pages; bfloat16 halves their memory; ours

    def __post_init__(self) -> None:
        _check_table_dtype("ProjectedEventConfig", self.table_dtype)


class ProjectedEventEmbedding(nn.Module):
    """Event vectors as ReLU(content @ W_kind + age @ V_kind + b_kind), one pair of W and V per content kind.

    That is the Linear over [content | age] of the winner, with W shared between the tower that sees ages (history) and
    the one that does not (future).
    """

    def __init__(self, config: ProjectedEventConfig, sizes: EventSizes) -> None:
        super().__init__()
        self.config = config
        self.kind = nn.Embedding(len(EVENT_KINDS) + 1, config.kind_width)
        self.sku = _large_table(sizes.num_skus, config.sku_width, config.table_dtype)
        self.category = nn.Embedding(sizes.num_categories, config.category_width)
        self.price = nn.Embedding(sizes.num_prices, config.price_width)
        self.codes = CodeEmbedding(config.code_width)
        self.age = PiecewiseLinearEncoding(config.age_bins)
        self.age_projection = Linear(config.age_bins, config.age_width)
        item_width = config.sku_width + config.category_width + config.price_width + config.code_width
        widths = {"item": config.kind_width + item_width}
        if sizes.has_visits:
            self.url = _large_table(sizes.num_urls, config.url_width, config.table_dtype)
            widths["visit"] = config.kind_width + config.url_width
        if sizes.has_searches:
            widths["search"] = config.kind_width + config.code_width
        self.content = nn.ModuleDict({name: Linear(width, config.width) for name, width in widths.items()})
        self.content_age = nn.ModuleDict({name: Linear(config.age_width, config.width, bias=False) for name in widths})

    def forward(self, batch: SequenceBatch, *, with_age: bool) -> Tensor:
        """Vectors of the packed events.

        Args:
            batch: T packed events.
            with_age: add the encoded age in days; the future tower does without.

        Returns:
            float [T, width].
        """
        items, visits, searches = _by_content(batch)
        age = self.age_projection(self.age(batch.age_s().float() / DAY_S)) if with_age else None
        parts = [self._project("item", self._item(batch, items), items, age)]
        rows = [items]
        if "visit" in self.content:
            content = torch.cat([self.kind(batch.kind[visits]), self.url(batch.url[visits])], dim=1)
            parts.append(self._project("visit", content, visits, age))
            rows.append(visits)
        if "search" in self.content:
            content = torch.cat([self.kind(batch.kind[searches]), self.codes(batch.codes[searches])], dim=1)
            parts.append(self._project("search", content, searches, age))
            rows.append(searches)
        return _interleave(parts, rows)

    def _item(self, batch: SequenceBatch, rows: Tensor) -> Tensor:
        tables = (
            self.kind(batch.kind[rows]),
            self.sku(batch.sku[rows]),
            self.category(batch.category[rows]),
            self.price(batch.price[rows]),
            self.codes(batch.codes[rows]),
        )
        return torch.cat(tables, dim=1)

    def _project(self, name: str, content: Tensor, rows: Tensor, age: Tensor | None) -> Tensor:
        projected = self.content[name](content)
        if age is not None:
            projected = projected + self.content_age[name](age[rows])
        return functional.relu(projected)


@dataclass(frozen=True)
class ConcatenatedEventConfig:
    """Widths of the multi-task model's event vector."""

    kind_width: int = 8  # columns; docs/winner.md 4.3
    sku_width: int = 384  # columns; docs/winner.md 4.3
    category_width: int = 96  # columns; docs/winner.md 4.3
    price_width: int = 16  # columns; docs/winner.md 4.3
    content_width: int = 384  # columns of item, page and search content alike; docs/winner.md 4.3
    day_width: int = 16  # columns; docs/winner.md 4.3
    week_width: int = 4  # columns; docs/winner.md 4.3
    max_days: int = 365  # rows of the day table, older events share the last; docs/winner.md 4.1
    table_dtype: TableDtype = "float32"  # of products and pages; bfloat16 halves their memory; ours

    def __post_init__(self) -> None:
        _check_table_dtype("ConcatenatedEventConfig", self.table_dtype)

    @property
    def width(self) -> int:
        """Columns of the event vector, 412 for the winner's widths."""
        return self.kind_width + self.content_width + self.day_width + self.week_width


class ConcatenatedEventEmbedding(nn.Module):
    """Event vectors [kind | content | day | week]: content of items is ReLU(Linear), of pages and searches a table.

    Day 0 and week 0 have rows of their own (there is no padding row to share, unlike the winner's).
    """

    def __init__(self, config: ConcatenatedEventConfig, sizes: EventSizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        self.kind = nn.Embedding(len(EVENT_KINDS) + 1, config.kind_width)
        self.sku = _large_table(sizes.num_skus, config.sku_width, config.table_dtype)
        self.category = nn.Embedding(sizes.num_categories, config.category_width)
        self.price = nn.Embedding(sizes.num_prices, config.price_width)
        self.codes = CodeEmbedding(config.content_width)
        item_width = config.sku_width + config.category_width + config.price_width + config.content_width
        self.item = Linear(item_width, config.content_width)
        if sizes.has_visits:
            self.url = _large_table(sizes.num_urls, config.content_width, config.table_dtype)
        self.day = nn.Embedding(config.max_days, config.day_width)
        self.week = nn.Embedding((config.max_days + 6) // 7, config.week_width)

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Vectors float [T, width] of T packed events."""
        items, visits, searches = _by_content(batch)
        tables = (
            self.sku(batch.sku[items]),
            self.category(batch.category[items]),
            self.price(batch.price[items]),
            self.codes(batch.codes[items]),
        )
        parts, rows = [functional.relu(self.item(torch.cat(tables, dim=1)))], [items]
        if self.sizes.has_visits:
            parts.append(self.url(batch.url[visits]))
            rows.append(visits)
        if self.sizes.has_searches:
            parts.append(self.codes(batch.codes[searches]))
            rows.append(searches)
        day = (batch.age_s() // DAY_S).clamp(0, self.config.max_days - 1)
        vectors = (self.kind(batch.kind), _interleave(parts, rows), self.day(day), self.week(day // 7))
        return torch.cat([vector.float() for vector in vectors], dim=1)
