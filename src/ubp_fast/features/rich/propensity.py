"""Propensities: how likely each client buys each label next, learned from the client base's own past.

For a client u and a label l (a category, sku or price bucket of a list), let the cell c(u, l) say how much of l the
client bought and carted so far (decayed), and how active a buyer the client is at all. With what was known at its
start, each of the newest windows tells how often a cell was followed by a purchase:

    p(u, l) = rate[list of l, c(u, l)] * lift[l]
    rate = (purchases + m * rate of the whole list) / (pairs + m)
    lift = (purchases of l + m) / (purchases of l that the rates expect + m)

and the same tables are read with the cells of today. Own repeats, popularity and activity are all in it, for one pass
over clients x labels; only events before the cutoff are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History
from ubp_fast.features.popular import label_slots

BOUGHT_EDGES = np.array([1e-9, 0.25, 0.5, 0.8, 1.5, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0])
CARTED_EDGES = np.array([1e-9, 0.5, 1.5, 4.0])
ACTIVITY_EDGES = np.array([1e-9, 0.25, 0.75, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0])
NUM_CELLS = (len(BOUGHT_EDGES) + 1) * (len(CARTED_EDGES) + 1) * (len(ACTIVITY_EDGES) + 1)
SMALLEST, LARGEST = 1e-6, 0.99


@dataclass(frozen=True)
class Propensities:
    """Log-odds of a purchase in the next window for every label, and per list the sum and the largest of them.

    Attributes:
        window_days: length of the windows whose purchases teach the rates.
        windows: how many of them before the cutoff, as far as the history reaches.
        half_life_days: of what was bought and carted.
        prior_events: m, how many pairs or purchases the prior is worth.
    """

    window_days: int = 14
    windows: int = 4
    half_life_days: float = 60.0
    prior_events: float = 20.0

    def __post_init__(self) -> None:
        for name in ("window_days", "windows", "half_life_days", "prior_events"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Propensities: {name} must be > 0, got {getattr(self, name)}")

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block; none without label lists or purchases."""
        slots, labels = history.once("label_slots", lambda: label_slots(history.store, history.lists))
        if not labels or "product_buy" not in history.store.kinds:
            return
        of_list = np.repeat(np.arange(len(history.lists)), [len(ids) for ids, _ in history.lists.values()])
        names = (f"{self}.rate", f"{self}.lift")
        rate, lift = history.day.once(names, lambda: self._learn(history, slots, of_list))
        cells = self._cells(history, history.cutoff_s, slots, len(labels))
        chances = np.clip(rate[of_list, cells] * lift, SMALLEST, LARGEST).astype(np.float32)
        log_odds = np.log(chances) - np.log1p(-chances)
        yield Column(tuple(f"log_odds_{label}" for label in labels), "log odds", log_odds)
        for index, name in enumerate(history.lists):
            of_this = chances[:, of_list == index]
            if of_this.shape[1]:
                yield Column(f"expected_{name}", "log purchases", np.log(of_this.sum(axis=1)))
                yield Column(f"largest_{name}", "log chance", np.log(of_this.max(axis=1)))

    def _learn(self, history: History, slots: np.ndarray, of_list: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rate [lists, cells] and lift [labels] from the newest windows before the cutoff."""
        num_labels, num_lists = len(of_list), len(history.lists)
        pairs, bought = np.zeros((2, num_labels * NUM_CELLS))
        for window in range(self.windows):
            end_s = history.cutoff_s - window * self.window_days * DAY_S
            start_s = end_s - self.window_days * DAY_S
            if window == 0 or start_s > history.store.first_timestamp_s:
                self._count(history, slots, start_s, end_s, pairs, bought)
        pairs, bought = pairs.reshape(num_labels, NUM_CELLS), bought.reshape(num_labels, NUM_CELLS)
        member = np.arange(num_lists)[:, None] == of_list
        list_pairs, list_bought = member @ pairs, member @ bought
        whole = list_bought.sum(axis=1, keepdims=True) / np.maximum(list_pairs.sum(axis=1, keepdims=True), 1)
        rate = (list_bought + self.prior_events * whole) / (list_pairs + self.prior_events)
        expected = (pairs * rate[of_list]).sum(axis=1)
        return rate, (bought.sum(axis=1) + self.prior_events) / (expected + self.prior_events)

    def _count(
        self, history: History, slots: np.ndarray, start_s: int, end_s: int, pairs: np.ndarray, bought: np.ndarray
    ) -> None:
        """Adds the pairs of each label and cell at the start of a window, and those that were bought in it."""
        num_labels = len(pairs) // NUM_CELLS
        for part in history.parts(num_labels):
            place = (np.arange(num_labels) * NUM_CELLS + self._cells(part, start_s, slots, num_labels)).ravel()
            window: dict[str, Any] = {"windows_s": (end_s - start_s,), "slots": slots, "num_slots": num_labels}
            later = part.aggregate((self, "later"), "product_buy", anchor_s=end_s, **window)
            hits = (later.counts[:, 0] > 0).ravel()
            pairs += np.bincount(place, minlength=len(pairs))
            bought += np.bincount(place[hits], minlength=len(bought))

    def _cells(self, history: History, anchor_s: int, slots: np.ndarray, num_labels: int) -> np.ndarray:
        """int64 [clients, labels] cell of every pair: purchases first, carts second if the shop has them."""
        half_lives_s = (self.half_life_days * DAY_S,)
        tables: dict[str, Any] = {"slots": slots, "num_slots": num_labels, "half_lives_s": half_lives_s}
        bought, *carted = (
            history.aggregate(self, kind, anchor_s=anchor_s, **tables)
            for kind in history.present(("product_buy", "add_to_cart"))
        )
        cells = np.digitize(bought.decayed_counts[:, 0], BOUGHT_EDGES) * (len(CARTED_EDGES) + 1)
        for found in carted:
            cells += np.digitize(found.decayed_counts[:, 0], CARTED_EDGES)
        activity = np.digitize(bought.decayed_totals[:, 0], ACTIVITY_EDGES)[:, None]
        return np.asarray(cells * (len(ACTIVITY_EDGES) + 1) + activity)
