"""How many pieces and how much money, where purchases say so: sums of the amounts themselves, not of price buckets.

Sums come as log1p of the shop's own units; what a client without purchases lacks (a basket) is NaN. A store whose
purchases say neither gives no columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ubp_fast.compiled import njit
from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History, check_windows, known_where, share_of, windows_of

UNITS = {"quantity": "pieces", "spend": "money"}


@dataclass(frozen=True)
class Money:
    """Pieces and money: in windows, fading, in the mean, last and largest basket; money of a piece.

    Purchases of one second are one basket.

    Attributes:
        windows_days: ascending; all history is added.
        half_lives_days: of sums in which older purchases count less.
    """

    windows_days: tuple[int, ...] = (7, 30, 90, 180, 365)
    half_lives_days: tuple[float, ...] = (30.0, 180.0)

    def __post_init__(self) -> None:
        check_windows("Money", self.windows_days)
        if min(self.half_lives_days, default=1.0) <= 0:
            raise ValueError(f"Money: half_lives_days must be > 0, got {self.half_lives_days}")

    def columns(self, history: History) -> Iterator[Column]:
        """Columns of this block."""
        purchases = history.events("product_buy")
        if purchases.amounts is None:
            return
        windows_s, windows = windows_of(self.windows_days)
        ages_s = np.array([np.iinfo(np.int64).max if age_s is None else age_s for age_s in windows_s], np.int64)
        half_lives_s = np.array(self.half_lives_days, np.float64) * DAY_S
        sums, fading, baskets, number = _sums(
            purchases.offsets, purchases.timestamp_s, purchases.amounts, history.cutoff_s, ages_s, half_lives_s
        )
        has, names = number > 0, history.store.amounts
        for place, name in enumerate(names):
            unit = f"log1p {UNITS[name]}"
            for index, window in enumerate(windows):
                yield Column(f"{name}_{window}", unit, np.log1p(sums[:, index, place]))
            for index, days in enumerate(self.half_lives_days):
                yield Column(f"{name}_half_life_{days:g}d", unit, np.log1p(fading[:, index, place]))
            mean = share_of(sums[:, -1, place], number)
            yield Column(f"{name}_basket_mean", unit, known_where(has, np.log1p(mean)))
            for index, basket in enumerate(("last", "largest")):
                yield Column(f"{name}_basket_{basket}", unit, known_where(has, np.log1p(baskets[:, index, place])))
        if len(names) == len(UNITS):
            pieces, money = (sums[:, -1, names.index(name)] for name in ("quantity", "spend"))
            known = pieces > 0
            each = np.log1p(money / np.where(known, pieces, 1))
            yield Column("spend_of_a_piece", "log1p money", known_where(known, each))


@njit
def _sums(offsets, timestamp_s, amounts, cutoff_s, ages_s, half_lives_s):  # pragma: no cover - compiled
    """Adds float64, oldest purchase first: [U, W, A] up to an age, [U, H, A] what is left of each after half-lives,
    [U, 2, A] in the last and in the largest basket; and counts baskets, [U]."""
    clients, width = len(offsets) - 1, amounts.shape[1]
    sums = np.zeros((clients, len(ages_s), width))
    fading = np.zeros((clients, len(half_lives_s), width))
    baskets = np.zeros((clients, 2, width))
    number = np.zeros(clients, np.int64)
    for client in range(clients):
        for row in range(offsets[client], offsets[client + 1]):
            age_s = cutoff_s - np.int64(timestamp_s[row])
            if age_s <= 0:
                break
            is_new = row == offsets[client] or timestamp_s[row] != timestamp_s[row - 1]
            number[client] += is_new
            for place in range(width):
                amount = np.float64(amounts[row, place])
                for window in range(len(ages_s)):
                    if age_s <= ages_s[window]:
                        sums[client, window, place] += amount
                for life in range(len(half_lives_s)):
                    fading[client, life, place] += amount * np.exp2(-age_s / half_lives_s[life])
                baskets[client, 0, place] = amount + (0.0 if is_new else baskets[client, 0, place])
                baskets[client, 1, place] = max(baskets[client, 1, place], baskets[client, 0, place])
    return sums, fading, baskets, number
