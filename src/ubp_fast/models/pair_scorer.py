"""Pair scores: how likely a client buys a label in the next target window, by one model for all labels of a list.

    score(client, label) = MLP(own counts of label and category | how the client's tastes and items fit the label |
                               popularity of the label | activity of the client)
    score(client)        = MLP(activity of the client)                                  buys, or carts, anything at all

A reader that meets a label for the first time has a few thousand rows to find out which of a thousand columns it should
look at. The scorer has seen every (client, label) pair of many past windows and knows what own counts, recency and
popularity say in general: alone, its scores rank clients better than a regression on all features does.

Own counts say nothing of a label that a client never bought. Tastes do: a few factors of everybody's decayed counts of
all items, pages and searches (`features.tastes`), of the client and of the label's items, and the products of both;
few, because many of them only say again what was bought; and the items that go with the label, weighed by what the
client has of them. A past window's factors and neighbours are fitted before that window.

One network per list of labels; rectified units, log odds out. Everything is counted before the cutoff, at three
half-lives; what is compared among clients (popularity) comes from the statistics of the day. A pair's score does not
depend on the other clients or labels at hand, nor on threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ubp_fast.compiled import njit
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.schema import EVENT_KINDS, SKU_KINDS, LabelLists, UserError
from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History, features_of
from ubp_fast.features.matrix import Features
from ubp_fast.features.popular import label_slots
from ubp_fast.features.scaling import DayStatistics, Sums, parts_of_rows
from ubp_fast.features.tastes import (
    ItemCounts,
    ItemNeighbours,
    TastesConfig,
    Weights,
    arrays_of_weights,
    fit_neighbours,
    fit_tastes,
    item_counts,
    tastes_of,
    weights_of_arrays,
)
from ubp_fast.files import load_arrays, write_arrays
from ubp_fast.kernels.row_product import pair_network, row_product
from ubp_fast.sequences import Views, window_labels
from ubp_fast.store.event_store import TIMELINE, EventStore
from ubp_fast.store.ids import drawn as drawn_ids

# List -> the labels of `window_labels` that its scores predict.
LISTS = {"propensity_category": "buy_category", "propensity_sku": "buy_sku", "propensity_price": "buy_price"}
# Scores of a client alone -> the labels of `window_labels` that they predict, and whether they predict the opposite.
OF_CLIENTS = {"buys": ("churn", True), "carts": ("add", False)}
# Categories of listed skus, a list like any other for whoever counts.
OF_SKUS = "skus_category"
# Fewer of either answer teach nothing: of pairs, of clients.
LEAST_POSITIVES, LEAST_CLIENTS = 100, 20
# An input lies within so many deviations: own counts have long tails.
CLIP = 5.0
# Less than this is no own count: an event from 5.6 half-lives ago.
SEEN = 0.02
LEAST_ACTIVITY = 0.05
LEAST_POPULARITY = 1e-6
LEAST_LENGTH = 1e-9
# What is known of the pairs of so many clients stays in a cache.
CLIENTS_AT_ONCE = 128


@dataclass(frozen=True)
class PairScorerConfig:
    """How pairs are scored; all constants are ours.

    Attributes:
        kinds: of events that own counts and popularity are taken of, with skus.
        activity_kinds: of events that tell how active a client is; "timeline" is all kinds together.
        taste_kinds: of events that are factorised.
        half_lives_days: of own counts and popularity, ascending.
        activity_half_lives_days: of the client's activity.
        tastes: numbers of factors whose products are compared, ascending; none: own counts alone.
        taste_half_life_days: of the counts that are factorised.
        item_neighbours: items that go with a label, the nearest ones by the cosine of their counts; 0: none.
        most_bought: skus of the newest window that are scored, the most bought ones, beside those of the label lists.
        windows: past windows at most that the scorer learns from.
        clients: drawn in every window at most.
        pairs: of a list, that the network learns from, at most those there are; a third as many of them bought, where
            there are so many.
        hidden: units of the two hidden layers.
        epochs: passes over the pairs.
        client_epochs: passes over the clients, for their own scores.
        batch_size: pairs per step.
        learning_rate: the largest of a schedule that rises and falls.
        weight_decay: of AdamW.
    """

    kinds: tuple[str, ...] = ("product_buy", "add_to_cart")
    activity_kinds: tuple[str, ...] = ("product_buy", "add_to_cart", TIMELINE)
    taste_kinds: tuple[str, ...] = ("product_buy", "add_to_cart", "page_visit", "search_query")
    half_lives_days: tuple[float, ...] = (14.0, 60.0, 240.0)
    activity_half_lives_days: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 60.0, 180.0)
    tastes: tuple[int, ...] = (8, 16)
    taste_half_life_days: float = 120.0
    item_neighbours: int = 300
    most_bought: int = 400
    windows: int = 6
    clients: int = 8192
    pairs: int = 150_000
    hidden: tuple[int, int] = (64, 32)
    epochs: int = 8
    client_epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        all_kinds = (*EVENT_KINDS, TIMELINE)
        for name, known in (("kinds", SKU_KINDS), ("activity_kinds", all_kinds), ("taste_kinds", EVENT_KINDS)):
            kinds = getattr(self, name)
            if not kinds or set(kinds) - set(known):
                raise UserError(f"PairScorerConfig: {name} must be some of {list(known)}, got {list(kinds)}")
        for name in ("windows", "clients", "pairs", "epochs", "client_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"PairScorerConfig: {name} must be >= 1, got {getattr(self, name)}")
        days = self.half_lives_days
        if not days or min(*days, *self.activity_half_lives_days) <= 0:
            raise UserError(f"PairScorerConfig: half_lives_days must be > 0, got {list(days)}")
        if list(self.tastes) != sorted({*self.tastes}) or min(self.tastes, default=1) < 1:
            raise UserError(f"PairScorerConfig: tastes must be ascending numbers >= 1, got {list(self.tastes)}")
        for name in ("item_neighbours", "most_bought"):
            if getattr(self, name) < 0:
                raise UserError(f"PairScorerConfig: {name} must be >= 0, got {getattr(self, name)}")
        if len(self.hidden) != 2 or min(self.hidden) < 1:
            raise UserError(f"PairScorerConfig: hidden must be two numbers >= 1, got {list(self.hidden)}")

    @property
    def factors(self) -> TastesConfig:
        """What is factorised."""
        return TastesConfig(self.taste_kinds, max(self.tastes, default=1), self.taste_half_life_days)

    @property
    def of_items(self) -> TastesConfig:
        """What is counted of the items that go with labels."""
        return replace(self.factors, kinds=self.kinds)


class Counts(NamedTuple):
    """What is counted of the clients at hand (U), by kind (K), half-life (H) and slot; J = K x H.

    Attributes:
        starts: int64 [K, U + 1] where the entries of each client begin.
        slots: int32 [entries], ascending for each kind and client.
        own: float32 [entries, H] decayed counts.
        totals: float32 [U, J] of all items.
        activity: float32 [U, A] how much, how long ago, on how many days.
        tastes: float32 [U, R] factors of what was bought; R = 0 where none are asked for.
        items: counts of the items that go with labels, None where none are asked for.
    """

    starts: np.ndarray
    slots: np.ndarray
    own: np.ndarray
    totals: np.ndarray
    activity: np.ndarray
    tastes: np.ndarray
    items: ItemCounts | None


class Factors(NamedTuple):
    """What says how a label fits a client who never had it.

    Attributes:
        items: weights of the items, by kind of events.
        labels: list -> for each number of factors r float32 [r, L], the sum of its items' weights with length 1.
        neighbours: the items that go with the labels, None where none are asked for.
    """

    items: Weights
    labels: Mapping[str, Sequence[np.ndarray]]
    neighbours: ItemNeighbours | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By name; for safetensors."""
        found = {f"items.{name}": array for name, array in arrays_of_weights(self.items).items()}
        found |= {f"{name}/{len(array)}": array for name, arrays in self.labels.items() for array in arrays}
        if self.neighbours is not None:
            found |= {f"neighbours.{name}": array for name, array in self.neighbours.arrays.items()}
        return found

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], lists: Iterable[str], config: PairScorerConfig) -> Factors:
        """The factors that `arrays` belong to.

        Raises:
            KeyError: an array is missing.
        """
        labels = {name: [arrays[f"{name}/{rank}"] for rank in config.tastes] for name in lists if name in LISTS}
        items, near = (
            {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            for prefix in ("items.", "neighbours.")
        )
        return cls(weights_of_arrays(items), labels, ItemNeighbours.of_arrays(near) if near else None)


class _PastFactors(Mapping[int, Factors]):
    """Factors of some cutoffs, fitted when they are asked for first: kept in memory, or in files of a folder.

    Of a million skus those of one cutoff are 140 MB.
    """

    def __init__(
        self,
        store: EventStore,
        cutoffs_s: Iterable[int],
        lists: LabelLists,
        config: PairScorerConfig,
        folder: Path | None,
    ) -> None:
        self._store, self._lists, self._config = store, lists, config
        self._cutoffs_s, self._folder = frozenset(cutoffs_s), folder
        self._made: dict[int, Factors] = {}

    def __getitem__(self, cutoff_s: int) -> Factors:
        if cutoff_s not in self._cutoffs_s:
            raise KeyError(cutoff_s)
        if self._folder is None:
            if cutoff_s not in self._made:
                self._made[cutoff_s] = _fit_factors(self._store, cutoff_s, self._lists, self._config)
            return self._made[cutoff_s]
        file = self._folder / f"factors-{cutoff_s}.safetensors"
        if not file.exists():
            write_arrays(file, _fit_factors(self._store, cutoff_s, self._lists, self._config).arrays)
        return Factors.of_arrays(load_arrays(file, memory_map=True), self._lists, self._config)

    def __iter__(self) -> Iterator[int]:
        return iter(self._cutoffs_s)

    def __len__(self) -> int:
        return len(self._cutoffs_s)


@dataclass(frozen=True)
class _Group:
    """A list of labels and its network.

    Attributes:
        slots: int64 [L] of the labels, category_slots: int64 [L] of their categories, -1 for none.
        arrays: weights as the compiled scorer takes them, float32, by name.
    """

    slots: np.ndarray
    category_slots: np.ndarray
    arrays: Mapping[str, np.ndarray]


class PairScorer:
    """Scores of (client, label) pairs: `fit`, then `transform`.

    Attributes:
        config: constants.
        lists: the label lists, those of `LISTS` and the categories of the skus.
        groups: list -> its network, of the lists that could be learned; those of `OF_CLIENTS` have one label each.
        factors: of tastes.
        past: those of the windows that were learned from, by cutoff; not kept in files.
    """

    def __init__(
        self,
        config: PairScorerConfig,
        lists: LabelLists,
        groups: Mapping[str, _Group],
        factors: Factors,
        past: Mapping[int, Factors] | None = None,
    ) -> None:
        self.config, self.lists, self.groups = config, lists, groups
        self.factors, self.past = factors, past or {}

    @classmethod
    def fit(
        cls,
        store: EventStore,
        cutoffs_s: Sequence[int],
        lists: LabelLists,
        config: PairScorerConfig | None = None,
        seed: int = 0,
        folder: Path | None = None,
        days: Mapping[int, DayStatistics] | None = None,
    ) -> PairScorer:
        """Learns from the target windows after each cutoff.

        Args:
            store: event store that reaches to the end of every window.
            cutoffs_s: seconds since 1970 UTC.
            lists: label lists; those of other columns than category, sku and price are ignored.
            config: constants.
            seed: of drawn clients and pairs, initial weights and order. The same seed gives the same weights.
            folder: keeps what is learned part by part, and factors of past windows out of memory. Of a fit that was
                interrupted, the same one goes on from there; nothing else may use it.
            days: cutoff -> what knows how popular the labels were among all clients, when the store holds no others
                than those that are drawn; see `popularity_of`. None: they are measured among its clients.

        Raises:
            ValueError: a window that reaches beyond the store's cutoff.
        """
        config = config or PairScorerConfig()
        known = scored_lists(store, lists)
        slots = _slots_of(store, known)
        # What is learned here knows nothing that lies behind the newest window.
        newest_s = max((when + store.target_days * DAY_S for when in cutoffs_s), default=store.cutoff_s)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        past = _PastFactors(store, {*cutoffs_s, newest_s}, known, config, folder)
        learned = None if folder is None else folder / "learned.safetensors"
        if learned is not None and learned.exists():
            found = cls.of_arrays(load_arrays(learned, memory_map=True), config)
            return cls(config, found.lists, found.groups, found.factors, past)
        scorer = cls(config, known, {}, past[newest_s], past)
        random = np.random.default_rng(seed)
        drawn: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in known if name in LISTS}
        alone: dict[str, list[tuple[np.ndarray, ...]]] = {}
        for window, cutoff_s in enumerate(cutoffs_s):
            history = History.of(store, cutoff_s, known)
            client_ids = np.asarray(store.client_ids)[history.clients]
            rows = history.clients[drawn_ids(client_ids, config.clients, seed, window)]
            labels, factors = window_labels(store, Views(rows, np.full(len(rows), cutoff_s)), known), past[cutoff_s]
            counts = _counts(replace(history, rows=rows, seen={}), config, factors)
            popularity = popularity_of(history, config, (days or {}).get(cutoff_s) or DayStatistics())
            for name, parts in drawn.items():
                label = labels[LISTS[name]]
                assert isinstance(label, LabelMatrix)
                group = _Group(slots[name], _category_slots(known, slots, name), {})
                products = _products(counts, factors, name, len(group.slots))
                parts.append(_draw(label, counts, popularity, products, group, config, len(cutoffs_s), random))
            for name, (label_name, opposite) in OF_CLIENTS.items():
                if label_name in labels:
                    happened = labels[label_name]
                    assert isinstance(happened, np.ndarray)
                    alone.setdefault(name, []).append((counts.activity, 1 - happened if opposite else happened))
        groups: dict[str, _Group] = {}
        for name, parts in alone.items():
            activity, happened = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            if LEAST_CLIENTS <= happened.sum() <= len(happened) - LEAST_CLIENTS:
                weight, widths = np.ones(len(happened), np.float32), {"client": activity.shape[1]}
                arrays = _train(activity, happened, weight, widths, config, config.client_epochs, seed)
                groups[name] = _Group(np.zeros(0, np.int64), np.zeros(0, np.int64), arrays)
        for name, parts in drawn.items():
            client, label_inputs, tastes, pair, bought, weight = (
                np.concatenate(arrays) for arrays in zip(*parts, strict=True)
            )
            if bought.sum() < LEAST_POSITIVES or bought.all():
                continue
            named = {"client": client, "label": label_inputs, "taste": tastes, "pair": pair}
            inputs, widths = np.concatenate([*named.values()], axis=1), {key: x.shape[1] for key, x in named.items()}
            arrays = _train(inputs, bought, weight, widths, config, config.epochs, seed)
            groups[name] = _Group(slots[name], _category_slots(known, slots, name), arrays)
        scorer = cls(config, known, groups, scorer.factors, past)
        if learned is not None:
            write_arrays(learned, scorer.arrays)
        return scorer

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns: scores of clients, then list and label."""
        return tuple(itertools.chain.from_iterable(map(self._names_of, self.groups)))

    def _names_of(self, name: str) -> tuple[str, ...]:
        return (name,) if name in OF_CLIENTS else tuple(f"{name}_{label}" for label in self.lists[name][0].tolist())

    def transform(
        self,
        store: EventStore,
        cutoff_s: int,
        directory: Path | None = None,
        day: DayStatistics | None = None,
        name: str = "scores",
    ) -> Features:
        """Log odds of every client that needs a profile, for anything at all and every label of the learned lists.

        Args:
            store: event store; of the one that was learned from, or of the same ids.
            cutoff_s: events before it are seen, seconds since 1970 UTC.
            directory: the result is written there and mapped from there.
            day: knows how popular the labels are, or learns it from these clients.
            name: under which the day knows it.

        Returns:
            [U, scores] float32, clients in the order of the store.
        """
        history = History.of(store, cutoff_s, self.lists, day)
        popularity = popularity_of(history, self.config, history.day, name)
        factors = self.past.get(cutoff_s, self.factors)
        label_inputs = {}
        for list_name, group in self.groups.items():
            if list_name in OF_CLIENTS:
                continue
            arrays = group.arrays
            nothing = _scaled(np.zeros_like(arrays["pair_mean"]), arrays, "pair")[None]
            popular = row_product(_scaled(popularity[group.slots], arrays, "label"), arrays["label_weight"])
            of_label = popular + row_product(nothing, arrays["pair_weight"])
            label_inputs[list_name] = np.ascontiguousarray((of_label + arrays["bias_1"]).T, np.float32)

        def columns(part: History) -> Iterator[Column]:
            counts = _counts(part, self.config, factors)
            for list_name, group in self.groups.items():
                if list_name in OF_CLIENTS:
                    scores = _of_clients(counts, group)
                else:
                    scores = self._scores(counts, len(popularity), list_name, label_inputs[list_name], factors)
                yield Column(self._names_of(list_name), "log odds", scores)

        return features_of(history, columns, directory)

    def _scores(self, counts: Counts, num_slots: int, name: str, of_label: np.ndarray, factors: Factors) -> np.ndarray:
        """Log odds float32 [U, L]; of_label float32 [H, L]: what labels bring of which a client knows nothing."""
        group = self.groups[name]
        arrays = group.arrays
        of_client = row_product(_scaled(counts.activity, arrays, "client"), arrays["client_weight"])
        last = [
            np.ascontiguousarray(arrays["weight_2"].T),
            *(arrays[name] for name in ("bias_2", "weight_3", "bias_3")),
        ]
        found = [np.zeros((0, len(group.slots)), np.float32)]
        for first in range(0, len(of_client), CLIENTS_AT_ONCE):
            rows = slice(first, first + CLIENTS_AT_ONCE)
            both = [
                ((products - mean) * scale).clip(-CLIP, CLIP)
                for products, mean, scale in zip(
                    _products(counts, factors, name, len(group.slots), rows),
                    arrays["taste_mean"],
                    arrays["taste_scale"],
                    strict=True,
                )
            ]
            of_both = np.stack(both, axis=1) if both else np.zeros((len(of_client[rows]), 0, len(group.slots)))
            offsets, known, inputs = _known_pairs(
                *(*counts[:4], group.slots, group.category_slots, num_slots),
                *(arrays["pair_mean"], arrays["pair_scale"], first, min(rows.stop, len(of_client))),
            )
            of_pairs = of_both.astype(np.float32, copy=False), arrays["taste_weight"], offsets, known, inputs
            found.append(pair_network(of_client[rows], of_label, *of_pairs, arrays["pair_weight"], *last))
        return np.concatenate(found)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What was fitted, by name; for safetensors."""
        found = {f"factors/{name}": array for name, array in self.factors.arrays.items()}
        for name, (ids, popularity) in self.lists.items():
            found |= {f"lists/{name}/ids": ids, f"lists/{name}/popularity": popularity}
        for name, group in self.groups.items():
            found |= {f"groups/{name}/slots": group.slots, f"groups/{name}/category_slots": group.category_slots}
            found |= {f"groups/{name}/{key}": array for key, array in group.arrays.items()}
        return found

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], config: PairScorerConfig) -> PairScorer:
        """The scorer that `arrays` belong to.

        Raises:
            KeyError: an array is missing.
        """
        found: dict[str, dict[str, dict[str, np.ndarray]]] = {"lists": {}, "groups": {}}
        for path, array in arrays.items():
            kind, name, key = path.split("/")
            if kind in found:
                found[kind].setdefault(name, {})[key] = array
        ordered = [name for name in (*LISTS, OF_SKUS) if name in found["lists"]]
        lists = {name: (found["lists"][name]["ids"], found["lists"][name]["popularity"]) for name in ordered}
        groups = {}
        for name in (*OF_CLIENTS, *ordered):
            if name in found["groups"]:
                group = found["groups"][name]
                groups[name] = _Group(group.pop("slots"), group.pop("category_slots"), group)
        factors = {
            path.removeprefix("factors/"): array for path, array in arrays.items() if path.startswith("factors/")
        }
        return cls(config, lists, groups, Factors.of_arrays(factors, lists, config))


