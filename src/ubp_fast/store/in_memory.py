"""Histories of some clients in memory, in the ids of a store that exists already.

    frames or a store -> Histories -> of a block of clients: MemoryStore, which features and models read like any other

A `MemoryStore` numbers the items of its own events only, so it costs what these cost, whatever the size of the
catalogue. Categories and prices have the dense ids of the vocabulary; skus and urls have places in it
(`embedding_rows`), the id "unknown" where it does not hold them. A sku that it does not hold is an item of its own
still, with whatever is known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.read import EventBatch
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, NUM_CODES, SKU_KINDS
from ubp_fast.store.event_store import AMOUNTS, TIMELINE, EventStore, ProductColumns, Timeline
from ubp_fast.store.ids import KnownIds
from ubp_fast.store.spill import Events, merge, narrowest
from ubp_fast.store.vocabulary import FIRST_ID, UNKNOWN

ARRAYS = ("category_ids", "url_ids", *(f"products.{name}" for name in ProductColumns._fields))
# Fewer events than this part of a vocabulary are sorted, more are marked in it.
DENSE_SHARE = 8
NUMBERS = ("first_timestamp_s", "num_prices", "kinds")


@dataclass(frozen=True)
class Vocabulary:
    """What a store knows beyond single clients: its ids, its products, its kinds and when it begins.

    Attributes:
        arrays: the columns of the store that `ARRAYS` names.
        numbers: what `NUMBERS` names of its header, and `AMOUNTS` where purchases have any.
    """

    arrays: Mapping[str, np.ndarray]
    numbers: Mapping[str, object]

    @classmethod
    def of(cls, store: EventStore) -> Vocabulary:
        """That of a store."""
        products = {f"products.{name}": column for name, column in store.products._asdict().items()}
        arrays = {"category_ids": store.category_ids, "url_ids": store.url_ids, **products}
        numbers = {name: store.header[name] for name in (*NUMBERS, AMOUNTS) if name in store.header}
        return cls({name: np.asarray(arrays[name]) for name in ARRAYS}, numbers)

    @property
    def amounts(self) -> tuple[str, ...]:
        """What its purchases say of themselves beside the product."""
        return tuple(self.numbers.get(AMOUNTS, ()))  # type: ignore[arg-type]

    @cached_property
    def skus(self) -> KnownIds:
        return KnownIds(self.arrays["products.sku_id"][FIRST_ID:])

    @cached_property
    def urls(self) -> KnownIds:
        return KnownIds(self.arrays["url_ids"][FIRST_ID:])

    @cached_property
    def categories(self) -> KnownIds:
        return KnownIds(self.arrays["category_ids"][FIRST_ID:])


class MemoryStore(EventStore):
    """A store whose columns lie in memory; `memory_store` makes it.

    Args:
        header: as of a store.
        columns: name -> array, as the files of a store.
        rows: "sku" and "url" -> place in the vocabulary of every dense id, i64.
    """

    def __init__(
        self, header: dict[str, object], columns: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]
    ) -> None:
        super().__init__(Path("memory"), header)
        self.__dict__.update(_columns=columns, _rows=rows)

    def _column(self, name: str) -> np.ndarray:
        return self.__dict__["_columns"][name]

    def embedding_rows(self, column: str, ids: np.ndarray) -> np.ndarray:
        return self.__dict__["_rows"][column][ids]


@dataclass(frozen=True)
class Histories:
    """Events of clients, client by client, ascending in time.

    Attributes:
        client_ids: i64 [U], ascending.
        kinds: kind -> offsets i64 [U + 1], timestamp_s [N], items [N] or codes [N, 16], and the original id of each
            item, None where items are original ids.
        products: sku, category, price (bucket), name (codes) of skus that a vocabulary may not hold; null is unknown.
        amounts: f32 [N, A] of the purchases, those of the store or model; None without any.
    """

    client_ids: np.ndarray
    kinds: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]
    products: pl.DataFrame | None = None
    amounts: np.ndarray | None = None

    @classmethod
    def of_store(cls, store: EventStore, products: pl.DataFrame | None = None) -> Histories:
        """What a store holds of its relevant and other clients."""
        originals = {"sku": np.asarray(store.sku_ids), "url": np.asarray(store.url_ids), "query": None}
        kinds = {}
        for kind in store.kinds:
            offsets, timestamp_s, item, codes, _ = store.kind(kind)
            values = codes if item is None else item
            assert values is not None
            kinds[kind] = (offsets, timestamp_s, values, originals[ITEM_COLUMN[kind]])
        return cls(np.asarray(store.client_ids), kinds, products, store.kind("product_buy").amounts)

    @classmethod
    def of_events(cls, events: Mapping[str, EventBatch], products: pl.DataFrame | None = None) -> Histories:
        """Events in any order; those of one client and second keep theirs."""
        clients = np.unique(np.concatenate([np.zeros(0, np.int64), *(batch.client_id for batch in events.values())]))
        kinds, sorted_amounts = {}, None
        for kind, (client_id, timestamp_s, item, amounts) in events.items():
            order = np.lexsort((timestamp_s, client_id))
            offsets = np.searchsorted(client_id[order], np.append(clients, np.iinfo(np.int64).max))
            kinds[kind] = (offsets, timestamp_s[order], item[order], None)
            sorted_amounts = sorted_amounts if amounts is None else amounts[order]
        return cls(clients, kinds, products, sorted_amounts)

    @property
    def last_s(self) -> int:
        """Second of the newest event; 0 without any."""
        return max((int(times.max()) for _, times, _, _ in self.kinds.values() if len(times)), default=0)

    def merged(self, later: Histories) -> Histories:
        """With further events; those of one client and second come after the ones that are here."""
        clients = np.union1d(self.client_ids, later.client_ids)
        kinds, amounts = {}, None
        for kind in EVENT_KINDS:
            if kind in self.kinds or kind in later.kinds:
                (before, *old), (after, *new) = (one.of_clients(clients, kind) for one in (self, later))
                if kind == "product_buy" and (self.amounts is not None or later.amounts is not None):
                    both = [one.amounts_of(clients) for one in (self, later)]
                    old, new = ([*columns, one] for columns, one in zip((old, new), _as_wide(both), strict=True))
                offsets = before + after
                client = [np.repeat(np.arange(len(clients)), np.diff(bounds)) for bounds in (before, after)]
                # An old row moves by the new ones of earlier clients, a new one by the old ones up to its client's.
                place = [np.arange(len(old[0])) + after[client[0]], np.arange(len(new[0])) + before[client[1] + 1]]
                columns = []
                for values, more in zip(old, new, strict=True):
                    column = np.empty((len(values) + len(more), *values.shape[1:]), np.result_type(values, more))
                    column[place[0]], column[place[1]] = values, more
                    columns.append(column)
                owner = np.repeat(np.arange(len(clients)), np.diff(offsets))
                if ((np.diff(columns[0]) < 0) & (owner[1:] == owner[:-1])).any():
                    order = np.lexsort((columns[0], owner))
                    columns = [column[order] for column in columns]
                kinds[kind] = (offsets, columns[0], columns[1], None)
                amounts = columns[2] if len(columns) > 2 else amounts
        tables = [one.products for one in (self, later) if one.products is not None]
        products = tables[0] if len(tables) == 1 else None
        if len(tables) == 2:
            first = [pl.col(name).drop_nulls().first() for name in tables[0].columns if name != "sku"]
            products = pl.concat(tables).group_by("sku", maintain_order=True).agg(first)
        return Histories(clients, kinds, products, amounts)

    def without(self, client_ids: np.ndarray) -> Histories:
        """Without these clients i64; their items stay described."""
        kept = self.client_ids[~np.isin(self.client_ids, client_ids)]
        kinds = {kind: (*self.of_clients(kept, kind), None) for kind in self.kinds}
        return Histories(kept, kinds, self.products, self.amounts_of(kept))

    def digest_into(self, update: Callable[[bytes], object]) -> None:
        """Gives all bytes to a hash."""
        update(np.ascontiguousarray(self.client_ids).tobytes())
        for kind, arrays in self.kinds.items():
            update(kind.encode())
            for array in arrays:
                if array is not None:
                    update(np.ascontiguousarray(array).tobytes())
        if self.amounts is not None:
            update(np.ascontiguousarray(self.amounts).tobytes())
        if self.products is not None:
            for series in self.products:
                update(np.ascontiguousarray(series.to_numpy()).tobytes())

    def of_clients(self, client_ids: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Offsets i64 [N + 1], times and original items (or codes) of some clients, in their order."""
        if kind not in self.kinds:
            item = np.zeros((0, NUM_CODES), np.uint8) if ITEM_COLUMN[kind] == "query" else np.zeros(0, np.int64)
            return np.zeros(len(client_ids) + 1, np.int64), np.zeros(0, np.int64), item
        _, timestamp_s, item, originals = self.kinds[kind]
        bounds, rows = self._rows_of(client_ids, kind)
        values = np.asarray(item[rows])
        return bounds, np.asarray(timestamp_s[rows]), values if originals is None else originals[values]

    def amounts_of(self, client_ids: np.ndarray) -> np.ndarray | None:
        """Amounts of the purchases that `of_clients` gives; None without any."""
        if self.amounts is None or "product_buy" not in self.kinds:
            return None
        return np.asarray(self.amounts[self._rows_of(client_ids, "product_buy")[1]])

    def _rows_of(self, client_ids: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Offsets i64 [N + 1] and rows of the events of some clients."""
        offsets = self.kinds[kind][0]
        place = np.searchsorted(self.client_ids, client_ids)
        found = place < len(self.client_ids)
        found[found] = self.client_ids[place[found]] == client_ids[found]
        start, end = np.zeros((2, len(client_ids)), np.int64)
        start[found], end[found] = offsets[place[found]], offsets[place[found] + 1]
        bounds = np.concatenate((np.zeros(1, np.int64), np.cumsum(end - start)))
        return bounds, np.arange(bounds[-1]) + np.repeat(start - bounds[:-1], end - start)


def _as_wide(amounts: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """Amounts of purchases, in place of None those of no purchase."""
    (width,) = {one.shape[1] for one in amounts if one is not None}
    return [np.zeros((0, width), np.float32) if one is None else one for one in amounts]


def memory_store(histories: Histories, client_ids: np.ndarray, cutoff_s: int, vocabulary: Vocabulary) -> MemoryStore:
    """The store of some clients' events before a cutoff.

    Kinds that the vocabulary does not have are left out: nothing has learned from them.

    Args:
        histories: of any clients; one who is not there has no events.
        client_ids: i64 [U], each once; the order of the result.
        cutoff_s: seconds since 1970 UTC.
        vocabulary: whose ids are used.
    """
    kinds: tuple[str, ...] = tuple(vocabulary.numbers["kinds"])  # type: ignore[arg-type]
    first_s = int(vocabulary.numbers["first_timestamp_s"])  # type: ignore[call-overload]
    names, read = vocabulary.amounts, {}
    amounts = np.zeros((0, len(names)), np.float32)
    for kind in EVENT_KINDS:
        bounds, timestamp_s, item = histories.of_clients(client_ids if kind in kinds else client_ids[:0], kind)
        if kind not in kinds:
            bounds = np.zeros(len(client_ids) + 1, np.int64)
        elif kind == "product_buy" and len(timestamp_s) and names:
            found = histories.amounts_of(client_ids)
            assert found is not None and found.shape[1] == len(names), "events are read with the amounts of the model"
            amounts = found[timestamp_s < cutoff_s]
        read[kind] = _before(bounds, timestamp_s, item, cutoff_s)
    first_event_s = min([first_s, *(int(times.min()) for _, times, _ in read.values() if len(times))])
    dtype = narrowest(first_event_s, cutoff_s)
    columns: dict[str, np.ndarray] = {"client_ids": client_ids, "is_relevant": np.ones(len(client_ids), bool)}
    skus = [read[kind][2] for kind in SKU_KINDS]
    sku_rows, dense_skus, products = _products(np.concatenate(skus), histories.products, vocabulary)
    url_place = vocabulary.urls.find(read["page_visit"][2]).astype(np.int64) + FIRST_ID
    url_rows, urls = _numbered(url_place, len(vocabulary.arrays["url_ids"]))
    items = dict(zip(SKU_KINDS, np.split(dense_skus, np.cumsum([len(values) for values in skus])[:-1]), strict=True))
    items |= {"page_visit": urls, "search_query": read["search_query"][2]}
    events = [Events(offsets, times.astype(dtype), items[kind]) for kind, (offsets, times, _) in read.items()]
    for kind, (offsets, timestamp_s, item, _) in zip(EVENT_KINDS, events, strict=True):
        name = "codes" if ITEM_COLUMN[kind] == "query" else "item"
        columns |= {f"{kind}.offsets": offsets, f"{kind}.timestamp_s": timestamp_s, f"{kind}.{name}": item}
    columns |= {f"product_buy.{AMOUNTS}": amounts} if names else {}
    timeline = Timeline(*merge(events, [0] * len(events)))
    columns |= products | {f"{TIMELINE}.{name}": column for name, column in timeline._asdict().items()}
    url_ids = vocabulary.arrays["url_ids"][url_rows]
    url_ids[:FIRST_ID] = -1
    columns |= {"url_ids": url_ids, "category_ids": vocabulary.arrays["category_ids"]}
    header = {
        "num_clients": len(client_ids),
        "cutoff_s": cutoff_s,
        "first_timestamp_s": first_s,
        "kinds": list(kinds),
        "num_skus": len(sku_rows),
        "num_urls": len(url_rows),
        "num_categories": len(columns["category_ids"]),
        "num_prices": vocabulary.numbers["num_prices"],
        AMOUNTS: names,
    }
    return MemoryStore(header, columns, {"sku": sku_rows, "url": url_rows})


def _before(
    offsets: np.ndarray, timestamp_s: np.ndarray, item: np.ndarray, cutoff_s: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Without the events at and after the cutoff."""
    kept = timestamp_s < cutoff_s
    if kept.all():
        return offsets, timestamp_s, item
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(kept)))[offsets], timestamp_s[kept], item[kept]


