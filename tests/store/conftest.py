"""Small event directories, written by code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import CODES, EVENT_KINDS, PRODUCT_SCHEMA, event_schema
from ubp_fast.events.split import Split
from ubp_fast.events.write import event_writer

Rows = dict[str, list[tuple[int, int, int]]]
NUM_PRODUCTS = 8


def frame_of(kind: str, rows: list[tuple[int, int, int]]) -> pl.DataFrame:
    """Canonical table of (client, time, item); the item of a search is the first of its codes."""
    schema = event_schema(kind)
    clients, times, items = ([row[column] for row in rows] for column in range(3))
    item: pl.Series = pl.Series(items, dtype=pl.Int64)
    if kind == "search_query":
        codes = np.zeros((len(rows), 16), np.uint8)
        codes[:, 0] = np.array(items, np.int64) % 256
        item = pl.Series(codes, dtype=CODES)
    return pl.DataFrame([pl.Series(clients, dtype=pl.Int64), pl.Series(times, dtype=pl.Int64), item], schema=schema)


def product_frame(skus: list[int]) -> pl.DataFrame:
    """Properties that follow from the sku."""
    index = np.array(skus)
    codes = np.repeat(index[:, None] % 256, 16, axis=1).astype(np.uint8)
    columns = [pl.Series(skus), pl.Series(1000 + index % 3), pl.Series(index * 7 % 100), pl.Series(codes, dtype=CODES)]
    return pl.DataFrame(columns, schema=PRODUCT_SCHEMA)


@pytest.fixture
def write_events() -> Callable[..., EventDirectory]:
    """Writes rows by kind; a purchase far in the future makes every directory a valid one."""

    def write(directory: Path, rows: Rows, relevant: list[int] | None = None) -> EventDirectory:
        skus = sorted({item for kind in EVENT_KINDS[:3] for _, _, item in rows.get(kind, [])} | {0})
        with event_writer(directory, "test") as writer:
            writer.write_products(product_frame(skus))
            for kind in EVENT_KINDS:
                more = [(10**6, 10**9, 0)] if kind == "product_buy" else []
                writer.write_events(kind, frame_of(kind, rows.get(kind, []) + more))
            if relevant is not None:
                writer.write_clients("relevant_clients", np.array(relevant, np.int64))
            writer.finish(Split(10**9 - 2, 10**9 - 1, 10**9))
        return EventDirectory.open(directory)

    return write
