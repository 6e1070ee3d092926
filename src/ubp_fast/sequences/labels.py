"""Training labels of client views, from the store: what was bought or put into the cart from the cutoff on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ubp_fast.events.targets import LabelMatrix
from ubp_fast.sequences.loader import check_windows_inside, item_ids
from ubp_fast.sequences.sampling import TARGET_WINDOW_S, Views, rows_at, token_rows

if TYPE_CHECKING:
    from ubp_fast.store.event_store import EventStore

# Dense ids 0 and 1 are padding and unknown; a price bucket b has the dense id b + 2.
_FIRST_REAL_ID = 2


def window_labels(
    store: EventStore, views: Views, label_lists: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray | LabelMatrix]:
    """Labels of N views under the names the models use.

    Args:
        store: must reach to the end of every view's window.
        views: N client views.
        label_lists: as `make_label_lists` gives them: `propensity_<column>` -> (original ids int64 [n], popularity).

    Returns:
        `churn` float32 [N], 1 when nothing is bought in the window, and per list `buy_<column>`, a LabelMatrix [N, n];
        with an add_to_cart table also `add` float32 [N], 1 when anything is put into the cart, and `add_<column>`.

    Raises:
        ValueError: a window reaches beyond the store's cutoff.
    """
    check_windows_inside(store, views, TARGET_WINDOW_S)
    labels: dict[str, np.ndarray | LabelMatrix] = {}
    for kind, prefix in (("product_buy", "buy"), ("add_to_cart", "add")):
        if kind not in store.kinds:
            continue
        start, end = rows_at(store, kind, views), rows_at(store, kind, views, TARGET_WINDOW_S)
        happened = end > start
        if prefix == "buy":
            labels["churn"] = (~happened).astype(np.float32)
        else:
            labels["add"] = happened.astype(np.float32)
        rows, _ = token_rows(start, end)
        view = np.repeat(np.arange(len(start)), end - start)
        sku = item_ids(store, kind)[rows]
        for name, (ids, _) in label_lists.items():
            column = name.removeprefix("propensity_")
            label = label_of_sku(store, column, ids)[sku]
            labels[f"{prefix}_{column}"] = _matrix(view, label, len(start), len(ids))
    return labels


def label_of_sku(store: EventStore, column: str, ids: np.ndarray) -> np.ndarray:
    """Position in `ids` of each dense sku's value in `column` (its last word: sku, category or price), -1 for none.

    Returns:
        int64 [S], one entry per row of the product table.
    """
    field = column.rsplit("_", 1)[-1]
    products = store.products
    if field == "sku":
        return _positions(products.sku_id, np.arange(len(products.sku_id)) >= _FIRST_REAL_ID, ids)
    if field == "category":
        return _positions(store.category_ids[products.category], products.category >= _FIRST_REAL_ID, ids)
    if field == "price":
        return _positions(products.price.astype(np.int64) - _FIRST_REAL_ID, products.price >= _FIRST_REAL_ID, ids)
    raise ValueError(f"window_labels: label_lists must be about sku, category or price, got '{column}'")


def _positions(values: np.ndarray, known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    if not len(ids):
        return np.full(len(values), -1)
    order = np.argsort(ids, kind="stable")
    slot = np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)
    return np.where(known & (ids[order[slot]] == values), order[slot], -1)


def _matrix(view: np.ndarray, label: np.ndarray, num_views: int, num_labels: int) -> LabelMatrix:
    kept = label >= 0
    pairs = np.unique(view[kept] * max(num_labels, 1) + label[kept])
    indptr = np.searchsorted(pairs // max(num_labels, 1), np.arange(num_views + 1)).astype(np.int64)
    return LabelMatrix(indptr, (pairs % max(num_labels, 1)).astype(np.int32), num_labels)
