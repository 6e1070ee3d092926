from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from support.shops import product_frame

from ubp_fast.events.checks import PURCHASE_SCHEMA, event_schema
from ubp_fast.events.read import EventDirectory
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


def purchases(days: list[int], **amounts: list[float]) -> pl.DataFrame:
    time_s = [day * 86_400 for day in days]
    columns = {"client_id": [1] * len(days), "timestamp_s": time_s, "sku": [5] * len(days)}
    return pl.DataFrame(columns | amounts, schema=event_schema("product_buy", list(amounts)))


def written(path: Path, *frames: pl.DataFrame) -> EventDirectory:
    with event_writer(path, "test") as writer:
        writer.write_products(product_frame([5]))
        for frame in frames:
            writer.write_events("product_buy", frame)
        writer.finish(writer.fitting_split())
    return EventDirectory.open(path)


def test_amounts_of_purchases_come_back(tmp_path: Path) -> None:
    first, second = purchases([0, 9], quantity=[2, 1.5], spend=[0, 9.25]), purchases([60], quantity=[7], spend=[1.1])
    events = written(tmp_path / "events", first, second)
    assert events.amounts == ("quantity", "spend")
    assert_frame_equal(events.frame("product_buy"), pl.concat([first, second]))
    (batch,) = events.batches("product_buy")
    assert batch.amounts is not None and batch.amounts.dtype == np.float32
    np.testing.assert_array_equal(batch.amounts, np.array([[2, 0], [1.5, 9.25], [7, 1.1]], np.float32))
    assert events.purchases(0, 10**9).columns == list(PURCHASE_SCHEMA)
    assert written(tmp_path / "spend", purchases([0, 60], spend=[1, 2])).amounts == ("spend",)
    plain = written(tmp_path / "plain", purchases([0, 60]))
    assert plain.amounts == () and "amounts" not in plain.info
    assert next(plain.batches("product_buy")).amounts is None


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), None])
def test_amounts_that_are_none(tmp_path: Path, bad: float | None) -> None:
    rule = "hold no null" if bad is None else "hold finite numbers >= 0"
    with pytest.raises(DataError, match=f"product_buy: column 'spend' must {rule}, got {bad} in row 1"):
        written(tmp_path / "events", purchases([0, 60], spend=[1, bad]))  # type: ignore[list-item]


def test_all_purchases_have_the_same_amounts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"product_buy: columns must be .*'spend': Float32"):
        written(tmp_path / "events", purchases([0], spend=[1]), purchases([60]))
    events = written(tmp_path / "again", purchases([0, 60], spend=[1, 2]))
    purchases([0, 60]).write_parquet(events.path / "product_buy.parquet")
    with pytest.raises(DataError, match=r"product_buy.parquet: columns must be .*'spend': Float32"):
        EventDirectory.open(events.path)
