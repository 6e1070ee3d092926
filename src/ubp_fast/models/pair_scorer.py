"""Pair scores: how likely a client buys a label in the next target window, by one model for all labels of a list.

    score(client, label) = MLP(own counts of label and category | popularity of the label | activity of the client)

A reader that meets a label for the first time has a few thousand rows to find out which of a thousand columns it should
look at. The scorer has seen every (client, label) pair of many past windows and knows what own counts, recency and
popularity say in general: alone, its scores rank clients better than a regression on all features does.

One network per list of labels; rectified units, log odds out. Everything is counted before the cutoff, at three
half-lives; what is compared among clients (popularity) comes from the statistics of the day. A pair's score does not
depend on the other clients or labels at hand, nor on threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ubp_fast.compiled import njit
from ubp_fast.events.labels import LabelMatrix
from ubp_fast.events.schema import SKU_KINDS, LabelLists, UserError
from ubp_fast.events.split import DAY_S
from ubp_fast.features.history import Column, History, features_of
from ubp_fast.features.matrix import Features
from ubp_fast.features.popular import label_slots
from ubp_fast.features.scaling import DayStatistics, add_product, projected
from ubp_fast.sequences import Views, window_labels
from ubp_fast.store.event_store import EventStore

# List -> the labels of `window_labels` that its scores predict.
LISTS = {"propensity_category": "buy_category", "propensity_sku": "buy_sku", "propensity_price": "buy_price"}
# Categories of listed skus, a list like any other for whoever counts.
OF_SKUS = "skus_category"
LEAST_POSITIVES = 100
# An input lies within so many deviations: own counts have long tails.
CLIP = 5.0
# Less than this is no own count: an event from 5.6 half-lives ago.
SEEN = 0.02
LEAST_ACTIVITY = 0.05
LEAST_POPULARITY = 1e-6
# Labels at once: what their hidden units take stays in the fastest cache.
LABELS_AT_ONCE = 128


@dataclass(frozen=True)
class PairScorerConfig:
    """How pairs are scored; all constants are ours.

    Attributes:
        kinds: kinds of events that own counts are taken of.
        half_lives_days: of own counts and popularity, ascending.
        activity_half_lives_days: of the client's activity.
        windows: past windows at most that the scorer learns from.
        clients: drawn in every window at most.
        pairs: of a list, that the network learns from, at most those there are; a third as many of them bought, where
            there are so many.
        hidden: units of the two hidden layers.
        epochs: passes over the pairs.
        batch_size: pairs per step.
        learning_rate: the largest of a schedule that rises and falls.
        weight_decay: of AdamW.
    """

    kinds: tuple[str, ...] = ("product_buy", "add_to_cart")
    half_lives_days: tuple[float, ...] = (14.0, 60.0, 240.0)
    activity_half_lives_days: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 60.0, 180.0)
    windows: int = 6
    clients: int = 8192
    pairs: int = 150_000
    hidden: tuple[int, int] = (64, 32)
    epochs: int = 8
    batch_size: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(SKU_KINDS)
        if unknown or not self.kinds:
            raise UserError(f"PairScorerConfig: kinds must be some of {list(SKU_KINDS)}, got {list(self.kinds)}")
        for name in ("windows", "clients", "pairs", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"PairScorerConfig: {name} must be >= 1, got {getattr(self, name)}")
        days = self.half_lives_days
        if not days or min(*days, *self.activity_half_lives_days) <= 0:
            raise UserError(f"PairScorerConfig: half_lives_days must be > 0, got {list(days)}")
        if len(self.hidden) != 2 or min(self.hidden) < 1:
            raise UserError(f"PairScorerConfig: hidden must be two numbers >= 1, got {list(self.hidden)}")


class Counts(NamedTuple):
    """What is counted of the clients at hand, float32.

    Attributes:
        own: [U, J, S] decayed counts of every slot; J = kinds x half-lives.
        logarithms: [U, J, S] log1p of them.
        is_seen: bool [U, S] whether any of a slot's is more than 0.
        totals: [U, J] of all items.
        activity: [U, A] how much, how long ago, on how many days.
    """

    own: np.ndarray
    logarithms: np.ndarray
    is_seen: np.ndarray
    totals: np.ndarray
    activity: np.ndarray


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
        groups: list -> its network, of the lists that could be learned.
    """

    def __init__(self, config: PairScorerConfig, lists: LabelLists, groups: Mapping[str, _Group]) -> None:
        self.config, self.lists, self.groups = config, lists, groups

    @classmethod
    def fit(
        cls,
        store: EventStore,
        cutoffs_s: Sequence[int],
        lists: LabelLists,
        config: PairScorerConfig | None = None,
        seed: int = 0,
    ) -> PairScorer:
        """Learns from the target windows after each cutoff.

        Args:
            store: event store that reaches to the end of every window.
            cutoffs_s: seconds since 1970 UTC.
            lists: label lists; those of other columns than category, sku and price are ignored.
            config: constants.
            seed: of drawn clients and pairs, initial weights and order. The same seed gives the same weights.

        Raises:
            ValueError: a window that reaches beyond the store's cutoff.
        """
        config = config or PairScorerConfig()
        known = {name: lists[name] for name in LISTS if name in lists}
        known |= _categories_of_skus(store, known)
        slots = _slots_of(store, known)
        scorer = cls(config, known, {})
        random = np.random.default_rng(seed)
        drawn: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in known if name in LISTS}
        for cutoff_s in cutoffs_s:
            history = History.of(store, cutoff_s, known)
            rows = history.clients
            if len(rows) > config.clients:
                rows = np.sort(random.choice(rows, config.clients, replace=False))
            labels = window_labels(store, Views(rows, np.full(len(rows), cutoff_s)), known)
            counts = _counts(replace(history, rows=rows, seen={}), config)
            popularity = scorer._popularity(history, DayStatistics())
            for name, found in drawn.items():
                label = labels[LISTS[name]]
                assert isinstance(label, LabelMatrix)
                group = _Group(slots[name], _category_slots(known, slots, name), {})
                found.append(_draw(label, counts, popularity, group, config, len(cutoffs_s), random))
        groups: dict[str, _Group] = {}
        for name, parts in drawn.items():
            pair, client, label_inputs, bought, weight = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            if bought.sum() < LEAST_POSITIVES or bought.all():
                continue
            inputs = np.concatenate([client, label_inputs, pair], axis=1)
            arrays = _train(inputs, bought, weight, (client.shape[1], label_inputs.shape[1]), config, seed)
            groups[name] = _Group(slots[name], _category_slots(known, slots, name), arrays)
        return cls(config, known, groups)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns: list and label."""
        return tuple(f"{name}_{label}" for name in self.groups for label in self.lists[name][0].tolist())

    def transform(
        self,
        store: EventStore,
        cutoff_s: int,
        directory: Path | None = None,
        day: DayStatistics | None = None,
        name: str = "scores",
    ) -> Features:
        """Log odds of every client that needs a profile, for every label of the learned lists.

        Args:
            store: event store; of the one that was learned from, or of the same ids.
            cutoff_s: events before it are seen, seconds since 1970 UTC.
            directory: the result is written there and mapped from there.
            day: knows how popular the labels are, or learns it from these clients.
            name: under which the day knows it.

        Returns:
            [U, labels] float32, clients in the order of the store.
        """
        history = History.of(store, cutoff_s, self.lists, day)
        popularity = self._popularity(history, history.day, name)
        label_inputs = {}
        for list_name, group in self.groups.items():
            arrays, popular = group.arrays, popularity[group.slots]
            scaled = ((popular - arrays["label_mean"]) * arrays["label_scale"]).clip(-CLIP, CLIP)
            nothing = _scaled(np.zeros_like(arrays["pair_mean"]), arrays)[None]
            of_label = projected(scaled, arrays["label_weight"]) + projected(nothing, arrays["pair_weight"])
            label_inputs[list_name] = np.ascontiguousarray((of_label + arrays["bias_1"]).T, np.float32)

        def columns(part: History) -> Iterator[Column]:
            counts = _counts(part, self.config)
            for list_name, group in self.groups.items():
                labels = tuple(f"{list_name}_{label}" for label in self.lists[list_name][0].tolist())
                yield Column(labels, "log odds", self._scores(counts, group, label_inputs[list_name]))

        return features_of(history, columns, directory)

    def _scores(self, counts: Counts, group: _Group, of_label: np.ndarray) -> np.ndarray:
        """Log odds float32 [U, L]; of_label float32 [H, L]: what labels bring of which a client knows nothing."""
        arrays = group.arrays
        scaled = ((counts.activity - arrays["client_mean"]) * arrays["client_scale"]).clip(-CLIP, CLIP)
        of_client = projected(scaled, arrays["client_weight"]).astype(np.float32)
        out = np.empty((len(of_client), len(group.slots)), np.float32)
        transposed = (np.ascontiguousarray(arrays[name].T) for name in ("pair_weight", "weight_2"))
        _score(
            *(counts.own, counts.logarithms, counts.is_seen, counts.totals),
            *(group.slots, group.category_slots, len(self.config.half_lives_days)),
            *(of_client, of_label, arrays["pair_mean"], arrays["pair_scale"], *transposed),
            *(arrays["bias_2"], arrays["weight_3"], arrays["bias_3"][0], out),
        )
        return out

    def _popularity(self, history: History, day: DayStatistics, name: str = "scores") -> np.ndarray:
        """Log of the decayed count per client of every slot and how it changes, float32 [S, J + kinds]."""

        def measure() -> tuple[np.ndarray]:
            found, config = [], self.config
            slots, labels = label_slots(history.store, self.lists)
            for kind in history.present(config.kinds):
                of_items = np.zeros((len(config.half_lives_days), history.store.num_skus))
                for part in history.parts(1):
                    events = part.events(kind)
                    assert events.item is not None
                    seen = np.flatnonzero(events.timestamp_s < history.cutoff_s)
                    age_days = (history.cutoff_s - events.timestamp_s[seen].astype(np.int64)) / DAY_S
                    for number, days in enumerate(config.half_lives_days):
                        of_items[number] += np.bincount(events.item[seen], 0.5 ** (age_days / days), of_items.shape[1])
                counts = np.zeros((len(config.half_lives_days), len(labels)))
                for column in slots.T:
                    listed = column >= 0
                    for number in range(len(counts)):
                        counts[number] += np.bincount(column[listed], of_items[number, listed], len(labels))
                logarithm = np.log(counts / max(len(history.clients), 1) + LEAST_POPULARITY)
                found += [*logarithm, logarithm[0] - logarithm[-1]]
            return (np.stack(found, axis=1).astype(np.float32),)

        return day.once((f"{name}.popularity",), measure)[0]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What was fitted, by name; for safetensors."""
        found: dict[str, np.ndarray] = {}
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
            found[kind].setdefault(name, {})[key] = array
        ordered = [name for name in (*LISTS, OF_SKUS) if name in found["lists"]]
        lists = {name: (found["lists"][name]["ids"], found["lists"][name]["popularity"]) for name in ordered}
        groups = {}
        for name in ordered:
            if name in found["groups"]:
                group = found["groups"][name]
                groups[name] = _Group(group.pop("slots"), group.pop("category_slots"), group)
        return cls(config, lists, groups)


