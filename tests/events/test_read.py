from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ubp_fast.events.checks import CODES
from ubp_fast.events.read import EventDirectory, read_id_list, read_label_lists, read_products, read_table
from ubp_fast.events.schema import ITEM_COLUMN, DataError
from ubp_fast.events.sources.challenge import Challenge

Shop = Callable[..., Path]


def with_value(column: str, row: int, value: object) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """A change of one cell; null is a value too."""

    def change(table: pl.DataFrame) -> pl.DataFrame:
        values = table[column].to_list()
        values[row] = value
        return table.with_columns(pl.Series(column, values, dtype=table[column].dtype))

    return change


def cast(column: str, dtype: type[pl.DataType]) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda table: table.with_columns(pl.col(column).cast(dtype))


FIFTEEN = "[" + "7 " * 15 + "]"
TOO_HIGH = "[" + "256 " * 16 + "]"
ALL_KINDS = ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")
ALL_AT_ONCE = dict.fromkeys(ALL_KINDS, lambda table: table.with_columns(timestamp=pl.lit("2023-01-20 00:00:00")))
BUY, QUERY, PRODUCTS = (
    "product_buy.parquet: column",
    "search_query.parquet: column 'query'",
    "product_properties.parquet",
)
BAD_SHOPS: list[tuple[dict, str]] = [
    ({"product_buy": None}, "product_buy.parquet: table must exist"),
    ({"product_properties": None}, f"{PRODUCTS}: table must exist"),
    ({"product_buy": lambda t: t.drop("sku")}, f"{BUY} 'sku' must exist, got columns"),
    ({"page_visit": lambda t: t.rename({"client_id": "user"})}, "page_visit.parquet: column 'client_id' must exist"),
    ({"product_buy": cast("sku", pl.Float64)}, f"{BUY} 'sku' must hold integers, got Float64"),
    ({"page_visit": cast("url", pl.String)}, "page_visit.parquet: column 'url' must hold integers, got String"),
    ({"product_buy": cast("client_id", pl.Float32)}, f"{BUY} 'client_id' must hold integers, got Float32"),
    (
        {"add_to_cart": with_value("timestamp", 1, "soon")},
        r"add_to_cart.parquet: column 'timestamp' must hold a time, got 'soon' in row 1 \(1 bad row of 2\); write",
    ),
    (
        {"product_buy": with_value("client_id", 2, None)},
        rf"{BUY} 'client_id' must hold an id in every row, got None in row 2 \(1 bad row of 4\); remove",
    ),
    ({"product_buy": with_value("sku", 0, None)}, f"{BUY} 'sku' must hold an id in every row, got None in row 0"),
    (
        {"product_buy": with_value("sku", 3, 999)},
        rf"{BUY} 'sku' must occur in product_properties, got 999 in row 3 \(1 bad row of 4\); add",
    ),
    ({"remove_from_cart": with_value("sku", 0, 999)}, "remove_from_cart.parquet: column 'sku' must occur"),
    (
        {"search_query": with_value("query", 0, "[1 2 x]")},
        rf"{QUERY} must hold vectors .*got '\[1 2 x\]' \(it holds something that is not an integer\) in row 0",
    ),
    ({"search_query": with_value("query", 0, FIFTEEN)}, rf"{QUERY} .*does not hold 16 codes\) in row 0"),
    ({"search_query": with_value("query", 0, TOO_HIGH)}, rf"{QUERY} .*outside 0..255\) in row 0"),
    ({"product_properties": with_value("name", 5, FIFTEEN)}, rf"{PRODUCTS}: column 'name' .* in row 5 \(1 bad row"),
    (
        {"product_properties": with_value("sku", 4, 10)},
        rf"{PRODUCTS}: column 'sku' must hold every value once, got 10 \(seen before\) in row 4",
    ),
    (
        {"product_properties": with_value("price", 1, 100)},
        f"{PRODUCTS}: column 'price' must be a quantile bucket 0..99, got 100 in row 1",
    ),
    ({"product_properties": lambda t: t.head(0)}, f"{PRODUCTS}: table must hold products, got 0 rows"),
    ({"product_buy": lambda t: t.head(0)}, "product_buy: table must hold purchases, got no purchases at all"),
    (
        ALL_AT_ONCE,
        "events: the first event must lie before the end of the input 2022-12-24 00:00:00, got 2023-01-20 00:00:00",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), BAD_SHOPS, ids=[re.sub(r"\W+", " ", text)[:60] for _, text in BAD_SHOPS]
)
def test_bad_tables_are_named_and_leave_nothing(shop: Shop, tmp_path: Path, changes: dict, message: str) -> None:
    source = shop(**changes)
    with pytest.raises(DataError, match=message):
        Challenge(str(source)).prepare(tmp_path / "out" / "events")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 0.999])
