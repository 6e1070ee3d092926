"""Building the event store in one pass: canonical tables -> client-sorted columns of the history before a cutoff.

    batches of a table -> events of the clients before the cutoff -> spilled by block of clients
    block of clients   -> sorted by client and time -> appended to the columns, and all kinds merged to the timeline

Memory holds a batch or a block of clients, the clients and the vocabularies, whatever the number of events.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.compiled import njit
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, NUM_CODES, SKU_KINDS, DataError
from ubp_fast.files import published_directory, save_array, write_json
from ubp_fast.progress import Progress, Steps
from ubp_fast.store.clients import clients_of, no_history
from ubp_fast.store.event_store import AMOUNTS, FORMAT, HEADER_FILE, TIMELINE, ColumnWriter, EventStore, columns_of
from ubp_fast.store.ids import KnownIds, Numbering
from ubp_fast.store.spill import (
    Events,
    Spill,
    keys_of,
    merge,
    narrowest,
    sort_events,
    with_amounts,
    without_amounts,
)
from ubp_fast.store.vocabulary import FIRST_ID, UNKNOWN, DenseProducts, dense_products, vocabulary

BLOCK_EVENTS = 1 << 18
MAX_BLOCKS = 512


def build_store(
    events: EventDirectory,
    path: Path,
    cutoff_s: int,
    min_url_count: int = 1,
    all_clients: bool = False,
    progress: Progress | None = None,
    base: EventStore | None = None,
) -> None:
    """Writes the store of all events with `timestamp_s < cutoff_s`; nothing later is looked at.

    Clients are the relevant clients of the source when it names them, else all with an event before the cutoff.
    Vocabularies hold what these clients' events before the cutoff hold.

    Args:
        events: the canonical events.
        path: new or empty directory; it appears when the store is complete. Events wait beside it while it is built:
            it takes twice its size on the disk for that long.
        cutoff_s: seconds since 1970 UTC.
        min_url_count: urls with fewer visits before the cutoff, by clients that need a profile, share the id "unknown"
            (the winner: 10). At 1 every url keeps its own.
        all_clients: also keep clients that the source does not name as relevant (`EventStore.is_relevant` tells them
            apart), for models that learn from everybody.
        progress: called with (steps done, steps in all).
        base: a store of the same source with an earlier cutoff. Events before that cutoff are taken from it and only
            later ones are read, so that another day costs a copy and that day; the result has the same bytes. Its
            clients must be all that `events` asks for, and min_url_count must be 1: it does not hold rare urls.

    Raises:
        DataError: no event before the cutoff, or too many clients.
        OutputDirectoryError: the directory is in use or cannot be written.
        ValueError: `base` does not fit.
    """
    if base is not None:
        _check_base(base, events, cutoff_s, min_url_count, all_clients)
    clients, is_relevant = clients_of(events, cutoff_s, all_clients, base)
    with published_directory(Path(path)) as partial:
        counted = is_relevant if min_url_count > 1 and not is_relevant.all() else None
        builder = Builder(events, partial, cutoff_s, clients, base, counted)
        steps = Steps(progress, sum(events.num_batches(kind) for kind in EVENT_KINDS) + builder.num_blocks + 1)
        builder.save("client_ids", clients.astype(np.int64))
        builder.save("is_relevant", is_relevant)
        builder.header |= {"all_clients": all_clients, "min_url_count": min_url_count}
        builder.header |= {"target_days": events.target_days}
        try:
            for kind in EVENT_KINDS:
                builder.spill_kind(kind, steps)
            builder.write_vocabularies(min_url_count)
            steps.done()
            builder.write_columns(steps)
        finally:
            builder.close()


def _check_base(base: EventStore, events: EventDirectory, cutoff_s: int, min_url_count: int, all_clients: bool) -> None:
    found = (base.header.get("all_clients"), base.header.get("min_url_count"))
    if (all_clients, min_url_count) != found or min_url_count != 1:
        raise ValueError(
            "build_store: base must have the same all_clients and min_url_count = 1 (rare urls are lost in it), got"
            f" all_clients={found[0]} and min_url_count={found[1]} for {all_clients} and {min_url_count};"
            " build without a base"
        )
    if base.amounts != events.amounts:
        raise ValueError(
            f"build_store: base must have the amounts of the events, {list(events.amounts)}, got {list(base.amounts)};"
            " build without a base"
        )
    if base.cutoff_s > cutoff_s:
        raise ValueError(f"build_store: base must have a cutoff up to {cutoff_s}, got {base.cutoff_s}")


class Builder:
    """Steps of one build, in the order in which `build_store` calls them."""

    def __init__(
        self,
        events: EventDirectory,
        directory: Path,
        cutoff_s: int,
        clients: np.ndarray,
        base: EventStore | None,
        counted: np.ndarray | None,
    ) -> None:
        self._counted, self._counted_urls = counted, Numbering()
        self._events, self._directory, self._cutoff_s, self._base = events, directory, cutoff_s, base
        self._clients = KnownIds(clients)
        self._num_clients = len(clients)
        sizes = sum(events.num_rows(kind) for kind in EVENT_KINDS)
        # A power of two: the block of a client is a shift away.
        self._block_bits = (-(-self._num_clients // min(MAX_BLOCKS, 1 + sizes // BLOCK_EVENTS)) - 1).bit_length()
        self._block_clients = 1 << self._block_bits
        self.num_blocks = -(-self._num_clients // self._block_clients)
        self._spills: dict[str, Spill] = {}
        self._first_s = cutoff_s if base is None else base.first_timestamp_s
        self._kinds = set() if base is None else set(base.kinds)
        self._products = events.products().sort("sku")
        self._skus = KnownIds(self._products["sku"].to_numpy())
        self._sku_counts = {kind: np.zeros(len(self._products), np.int64) for kind in SKU_KINDS}
        self._urls = Numbering()
        self._dense: dict[str, np.ndarray] = {}
        self.header: dict[str, object] = {"format": FORMAT, "cutoff_s": cutoff_s, "num_clients": self._num_clients}
        self.header |= {AMOUNTS: list(events.amounts)} if events.amounts else {}
        if base is not None:
            self._base_rows = self._clients.find(np.asarray(base.client_ids))
            skus = self._skus.find(np.asarray(base.sku_ids[FIRST_ID:]))
            urls = self._urls.number(np.asarray(base.url_ids), np.arange(FIRST_ID, base.num_urls, dtype=np.int32))
            self._urls.add_counts(urls, base.item_counts("page_visit")[FIRST_ID:] - 1)
            self._base_numbers = {"sku": skus, "url": urls}
            for kind in SKU_KINDS:
                self._sku_counts[kind][skus] = base.item_counts(kind)[FIRST_ID:]

    def spill_kind(self, kind: str, steps: Steps) -> None:
        """Reads the history of one kind; keeps the events of our clients, items as numbers."""
        is_query = ITEM_COLUMN[kind] == "query"
        item: np.ndarray = np.empty((0, NUM_CODES), np.uint8) if is_query else np.empty(0, np.int32)
        if kind == "product_buy" and self._events.amounts:
            item = np.empty((0, 1 + len(self._events.amounts)), np.int32)
        spill = Spill(self._directory / f".{kind}", self._block_bits, self.num_blocks, item)
        self._spills[kind] = spill
        from_s = None if self._base is None else self._base.cutoff_s
        for client_id, timestamp_s, values, amounts in self._events.batches(kind, from_s):
            rows, clients = self._clients.known(client_id, timestamp_s, self._cutoff_s)
            times, numbers = timestamp_s[rows], self._numbers(kind, values, rows, clients)
            numbers = with_amounts(numbers, None if amounts is None else amounts[rows])
            if len(rows):
                self._first_s = min(self._first_s, int(times.min()))
                self._kinds.add(kind)
            spill.write(clients, times, numbers)
            steps.done()
        spill.finish()

    def _numbers(self, kind: str, values: np.ndarray, rows: np.ndarray, clients: np.ndarray) -> np.ndarray:
        """Codes, or numbers that `write_vocabularies` turns into dense ids, of some rows of a batch."""
        if ITEM_COLUMN[kind] == "query":
            return values[rows]
        if kind == "page_visit":
            if self._counted is not None:
                self._counted_urls.number(values, rows[self._counted[clients]])
            return self._urls.number(values, rows)
        places = places_of_skus(self._events, kind, self._skus, values[rows])
        count(places, self._sku_counts[kind])
        return places

    def add_counts(self, kind: str, items: np.ndarray, counts: np.ndarray) -> None:
        """How often more some items of a kind came: places of skus in the product table, or urls; none twice."""
        if kind != "page_visit":
            self._sku_counts[kind][items] += counts
            return
        numbers = self._urls.number(items, np.arange(len(items), dtype=np.int32))
        self._urls.add_counts(numbers, counts - 1)

    @property
    def dense_skus(self) -> np.ndarray:
        """Dense ids i32 of the rows of the product table by ascending sku, once the vocabularies are made."""
        return self._dense["sku"]

    def write_vocabularies(self, min_url_count: int) -> None:
        """Makes the vocabularies and writes them and the product table; numbers get their dense ids."""
        is_seen = np.sum(list(self._sku_counts.values()), axis=0) > 0
        products = self._products.filter(pl.Series(is_seen))
        self._dense["sku"] = np.cumsum(is_seen, dtype=np.int32) + np.int32(FIRST_ID - 1)
        for kind, counts in self._sku_counts.items():
            self.save(f"{kind}.item_counts", np.concatenate([np.zeros(FIRST_ID, np.int64), counts[is_seen]]))
        ids, numbers = self._urls.counted(min_url_count)
        if self._counted is not None:
            ids = self._counted_urls.counted(min_url_count)[0]
            numbers = self._urls.number(ids, np.arange(len(ids), dtype=np.int32)).astype(np.int64)
            self._urls.add_counts(numbers, np.full(len(ids), -1))
        order = np.argsort(ids, kind="stable")  # nearly all of them are in order: one pass
        ids, numbers = ids[order], numbers[order]
        url_ids = vocabulary(ids)
        self._dense["url"] = np.zeros(self._urls.end, np.int32)
        every = self._urls.counted(1)[1]
        self._dense["url"][every] = UNKNOWN
        self._dense["url"][numbers] = np.arange(FIRST_ID, len(url_ids))
        counts = self._urls.counts_of(numbers)
        rare = int(self._urls.counts_of(every).sum() - counts.sum())
        self.save("page_visit.item_counts", np.concatenate([np.array([0, rare], np.int64), counts]))
        self.save("url_ids", url_ids)
        dense = dense_products(products)
        self.header |= {"num_skus": len(dense.sku_ids), "num_urls": len(url_ids)}
        self._write_products(dense, products["name"])

    def _write_products(self, dense: DenseProducts, names: pl.Series) -> None:
        """Properties of the skus in the vocabulary; those of later skus must not be seen."""
        self.save("products.sku_id", dense.sku_ids)
        self.save("products.category", dense.category)
        self.save("products.price", dense.price)
        self.save("products.name", np.concatenate([np.zeros((FIRST_ID, NUM_CODES), np.uint8), names.to_numpy()]))
        self.save("category_ids", dense.category_ids)
        num_prices = int(dense.price.max(initial=UNKNOWN)) + 1
        self.header |= {"num_categories": len(dense.category_ids), "num_prices": num_prices}

    def write_columns(self, steps: Steps) -> None:
        """Sorts block by block, appends to the columns of every kind and of the timeline, and writes store.json."""
        counts = {kind: spill.num_events for kind, spill in self._spills.items()}
        if self._base is not None:
            counts = {kind: count + len(self._base.kind(kind).timestamp_s) for kind, count in counts.items()}
        if not self._kinds:
            raise no_history(self._events, self._cutoff_s)
        timeline = ColumnWriter(
            self._directory, TIMELINE, ("timestamp_s", "kind", "row"), self._num_clients, sum(counts.values())
        )
        writers = {}
        for kind, count in counts.items():
            names = columns_of(kind, self._events.amounts)
            writers[kind] = ColumnWriter(self._directory, kind, names, self._num_clients, count)
        time, row_dtype = narrowest(self._first_s, self._cutoff_s), narrowest(0, max(counts.values()))
        for block in range(self.num_blocks):
            parts = [self._sorted(kind, block, time) for kind in EVENT_KINDS]
            offsets, timestamp_s, kind_code, row = merge(parts, [one.num_rows for one in writers.values()], row_dtype)
            timeline.append(offsets, timestamp_s, kind_code, row)
            for writer, part in zip(writers.values(), parts, strict=True):
                writer.append(*part.columns)
            steps.done()
        for writer in (timeline, *writers.values()):
            writer.close()
        self.header |= {
            "first_timestamp_s": self._first_s,
            "kinds": [kind for kind in EVENT_KINDS if kind in self._kinds],
        }
        write_json(self._directory / HEADER_FILE, self.header)

    def _sorted(self, kind: str, block: int, time: type[np.signedinteger]) -> Events:
        """Events of a block of clients with dense ids."""
        first = block * self._block_clients
        num_clients = min(self._block_clients, self._num_clients - first)
        before = None if self._base is None else self._base_records(self._base, kind, first, num_clients)
        keys, items = self._spills[kind].read(block, before)
        items, amounts = without_amounts(items)
        if items.ndim == 1:
            items = self._dense[ITEM_COLUMN[kind]][items]
        return sort_events(keys, items, first, num_clients, time, amounts)

    def _base_records(self, base: EventStore, kind: str, first: int, num_clients: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and items, as numbers, that the base holds of the clients of a block."""
        low, high = np.searchsorted(self._base_rows, [first, first + num_clients])
        columns = base.kind(kind)
        offsets = columns.offsets[low : high + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        keys = keys_of(np.repeat(self._base_rows[low:high], np.diff(offsets)), columns.timestamp_s[rows])
        if columns.item is not None:
            numbers = self._base_numbers[ITEM_COLUMN[kind]][columns.item[rows] - FIRST_ID]
            return keys, with_amounts(numbers, None if columns.amounts is None else columns.amounts[rows])
        if columns.codes is None:
            raise ValueError(f"{base.path}: {kind} of the base must have items or codes, got neither; build it again")
        return keys, columns.codes[rows]

    def save(self, name: str, column: np.ndarray) -> None:
        """Writes one column at once."""
        save_array(self._directory / f"{name}.npy", column)

    def close(self) -> None:
        """Removes the spilled events."""
        for spill in self._spills.values():
            spill.close()


def places_of_skus(events: EventDirectory, kind: str, skus: KnownIds, values: np.ndarray) -> np.ndarray:
    """Places i32 [N] of the skus i64 [N] of some events in the product table.

    Raises:
        DataError: one is not there.
    """
    places = skus.find(values)
    if places.min(initial=0) < 0:
        raise DataError(
            f"{events.path}: column 'sku' of {kind} must occur in the product table, got {values[places < 0][0]};"
            " prepare the events again from their source"
        )
    return places


@njit
def count(places, counts):  # pragma: no cover - compiled
    """Adds 1 to counts[place] for every place."""
    for place in places:
        counts[place] += 1
