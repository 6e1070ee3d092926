from __future__ import annotations

import polars as pl
import pytest

from ubp_fast.events.checks import bad_rows, event_schema, require_canonical, require_columns, require_unique
from ubp_fast.events.schema import EVENT_KINDS, ITEM_COLUMN, DataError


def test_every_kind_has_an_item_column() -> None:
    assert set(ITEM_COLUMN) == set(EVENT_KINDS)
    assert list(event_schema("page_visit")) == ["client_id", "timestamp_s", "url"]


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'purchase'"):
        event_schema("purchase")


def test_message_names_file_column_row_count_and_remedy() -> None:
    values = pl.Series([1, -2, 3, -4])
    error = bad_rows("a.parquet", "sku", "be positive", values < 0, values, "drop them", "odd")
    assert str(error) == (
        "a.parquet: column 'sku' must be positive, got -2 (odd) in row 1 (2 bad rows of 4); drop them"
    )


def test_long_values_are_cut() -> None:
    values = pl.Series(["x" * 500])
    assert len(str(bad_rows("f", "c", "be short", values.is_not_null(), values, "cut"))) < 200


def test_missing_column() -> None:
    with pytest.raises(DataError, match=r"f: column 'sku' must exist, got columns \['url'\]; rename"):
        require_columns("f", ["url"], ["url", "sku"], "rename it")


def test_repeated_value() -> None:
    with pytest.raises(DataError, match=r"got 7 \(seen before\) in row 2 \(1 bad row of 3\)"):
        require_unique("f", "sku", pl.Series([7, 8, 7]), "keep one")


@pytest.mark.parametrize(
    "frame",
    [
        pl.DataFrame({"client_id": [1], "timestamp_s": [1], "sku": [1.0]}),
        pl.DataFrame({"client_id": [1], "sku": [1], "timestamp_s": [1]}).select("sku", "client_id", "timestamp_s"),
        pl.DataFrame({"client_id": [1], "timestamp_s": [1], "sku": [None]}, schema=event_schema("product_buy")),
    ],
    ids=["dtype", "order", "null"],
)
def test_canonical_frames_are_checked(frame: pl.DataFrame) -> None:
    with pytest.raises(DataError):
        require_canonical("f", frame, event_schema("product_buy"))
