"""Building the event store: canonical tables -> client-sorted columns of the history before a cutoff."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.progress import Progress, Steps
from ubp_fast.events.publish import published_directory
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, NUM_CODES, SKU_KINDS, DataError
from ubp_fast.store.event_store import FORMAT, HEADER_FILE, TIMELINE
from ubp_fast.store.vocabulary import FIRST_ID, UNKNOWN, encode, vocabulary


def build_store(
    events: EventDirectory,
    path: Path,
    cutoff_s: int,
    min_url_count: int = 1,
    all_clients: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the store of all events with `timestamp_s < cutoff_s`; nothing later is looked at.

    Clients are the relevant clients of the source when it names them, else all with an event before the cutoff.
    Vocabularies hold what these clients' events before the cutoff hold.

    Args:
        events: the canonical events.
        path: new or empty directory; it appears when the store is complete.
        cutoff_s: seconds since 1970 UTC.
        min_url_count: urls with fewer visits before the cutoff share the id "unknown" (the winner: 10).
        all_clients: also keep clients that the source does not name as relevant (`EventStore.is_relevant` tells them
            apart), for models that learn from everybody.
        progress: called with (steps done, steps in all).

    Raises:
        DataError: no event before the cutoff, or the directory is in use or cannot be written.
    """
    clients, is_relevant = _clients(events, cutoff_s, all_clients)
    with published_directory(Path(path)) as partial:
        builder = _Builder(events, partial, cutoff_s, clients, is_relevant)
        steps = Steps(progress, len(EVENT_KINDS) + 2)
        for kind in EVENT_KINDS:
            builder.sort_kind(kind)
            steps.done()
        builder.write_items(min_url_count)
        steps.done()
        builder.write_timeline()
        builder.write_header()
        steps.done()


def _clients(events: EventDirectory, cutoff_s: int, all_clients: bool) -> tuple[np.ndarray, np.ndarray]:
    """Client ids of the store, ascending, and which of them need a profile."""
    relevant = events.relevant_clients
    if relevant is not None and not all_clients:
        return np.sort(relevant), np.ones(len(relevant), bool)
    before = pl.col("timestamp_s") < cutoff_s
    parts = [events.scan(kind).filter(before).select(pl.col("client_id").unique()) for kind in events.kinds]
    present = pl.concat(parts).collect()["client_id"].unique().sort().to_numpy()
    if relevant is None:
        return present, np.ones(len(present), bool)
    clients = np.union1d(present, relevant)
    return clients, np.isin(clients, relevant)


