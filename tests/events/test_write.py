from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from ubp_fast.events.checks import event_schema
from ubp_fast.events.schema import DataError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.events.write import end_seconds, event_writer
from ubp_fast.files import OutputDirectoryError


def test_end_option() -> None:
    assert end_seconds(None) is None
    assert end_seconds("1970-01-02") == 86_400
    assert end_seconds("1970-01-01T02:00:01+02:00") == 1
    with pytest.raises(ValueError, match="end must be a date-time like '2022-11-09 23:59:59', got 'x'"):
        end_seconds("x")


def test_a_full_disk_leaves_nothing(shop: Callable[..., Path], tmp_path: Path) -> None:
    source = shop(page_visit=lambda table: pl.concat([table] * 20_000).with_columns(url=pl.int_range(pl.len()) * 7919))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutputDirectoryError, match="events: output must be a writable directory with free space"):
            Challenge(str(source)).prepare(tmp_path / "out" / "events")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


def test_no_purchases_until_the_end(shop: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got no purchases at all until 2023-01-02 00:00:00"):
        Challenge(str(shop()), end="2023-01-02").prepare(tmp_path / "events")


def test_the_writer_refuses_other_columns(tmp_path: Path) -> None:
    frame = pl.DataFrame({"client_id": [1], "timestamp_s": [0], "url": [1.5]})
    with (
        pytest.raises(DataError, match="page_visit: columns must be"),
        event_writer(tmp_path / "events", "test") as writer,
    ):
        writer.write_events("page_visit", frame)
    assert list(tmp_path.iterdir()) == []
    assert frame.columns == list(event_schema("page_visit"))