class PopularitySums(Sums[tuple[np.ndarray]]):
    """Log of the decayed count per client of every slot and how it changes, float32 [S, J + kinds].

    A part adds clients and, of every kind, counts float64 [half-lives, S].
    """

    def _of(self, *rows: Any) -> list[np.ndarray]:
        clients, *of_kinds = rows
        return [np.array([clients], np.float64), *of_kinds]

    def _result(self, part: list[np.ndarray]) -> tuple[np.ndarray]:
        clients, *of_kinds = part
        found: list[np.ndarray] = []
        for counts in of_kinds:
            logarithm = np.log(counts / max(clients.item(), 1) + LEAST_POPULARITY)
            found += [*logarithm, logarithm[0] - logarithm[-1]]
        return (np.stack(found, axis=1).astype(np.float32),)


def popularity_of(history: History, config: PairScorerConfig, day: DayStatistics, name: str = "scores") -> np.ndarray:
    """How popular the slots of the history's lists are, see `PopularitySums`; known to the day, or measured."""

    def measure() -> PopularitySums:
        sums, (slots, labels) = PopularitySums(), label_slots(history.store, history.lists)
        for number, clients in parts_of_rows(len(history.clients)):
            part = replace(history, rows=history.clients[clients], seen={})
            of_kinds = []
            for kind in history.present(config.kinds):
                events = part.events(kind)
                assert events.item is not None
                seen = np.flatnonzero(events.timestamp_s < history.cutoff_s)
                age_days = (history.cutoff_s - events.timestamp_s[seen].astype(np.int64)) / DAY_S
                of_lists = slots[events.item[seen]].T
                counts = np.zeros((len(config.half_lives_days), len(labels)))
                for half_life, days in enumerate(config.half_lives_days):
                    decayed = 0.5 ** (age_days / days)
                    for column in of_lists:
                        listed = column >= 0
                        counts[half_life] += np.bincount(column[listed], decayed[listed], len(labels))
                of_kinds.append(counts)
            sums.add(day.first_part + number, len(part.rows), *of_kinds)
        return sums

    return day.statistic((f"{name}.popularity",), measure)[0]


