"""Synthetic events of all five kinds with a known truth; the world behind them is in `synthetic_world`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.checks import CODES, PRODUCT_SCHEMA, event_schema
from ubp_fast.events.labels import label_lists
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import ITEM_COLUMN, LabelLists, UserError
from ubp_fast.events.sources.synthetic_world import (
    ADDS_PER_SESSION,
    Catalogue,
    Clients,
    draw_catalogue,
    draw_clients,
    label_shares,
    noisy_codes,
    purchase_probability,
)
from ubp_fast.events.split import DAY_S, TARGET_DAYS, Split
from ubp_fast.events.write import end_seconds, event_writer
from ubp_fast.files import create_array
from ubp_fast.progress import Progress, Steps

VISITS_PER_SESSION, SEARCHES_PER_SESSION, REMOVE_PROBABILITY = 6.0, 0.4, 0.35
SESSION_S = 1800
FIRST_SKU, FIRST_URL, FIRST_CLIENT = 1000, 1, 1


@dataclass(frozen=True)
class Synthetic:
    """A shop that never was, as a source. The same configuration gives the same bytes.

    Beside the events lies `truth/`: client_ids.npy i64 [U] and, for the windows train and validation,
    `<window>_purchase.npy` f32 [U] and `<window>_<label list>.npy` f32 [U, n]: the probability that the client buys
    (that label) in the window, for an oracle's score.

    Attributes:
        clients: how many clients ever come.
        days: length of the log; two target windows end it.
        seed: of everything random.
        skus: products.
        categories: of products.
        urls: pages.
        start: first day (ISO date).
        relevant: how many clients need a profile, the more active ones more likely (None: all); truth is theirs only.
        activity: factor of how often clients come back; everybody comes once.
        block_clients: clients drawn at a time; part of what the bytes depend on.
        end: ISO date-time; later events are removed and all windows move.
    """

    clients: int = 2000
    days: int = 140
    seed: int = 0
    skus: int = 500
    categories: int = 50
    urls: int = 3000
    start: str = "2022-06-23"
    relevant: int | None = None
    activity: float = 1.0
    block_clients: int = 20_000
    end: str | None = None

    def prepare(self, directory: Path, progress: Progress | None = None, target_days: int = TARGET_DAYS) -> None:
        """Writes the canonical event directory, with label lists from the train target window.

        Rows are in order of time inside each block of clients; memory holds one block, and one number per client.

        Raises:
            ValueError: the configuration breaks a rule.
            DataError: too few clients or days for a single purchase.
            OutputDirectoryError: `directory` cannot be written.
        """
        self._check(target_days)
        blocks = -(-self.clients // self.block_clients)
        steps = Steps(progress, 2 * blocks + 1)
        catalogue = draw_catalogue(np.random.default_rng([self.seed, 0]), self.skus, self.categories)
        with event_writer(directory, "synthetic", self.end, target_days) as writer:
            writer.write_products(_product_table(catalogue))
            weights = []
            for block, ids, clients in self._blocks(catalogue):
                rng = np.random.default_rng([self.seed, 2, block])
                for kind, frame in self._events(rng, ids, clients, catalogue).items():
                    writer.write_events(kind, frame.sort("timestamp_s", maintain_order=True))
                weights.append(clients.session_rate * (clients.death_day - clients.birth_day))
                steps.done()
            chosen = self._relevant(np.concatenate(weights))
            if chosen is not None:
                writer.write_clients("relevant_clients", chosen + FIRST_CLIENT)
            split = writer.default_split()
            writer.finish(split, seed=self.seed, clients=self.clients)
            lists = label_lists(EventDirectory.open(writer.directory).purchases(*split.train_window_s))
            writer.write_label_lists(lists)
            steps.done()
            self._write_truth(writer.directory / "truth", catalogue, split, target_days, lists, steps, chosen)

    def _check(self, target_days: int) -> None:
        for name, least in (("clients", 1), ("days", 2 * target_days + 1), ("categories", 1), ("block_clients", 1)):
            if getattr(self, name) < least:
                raise UserError(f"Synthetic: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.activity > 0:
            raise UserError(f"Synthetic: activity must be > 0, got {self.activity}")
        if self.relevant is not None and not 1 <= self.relevant <= self.clients:
            raise UserError(f"Synthetic: relevant must be 1..clients = {self.clients}, got {self.relevant}")
        for name in ("skus", "urls"):
            if getattr(self, name) < self.categories:
                raise UserError(f"Synthetic: {name} must be at least categories, got {getattr(self, name)}")

    def _relevant(self, weights: np.ndarray) -> np.ndarray | None:
        """Rows of the clients that need a profile, ascending. Source: Efraimidis and Spirakis 2006."""
        if self.relevant is None:
            return None
        keys = np.log(np.random.default_rng([self.seed, 3]).random(len(weights))) / weights
        return np.sort(np.argpartition(keys, len(keys) - self.relevant)[len(keys) - self.relevant :])

    @property
    def first_s(self) -> int:
        """Second at which the first day begins."""
        start_s = end_seconds(self.start)
        assert start_s is not None
        return start_s - start_s % DAY_S

    def _blocks(self, catalogue: Catalogue) -> Iterator[tuple[int, np.ndarray, Clients]]:
        """Block number, client ids and traits; drawn anew on every pass instead of kept."""
        for block, first in enumerate(range(0, self.clients, self.block_clients)):
            count = min(self.block_clients, self.clients - first)
            rng = np.random.default_rng([self.seed, 1, block])
            ids = np.arange(first, first + count, dtype=np.int64) + FIRST_CLIENT
            yield block, ids, draw_clients(rng, count, self.days, catalogue, self.activity)

    def _events(
        self, rng: np.random.Generator, ids: np.ndarray, clients: Clients, catalogue: Catalogue
    ) -> dict[str, pl.DataFrame]:
        """All events of a block of clients."""
        client, time_s = self._sessions(rng, clients)
        draw = _Draws(rng, client, time_s, clients, catalogue)
        visitor, visit_s, category = draw.events(1 + rng.poisson(VISITS_PER_SESSION - 1, len(client)))
        urls_per_category = self.urls // self.categories
        page = np.floor(urls_per_category ** rng.random(len(category))).astype(np.int64) - 1
        searcher, search_s, topic = draw.events(rng.poisson(SEARCHES_PER_SESSION, len(client)))
        adder, add_s, add_category = draw.events(rng.poisson(ADDS_PER_SESSION, len(client)))
        sku = draw.skus(adder, add_category) + FIRST_SKU
        bought = rng.random(len(adder)) < clients.buy_probability[adder]
        removed = ~bought & (rng.random(len(adder)) < REMOVE_PROBABILITY)
        later_s = add_s + rng.integers(10, SESSION_S, len(adder))
        rows = {
            "product_buy": (adder[bought], later_s[bought], sku[bought]),
            "add_to_cart": (adder, add_s, sku),
            "remove_from_cart": (adder[removed], later_s[removed], sku[removed]),
            "page_visit": (visitor, visit_s, category * urls_per_category + page + FIRST_URL),
            "search_query": (searcher, search_s, noisy_codes(rng, catalogue.category_codes[topic], 0.3)),
        }
        last_s = self.first_s + self.days * DAY_S - 1
        return {
            kind: _frame(kind, ids[who], np.minimum(when, last_s), item) for kind, (who, when, item) in rows.items()
        }

    def _sessions(self, rng: np.random.Generator, clients: Clients) -> tuple[np.ndarray, np.ndarray]:
        """Client row and start of every session; the first is on the first day, so that everybody leaves a trace."""
        alive_days = clients.death_day - clients.birth_day
        more = rng.poisson(clients.session_rate * alive_days)
        everybody = np.arange(len(more))
        client = np.concatenate([everybody, np.repeat(everybody, more)])
        offset = np.concatenate([np.zeros(len(more)), rng.random(more.sum())]) * alive_days[client]
        day = clients.birth_day[client] + np.floor(offset).astype(np.int64)
        second = (rng.beta(2.5, 2.0, len(client)) * (DAY_S - 2 * SESSION_S)).astype(np.int64)
        return client, self.first_s + day * DAY_S + second

    def _write_truth(
        self,
        directory: Path,
        catalogue: Catalogue,
        split: Split,
        target_days: int,
        lists: LabelLists,
        steps: Steps,
        chosen: np.ndarray | None,
    ) -> None:
        """Probabilities of the two target windows of the clients that need a profile, by block of clients."""
        directory.mkdir()
        starts = {"train": split.input_end_s, "validation": split.validation_start_s}
        count = self.clients if chosen is None else len(chosen)
        columns: dict[str, np.memmap] = {}

        def write(name: str, first: int, values: np.ndarray) -> None:
            if name not in columns:
                shape = (count, *values.shape[1:])
                columns[name] = create_array(directory / f"{name}.npy", values.dtype, shape)
            columns[name][first : first + len(values)] = values

        first = 0
        for _, ids, everybody in self._blocks(catalogue):
            kept = np.arange(len(ids)) if chosen is None else np.flatnonzero(np.isin(ids - FIRST_CLIENT, chosen))
            clients = everybody.take(kept)
            write("client_ids", first, ids[kept])
            shares = {"purchase": np.ones((len(kept), 1))}
            for name, (labels, _) in lists.items():
                column = name.rsplit("_", 1)[1]
                index = labels - FIRST_SKU if column == "sku" else labels
                shares[name] = label_shares(clients, catalogue, column, index)
            for window, start_s in starts.items():
                day = (start_s - self.first_s) // DAY_S
                for name, share in shares.items():
                    truth = purchase_probability(clients, share, day, target_days)
                    write(f"{window}_{name}", first, truth[:, 0] if name == "purchase" else truth)
            first += len(kept)
            steps.done()
        for values in columns.values():
            values.flush()


class _Draws:
    """Events inside sessions: whose, when, and of which category."""

    def __init__(
        self, rng: np.random.Generator, client: np.ndarray, time_s: np.ndarray, clients: Clients, catalogue: Catalogue
    ) -> None:
        self._rng, self._client, self._time_s, self._clients = rng, client, time_s, clients
        # Row u of the running sums covers (u, u + 1], so that one search serves all clients; likewise for categories.
        rows = np.arange(len(clients.session_rate))[:, None]
        self._category_sums = (np.cumsum(clients.category_share, axis=1) + rows).ravel()
        self._num_categories = clients.category_share.shape[1]
        ends = np.cumsum(np.bincount(catalogue.sku_category))
        self._sku_ranges = np.stack([np.concatenate([[0], ends[:-1]]), ends - 1])
        sums = np.cumsum(catalogue.sku_share, axis=1)
        before = np.concatenate([np.zeros((len(sums), 1)), sums], axis=1)[:, self._sku_ranges[0]]
        self._sku_sums = sums - before[:, catalogue.sku_category] + catalogue.sku_category

    def events(self, per_session: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Client row, time and category of the given number of events per session."""
        session = np.repeat(np.arange(len(per_session)), per_session)
        client = self._client[session]
        time_s = self._time_s[session] + self._rng.integers(0, SESSION_S, len(session))
        found = np.searchsorted(self._category_sums, client + self._rng.random(len(client)))
        first = client * self._num_categories
        return client, time_s, np.clip(found - first, 0, self._num_categories - 1)

    def skus(self, client: np.ndarray, category: np.ndarray) -> np.ndarray:
        """A product index of the given category for each client, by popularity and the client's price segment."""
        target = category + self._rng.random(len(client))
        sku = np.empty(len(client), np.int64)
        for segment, sums in enumerate(self._sku_sums):
            rows = np.flatnonzero(self._clients.price_segment[client] == segment)
            sku[rows] = np.searchsorted(sums, target[rows])
        return np.clip(sku, self._sku_ranges[0][category], self._sku_ranges[1][category])


def _product_table(catalogue: Catalogue) -> pl.DataFrame:
    sku = np.arange(len(catalogue.sku_category), dtype=np.int64) + FIRST_SKU
    columns = [pl.Series(sku), pl.Series(catalogue.sku_category), pl.Series(catalogue.sku_price)]
    return pl.DataFrame([*columns, pl.Series(catalogue.sku_codes, dtype=CODES)], schema=PRODUCT_SCHEMA)


def _frame(kind: str, client_id: np.ndarray, timestamp_s: np.ndarray, item: np.ndarray) -> pl.DataFrame:
    column = pl.Series(item, dtype=CODES) if ITEM_COLUMN[kind] == "query" else pl.Series(item)
    return pl.DataFrame([pl.Series(client_id), pl.Series(timestamp_s), column], schema=event_schema(kind))
