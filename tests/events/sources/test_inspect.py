"""What a file looks like, and that the command which is offered reads it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from omegaconf import OmegaConf
from support.runs import composed

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError
from ubp_fast.events.sources.inspect import inspect, setting
from ubp_fast.events.sources.table import Table

DAYS = ["2024-01-31", "2024-03-01", "2024-04-30"]
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "web shop": (
        "event_time,event_type,product_id,category_code,brand,price,user_id,user_session\n"
        + "".join(
            f"{day} 10:00:00 UTC,{kind},{item},home.{item},acme,9.50,5{item},x\n"
            for day in DAYS
            for item, kind in enumerate(("view", "cart", "purchase", "remove_from_cart"))
        ),
        {
            "client_column": "user_id",
            "timestamp_column": "event_time",
            "sku_column": "product_id",
            "category_column": "category_code",
            "price_column": "price",
            "kind_column": "event_type",
            "kinds": {
                "view": "page_visit",
                "cart": "add_to_cart",
                "purchase": "product_buy",
                "remove_from_cart": "remove_from_cart",
            },
            "url_column": "product_id",
        },
    ),
    "invoices": (
        "Invoice;StockCode;Description;Quantity;InvoiceDate;Price;Customer ID;Country\n"
        + "".join(f"{n};A{n};Cup, red;{n};{day} 8:26;2,55;17850;UK\n" for n in (2, -1) for day in DAYS),
        {
            "client_column": "Customer ID",
            "timestamp_column": "InvoiceDate",
            "sku_column": "StockCode",
            "name_column": "Description",
            "price_column": "Price",
            "quantity_column": "Quantity",
            "decimal": ",",
        },
    ),
    "totals": (
        "customer_id,date,sku,qty,total_amount\n" + "".join(f"7,{day},A,2,12.5\n" for day in DAYS),
        {
            "client_column": "customer_id",
            "timestamp_column": "date",
            "price_column": "total_amount",
            "quantity_column": "qty",
            "spend_column": "total_amount",
        },
    ),
    "pieces that lack": (
        "customer_id,date,sku,qty,price\n"
        + "".join(f"7,{day},A,{n},2\n" for day, n in zip(DAYS, ("3", "", "4"), strict=True)),
        {"client_column": "customer_id", "timestamp_column": "date", "price_column": "price"},
    ),
    "american dates": (
        "Order ID,Order Date,Customer ID,Product ID,Sales\nA,1/2/2024,X,F1,3\nB,3/4/2024,Y,F1,4\nC,5/6/2024,X,F2,5\n",
        {
            "client_column": "Customer ID",
            "timestamp_column": "Order Date",
            "sku_column": "Product ID",
            "price_column": "Sales",
            "timestamp_format": "%d/%m/%Y",
        },
    ),
    "without a header": (
        "".join(f"{client} 1193 5 {1_704_067_200 + day * 86_400 * 20}\n" for day, client in enumerate((1, 2, 1, 2))),
        {
            "client_column": "column_1",
            "sku_column": "column_2",
            "timestamp_column": "column_4",
            "columns": ["column_1", "column_2", "column_3", "column_4"],
        },
    ),
    "clicks without a header": (
        "".join(
            f"{client},{client * 7},3,{kind},{1_704_067_200 + day * 86_400 * 20}\n"
            for day, client in enumerate((11, 12, 13, 14))
            for kind in ("pv", "buy")
        ),
        {
            "client_column": "column_1",
            "sku_column": "column_2",
            "url_column": "column_2",
            "kind_column": "column_4",
            "timestamp_column": "column_5",
            "columns": [f"column_{place}" for place in range(1, 6)],
            "kinds": {"pv": "page_visit", "buy": "product_buy"},
        },
    ),
    "inches": (
        "user\titem\tdate\n" + "".join(f'u{n}\t{n}" pipe\t{day}\n' for n, day in enumerate(DAYS)),
        {"client_column": "user", "sku_column": "item", "timestamp_column": "date", "quote": ""},
    ),
    "no products": (
        "customer_id\tdate\tamount\n" + "".join(f"7\t{day}\t12.5\n" for day in DAYS),
        {
            "client_column": "customer_id",
            "timestamp_column": "date",
            "price_column": "amount",
            "sku_column": None,
        },
    ),
    # A first day whose date can be read in two ways, and numbers of clients that may be days since 1970.
    "day first, decided late": (
        "Kunde;Datum;Artikel\n"
        + "".join(f"1{n % 7 + 3085};01/12/2023 {n // 60:02}:{n % 60:02};A\n" for n in range(1100))
        + "".join(f"13086;{day}/{month}/2024 10:00;A\n" for day, month in ((31, "01"), (2, "03"), (30, "04"))),
        {"client_column": "Kunde", "timestamp_column": "Datum", "sku_column": "Artikel"},
    ),
    "an index without a name": (
        ",user,time,item\n" + "".join(f"{n},u{n},{day},cup\n" for n, day in enumerate(DAYS)),
        {"client_column": "user", "timestamp_column": "time", "sku_column": "item"},
    ),
    "days spelled as numbers, without a header": (
        "".join(f"1{n}085,1193,{day.replace('-', '')}\n" for n, day in enumerate(DAYS)),
        {
            "client_column": "column_1",
            "sku_column": "column_2",
            "timestamp_column": "column_3",
            "columns": ["column_1", "column_2", "column_3"],
        },
    ),
    "German words": (
        "Käufer|Datum|Artikel\n" + "".join(f"7|{day}|5\n" for day in DAYS),
        {"client_column": "Käufer", "timestamp_column": "Datum", "sku_column": "Artikel"},
    ),
}


def offered(text: str) -> dict[str, Any]:
    """The settings of the data group that the offered command would make, but for the path."""
    words = shlex.split(text.split("command:\n")[1])
    assert words[:3] == ["ubp-fast", "run", "data=table"]
    config: dict[str, Any] = OmegaConf.to_container(composed(*words[2:]).data)  # type: ignore[assignment]
    return config


@pytest.mark.parametrize("name", FILES)
def test_the_offered_command_reads_the_file(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    path = tmp_path / f"{name}'s log = 1.dat"
    path.write_text(content)
    config = offered(inspect(str(path)))
    assert config["path"] == str(path)
    given = {key: value for key, value in config.items() if key not in ("_target_", "path")}
    defaults: dict[str, Any] = OmegaConf.to_container(composed("data=table", "data.path=x").data)  # type: ignore[assignment]
    assert {key: value for key, value in given.items() if value != defaults[key]} == expected
    Table(str(path), **given).prepare(tmp_path / "events")
    assert EventDirectory.open(tmp_path / "events").info["rows"]["product_buy"] >= 2


def test_what_is_said_of_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(FILES["american dates"][0])
    text = inspect(str(path))
    assert re.search(r"^Order Date +String +0% +3 +1/2/2024, 3/4/2024, 5/6/2024 +timestamp$", text, re.M)
    assert "column 'Order Date' can be read in two ways, as %d/%m/%Y or as %m/%d/%Y" in text


def test_numbers_that_count_from_a_day_of_their_own(tmp_path: Path) -> None:
    pl.DataFrame({"household_key": [1, 2], "DAY": [1, 711], "PRODUCT_ID": [5, 5]}).write_parquet(tmp_path / "log")
    text = inspect(str(tmp_path / "log"))
    assert "column 'DAY' holds numbers that are no times since 1970" in text
    assert offered(text)["timestamp_unit"] == "d"


def test_ids_are_no_times_where_no_column_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("wer,wann,was\n" + "".join(f"1{n}085,neulich,cup\n" for n in range(3)))
    text = inspect(str(tmp_path / "log.csv"))
    assert "no column looks like a timestamp; name it with data.timestamp_column" in text


def test_a_column_of_zones_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,time,tz,item\n" + "".join(f"7,{day} 10:00,Europe/Warsaw,cup\n" for day in DAYS))
    told = re.search(r'column \'tz\' holds zones: "data.(\w+)=(.*)" reads each', inspect(str(path)))
    assert told is not None and told[1] == "timestamp_column"
    Table(str(path), client_column="user", timestamp_column=told[2][1:-1].split(", "), sku_column="item").prepare(
        tmp_path / "events"
    )
    assert EventDirectory.open(tmp_path / "events").info["rows"]["product_buy"] == 3


def test_a_wrong_column_ends_with_the_command(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(FILES["web shop"][0])
    with pytest.raises(DataError, match="column 'client_id' must exist, got columns") as caught:
        Table(str(path), price_column="brand").prepare(tmp_path / "events")
    command = re.split(r"perhaps[^:]*: ", str(caught.value))[1]
    assert "\n" not in command
    config = offered(f"command:\n{command}")
    assert config["client_column"] == "user_id" and config["price_column"] == "brand"


def test_no_command_is_offered_that_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1.csv").write_text("user,time,item\n" + "".join(f"7,{day},cup\n" for day in DAYS))
    (tmp_path / "log" / "2.csv").write_text("")
    table = Table(str(tmp_path / "log"), client_column="user", timestamp_column="time", sku_column="item")
    with pytest.raises(DataError, match=r"2\.csv: file must hold a table") as caught:
        table.prepare(tmp_path / "events")
    assert "perhaps" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain.csv", "data.path=plain.csv"),
        ("two words", "\"data.path='two words'\""),
        ("a=b", "\"data.path='a=b'\""),
        ("", "\"data.path=''\""),
        ("null", "\"data.path='null'\""),
        ("7", "\"data.path='7'\""),
    ],
)
def test_settings_are_quoted_where_it_is_needed(value: str, expected: str) -> None:
    assert setting("data.path", value) == expected


@pytest.mark.parametrize(
    "value", ["it's", 'say "x"', "50 $", "back\\slash", "a\\'b", "end\\", "Käufer", "{a: b}", "[x]", "x,y"]
)
def test_any_name_comes_back_as_it_was(value: str) -> None:
    (word,) = shlex.split(setting("data.path", value))
    assert composed("data=table", word).data.path == value