def test_truncated_parquet(shop: Shop, tmp_path: Path, share: float) -> None:
    path = shop() / "page_visit.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        DataError, match=r"page_visit.parquet: file must be a complete Parquet file, got '.*copy or make it"
    ):
        Challenge(str(path.parent)).prepare(tmp_path / "events")
    assert not (tmp_path / "events").exists()


def test_text_that_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("client_id,timestamp\n" * 10)
    with pytest.raises(DataError, match="complete Parquet file"):
        read_table(path)


def test_an_empty_or_missing_table_makes_the_kind_absent(shop: Shop, tmp_path: Path) -> None:
    Challenge(str(shop(page_visit=lambda t: t.head(0), search_query=None))).prepare(tmp_path / "events")
    events = EventDirectory.open(tmp_path / "events")
    assert events.kinds == ("product_buy", "add_to_cart", "remove_from_cart")
    assert [note for note in events.info["notes"] if "page_visit" in note]
    assert events.frame("page_visit").shape == (0, 3)
    assert events.scan("search_query").collect()["query"].dtype == CODES
    assert events.frame("page_visit", ["url"]).columns == ["url"]


def test_purchases_only_shop(shop: Shop, tmp_path: Path) -> None:
    Challenge(str(shop(add_to_cart=None, remove_from_cart=None, page_visit=None, search_query=None))).prepare(
        tmp_path / "e"
    )
    assert EventDirectory.open(tmp_path / "e").kinds == ("product_buy",)


def test_purchases_are_half_open_and_keep_file_order(shop: Shop, tmp_path: Path) -> None:
    Challenge(str(shop())).prepare(tmp_path / "events")
    events = EventDirectory.open(tmp_path / "events")
    times = events.frame("product_buy")["timestamp_s"].to_list()
    purchases = events.purchases(min(times), max(times))
    assert purchases.columns == ["client_id", "timestamp_s", "sku", "category", "price"]
    assert purchases["sku"].to_list() == [10, 11, 12]
    assert purchases["category"].to_list() == [0, 0, 1]
    assert len(events.purchases(min(times), max(times) + 1)) == 4


def test_open_refuses_what_is_no_event_directory(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold dataset.json, got none"):
        EventDirectory.open(tmp_path)
    Challenge(str(shop())).prepare(tmp_path / "events")
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "events" / "page_visit.parquet")
    with pytest.raises(DataError, match=r"page_visit.parquet: columns must be"):
        EventDirectory.open(tmp_path / "events")
    (tmp_path / "events" / "page_visit.parquet").unlink()
    with pytest.raises(DataError, match=r"page_visit.parquet: table must exist"):
        EventDirectory.open(tmp_path / "events")
    (tmp_path / "events" / "dataset.json").write_text('{"format": 2, "kinds"')
    with pytest.raises(DataError, match=r"dataset.json: file must be complete"):
        EventDirectory.open(tmp_path / "events")
    (tmp_path / "events" / "dataset.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="must have format 2, got 99"):
        EventDirectory.open(tmp_path / "events")


def test_client_lists(tmp_path: Path) -> None:
    path = tmp_path / "relevant_clients.npy"
    np.save(path, np.array([5, 3], np.int32))
    assert read_id_list(path, unique=True).tolist() == [5, 3]
    np.save(path, np.array([5, 3, 5]))
    with pytest.raises(
        DataError, match=r"must hold every value once, got 5 \(seen before\) in row 2 \(1 bad row of 3\)"
    ):
        read_id_list(path, unique=True)
    for bad in (np.array([1.0]), np.array([[1]]), np.array(["1"])):
        np.save(path, bad)
        with pytest.raises(DataError, match="one-dimensional integers"):
            read_id_list(path, unique=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="complete array of numbers"):
        read_id_list(path, unique=True)


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="complete array of numbers"):
        read_id_list(tmp_path / "a.npy", unique=False)


