from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.parse import hash_texts
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError
from ubp_fast.events.sources.table import Table

START = datetime(2023, 1, 1)
CODES = "[" + " ".join(str(code) for code in range(16)) + "]"
OPTIONS: dict[str, Any] = {
    "client_column": "user",
    "timestamp_column": "when",
    "kind_column": "what",
    "kinds": {"bought": "product_buy", "saw": "page_visit", "asked": "search_query", "liked": "ignore"},
    "sku_column": "item",
    "url_column": "item",
    "query_column": "text",
    "category_column": "shelf",
    "price_column": "euro",
    "name_column": "title",
}


def log() -> pl.DataFrame:
    """Sixty days; the input ends on day 33 (last purchase on day 60)."""
    rows = [
        # day, user, what, item, text, shelf, euro, title
        (9, "zoe", "bought", "cup", None, "kitchen", 3.0, "Red cup"),
        (2, "adam", "saw", "cup", None, None, None, None),
        (60, "zoe", "bought", "pan", None, "garden", 99.0, "Iron pan"),
        (5, "adam", "bought", "pan", None, "kitchen", 20.0, "Pan"),
        (7, "adam", "asked", None, "red CUP!", None, None, None),
        (8, "zoe", "liked", None, None, None, None, None),
        (12, "zoe", "bought", "cup", None, "garden", 5.0, "Blue cup"),
        (50, "eve", "bought", "hose", None, "garden", 50.0, None),
    ]
    columns = ["day", "user", "what", "item", "text", "shelf", "euro", "title"]
    table = pl.DataFrame(rows, schema=columns, orient="row")
    return table.with_columns(when=pl.Series([str(START + timedelta(days=day)) for day in table["day"]])).drop("day")


def prepared(tmp_path: Path, table: pl.DataFrame, **changes: Any) -> EventDirectory:
    path = tmp_path / "log.parquet"
    table.write_parquet(path)
    Table(str(path), **{**OPTIONS, **changes}).prepare(tmp_path / "events")
    return EventDirectory.open(tmp_path / "events")


def mapping(events: EventDirectory, name: str) -> dict[str, int]:
    return dict(pl.read_parquet(events.path / "maps" / f"{name}.parquet").select("value", "id").iter_rows())


def test_text_ids_are_numbered_by_time_and_rows_keep_their_order(tmp_path: Path) -> None:
    events = prepared(tmp_path, log())
    assert events.kinds == ("product_buy", "page_visit", "search_query")
    assert mapping(events, "client_id") == {"adam": 0, "zoe": 1, "eve": 2}
    assert mapping(events, "sku") == {"pan": 0, "cup": 1, "hose": 2}
    assert mapping(events, "url") == {"cup": 0}
    buys = events.frame("product_buy")
    assert buys["client_id"].to_list() == [1, 1, 0, 1, 2]
    assert buys["sku"].to_list() == [1, 0, 0, 1, 2]
    assert events.frame("page_visit")["url"].to_list() == [0]
    assert events.split.input_end_s == int((START + timedelta(days=33)).timestamp() - datetime(1970, 1, 1).timestamp())


def test_products_are_described_by_the_history(tmp_path: Path) -> None:
    """The pan costs 99 and stands in the garden only after the input's end."""
    products = prepared(tmp_path, log()).products()
    categories = dict(mapping(EventDirectory.open(tmp_path / "events"), "category").items())
    assert products["sku"].to_list() == [0, 1, 2]
    assert products["category"].to_list() == [categories["kitchen"], categories["kitchen"], categories["garden"]]
    # Medians before the end: pan 20, cup 4; the hose (50, later) lies above all edges.
    assert products["price"].to_list() == [99, 0, 99]
    names = hash_texts(pl.Series(["Pan", "Red cup", ""])).to_list()
    assert products["name"].to_list() == names


def test_changes_after_the_input_do_not_reach_the_history(tmp_path: Path) -> None:
    first = prepared(tmp_path, log())
    late = pl.col("when") > "2023-02-10"
    changed = log().with_columns(
        user=pl.when(late).then(pl.lit("aaron")).otherwise("user"), euro=pl.when(late).then(1.0).otherwise("euro")
    )
    (tmp_path / "changed").mkdir()
    second = prepared(tmp_path / "changed", changed)
    for kind in first.kinds:
        before = pl.col("timestamp_s") < first.split.input_end_s
        assert first.frame(kind).filter(before).equals(second.frame(kind).filter(before))
    assert first.products().head(2).equals(second.products().head(2))


def test_csv_equals_parquet(tmp_path: Path) -> None:
    events = prepared(tmp_path, log())
    log().write_csv(tmp_path / "log.csv", separator=";")
    Table(str(tmp_path / "log.csv"), separator=";", **OPTIONS).prepare(tmp_path / "from_csv")
    other = EventDirectory.open(tmp_path / "from_csv")
    assert {**events.info, "notes": []} == {**other.info, "notes": []}
    for kind in events.kinds:
        assert events.frame(kind).equals(other.frame(kind))
    assert events.products().equals(other.products())


