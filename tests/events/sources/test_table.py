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
from ubp_fast.events.sources.table_rows import numbers

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


def plain(tmp_path: Path, content: str | pl.DataFrame, **options: Any) -> EventDirectory:
    """Purchases of a file: sixty days of client 1, and the rows given."""
    path = tmp_path / "log"
    if isinstance(content, str):
        path.write_text(content)
    else:
        content.write_parquet(path)
    Table(str(path), **options).prepare(tmp_path / "events")
    return EventDirectory.open(tmp_path / "events")


HEADER = "client_id,timestamp,sku,pieces,price\n"
FIRST, LAST = "1,2024-01-01 00:00:00,5,1,2.50\n", "1,2024-03-01 00:00:00,5,1,2.50\n"


def test_returns_are_no_purchases(tmp_path: Path) -> None:
    rows = "2,2024-01-05,6,-1,2\n2,2024-01-06,6,0,2\n2,2024-01-07,7,3,2\n"
    events = plain(tmp_path, HEADER + FIRST + rows + LAST, quantity_column="pieces")
    assert events.frame("product_buy")["sku"].to_list() == [5, 7, 5]
    assert [note.split(": ")[1] for note in events.info["notes"]] == [
        "1 rows of a negative quantity are returns or cancellations, left out",
        "1 rows of quantity 0 are left out",
    ]


@pytest.mark.parametrize(
    ("options", "quantity", "spend"),
    [
        ({}, None, None),
        ({"quantity_column": "pieces"}, [1, 3, 2.5, 1], None),
        ({"price_column": "price"}, None, [2.5, 0, 0, 2.5]),
        ({"price_column": "price", "quantity_column": "pieces"}, [1, 3, 2.5, 1], [2.5, 0, 0, 2.5]),
        ({"spend_column": "total"}, None, [2, 9, 0, 7]),
        ({"spend_column": "total", "price_column": "price", "quantity_column": "pieces"}, [1, 3, 2.5, 1], [2, 9, 0, 7]),
    ],
)
def test_pieces_and_money(
    tmp_path: Path, options: dict[str, str], quantity: list[float] | None, spend: list[float] | None
) -> None:
    """Money is price times pieces, or a column of its own; missing and negative prices cost nothing."""
    rows = "1,2024-01-01,5,1,2.50,2\n2,2024-01-05,6,3,,9\n2,2024-01-06,6,2.5,-4,-1\n1,2024-03-01,5,1,2.50,7\n"
    events = plain(tmp_path, HEADER.replace("price", "price,total") + rows, **options)
    found = {name: events.frame("product_buy")[name].to_list() for name in events.amounts}
    assert found == {name: one for name, one in (("quantity", quantity), ("spend", spend)) if one is not None}


def test_price_times_pieces(tmp_path: Path) -> None:
    rows = HEADER + "1,2024-01-01,5,3,2.10\n1,2024-02-01,5,-3,2.10\n1,2024-03-01,5,4,0.1\n"
    events = plain(tmp_path, rows, price_column="price", quantity_column="pieces")
    np.testing.assert_array_equal(events.frame("product_buy")["spend"], np.array([3 * 2.10, 4 * 0.1], np.float32))


def test_money_that_is_none(tmp_path: Path) -> None:
    content = HEADER + FIRST + "2,2024-01-05,6,2,much\n" + LAST
    with pytest.raises(DataError, match=r"'price' must hold numbers or nothing, got 'much' in row 1"):
        plain(tmp_path, content, spend_column="price")
    with pytest.raises(DataError, match=r"'price' must hold numbers that fit float32, got '1e200' in row 1"):
        plain(tmp_path, content.replace("much", "1e200"), price_column="price")


def test_only_purchases_have_amounts(tmp_path: Path) -> None:
    events = prepared(tmp_path, log().with_columns(n=pl.Series([2, None, 1, 1, None, None, 1, 1])), quantity_column="n")
    assert events.amounts == ("quantity", "spend")
    assert events.frame("product_buy")["spend"].to_list() == [6, 99, 20, 5, 50]
    assert events.frame("page_visit").columns == ["client_id", "timestamp_s", "url"]


def test_cart_events_of_a_negative_quantity_are_removals(tmp_path: Path) -> None:
    table = log().with_columns(
        what=pl.col("what").replace("saw", "carted"), n=pl.Series([1, -1, 1, 1, None, None, 1, 1])
    )
    kinds = {"bought": "product_buy", "carted": "add_to_cart", "asked": "search_query", "liked": "ignore"}
    events = prepared(tmp_path, table, kinds=kinds, quantity_column="n")
    assert events.info["rows"] == {"product_buy": 5, "remove_from_cart": 1, "search_query": 1}