def test_label_lists(tmp_path: Path) -> None:
    assert read_label_lists(tmp_path) == {}
    np.save(tmp_path / "propensity_sku.npy", np.array([4, 4, 2]))
    with pytest.raises(DataError, match=r"popularity_propensity_sku.npy: file must exist"):
        read_label_lists(tmp_path)
    for bad in (
        np.array([0.5, 0.5]),
        np.array([0.5, np.nan, 0.1]),
        np.array([0.5, -0.1, 0.1]),
        np.array(["a", "b", "c"]),
    ):
        np.save(tmp_path / "popularity_propensity_sku.npy", bad)
        with pytest.raises(DataError, match=r"popularity_propensity_sku.npy"):
            read_label_lists(tmp_path)
    np.save(tmp_path / "popularity_propensity_sku.npy", np.array([3, 2, 1]))
    ids, popularity = read_label_lists(tmp_path)["propensity_sku"]
    assert ids.tolist() == [4, 4, 2]
    assert popularity.dtype == np.float64


def test_products_keep_their_order(shop: Shop) -> None:
    products = read_products(shop(product_properties=lambda t: t.reverse()) / "product_properties.parquet")
    assert products["sku"].to_list() == [15, 14, 13, 12, 11, 10]
    assert products["name"].dtype == CODES


def test_a_directory_of_parts_is_a_table(shop: Shop, tmp_path: Path) -> None:
    source = shop()
    whole = pl.read_parquet(source / "product_buy.parquet")
    (source / "product_buy.parquet").unlink()
    (source / "product_buy.parquet").mkdir()
    whole[:3].write_parquet(source / "product_buy.parquet" / "part-00000.parquet")
    whole[3:].write_parquet(source / "product_buy.parquet" / "part-00001.parquet")
    assert_frame_equal(read_table(source / "product_buy.parquet"), whole)
    Challenge(str(source)).prepare(tmp_path / "events")
    assert EventDirectory.open(tmp_path / "events").frame("product_buy")["client_id"].to_list() == [3, 1, 2, 1]
    for part in (source / "product_buy.parquet").iterdir():
        part.unlink()
    with pytest.raises(DataError, match=r"product_buy.parquet: table must exist"):
        read_table(source / "product_buy.parquet")


def test_batches_give_the_same_events(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shop(page_visit=lambda table: pl.concat([table] * 5).with_columns(url=pl.int_range(pl.len())))
    Challenge(str(source)).prepare(tmp_path / "whole")
    monkeypatch.setattr("ubp_fast.events.read.BATCH_ROWS", 4)
    Challenge(str(source)).prepare(tmp_path / "parts")
    whole, parts = (EventDirectory.open(tmp_path / name) for name in ("whole", "parts"))
    assert len(list((tmp_path / "parts" / "page_visit.parquet").iterdir())) == 4
    for kind in whole.kinds:
        assert_frame_equal(whole.frame(kind), parts.frame(kind))
        batches = list(parts.batches(kind))
        item = whole.frame(kind)[ITEM_COLUMN[kind]].to_numpy()
        np.testing.assert_array_equal(np.concatenate([batch.item for batch in batches]), item)
        assert all(len(batch.client_id) == len(batch.timestamp_s) <= 4 for batch in batches)
    late = next(parts.batches("page_visit", from_s=int(whole.frame("page_visit")["timestamp_s"].max())))  # type: ignore[arg-type]
    assert late.item.tolist() == [2, 5, 8, 11]


def test_a_bad_row_of_a_later_batch(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ubp_fast.events.read.BATCH_ROWS", 4)
    ids = pl.when(pl.int_range(pl.len()) == 10).then(None).otherwise("client_id").alias("client_id")
    source = shop(page_visit=lambda table: pl.concat([table] * 5).with_columns(ids))
    message = r"page_visit.parquet: column 'client_id' .* in row 2 \(1 bad row of 4\).*rows are counted from row 8"
    with pytest.raises(DataError, match=message):
        Challenge(str(source)).prepare(tmp_path / "events")
