"""The world behind synthetic events: a catalogue, clients with hidden tastes, and how probable their purchases are.

A client who is alive on a day opens Poisson(session_rate) sessions and puts Poisson(adds) products into the cart of
each; each is bought with probability buy_probability. The product is drawn in two steps: a category by the client's
taste, then a product of that category by popularity and the client's price segment. A client dies with a constant
hazard per day and never comes back. All of it is hidden; the events only hint at it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from ubp_fast.events.schema import NUM_CODES, NUM_PRICE_BUCKETS

ADDS_PER_SESSION = 0.8
TASTE_STRENGTH, PRICE_STRENGTH = 1.5, 2.0
LATENT_DIM, PRICE_SEGMENTS = 8, 5
ZIPF_EXPONENT = 1.05


@dataclass(frozen=True)
class Catalogue:
    """Products, sorted by category; S products, K categories.

    Attributes:
        category_vector: f64 [K, 8], what tastes are compared with.
        category_popularity: f64 [K], log weight.
        category_codes: u8 [K, 16], centre of the codes of names and queries.
        sku_category: i64 [S], ascending.
        sku_price: i64 [S], bucket 0..99.
        sku_codes: u8 [S, 16].
        sku_share: f64 [5, S], probability of a product inside its category, per price segment of the client.
    """

    category_vector: np.ndarray
    category_popularity: np.ndarray
    category_codes: np.ndarray
    sku_category: np.ndarray
    sku_price: np.ndarray
    sku_codes: np.ndarray
    sku_share: np.ndarray

    @cached_property
    def price_share(self) -> np.ndarray:
        """Probability f64 [5, K, 100] that a product of a category has a price, per price segment of the client."""
        categories = len(self.category_popularity)
        cell = self.sku_category * NUM_PRICE_BUCKETS + self.sku_price
        sums = [np.bincount(cell, share, categories * NUM_PRICE_BUCKETS) for share in self.sku_share]
        return np.stack(sums).reshape(len(sums), categories, NUM_PRICE_BUCKETS)


@dataclass(frozen=True)
class Clients:
    """Hidden traits of U clients.

    Attributes:
        session_rate: f64 [U], sessions per day alive.
        buy_probability: f64 [U], of a product in the cart.
        hazard: f64 [U], rate of dying per day.
        birth_day: i64 [U], first day alive.
        death_day: i64 [U], first day not alive any more.
        price_segment: i64 [U], 0..4, cheap to dear.
        category_share: f64 [U, K], probability of each category.
    """

    session_rate: np.ndarray
    buy_probability: np.ndarray
    hazard: np.ndarray
    birth_day: np.ndarray
    death_day: np.ndarray
    price_segment: np.ndarray
    category_share: np.ndarray

    def take(self, rows: np.ndarray) -> Clients:
        """Traits of some of them."""
        return Clients(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_catalogue(rng: np.random.Generator, skus: int, categories: int) -> Catalogue:
    """Draws the products; the first `categories` of them make sure that no category is empty."""
    popularity = -ZIPF_EXPONENT * np.log(np.arange(1, categories + 1)) * 0.7
    extra = rng.choice(categories, skus - categories, p=_softmax(popularity))
    sku_category = np.sort(np.concatenate([np.arange(categories), extra]))
    money = rng.normal(size=categories)[sku_category] + rng.normal(size=skus)
    bucket = np.argsort(np.argsort(money, kind="stable"), kind="stable") * NUM_PRICE_BUCKETS // skus
    rank = rng.permutation(skus) % np.bincount(sku_category)[sku_category] + 1
    taste_of_price = np.linspace(-1, 1, PRICE_SEGMENTS)[:, None] * (2 * bucket / (NUM_PRICE_BUCKETS - 1) - 1)
    weight = np.exp(PRICE_STRENGTH * taste_of_price) * rank**-ZIPF_EXPONENT
    category_total = np.stack([np.bincount(sku_category, row, categories) for row in weight])
    category_codes = rng.integers(0, 256, (categories, NUM_CODES), dtype=np.uint8)
    return Catalogue(
        category_vector=rng.normal(size=(categories, LATENT_DIM)),
        category_popularity=popularity,
        category_codes=category_codes,
        sku_category=sku_category,
        sku_price=bucket.astype(np.int64),
        sku_codes=noisy_codes(rng, category_codes[sku_category], 0.3),
        sku_share=weight / category_total[:, sku_category],
    )


def draw_clients(
    rng: np.random.Generator, count: int, days: int, catalogue: Catalogue, activity: float = 1.0
) -> Clients:
    """Draws clients; three of five are there from the first day on, the others join later.

    `activity` is a factor of all session rates.
    """
    session_rate = np.minimum(np.exp(rng.normal(-2.2, 1.1, count)), 5.0)
    hazard = np.exp(rng.normal(np.log(1 / 150), 0.9, count))
    birth = np.where(rng.random(count) < 0.6, 0, rng.integers(0, days, count))
    lifetime = 1 + np.floor(np.minimum(rng.exponential(size=count) / hazard, days)).astype(np.int64)
    taste = rng.normal(size=(count, LATENT_DIM))
    # einsum, not a matrix product: its sums do not depend on the number of threads, so neither do the bytes.
    match = np.einsum("ud,kd->uk", taste, catalogue.category_vector) / np.sqrt(LATENT_DIM)
    return Clients(
        session_rate=activity * session_rate,
        buy_probability=1 / (1 + np.exp(-rng.normal(-0.5, 0.8, count))),
        hazard=hazard,
        birth_day=birth,
        death_day=np.minimum(birth + lifetime, days),
        price_segment=rng.integers(0, PRICE_SEGMENTS, count),
        category_share=_softmax(catalogue.category_popularity + TASTE_STRENGTH * match),
    )


def noisy_codes(rng: np.random.Generator, codes: np.ndarray, share: float) -> np.ndarray:
    """Replaces a share of codes u8 [N, 16] by random ones."""
    noise = rng.integers(0, 256, codes.shape, dtype=np.uint8)
    return np.where(rng.random(codes.shape) < share, noise, codes)


def purchase_probability(clients: Clients, label_share: np.ndarray, start_day: int, num_days: int) -> np.ndarray:
    """Probability that clients buy a label inside a window, given all traits and whether they live when it starts.

    Sessions with a purchase of the label come as a Poisson process with rate r per day alive; with survival s per day
    P(none in W days) = sum_{k < W-1} s^k (1 - s) e^{-r (k + 1)} + s^{W-1} e^{-r W}.

    Args:
        clients: U clients.
        label_share: f64 [U, n], probability that a bought product has the label; ones for "anything".
        start_day: first day of the window.
        num_days: its length.

    Returns:
        f32 [U, n].
    """
    per_session = -np.expm1(-ADDS_PER_SESSION * clients.buy_probability[:, None] * label_share)
    quiet = np.exp(-clients.session_rate[:, None] * per_session)
    first_day = np.maximum(start_day, clients.birth_day)
    length = np.maximum(start_day + num_days - first_day, 0)[:, None]
    survival = np.exp(-clients.hazard)[:, None]
    step = survival * quiet
    last = step ** np.maximum(length - 1, 0)
    none = quiet * ((1 - survival) * (1 - last) / (1 - step) + last)
    alive = (clients.death_day > first_day)[:, None] & (length > 0)
    return np.where(alive, 1 - none, 0.0).astype(np.float32)


def label_shares(clients: Clients, catalogue: Catalogue, column: str, labels: np.ndarray) -> np.ndarray:
    """Probability f64 [U, n] that a product a client buys has each label: an index of a sku or category, or a price."""
    if column == "category":
        return clients.category_share[:, labels]
    if column == "sku":
        inside = catalogue.sku_share[:, labels][clients.price_segment]
        return clients.category_share[:, catalogue.sku_category[labels]] * inside
    shares = np.empty((len(clients.price_segment), len(labels)))
    for segment, of_price in enumerate(catalogue.price_share):
        rows = np.flatnonzero(clients.price_segment == segment)
        shares[rows] = np.einsum("uk,kn->un", clients.category_share[rows], of_price[:, labels])
    return shares


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
