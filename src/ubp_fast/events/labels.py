"""Which labels the propensity tasks ask for, when they are made from the purchases of a window."""

from __future__ import annotations

import numpy as np
import polars as pl

from ubp_fast.events.tables import LabelLists

NUM_LABELS = 100


def top_label_lists(purchases: pl.DataFrame, num_labels: int = NUM_LABELS) -> LabelLists:
    """The most bought categories, skus and price buckets, and the skus that come next in rank as "new" skus.

    Ranks count purchase rows, ties go to the smaller id. Popularity is a label's share of all rows.

    Args:
        purchases: rows of the window with columns sku, category, price.
        num_labels: length of each list; a list is shorter when there are fewer values.

    Returns:
        list name -> (ids i64 [n], popularity f64 [n]); "propensity_new_sku" is left out when no sku is left for it.
    """
    lists = {
        "propensity_category": _ranked(purchases, "category", 0, num_labels),
        "propensity_sku": _ranked(purchases, "sku", 0, num_labels),
        "propensity_new_sku": _ranked(purchases, "sku", num_labels, num_labels),
        "propensity_price": _ranked(purchases, "price", 0, num_labels),
    }
    return {name: entry for name, entry in lists.items() if len(entry[0])}


def _ranked(purchases: pl.DataFrame, column: str, skip: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    counts = purchases.group_by(column).len().sort(["len", column], descending=[True, False])
    ranked = counts.slice(skip, count)
    return ranked[column].to_numpy(), ranked["len"].to_numpy() / max(1, len(purchases))