def test_quantities_that_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'pieces' must hold a number, got 'two' in row 1 \(1 bad row of 3"):
        plain(tmp_path, HEADER + FIRST + "2,2024-01-05,6,two,2\n" + LAST, quantity_column="pieces")


def test_bad_rows_are_left_out_counted_and_shown(tmp_path: Path) -> None:
    bad = "2,soon,6,1,2\n,2024-01-05,6,1,2\n2,2024-01-06,,1,2\n2,2024-01-06,6,1,2,9\n2,2024-01-06,6,x,2\n"
    bad += "3,2300-01-01,6,1,2\n"
    content = HEADER + FIRST + bad + LAST
    options = {"quantity_column": "pieces", "on_bad_rows": "drop"}
    events = plain(tmp_path, content, **options)
    assert events.frame("product_buy")["client_id"].to_list() == [1, 1]
    assert events.info["notes"] == [f"{tmp_path}/log: 6 bad rows are left out, the first are in bad_rows.csv"]
    shown = pl.read_csv(events.path / "bad_rows.csv")
    assert set(shown["file"]) == {str(tmp_path / "log")}
    assert shown.select("column", "row", "line").rows() == [
        (None, None, 6),
        ("timestamp", 1, None),
        ("timestamp", 5, None),
        ("client_id", 2, None),
        ("pieces", 4, None),
        ("sku", 3, None),
    ]
    assert shown["reason"].to_list()[:2] == ["the line holds 6 values", "must hold a time"]


def test_rows_of_a_part_are_named_by_the_part(tmp_path: Path) -> None:
    for name, rows in (("a", FIRST), ("b", LAST + "2,soon,6,1,2\n")):
        (tmp_path / f"{name}.csv").write_text(HEADER + rows)
    with pytest.raises(DataError, match=r"b.csv: column 'timestamp' must hold a time, got 'soon' in row 1 \(1 bad"):
        Table(str(tmp_path / "*.csv")).prepare(tmp_path / "events")


def test_a_filter_takes_rows_before_they_are_checked(tmp_path: Path) -> None:
    content = HEADER + FIRST + "2,soon,6,0,2\n7,2024-01-05,6,2,2\n" + LAST
    events = plain(tmp_path, content, filter="pieces > 0 AND client_id <> 7")
    assert events.frame("product_buy")["client_id"].to_list() == [1, 1]
    assert events.info["notes"] == [f"{tmp_path}/log: data.filter leaves 2 of 4 rows out"]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("pieces >", "filter must be an SQL condition like 'quantity > 0', got 'pieces >'"),
        ("pieces + 1", "filter must be true or false for every row, got 'pieces \\+ 1'"),
        ("price LIKE '3'", "filter must fit the columns .*price.*Float64"),
        ("pieces > 1000", "got none that data.filter lets through"),
        ("colour = 'red'", "column 'colour' must exist"),
    ],
)
def test_filters_that_do_not_work(tmp_path: Path, condition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(tmp_path, HEADER + FIRST + LAST, filter=condition)


def test_copies_of_rows(tmp_path: Path) -> None:
    content = HEADER + FIRST + FIRST + LAST + "1,2024-03-01 00:00:00,5,1,3\n" + LAST
    events = plain(tmp_path, content)
    assert len(events.frame("product_buy")) == 5
    assert "3 of 5 rows repeat an earlier one exactly, they are kept" in events.info["notes"][0]
    (tmp_path / "priced").mkdir()
    events = plain(tmp_path / "priced", content, duplicates="drop", price_column="price")
    assert len(events.frame("product_buy")) == 3
    assert "2 of 5 rows repeat an earlier one exactly, they are left out" in events.info["notes"][0]


def test_every_row_twice_is_told(tmp_path: Path) -> None:
    events = plain(tmp_path, HEADER + 2 * FIRST + 2 * LAST)
    assert "every row occurs twice; 2 of 4" in events.info["notes"][0]


def test_a_log_without_products(tmp_path: Path) -> None:
    events = plain(tmp_path, HEADER.replace("sku", "x") + FIRST + LAST, sku_column=None)
    assert events.frame("product_buy")["sku"].to_list() == [0, 0]
    assert "no product column is named" in events.info["notes"][0]


def test_leading_zeros_tell_clients_apart(tmp_path: Path) -> None:
    events = plain(tmp_path, HEADER + FIRST.replace("1,", "007,", 1) + LAST.replace("1,", "7,", 1))
    assert mapping(events, "client_id") == {"007": 0, "7": 1}


@pytest.mark.parametrize(
    "ids",
    [
        pl.Series([1.0, 2.0]),
        pl.Series(["1", "2"]).cast(pl.Decimal(10, 2)),
        pl.Series([1, 2], dtype=pl.UInt8),
        pl.Series([1, 2], dtype=pl.UInt64),
    ],
)
def test_ids_of_any_number(tmp_path: Path, ids: pl.Series) -> None:
    table = pl.DataFrame({"client_id": ids, "timestamp": ["2024-01-01", "2024-03-01"], "sku": [1, 1]})
    assert plain(tmp_path, table).frame("product_buy")["client_id"].to_list() == [1, 2]


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (pl.Series([2**63, 2**64 - 1], dtype=pl.UInt64), [str(2**63), str(2**64 - 1)]),
        (pl.Series([b"\x01\xff", b"\x02"]), ["01ff", "02"]),
        (pl.Series(["b", "a"], dtype=pl.Categorical), ["b", "a"]),
    ],
)
def test_ids_that_need_numbers(tmp_path: Path, ids: pl.Series, names: list[str]) -> None:
    table = pl.DataFrame({"client_id": ids, "timestamp": ["2024-01-01", "2024-03-01"], "sku": [1, 1]})
    assert list(mapping(plain(tmp_path, table), "client_id")) == names


