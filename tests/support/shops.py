"""Small shops for tests: seeded events of chosen kinds with tastes that can be learned, or given rows; their stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.checks import CODES, PRODUCT_SCHEMA, event_schema
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN
from ubp_fast.events.split import Split
from ubp_fast.events.write import event_writer
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

DAY_S = 86_400
START_S = 1_700_000_000
DAYS = 84
END_S = START_S + DAYS * DAY_S
NUM_SKUS, NUM_URLS = 40, 25
EMPTY_CLIENT, PURCHASES_PER_CLIENT = 5, 30

Rows = dict[str, list[tuple[int, int, int]]]


def write_shop(
    path: Path,
    kinds: tuple[str, ...] = EVENT_KINDS,
    clients: int = 30,
    seed: int = 0,
    scrambled_from_s: int | None = None,
) -> EventDirectory:
    """Writes a shop whose client u likes every sku with sku % 5 == u % 5.

    Args:
        path: new directory.
        kinds: tables to write.
        clients: ids are 100, 101, ...; the one with row `EMPTY_CLIENT` has no events.
        seed: of everything.
        scrambled_from_s: events from here on have other items and other times.
    """
    split = Split(END_S - 28 * DAY_S, END_S - 14 * DAY_S, END_S)
    with event_writer(path, "test") as writer:
        sku = np.arange(NUM_SKUS)
        names = np.random.default_rng(seed).integers(0, 256, (NUM_SKUS, 16)).astype(np.uint8)
        writer.write_products(
            pl.DataFrame(
                {"sku": sku, "category": sku % 5 + 7, "price": sku % 10, "name": pl.Series(names, dtype=CODES)}
            )
        )
        for number, kind in enumerate(kinds):
            writer.write_events(kind, _events(kind, clients, np.random.default_rng([seed, number]), scrambled_from_s))
        writer.write_clients("relevant_clients", np.arange(100, 100 + clients))
        writer.finish(split)
    return EventDirectory.open(path)


def _events(kind: str, clients: int, random: np.random.Generator, scrambled_from_s: int | None) -> pl.DataFrame:
    counts = random.integers(1, PURCHASES_PER_CLIENT, clients)
    counts[EMPTY_CLIENT] = 0
    client = np.repeat(np.arange(clients), counts)
    timestamp_s = START_S + random.integers(0, DAYS * DAY_S, len(client))
    timestamp_s[0] = START_S
    sku = random.integers(0, NUM_SKUS // 5, len(client)) * 5 + client % 5
    url, codes = random.integers(0, NUM_URLS, len(client)), random.integers(0, 256, (len(client), 16))
    if scrambled_from_s is not None:
        late = timestamp_s >= scrambled_from_s
        timestamp_s[late] = random.integers(scrambled_from_s, END_S, late.sum())
        sku[late], url[late], codes[late] = (sku[late] + 3) % NUM_SKUS, (url[late] + 1) % NUM_URLS, 255 - codes[late]
    items = {"sku": sku, "url": url, "query": pl.Series(codes.astype(np.uint8), dtype=CODES)}
    column = ITEM_COLUMN[kind]
    return pl.DataFrame({"client_id": client + 100, "timestamp_s": timestamp_s, column: items[column]})


def make_store(
    path: Path,
    kinds: tuple[str, ...] = EVENT_KINDS,
    clients: int = 30,
    seed: int = 0,
    scrambled_from_s: int | None = None,
) -> EventStore:
    """The store of such a shop, with all events before its end, below the new directory `path`."""
    events = write_shop(path / "events", kinds, clients, seed, scrambled_from_s)
    build_store(events, path / "store", END_S)
    return EventStore.open(path / "store")


def amounts_of(number: int, amounts: Sequence[str]) -> np.ndarray:
    """Float32 [number, A] that tell rows of a table apart: pieces 1, 2, 3, ..., and money."""
    row = np.arange(number)
    columns = {"quantity": row + 1.0, "spend": 0.1 + row / 3}
    return np.stack([columns[name] for name in amounts], axis=1).astype(np.float32)


def frame_of(kind: str, rows: list[tuple[int, int, int]], amounts: Sequence[str] = ()) -> pl.DataFrame:
    """Canonical table of (client, time, item); the item of a search is the first of its codes."""
    schema = event_schema(kind, amounts)
    clients, times, items = ([row[column] for row in rows] for column in range(3))
    item: pl.Series = pl.Series(items, dtype=pl.Int64)
    if kind == "search_query":
        codes = np.zeros((len(rows), 16), np.uint8)
        codes[:, 0] = np.array(items, np.int64) % 256
        item = pl.Series(codes, dtype=CODES)
    more = [pl.Series(one) for one in amounts_of(len(rows), amounts).T] if len(schema) > 3 else []
    columns = [pl.Series(clients, dtype=pl.Int64), pl.Series(times, dtype=pl.Int64), item, *more]
    return pl.DataFrame(columns, schema=schema)


def product_frame(skus: list[int]) -> pl.DataFrame:
    """Properties that follow from the sku."""
    index = np.array(skus)
    codes = np.repeat(index[:, None] % 256, 16, axis=1).astype(np.uint8)
    columns = [pl.Series(skus), pl.Series(1000 + index % 3), pl.Series(index * 7 % 100), pl.Series(codes, dtype=CODES)]
    return pl.DataFrame(columns, schema=PRODUCT_SCHEMA)


def write_rows(
    directory: Path, rows: Rows, relevant: list[int] | None = None, amounts: Sequence[str] = ()
) -> EventDirectory:
    """Writes (client, time, item) by kind, and a purchase far in the future that makes every directory a valid one."""
    skus = sorted({item for kind in EVENT_KINDS[:3] for _, _, item in rows.get(kind, [])} | {0})
    with event_writer(directory, "test") as writer:
        writer.write_products(product_frame(skus))
        for kind in EVENT_KINDS:
            more = [(10**6, 10**9, 0)] if kind == "product_buy" else []
            writer.write_events(kind, frame_of(kind, rows.get(kind, []) + more, amounts))
        if relevant is not None:
            writer.write_clients("relevant_clients", np.array(relevant, np.int64))
        writer.finish(Split(10**9 - 2, 10**9 - 1, 10**9))
    return EventDirectory.open(directory)