def _scaled(values: np.ndarray, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Inputs as the network takes them; `name`: what of."""
    return ((values - arrays[f"{name}_mean"]) * arrays[f"{name}_scale"]).clip(-CLIP, CLIP)


def _of_clients(counts: Counts, group: _Group) -> np.ndarray:
    """Log odds float32 [U, 1] of clients alone."""
    arrays = group.arrays
    first = row_product(_scaled(counts.activity, arrays, "client"), arrays["client_weight"], arrays["bias_1"])
    second = row_product(np.maximum(first, 0), arrays["weight_2"], arrays["bias_2"])
    return row_product(np.maximum(second, 0), arrays["weight_3"][:, None], arrays["bias_3"])


def _fit_factors(store: EventStore, cutoff_s: int, lists: LabelLists, config: PairScorerConfig) -> Factors:
    """From the events before a cutoff."""
    near = None
    if config.item_neighbours:
        bought = {name: lists[name] for name in LISTS if name in lists}
        near = fit_neighbours(store, cutoff_s, bought, config.of_items, config.item_neighbours)
    if not config.tastes:
        return Factors({}, dict.fromkeys(lists, ()), near)
    with _one_thread():
        items = fit_tastes(store, cutoff_s, config.factors)
    of_labels: dict[str, list[np.ndarray]] = {}
    for name, (labels, _) in lists.items():
        if name not in LISTS:
            continue
        label_of_item = store.label_of_sku(name, labels)
        sums = np.zeros((len(labels), config.factors.rank))
        for kind, (skus, weights) in items.items():
            if kind in SKU_KINDS:
                label = label_of_item[skus]
                np.add.at(sums, label[label >= 0], weights[label >= 0])
        of_labels[name] = []
        for rank in config.tastes:
            length = np.linalg.norm(sums[:, :rank], axis=1, keepdims=True)
            found = (sums[:, :rank] / np.maximum(length, LEAST_LENGTH)).T
            of_labels[name].append(np.ascontiguousarray(found, np.float32))
    return Factors(items, of_labels, near)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and so every weight, is the same whatever the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _products(
    counts: Counts, factors: Factors, name: str, num_labels: int, rows: slice = slice(None)
) -> Iterator[np.ndarray]:
    """How the labels of a list fit some clients [rows, L]: two for each number of factors, two for the items that go
    with labels; the products as they are, and by the length of the client's.
    """
    for of_label in factors.labels[name]:
        mine = np.ascontiguousarray(counts.tastes[rows, : len(of_label)])
        products = row_product(mine, of_label)
        yield products
        length = np.sqrt(row_product(mine**2, np.ones((mine.shape[1], 1), np.float32)))
        yield products / np.maximum(length, np.float32(LEAST_LENGTH))
    if factors.neighbours is not None and counts.items is not None:
        products = counts.items.products(factors.neighbours.lists[name], num_labels, rows)
        yield products
        yield products / np.maximum(counts.items.lengths[rows], np.float32(LEAST_LENGTH))


def scored_lists(store: EventStore, lists: LabelLists) -> LabelLists:
    """The lists whose labels are scored, and the categories of the skus."""
    known = {name: lists[name] for name in LISTS if name in lists}
    return known | _categories_of_skus(store, known)


def _categories_of_skus(store: EventStore, lists: LabelLists) -> LabelLists:
    """The categories of the listed skus, as a list of labels; none where the data has no categories."""
    if "propensity_sku" not in lists or "propensity_category" not in lists:
        return {}
    category = np.asarray(store.category_ids)[np.asarray(store.products.category)[_items(store, lists)]]
    different = np.unique(category)
    return {OF_SKUS: (different.astype(np.int64), np.zeros(len(different)))}


def _items(store: EventStore, lists: LabelLists) -> np.ndarray:
    """Dense ids of the listed skus, int64 [L]."""
    label_of_item = store.label_of_sku("propensity_sku", lists["propensity_sku"][0])
    items = np.zeros(len(lists["propensity_sku"][0]), np.int64)
    listed = np.flatnonzero(label_of_item >= 0)
    items[label_of_item[listed]] = listed
    return items


def _slots_of(store: EventStore, lists: LabelLists) -> dict[str, np.ndarray]:
    """Slots int64 [L] of every list's labels; of `OF_SKUS` the category's slot of every listed sku."""
    first, found = 0, {}
    for name, (ids, _) in lists.items():
        found[name] = first + np.arange(len(ids))
        first += len(ids)
    if OF_SKUS in lists:
        ids = lists[OF_SKUS][0]
        category = np.asarray(store.category_ids)[np.asarray(store.products.category)[_items(store, lists)]]
        found[OF_SKUS] = found[OF_SKUS][np.searchsorted(ids, category)]
    return found


def _category_slots(lists: LabelLists, slots: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The slot of the category of every label, int64 [L]; -1 where labels have none."""
    if name == "propensity_sku" and OF_SKUS in lists:
        return slots[OF_SKUS]
    return np.full(len(slots[name]), -1)


def _counts(history: History, config: PairScorerConfig, factors: Factors) -> Counts:
    """Of the clients at hand."""
    slots, labels = history.once("label slots", lambda: label_slots(history.store, history.lists))
    starts, of_kinds, activity, first = [], [], [], 0
    for kind in history.present(config.kinds):
        decayed = history.decayed(kind, config.half_lives_days, slots, len(labels))
        of_kinds.append(decayed)
        starts.append(first + decayed.offsets)
        first += len(decayed.slots)
    for kind in history.present(config.activity_kinds):
        half_lives_s = tuple(days * DAY_S for days in config.activity_half_lives_days)
        windows_s = (14 * DAY_S, 30 * DAY_S, 90 * DAY_S, None)
        found = history.aggregate("activity", kind, half_lives_s=half_lives_s, windows_s=windows_s, periods_s=(DAY_S,))
        ages = np.stack([column.values for column in history.recency(found, kind)], axis=1)
        activity.append(np.log1p(np.concatenate([found.decayed_totals, ages, found.distinct_times[:, :, 0]], axis=1)))
    return Counts(
        np.stack(starts),
        np.concatenate([decayed.slots for decayed in of_kinds]),
        np.concatenate([decayed.counts for decayed in of_kinds], dtype=np.float32),
        np.concatenate([decayed.totals for decayed in of_kinds], axis=1, dtype=np.float32),
        np.concatenate(activity, axis=1, dtype=np.float32),
        tastes_of(history, config.factors, factors.items)
        if config.tastes
        else np.zeros((len(history.rows), 0), np.float32),
        None if factors.neighbours is None else item_counts(history, config.of_items, factors.neighbours.items),
    )


def _draw(
    label: LabelMatrix,
    counts: Counts,
    popularity: np.ndarray,
    fits: Iterable[np.ndarray],
    group: _Group,
    config: PairScorerConfig,
    windows: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, ...]:
    """Pairs of one window: inputs of client, label, tastes and pair, whether bought, how many pairs each stands for.

    `fits`: how the labels fit the clients, see `_products`.
    """
    share = max(min(config.pairs // windows, label.num_rows * label.num_labels), 1)
    row, column = np.repeat(np.arange(label.num_rows), np.diff(label.indptr)), label.indices.astype(np.int64)
    kept = random.permutation(len(row))[: max(share // 3, 1)]
    others = random.integers(0, label.num_rows, share), random.integers(0, label.num_labels, share)
    is_positive = np.isin(others[0] * label.num_labels + others[1], row * label.num_labels + column)
    rows, columns = (
        np.concatenate([mine[kept], other[~is_positive]]) for mine, other in zip((row, column), others, strict=True)
    )
    num_negatives = len(rows) - len(kept)
    weight = np.repeat(
        [len(row) / max(len(kept), 1), (label.num_rows * label.num_labels - len(row)) / max(num_negatives, 1)],
        [len(kept), num_negatives],
    )
    half_lives = len(config.half_lives_days)
    pair = np.empty((len(rows), _pair_width(counts.totals.shape[1], half_lives, group)), np.float32)
    slots, category_slots = group.slots[columns], group.category_slots[columns]
    _pair_inputs(*counts[:4], rows, slots, category_slots, len(popularity), pair)
    products = [both[rows, columns] for both in fits]
    tastes = np.stack(products, axis=1) if products else np.zeros((len(rows), 0), np.float32)
    bought = np.repeat(np.array([1, 0], np.float32), [len(kept), num_negatives])
    inputs = counts.activity[rows], popularity[group.slots[columns]], tastes, pair
    return *inputs, bought, weight.astype(np.float32)


def _pair_width(counts: int, half_lives: int, group: _Group) -> int:
    of_category = 2 * counts if len(group.category_slots) and group.category_slots[0] >= 0 else 0
    return 4 * counts + counts // half_lives + of_category


def _train(
    inputs: np.ndarray,
    bought: np.ndarray,
    weight: np.ndarray,
    widths: Mapping[str, int],
    config: PairScorerConfig,
    epochs: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """The network of one list; inputs float32 [N, F] of several kinds side by side, `widths`: of each by name."""
    mean, deviation = inputs.mean(axis=0, dtype=np.float64), inputs.std(axis=0, dtype=np.float64)
    scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0.0)
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    values = torch.from_numpy(((inputs - mean) * scale).clip(-CLIP, CLIP))
    known, weights = torch.from_numpy(bought), torch.from_numpy(weight / weight.mean())
    rate = float((bought * weight).sum() / weight.sum())
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        sizes = (values.shape[1], *config.hidden, 1)
        first, second, third = (nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        with torch.no_grad():
            third.bias.fill_(float(np.log(rate / (1 - rate))))
        _optimise(network, values, known, weights, config, epochs)
    weight_1 = first.weight.detach().numpy().T
    arrays: dict[str, Any] = {"bias_1": first.bias, "weight_2": second.weight.T, "bias_2": second.bias}
    arrays |= {"weight_3": third.weight[0], "bias_3": third.bias}
    found = {name: array.detach().numpy() for name, array in arrays.items()}
    ends = itertools.accumulate(widths.values())
    for (name, width), end in zip(widths.items(), ends, strict=True):
        part = slice(end - width, end)
        found |= {f"{name}_mean": mean[part], f"{name}_scale": scale[part], f"{name}_weight": weight_1[part]}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def _optimise(
    network: nn.Module,
    values: torch.Tensor,
    known: torch.Tensor,
    weights: torch.Tensor,
    config: PairScorerConfig,
    epochs: int,
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = -(-len(values) // config.batch_size) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps + 1)
    for _ in range(epochs):
        for batch in torch.randperm(len(values)).split(config.batch_size):
            logits = network(values[batch])[:, 0]
            loss = functional.binary_cross_entropy_with_logits(logits, known[batch], weights[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@njit
def _spread(starts, slots, own, row, counts, logarithms, is_seen):  # pragma: no cover - compiled
    """What a client has, with its log1p, over zeros [J, S]; and which slots have any, over False [S]."""
    half_lives = own.shape[1]
    for kind in range(len(starts)):
        for entry in range(starts[kind, row], starts[kind, row + 1]):
            for number in range(half_lives):
                count = own[entry, number]
                if count != 0:
                    counts[kind * half_lives + number, slots[entry]] = count
                    logarithms[kind * half_lives + number, slots[entry]] = np.log1p(count)
                    is_seen[slots[entry]] = True


@njit
def _clear(starts, slots, row, counts, logarithms, is_seen):  # pragma: no cover - compiled
    """Undoes `_spread`."""
    for kind in range(len(starts)):
        for entry in range(starts[kind, row], starts[kind, row + 1]):
            is_seen[slots[entry]] = False
            for number in range(len(counts)):
                counts[number, slots[entry]] = 0
                logarithms[number, slots[entry]] = 0


@njit
def _pair(own, logarithms, totals, slot, category_slot, half_lives, out):  # pragma: no cover - compiled
    """Inputs of one pair: own and their log1p [J, S], totals [J] of the client."""
    counts = own.shape[0]
    at = 0
    for number in range(counts):
        logarithm = logarithms[number, slot]
        out[at] = logarithm
        out[at + 1] = np.sqrt(logarithm)
        share = own[number, slot] / max(totals[number], np.float32(LEAST_ACTIVITY))
        out[at + 2] = np.sqrt(min(share, np.float32(1)))
        out[at + 3] = np.float32(1) if logarithm > np.float32(SEEN) else np.float32(0)
        at += 4
    for first in range(0, counts, half_lives):
        out[at] = logarithms[first, slot] - logarithms[first + half_lives - 1, slot]
        at += 1
    if category_slot >= 0:
        for number in range(counts):
            logarithm = logarithms[number, category_slot]
            out[at] = logarithm
            out[at + 1] = np.sqrt(logarithm)
            at += 2


@njit
def _pair_inputs(  # pragma: no cover - compiled
    starts, listed, own, totals, rows, slots, category_slots, num_slots, out
):
    half_lives = own.shape[1]
    counts, logarithms = np.zeros((2, totals.shape[1], num_slots), np.float32)
    is_seen = np.zeros(num_slots, np.bool_)
    for number in range(len(rows)):
        row = rows[number]
        _spread(starts, listed, own, row, counts, logarithms, is_seen)
        _pair(counts, logarithms, totals[row], slots[number], category_slots[number], half_lives, out[number])
        _clear(starts, listed, row, counts, logarithms, is_seen)


@njit
def _known_pairs(  # pragma: no cover - compiled
    starts, listed, own, totals, slots, category_slots, num_slots, pair_mean, pair_scale, first_row, last_row
):
    """Pairs of whose label, or its category, clients of some rows have anything: offsets, labels, and how their inputs
    differ from those of a pair of which there is nothing.
    """
    lower, upper = np.float32(-CLIP), np.float32(CLIP)
    num_labels, inputs, half_lives = len(slots), len(pair_mean), own.shape[1]
    counts, logarithms = np.zeros((2, totals.shape[1], num_slots), np.float32)
    is_seen = np.zeros(num_slots, np.bool_)
    offsets = np.zeros(last_row - first_row + 1, np.int64)
    most = (last_row - first_row) * num_labels
    known, differences = np.empty(most, np.int32), np.empty((most, inputs), np.float32)
    of_nothing = np.empty(inputs, np.float32)
    for number in range(inputs):
        of_nothing[number] = min(max(-pair_mean[number] * pair_scale[number], lower), upper)
    place = 0
    for row in range(first_row, last_row):
        _spread(starts, listed, own, row, counts, logarithms, is_seen)
        for label in range(num_labels):
            category_slot = category_slots[label]
            if is_seen[slots[label]] or (category_slot >= 0 and is_seen[category_slot]):
                known[place] = label
                pair = differences[place]
                _pair(counts, logarithms, totals[row], slots[label], category_slot, half_lives, pair)
                for number in range(inputs):
                    value = (pair[number] - pair_mean[number]) * pair_scale[number]
                    pair[number] = min(max(value, lower), upper) - of_nothing[number]
                place += 1
        offsets[row - first_row + 1] = place
        _clear(starts, listed, row, counts, logarithms, is_seen)
    return offsets, known[:place], differences[:place]
