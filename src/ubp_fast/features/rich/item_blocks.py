"""Blocks about items: how many different ones, at what prices, how many at once, what follows what, their names.

Counts come as log1p, shares lie in [0, 1]. What a client lacks (a price) is NaN. Kinds that the shop does not have give
no columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ubp_fast.events.schema import EVENT_KINDS, NUM_CODES, NUM_PRICE_BUCKETS, SKU_KINDS
from ubp_fast.features.history import Column, History, known_where, price_table, share_of, windows_of
from ubp_fast.kernels.windowed_aggregate import row_sums
from ubp_fast.store.event_store import rows_before
from ubp_fast.store.vocabulary import FIRST_ID


@dataclass(frozen=True)
class Diversity:
    """How many different things, how evenly, how often again.

    Attributes:
        kinds: kinds of events.
        windows_days: ascending; all history is added.
    """

    kinds: tuple[str, ...] = EVENT_KINDS
    windows_days: tuple[int, ...] = (30,)

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        windows_s, windows = windows_of(self.windows_days)
        for kind in history.present(self.kinds):
            names = ("items", "categories", "prices") if kind in SKU_KINDS else ("items",)
            found = history.aggregate(self, kind, names, windows_s=windows_s)
            for index, window in enumerate(windows):
                total = found.totals[:, index]
                for place, name in enumerate(names):
                    different = found.distinct[:, index, place]
                    yield Column(f"{kind}_different_{name}_{window}", "log1p items", np.log1p(different))
                    yield Column(f"{kind}_entropy_{name}_{window}", "nats", found.entropy[:, index, place])
                    yield Column(f"{kind}_again_{name}_{window}", "share", share_of(total - different, total))


@dataclass(frozen=True)
class Prices:
    """Prices of what was bought or carted, as buckets 0..99 divided by 100.

    Attributes:
        kinds: kinds with skus.
        windows_days: ascending; all history is added.
        bins: equal ranges of buckets whose shares are given. Source: the winner's 5.
    """

    kinds: tuple[str, ...] = SKU_KINDS
    windows_days: tuple[int, ...] = (30,)
    bins: int = 5

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        windows_s, windows = windows_of(self.windows_days)
        prices = price_table(history.store)
        known = prices[:, 1] > 0
        price = prices[:, 0] / NUM_PRICE_BUCKETS
        values = np.stack((price, price**2, prices[:, 1]), axis=1)
        slots = np.where(known, prices[:, 0].astype(np.int32) * self.bins // NUM_PRICE_BUCKETS, -1)
        for kind in history.present(tuple(kind for kind in self.kinds if kind in SKU_KINDS)):
            offsets, timestamp_s, item, *_ = history.events(kind)
            tables: dict[str, Any] = {"values": values, "slots": slots, "num_slots": self.bins}
            found = history.aggregate(self, kind, windows_s=windows_s, **tables)
            has = found.sums[:, :, 2] > 0
            means = share_of(found.sums[:, :, 0], found.sums[:, :, 2])
            for index, window in enumerate(windows):
                mean = means[:, index]
                variance = share_of(found.sums[:, index, 1], found.sums[:, index, 2]) - mean**2
                yield Column(f"{kind}_price_mean_{window}", "price", known_where(has[:, index], mean))
                deviation = np.sqrt(np.maximum(variance, 0))
                yield Column(f"{kind}_price_deviation_{window}", "price", known_where(has[:, index], deviation))
                for place in range(self.bins):
                    share = share_of(found.counts[:, index, place], found.sums[:, index, 2])
                    yield Column(f"{kind}_price_bin_{place}_{window}", "share", share)
            for index, window in enumerate(windows[:-1]):
                trend = np.where(has[:, index], means[:, index] - means[:, -1], 0)
                yield Column(f"{kind}_price_trend_{window}", "price", trend)
            end = rows_before(offsets, timestamp_s, history.cutoff_s)
            newest = np.zeros(len(end), np.int64)
            some = end > offsets[:-1]
            assert item is not None
            newest[some] = item[end[some] - 1]
            yield Column(f"{kind}_price_last", "price", known_where(some & known[newest], price[newest]))


@dataclass(frozen=True)
class Baskets:
    """How much comes at once, for how much, and how much of it is new. Events of one second are one basket.

    Attributes:
        kinds: kinds with skus.
        windows_days: ascending; all history is added.
    """

    kinds: tuple[str, ...] = SKU_KINDS
    windows_days: tuple[int, ...] = (30,)

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        windows_s, windows = windows_of(self.windows_days)
        tables: dict[str, Any] = {"values": lambda: price_table(history.store), "periods_s": (1,)}
        for kind in history.present(tuple(kind for kind in self.kinds if kind in SKU_KINDS)):
            found = history.aggregate(self, kind, ("items",), windows_s=windows_s, **tables)
            for index, window in enumerate(windows):
                baskets, spend = found.distinct_times[:, index, 0], found.sums[:, index, 0] / NUM_PRICE_BUCKETS
                has = baskets > 0
                size = known_where(has, np.log1p(share_of(found.totals[:, index], baskets)))
                yield Column(f"{kind}_baskets_{window}", "log1p baskets", np.log1p(baskets))
                yield Column(f"{kind}_basket_size_{window}", "log1p events", size)
                yield Column(f"{kind}_spend_{window}", "log1p price", np.log1p(spend))
                each = known_where(has, np.log1p(share_of(spend, baskets)))
                yield Column(f"{kind}_basket_spend_{window}", "log1p price", each)
            for index, (window, window_s) in enumerate(zip(windows[:-1], windows_s, strict=False)):
                assert window_s is not None
                start_s = history.cutoff_s - window_s
                before = history.aggregate((self, "before"), kind, ("items",), anchor_s=start_s, windows_s=(None,))
                first_met = found.distinct[:, -1, 0] - before.distinct[:, -1, 0]
                yield Column(f"{kind}_new_items_{window}", "log1p items", np.log1p(first_met))
                share = known_where(found.totals[:, index] > 0, share_of(first_met, found.distinct[:, index, 0]))
                yield Column(f"{kind}_new_share_{window}", "share", share)


@dataclass(frozen=True)
class Conversions:
    """How often one kind of event comes for each of another one, smoothed: log((a + 1) / (b + 1)).

    Attributes:
        pairs: (a, b) kinds.
        windows_days: ascending; all history is added.
    """

    pairs: tuple[tuple[str, str], ...] = (
        ("product_buy", "add_to_cart"),
        ("remove_from_cart", "add_to_cart"),
        ("add_to_cart", "page_visit"),
        ("search_query", "page_visit"),
    )
    windows_days: tuple[int, ...] = (30,)

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        windows_s, windows = windows_of(self.windows_days)
        for pair in self.pairs:
            if len(history.present(tuple(pair))) < 2:
                continue
            one, other = (history.aggregate(self, kind, windows_s=windows_s).totals for kind in pair)
            for index, window in enumerate(windows):
                ratio = np.log1p(one[:, index]) - np.log1p(other[:, index])
                yield Column(f"{pair[0]}_per_{pair[1]}_{window}", "log ratio", ratio)


@dataclass(frozen=True)
class MeanCodes:
    """Mean quantisation codes 0..255 of product names and queries, divided by 255.

    Attributes:
        kinds: kinds with skus, or search_query.
    """

    kinds: tuple[str, ...] = ("product_buy", "add_to_cart", "search_query")

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        for kind in history.present(self.kinds):
            columns = history.events(kind)
            if columns.codes is not None:
                sums, events = row_sums(*columns[:2], columns.codes, before_s=history.cutoff_s)
            else:
                names = history.store.products.name
                known = np.arange(len(names)) >= FIRST_ID
                values = np.concatenate((names * known[:, None], known[:, None]), axis=1)
                found = history.aggregate(self, kind, windows_s=(None,), values=values)
                sums, events = found.sums[:, 0, :NUM_CODES], found.sums[:, 0, NUM_CODES]
            for code in range(NUM_CODES):
                mean = share_of(sums[:, code], events) / 255
                yield Column(f"{kind}_mean_code_{code}", "code", known_where(events > 0, mean))
