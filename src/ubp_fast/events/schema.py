"""What an event table looks like, and what is said of one that looks otherwise; its checks are in `checks`.

The canonical tables (one Parquet file per kind, see `ubp_fast.events.read`):

    product_buy, add_to_cart, remove_from_cart   client_id i64, timestamp_s i64, sku i64
    product_buy, where the source knows them     quantity f32 (pieces), spend f32 (money of the row), both >= 0
    page_visit                                   client_id i64, timestamp_s i64, url i64
    search_query                                 client_id i64, timestamp_s i64, query u8[16]
    product_properties                           sku i64, category i64, price i64, name u8[16]

`timestamp_s` counts seconds since 1970-01-01 UTC. `query` and `name` are 16 product-quantisation codes, `price` is a
quantile bucket 0..99.
"""

from __future__ import annotations

import numpy as np

EVENT_KINDS: tuple[str, ...] = ("product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query")
ITEM_COLUMN: dict[str, str] = {
    "product_buy": "sku",
    "add_to_cart": "sku",
    "remove_from_cart": "sku",
    "page_visit": "url",
    "search_query": "query",
}
# What purchases, and no other kind, may say of themselves beside the product.
AMOUNTS: tuple[str, ...] = ("quantity", "spend")
SKU_KINDS: tuple[str, ...] = tuple(kind for kind in EVENT_KINDS if ITEM_COLUMN[kind] == "sku")
LABEL_LISTS: tuple[str, ...] = ("propensity_category", "propensity_sku", "propensity_new_sku", "propensity_price")
LabelLists = dict[str, tuple[np.ndarray, np.ndarray]]  # list name -> (ids i64 [n], popularity f64 [n])
NUM_CODES = 16
NUM_PRICE_BUCKETS = 100
PRODUCT_TABLE = "product_properties"


class UserError(ValueError):
    """What a user gave breaks a rule; the message is all that the user needs. Other errors are mistakes of ours."""


class DataError(UserError):
    """The data breaks a rule; the message names file, column, first bad row, count and the remedy."""