def _scaled(pair: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Inputs of pairs as the network takes them."""
    return ((pair - arrays["pair_mean"]) * arrays["pair_scale"]).clip(-CLIP, CLIP)


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


def _counts(history: History, config: PairScorerConfig) -> Counts:
    """Of the clients at hand."""
    slots, labels = history.once("label slots", lambda: label_slots(history.store, history.lists))
    own, totals, activity = [], [], []
    for kind in history.present(config.kinds):
        half_lives_s = tuple(days * DAY_S for days in config.half_lives_days)
        found = history.aggregate("pairs", kind, slots=slots, num_slots=len(labels), half_lives_s=half_lives_s)
        own.append(found.decayed_counts.astype(np.float32))
        totals.append(found.decayed_totals.astype(np.float32))
        half_lives_s = tuple(days * DAY_S for days in config.activity_half_lives_days)
        windows_s = (14 * DAY_S, 30 * DAY_S, 90 * DAY_S, None)
        found = history.aggregate("activity", kind, half_lives_s=half_lives_s, windows_s=windows_s, periods_s=(DAY_S,))
        ages = np.stack([column.values for column in history.recency(found, kind)], axis=1)
        activity.append(np.log1p(np.concatenate([found.decayed_totals, ages, found.distinct_times[:, :, 0]], axis=1)))
    counts = np.concatenate(own, axis=1)
    logarithms, is_seen = np.zeros_like(counts), np.zeros((len(counts), counts.shape[2]), bool)
    _logarithms(counts, logarithms, is_seen)
    return Counts(
        *(counts, logarithms, is_seen, np.concatenate(totals, axis=1)),
        np.concatenate(activity, axis=1, dtype=np.float32),
    )


def _draw(
    label: LabelMatrix,
    counts: Counts,
    popularity: np.ndarray,
    group: _Group,
    config: PairScorerConfig,
    windows: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, ...]:
    """Pairs of one window: inputs of pair, client and label, whether bought, and for how many pairs each one stands."""
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
    pair = np.empty((len(rows), _pair_width(counts.own.shape[1], half_lives, group)), np.float32)
    slots, category_slots = group.slots[columns], group.category_slots[columns]
    _pair_inputs(counts.own, counts.logarithms, counts.totals, rows, slots, category_slots, half_lives, pair)
    bought = np.repeat(np.array([1, 0], np.float32), [len(kept), num_negatives])
    return pair, counts.activity[rows], popularity[group.slots[columns]], bought, weight.astype(np.float32)


def _pair_width(counts: int, half_lives: int, group: _Group) -> int:
    of_category = 2 * counts if len(group.category_slots) and group.category_slots[0] >= 0 else 0
    return 4 * counts + counts // half_lives + of_category


def _train(
    inputs: np.ndarray,
    bought: np.ndarray,
    weight: np.ndarray,
    widths: tuple[int, int],
    config: PairScorerConfig,
    seed: int,
) -> dict[str, np.ndarray]:
    """The network of one list; inputs float32 [N, client | label | pair], `widths` of the first two."""
    mean, deviation = inputs.mean(axis=0, dtype=np.float64), inputs.std(axis=0, dtype=np.float64)
    scale = np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0.0)
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    values = torch.from_numpy(((inputs - mean) * scale).clip(-CLIP, CLIP))
    known, weights = torch.from_numpy(bought), torch.from_numpy(weight / weight.mean())
    rate = float((bought * weight).sum() / weight.sum())
    threads = torch.get_num_threads()
    # One thread: the order of sums, and so every weight, is the same whatever the number of cores.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            sizes = (values.shape[1], *config.hidden, 1)
            first, second, third = (nn.Linear(*pair) for pair in itertools.pairwise(sizes))
            network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
            with torch.no_grad():
                third.bias.fill_(float(np.log(rate / (1 - rate))))
            _optimise(network, values, known, weights, config)
    finally:
        torch.set_num_threads(threads)
    weight_1 = first.weight.detach().numpy().T
    client, label = slice(0, widths[0]), slice(widths[0], sum(widths))
    pair = slice(sum(widths), None)
    arrays: dict[str, Any] = {"bias_1": first.bias, "weight_2": second.weight.T, "bias_2": second.bias}
    arrays |= {"weight_3": third.weight[0], "bias_3": third.bias}
    found = {name: array.detach().numpy() for name, array in arrays.items()}
    for name, part in (("client", client), ("label", label), ("pair", pair)):
        found |= {f"{name}_mean": mean[part], f"{name}_scale": scale[part], f"{name}_weight": weight_1[part]}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def _optimise(
    network: nn.Module, values: torch.Tensor, known: torch.Tensor, weights: torch.Tensor, config: PairScorerConfig
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    steps = -(-len(values) // config.batch_size) * config.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps + 1)
    for _ in range(config.epochs):
        for batch in torch.randperm(len(values)).split(config.batch_size):
            logits = network(values[batch])[:, 0]
            loss = functional.binary_cross_entropy_with_logits(logits, known[batch], weights[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


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
def _logarithms(own, out, is_seen):  # pragma: no cover - compiled
    """log1p of the counts, most of which are 0, over zeros; and which slots have any, over False."""
    for row in range(own.shape[0]):
        for number in range(own.shape[1]):
            for slot in range(own.shape[2]):
                if own[row, number, slot] != 0:
                    out[row, number, slot] = np.log1p(own[row, number, slot])
                    is_seen[row, slot] = True


@njit
def _pair_inputs(own, logarithms, totals, rows, slots, category_slots, half_lives, out):  # pragma: no cover - compiled
    for number in range(len(rows)):
        row = rows[number]
        slot, category_slot = slots[number], category_slots[number]
        _pair(own[row], logarithms[row], totals[row], slot, category_slot, half_lives, out[number])


@njit
def _score(  # pragma: no cover - compiled
    own,
    logarithms,
    is_seen,
    totals,
    slots,
    category_slots,
    half_lives,
    of_client,
    of_label,
    pair_mean,
    pair_scale,
    pair_weight,
    weight_2,
    bias_2,
    weight_3,
    bias_3,
    out,
):
    """The network for all pairs, a client's labels side by side: units [H, L], weights [units, inputs].

    The first layer is a sum of what client, label and pair bring. Labels of which the client has nothing share what
    their pair brings, and `of_label` holds it; for the others follows how theirs differs from it.
    """
    lower, upper = np.float32(-CLIP), np.float32(CLIP)
    num_labels, inputs, hidden = len(slots), len(pair_mean), len(weight_2)
    pair = np.empty(inputs, np.float32)
    of_nothing = np.empty(inputs, np.float32)
    for number in range(inputs):
        of_nothing[number] = min(max(-pair_mean[number] * pair_scale[number], lower), upper)
    known = np.empty(num_labels, np.int64)
    first_units = np.empty(of_label.shape[0] * LABELS_AT_ONCE, np.float32)
    second_units = np.empty(hidden * LABELS_AT_ONCE, np.float32)
    for row in range(own.shape[0]):
        num_known = 0
        for label in range(num_labels):
            category_slot = category_slots[label]
            if is_seen[row, slots[label]] or (category_slot >= 0 and is_seen[row, category_slot]):
                known[num_known] = label
                num_known += 1
        differences = np.empty((inputs, num_known), np.float32)
        for place in range(num_known):
            label = known[place]
            _pair(own[row], logarithms[row], totals[row], slots[label], category_slots[label], half_lives, pair)
            for number in range(inputs):
                value = (pair[number] - pair_mean[number]) * pair_scale[number]
                differences[number, place] = min(max(value, lower), upper) - of_nothing[number]
        of_pair = np.zeros((of_label.shape[0], num_known), np.float32)
        add_product(pair_weight, differences, of_pair)
        begin = 0
        for start in range(0, num_labels, LABELS_AT_ONCE):
            width = min(LABELS_AT_ONCE, num_labels - start)
            first = first_units[: of_label.shape[0] * width].reshape(-1, width)
            second = second_units[: hidden * width].reshape(-1, width)
            end = begin
            while end < num_known and known[end] < start + width:
                end += 1
            for unit in range(of_label.shape[0]):
                _sum(of_client[row, unit], of_label[unit, start : start + width], first[unit])
                for place in range(begin, end):
                    first[unit, known[place] - start] += of_pair[unit, place]
                _rectify(first[unit])
            begin = end
            for unit in range(hidden):
                second[unit] = bias_2[unit]
            add_product(weight_2, first, second)
            scores = out[row, start : start + width]
            scores[:] = bias_3
            for unit in range(hidden):
                _rectify(second[unit])
                _add(weight_3[unit], second[unit], scores)


@njit
def _sum(number, values, out):  # pragma: no cover - compiled
    for place in range(len(out)):
        out[place] = number + values[place]


@njit
def _rectify(values):  # pragma: no cover - compiled
    for place in range(len(values)):
        values[place] = max(values[place], np.float32(0))


@njit
def _add(weight, values, out):  # pragma: no cover - compiled
    for place in range(len(out)):
        out[place] += weight * values[place]
