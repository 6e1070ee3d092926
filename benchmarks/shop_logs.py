"""Logs of the challenge's size and shape, or a part of them; the bytes depend on the scale only.

Log-normal activity of 19 M clients, a million of them (drawn by activity) with 28 % of the events relevant; log-uniform
items; rows in order of time, clients in no order. Nothing here is the challenge's data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.checks import CODES, PRODUCT_SCHEMA, event_schema
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.split import DAY_S, Split
from ubp_fast.events.write import event_writer

EVENTS = {
    "product_buy": 1_682_000,
    "add_to_cart": 5_235_000,
    "remove_from_cart": 1_697_000,
    "page_visit": 150_700_000,
    "search_query": 9_570_000,
}
CLIENTS, RELEVANT, SKUS, URLS, CATEGORIES, DAYS = 19_000_000, 1_000_000, 1_260_000, 5_000_000, 7_000, 140
START_S = 1_655_942_400
CUTOFF_S = START_S + DAYS * DAY_S
PART = 1 << 20


def write_logs(path: Path, scale: float) -> EventDirectory:
    """Writes the canonical event directory; all events lie before `CUTOFF_S`."""
    random = np.random.default_rng(0)
    skus, urls = int(SKUS * scale**0.5), int(URLS * scale**0.5)
    weight = random.lognormal(1.0, 1.5, int(CLIENTS * scale))
    relevant = int(RELEVANT * scale)
    keys = np.log(random.random(len(weight))) / weight
    chosen = np.sort(np.argpartition(keys, len(keys) - relevant)[len(keys) - relevant :])
    sums = np.cumsum(weight)
    with event_writer(path, "benchmark") as writer:
        names = pl.Series(random.integers(0, 256, (skus, 16), dtype=np.uint8), dtype=CODES)
        columns = [np.arange(skus), _popular(random, skus, CATEGORIES), random.integers(0, 100, skus)]
        writer.write_products(pl.DataFrame([*map(pl.Series, columns), names], schema=PRODUCT_SCHEMA))
        for kind, full in EVENTS.items():
            total = int(full * scale)
            for first in range(0, total, PART):
                count = min(PART, total - first)
                client = np.searchsorted(sums, random.random(count) * sums[-1]).clip(max=len(sums) - 1)
                seconds = (np.sort(random.random(count)) * count + first) * (DAYS * DAY_S / total)
                time_s = START_S + seconds.astype(np.int64)
                item = (
                    pl.Series(random.integers(0, 256, (count, 16), dtype=np.uint8), dtype=CODES)
                    if kind == "search_query"
                    else pl.Series(_popular(random, count, urls if kind == "page_visit" else skus))
                )
                frame = pl.DataFrame([pl.Series(client), pl.Series(time_s), item], schema=event_schema(kind))
                writer.write_events(kind, frame)
        writer.write_clients("relevant_clients", chosen)
        writer.finish(Split(CUTOFF_S, CUTOFF_S + 14 * DAY_S, CUTOFF_S + 28 * DAY_S))
    return EventDirectory.open(path)


def _popular(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    rank = np.exp(random.random(count) * np.log(size + 1.0)).astype(np.int64) - 1
    return rank.clip(max=size - 1) * 2_654_435_761 % size