def _numbered(place: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in a vocabulary of so many of the dense ids 0, 1, 2, ...; and the dense id i32 [N] of each place."""
    if len(place) * DENSE_SHARE < size:
        known, numbers = np.unique(place, return_inverse=True)
        is_real = known >= FIRST_ID
        dense = np.where(is_real, np.cumsum(is_real) + FIRST_ID - 1, UNKNOWN).astype(np.int32)
        return np.concatenate((np.arange(FIRST_ID), known[is_real])), dense[numbers]
    is_seen = np.zeros(size, bool)
    is_seen[place] = True
    is_seen[:FIRST_ID] = True
    return np.flatnonzero(is_seen), (np.cumsum(is_seen, dtype=np.int32) - 1)[place]


def _products(
    skus: np.ndarray, described: pl.DataFrame | None, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Place in the vocabulary of every dense sku, known ones first; the dense sku i32 [N] of each; product table."""
    arrays = vocabulary.arrays
    place = vocabulary.skus.find(skus).astype(np.int64) + FIRST_ID
    rows, dense = _numbered(place, len(arrays["products.sku_id"]))
    is_new = place < FIRST_ID
    others, numbers = np.unique(skus[is_new], return_inverse=True)
    new = slice(len(rows), None)
    dense[is_new] = len(rows) + numbers
    rows = np.concatenate((rows, np.full(len(others), UNKNOWN)))
    products = {f"products.{name}": arrays[f"products.{name}"][rows] for name in ProductColumns._fields}
    if len(others):
        products["products.sku_id"][new] = others
        if described is not None and len(described):
            _describe({name: column[new] for name, column in products.items()}, described, vocabulary)
    return rows, dense, products


def _describe(products: dict[str, np.ndarray], described: pl.DataFrame, vocabulary: Vocabulary) -> None:
    """Fills in what is known of skus that the vocabulary does not hold; unknown categories stay unknown."""
    wanted = pl.DataFrame({"sku": products["products.sku_id"]})
    found = wanted.join(described, on="sku", how="left", maintain_order="left")
    category, price, name = (found[column].drop_nulls() for column in ("category", "price", "name"))
    has = {column: found[column].is_not_null().to_numpy() for column in ("category", "price", "name")}
    place = vocabulary.categories.find(category.to_numpy().astype(np.int64))
    products["products.category"][has["category"]] = np.where(place >= 0, place + FIRST_ID, UNKNOWN)
    highest: int = vocabulary.numbers["num_prices"] - 1  # type: ignore[operator]
    products["products.price"][has["price"]] = np.minimum(price.to_numpy() + FIRST_ID, highest)
    if len(name):
        products["products.name"][has["name"]] = name.to_numpy()