class _Builder:
    """Steps of one build, in the order in which `build_store` calls them; holds the sorted columns of all kinds."""

    def __init__(
        self, events: EventDirectory, directory: Path, cutoff_s: int, clients: np.ndarray, is_relevant: np.ndarray
    ) -> None:
        self._events, self._directory, self._cutoff_s, self._clients = events, directory, cutoff_s, clients
        self._client_row: dict[str, np.ndarray] = {}
        self._timestamp_s: dict[str, np.ndarray] = {}
        self._item: dict[str, np.ndarray] = {}
        self._header: dict[str, object] = {"format": FORMAT, "cutoff_s": cutoff_s, "num_clients": len(clients)}
        self._save("client_ids", clients.astype(np.int64))
        self._save("is_relevant", is_relevant)

    def sort_kind(self, kind: str) -> None:
        """Reads the history of one kind and sorts it by client and time, ties in file order."""
        frame = self._events.scan(kind).filter(pl.col("timestamp_s") < self._cutoff_s).collect()
        client_id = frame["client_id"].to_numpy()
        row = np.searchsorted(self._clients, client_id)
        row[row == len(self._clients)] = 0
        known = np.flatnonzero(self._clients[row] == client_id) if len(self._clients) else np.empty(0, np.int64)
        row, timestamp_s = row[known], frame["timestamp_s"].to_numpy()[known]
        order = _order_by_client_and_time(row, timestamp_s)
        self._client_row[kind], self._timestamp_s[kind] = row[order], timestamp_s[order]
        self._item[kind] = frame[ITEM_COLUMN[kind]].to_numpy()[known][order]
        self._save(f"{kind}.offsets", _offsets(self._client_row[kind], len(self._clients)))
        self._save(f"{kind}.timestamp_s", self._timestamp_s[kind])

    def write_items(self, min_url_count: int) -> None:
        """Makes the vocabularies and writes items as dense ids, and the product table."""
        sku_ids = vocabulary(np.concatenate([self._item[kind] for kind in SKU_KINDS]))
        url_ids = vocabulary(self._item["page_visit"], min_url_count)
        for kind in SKU_KINDS:
            self._save(f"{kind}.item", encode(self._item[kind], sku_ids))
        self._save("page_visit.item", encode(self._item["page_visit"], url_ids))
        self._save("search_query.codes", self._item["search_query"].reshape(-1, NUM_CODES))
        self._save("url_ids", url_ids)
        self._header |= {"num_skus": len(sku_ids), "num_urls": len(url_ids)}
        self._write_products(sku_ids)

    def _write_products(self, sku_ids: np.ndarray) -> None:
        """Properties of the skus in the vocabulary; those of later skus must not be seen."""
        wanted = pl.DataFrame({"sku": sku_ids[FIRST_ID:]})
        products = wanted.join(self._events.products(), on="sku", how="left", maintain_order="left")
        special = np.arange(FIRST_ID, dtype=np.int32)
        category_ids = vocabulary(products["category"].to_numpy())
        category = np.concatenate([special, encode(products["category"].to_numpy(), category_ids)])
        price = np.concatenate([special, products["price"].to_numpy().astype(np.int32) + FIRST_ID])
        name = np.concatenate([np.zeros((FIRST_ID, NUM_CODES), np.uint8), products["name"].to_numpy()])
        self._save("products.sku_id", sku_ids)
        self._save("products.category", category)
        self._save("products.price", price.astype(np.int32))
        self._save("products.name", name)
        self._save("category_ids", category_ids)
        self._header |= {"num_categories": len(category_ids), "num_prices": int(price.max(initial=UNKNOWN)) + 1}

    def write_timeline(self) -> None:
        """Merges all kinds by client and time; the sort is stable, so ties keep the order of kinds and rows."""
        client_row = np.concatenate([self._client_row[kind] for kind in EVENT_KINDS])
        timestamp_s = np.concatenate([self._timestamp_s[kind] for kind in EVENT_KINDS])
        if not len(timestamp_s):
            raise DataError(
                f"{self._events.path}: the cutoff must lie after the first event of a client, got {self._cutoff_s}"
                " with no event before it; choose a later cutoff or check the relevant clients"
            )
        lengths = [len(self._timestamp_s[kind]) for kind in EVENT_KINDS]
        kind = np.repeat(np.arange(1, len(EVENT_KINDS) + 1, dtype=np.uint8), lengths)
        row = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        order = _order_by_client_and_time(client_row, timestamp_s)
        self._save(f"{TIMELINE}.offsets", _offsets(client_row, len(self._clients)))
        self._save(f"{TIMELINE}.timestamp_s", timestamp_s[order])
        self._save(f"{TIMELINE}.kind", kind[order])
        self._save(f"{TIMELINE}.row", row[order])
        self._header["first_timestamp_s"] = int(timestamp_s.min())

    def write_header(self) -> None:
        """Writes store.json."""
        self._header["kinds"] = [kind for kind in EVENT_KINDS if len(self._timestamp_s[kind])]
        (self._directory / HEADER_FILE).write_text(json.dumps(self._header, indent=1) + "\n", encoding="utf-8")

    def _save(self, name: str, column: np.ndarray) -> None:
        np.save(self._directory / f"{name}.npy", np.ascontiguousarray(column))


def _order_by_client_and_time(client_row: np.ndarray, timestamp_s: np.ndarray) -> np.ndarray:
    """Stable order by client, then time.

    One 64-bit key instead of two sort passes: times span less than 2^34 s (years 1900..2199), clients fewer than 2^29.
    """
    if not len(timestamp_s):
        return np.empty(0, np.int64)
    first = timestamp_s.min()
    span = int(timestamp_s.max() - first) + 1
    assert (int(client_row.max()) + 1) * span < 2**63
    return np.argsort(client_row * span + (timestamp_s - first), kind="stable")


def _offsets(client_row: np.ndarray, num_clients: int) -> np.ndarray:
    counts = np.bincount(client_row, minlength=num_clients)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