def test_purchases_only_with_integer_ids_and_milliseconds(tmp_path: Path) -> None:
    start_ms = 1_672_531_200_000
    table = pl.DataFrame(
        {"client_id": [9, 7, 9], "timestamp": [start_ms, start_ms + 1999, start_ms + 50 * 86_400_000], "sku": [5, 3, 5]}
    )
    table.write_parquet(tmp_path / "log.parquet")
    Table(str(tmp_path / "log.parquet"), timestamp_unit="ms").prepare(tmp_path / "events")
    events = EventDirectory.open(tmp_path / "events")
    assert events.kinds == ("product_buy",)
    assert events.frame("product_buy")["client_id"].to_list() == [9, 7, 9]
    assert events.frame("product_buy")["timestamp_s"][1] == start_ms // 1000 + 1
    assert events.products().select("sku", "category", "price").rows() == [(5, 0, 0), (3, 0, 0)]
    assert not (events.path / "maps").exists()


def test_products_without_price_or_category(tmp_path: Path) -> None:
    table = log().with_columns(
        euro=pl.when(pl.col("item") == "cup").then(float("nan")).otherwise("euro"),
        shelf=pl.when(pl.col("item") == "cup").then(None).otherwise("shelf"),
    )
    events = prepared(tmp_path, table)
    assert events.products()["price"].to_list()[1] == 0
    assert "UNKNOWN" in mapping(events, "category")
    assert any("1 products have no price" in note for note in events.info["notes"])


def test_queries_and_names_as_codes(tmp_path: Path) -> None:
    table = log().with_columns(text=pl.when(pl.col("what") == "asked").then(pl.lit(CODES)), title=pl.lit(CODES))
    events = prepared(tmp_path, table, text_format="codes")
    assert events.frame("search_query")["query"].to_list() == [list(range(16))]
    assert events.products()["name"].to_list() == [list(range(16))] * 3


def test_an_earlier_end(tmp_path: Path) -> None:
    events = prepared(tmp_path, log(), end="2023-02-25")
    assert events.frame("product_buy")["sku"].to_list() == [1, 0, 1, 2]
    assert events.split.end_s < prepared_end(log())


def prepared_end(table: pl.DataFrame) -> int:
    return int(table["when"].str.to_datetime().max().timestamp())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("what", 3, "sold", r"column 'what' must be one of .*'liked'\], got 'sold' in row 3 \(1 bad row of 8\); map"),
        ("what", 3, None, "column 'what' must be one of .* got None in row 3"),
        ("user", 6, None, "column 'user' must hold a value, got None in row 6"),
        ("item", 3, None, "column 'item' must hold a value, got None in row 3"),
        ("text", 4, None, "column 'text' must hold a value, got None in row 4"),
        ("when", 7, "yesterday", "column 'when' must hold a time, got 'yesterday' in row 7"),
    ],
)
def test_bad_rows_are_numbered_as_in_the_file(
    tmp_path: Path, column: str, row: int, value: object, message: str
) -> None:
    values: list[object] = log()[column].to_list()
    values[row] = value
    with pytest.raises(DataError, match=rf"log.parquet: {message}"):
        prepared(tmp_path, log().with_columns(pl.Series(column, values, dtype=pl.String)))
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_malformed_codes_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    table = log().with_columns(
        text=pl.when(pl.col("what") == "asked").then(pl.lit("[1 2 x]")), title=pl.lit(None, pl.String)
    )
    with pytest.raises(DataError, match=r"column 'text' must hold vectors .* in row 4 \(1 bad row of 8\)"):
        prepared(tmp_path, table, text_format="codes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"client_column": "client"},
            "log.parquet: column 'client' must exist, got columns .* name the column in the",
        ),
        ({"query_column": None}, "rows of kind search_query must have a column for 'query', got none; name it with"),
        (
            {"kinds": {"bought": "ignore", "saw": "page_visit", "asked": "ignore", "liked": "ignore"}},
            "no purchases at all",
        ),
        ({"end": "2023-01-03"}, "no purchases at all"),
        (
            {"price_column": "shelf"},
            "'shelf' must hold numbers or nothing, got 'kitchen' in row 0 .5 bad rows of 8",
        ),
    ],
)
def test_configurations_that_do_not_fit_the_table(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, log(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": {"bought": "purchase"}}, "kinds must map to .*'ignore'\\], got 'purchase' for 'bought'"),
        ({"text_format": "bytes"}, "text_format must be one of .* got 'bytes'"),
        ({"timestamp_unit": "h"}, "unit must be one of .* got 'h'"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, log(), **changes)


def test_empty_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="table must hold events, got 0 rows"):
        prepared(tmp_path, log().head(0))


def test_ids_with_a_fraction_are_refused(tmp_path: Path) -> None:
    values = pl.Series("user", [1.0, 2.0, 3.0, 1.5, 1.0, 1.0, 1.0, 1.0])
    with pytest.raises(DataError, match=r"column 'user' must hold ids without a fraction, got 1.5 in row 3 .1 bad row"):
        prepared(tmp_path, log().with_columns(values))


def test_texts_with_the_same_words_share_codes() -> None:
    codes = hash_texts(
        pl.Series("name", ["Red cup", "red, CUP", "red pan", None, "", "a b c d e f g h i j k l m n o p q r"])
    )
    red_cup, same, red_pan, null, empty, long = codes.to_list()
    assert red_cup == same
    assert red_cup[::2] == red_pan[::2]
    assert red_cup[1::2] != red_pan[1::2]
    assert null == empty
    assert len(long) == 16
    assert np.unique(red_cup).size > 8
    assert codes.name == "name"