@pytest.mark.parametrize(
    ("prices", "decimal"),
    [(["2.50", "$1,000"], "."), (["2,50 €", "1.000"], ","), (["2.5", "1e3"], ".")],
)
def test_prices_as_people_write_them(tmp_path: Path, prices: list[str], decimal: str) -> None:
    assert numbers(pl.Series("price", prices), decimal).to_list() == [2.5, 1000.0]
    times = ["2024-01-01", "2024-01-02", "2024-03-01"]
    table = pl.DataFrame({"client_id": 1, "timestamp": times, "sku": [1, 2, 2], "price": [*prices, None]})
    assert plain(tmp_path, table, price_column="price", decimal=decimal).products()["price"].to_list() == [0, 99]


def test_a_decimal_comma_is_asked_for(tmp_path: Path) -> None:
    content = HEADER.replace(",", ";") + "1;2024-01-01;5;1;2,5\n1;2024-03-01;5;1;2,5\n"
    with pytest.raises(DataError, match=r"'price' must hold numbers or nothing, got '2,5' .* set data.decimal=','"):
        plain(tmp_path, content, price_column="price")


def test_date_and_time_of_day_in_two_columns(tmp_path: Path) -> None:
    content = "client_id,day,clock,sku\n1,2024-01-01,10:30,1\n1,2024-03-01,8:00,1\n"
    events = plain(tmp_path, content, timestamp_column=["day", "clock"])
    assert events.info["first_s"] == 1_704_067_200 + 10 * 3600 + 1800


def test_the_shops_clock_moves_the_days(tmp_path: Path) -> None:
    """23:30 in London is the next day in Warsaw; a text that names no zone keeps its day."""
    times = ["2024-01-01T23:30Z", "2024-03-01T23:30Z"]
    table = pl.DataFrame({"client_id": [1, 1], "timestamp": times, "sku": [1, 1]})
    assert plain(tmp_path, table, timezone="Europe/Warsaw").info["first_s"] == 1_704_067_200 + 86_400 + 1800


def test_rows_of_a_frame_are_those_of_its_file(tmp_path: Path) -> None:
    """A frame that is handed over is no whole log: few rows, far apart, are fine."""
    path = tmp_path / "log.parquet"
    log().write_parquet(path)
    table = Table(str(path), **OPTIONS)
    assert table.rows_of(log()).equals(table.rows_of(table.raw()))
    two = log().head(2).with_columns(when=pl.Series(["2001-01-01", "2024-01-01"]))
    assert len(table.rows_of(two)) == 2
    with pytest.raises(DataError, match="column 'euro' must exist"):
        table.rows_of(two.drop("euro"))


def test_a_time_far_behind_all_others_is_named(tmp_path: Path) -> None:
    table = pl.DataFrame({"client_id": 1, "timestamp": range(1_704_067_200, 1_709_251_200, 86_400), "sku": 1})
    odd = pl.concat([table[:30], pl.DataFrame({"client_id": 1, "timestamp": [4_102_358_400], "sku": 1}), table[30:]])
    with pytest.raises(DataError, match=r"must lie near the other times.*\(76 years after.*in row 30 \(1 bad"):
        plain(tmp_path, odd.cast(pl.Int64))
    events = plain(tmp_path, odd.cast(pl.Int64), on_bad_rows="drop")
    assert events.info["rows"] == {"product_buy": 60}
    (tmp_path / "ended").mkdir()
    assert plain(tmp_path / "ended", odd.cast(pl.Int64), end="2024-02-29").info["rows"] == {"product_buy": 60}
