"""A small shop in the organisers' raw layout, written by code."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

START = datetime(2023, 1, 1, 12)
CODES = "[" + " ".join(str(code) for code in range(16)) + "]"
Change = Callable[[pl.DataFrame], pl.DataFrame]


def _times(days: list[float]) -> list[str]:
    return [(START + timedelta(days=day)).strftime("%Y-%m-%d %H:%M:%S") for day in days]


def raw_tables() -> dict[str, pl.DataFrame]:
    """Three clients, six products, 60 days; the last purchase is on day 60."""
    return {
        "product_buy": pl.DataFrame(
            {"client_id": [3, 1, 2, 1], "timestamp": _times([5, 2, 40, 60]), "sku": [10, 11, 12, 10]}
        ),
        "add_to_cart": pl.DataFrame({"client_id": [3, 1], "timestamp": _times([4.9, 61]), "sku": [10, 13]}),
        "remove_from_cart": pl.DataFrame({"client_id": [2], "timestamp": _times([7]), "sku": [14]}),
        "page_visit": pl.DataFrame({"client_id": [1, 2, 3], "timestamp": _times([0, 0, 50]), "url": [5, 5, 7]}),
        "search_query": pl.DataFrame({"client_id": [2], "timestamp": _times([3]), "query": [CODES]}),
        "product_properties": pl.DataFrame(
            {
                "sku": range(10, 16),
                "category": [0, 0, 1, 1, 2, 2],
                "price": [0, 20, 40, 60, 80, 99],
                "name": [CODES] * 6,
            }
        ),
    }


@pytest.fixture
def shop(tmp_path: Path) -> Callable[..., Path]:
    """Writes the shop's tables after changes: `shop(product_buy=lambda table: ...)`, None leaves a table out."""

    def write(**changes: Change | None) -> Path:
        directory = tmp_path / "shop"
        directory.mkdir()
        for name, table in raw_tables().items():
            change = changes.get(name, lambda table: table)
            if change is not None:
                change(table).write_parquet(directory / f"{name}.parquet")
        return directory

    return write
