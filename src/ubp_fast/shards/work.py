"""What a task does with one shard, and where all tasks of a run find what is known so far.

Whatever is compared among all clients is asked of a `PartialStatistics`: what is not known of all is measured among the
clients of the shard and written down, for `measured_of_all` to add up. Features are made once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ubp_fast.events.schema import LabelLists
from ubp_fast.features import scaling
from ubp_fast.features.history import History
from ubp_fast.features.matrix import NAMES_FILE, load_features
from ubp_fast.features.popular import PopularLists
from ubp_fast.features.scaling import ColumnMoments, KnownMeans, NotYetKnown, PartialStatistics, Statistic
from ubp_fast.features.tastes import weights_of_arrays
from ubp_fast.files import load_arrays, save_array, write_arrays, write_json
from ubp_fast.models.near import NearModel, NearSums, near_sums
from ubp_fast.models.pair_scorer import PairScorer, PopularitySums, popularity_of, scored_lists
from ubp_fast.models.reduced_rank import ReducedRankConfig, ReducedRankModel, RegressionSums
from ubp_fast.profiler.parts import (
    Blocks,
    Fitted,
    Made,
    graded_blocks,
    graded_rank,
    inputs_of_day,
    inputs_of_models,
    is_summary,
    near_parts,
    own_blocks,
    parts_of,
)
from ubp_fast.profiler.recipe import Recipe
from ubp_fast.profiles.blocks import compose
from ubp_fast.sequences import training_cutoffs, views_at, window_labels
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.in_memory import Vocabulary
from ubp_fast.store.shards import first_rows, shard_folder

MEASURED_FILE, VECTORS_FILE, LAYOUT_FILE = "measured.safetensors", "vectors.npy", "layout.json"
TASTES_FILE, SAMPLE, LEARNED, DAYS = "taste_weights.safetensors", "sample", "pairs", "days"
FEATURES, FILLED = "features", "filled"
STATISTICS = {one.__name__: one for one in (ColumnMoments, KnownMeans, PopularitySums, RegressionSums, NearSums)}
# Names of sums of all stacking cutoffs among those of the day.
STRONG, GRADED, NEAR = ("strong.sums",), ("graded.sums",), ("near.sums",)
Measured = dict[tuple[int, tuple[str, ...]], Statistic[Any, Any]]


@dataclass(frozen=True)
class Shared:
    """What all tasks of a run know of it; small enough to travel with each.

    Attributes:
        store: folder of the sharded store.
        features: folder of the features.
        models: folder of what is fitted.
        recipe: the configuration.
        cutoffs: past ones that the regression learns from.
        lists: label lists.
        scored: those whose labels the scorer of pairs predicts.
        popular: kind -> frequent values.
        seed: of the scorer of pairs.
    """

    store: Path
    features: Path
    models: Path
    recipe: Recipe
    cutoffs: tuple[int, ...]
    lists: LabelLists
    scored: LabelLists
    popular: Mapping[str, PopularLists]
    seed: int

    @property
    def whole(self) -> EventStore:
        """The store of all shards, without their events."""
        return EventStore.open(self.store)

    def shard(self, number: int) -> EventStore:
        """The store of one shard."""
        return EventStore.open(shard_folder(self.store, number))

    def days_file(self, cutoff_s: int) -> Path:
        """Where lies what is known of all clients at a cutoff."""
        return self.features / DAYS / f"{cutoff_s}.safetensors"

    def known_at(self, cutoff_s: int) -> dict[str, np.ndarray]:
        """What is known of all clients at a cutoff so far."""
        file = self.days_file(cutoff_s)
        return load_arrays(file) if file.exists() else {}

    def day(self, number: int, cutoff_s: int) -> PartialStatistics:
        """The same for the clients of a shard."""
        return PartialStatistics(self.known_at(cutoff_s), first_rows(self.whole)[number] // scaling.ROWS_AT_ONCE)

    def made(self, number: int, cutoff_s: int) -> Made:
        """Features of a shard's clients at a cutoff."""

        def load(name: str) -> Any:
            for step in (FEATURES, FILLED):
                folder = self.features / step / f"{number:05d}" / str(cutoff_s) / name
                if (folder / NAMES_FILE).exists():
                    return load_features(folder)
            raise FileNotFoundError(folder)

        return load

    def scorer_cutoffs(self) -> tuple[int, ...]:
        """Windows that the scorer of pairs learns from."""
        return training_cutoffs(self.whole, self.recipe.pairs.windows, 1)

    def scorer(self) -> PairScorer | None:
        """That of pairs, where one was learned."""
        folder = self.features / LEARNED
        if not folder.exists():
            return None
        sample = EventStore.open(self.features / SAMPLE)
        config = self.recipe.pairs
        return PairScorer.fit(sample, self.scorer_cutoffs(), self.scored, config, self.seed, folder)

    def graded_config(self) -> ReducedRankConfig:
        """Of the graded directions."""
        config = self.recipe.stacking
        assert isinstance(config, ReducedRankConfig)
        return ReducedRankConfig(graded_rank(self.recipe), config.labels, config.ridge, config.summary_weight)

    def fitted(self, scorer: PairScorer | None = None) -> Fitted:
        """What has been learned so far."""
        whole, recipe = self.whole, self.recipe
        assert isinstance(recipe.stacking, ReducedRankConfig)
        tastes, strong, graded, near = (
            folder / name
            for folder, name in (
                (self.features, TASTES_FILE),
                *((self.models, f"{name}.safetensors") for name in ("strong", "graded", "near")),
            )
        )
        return Fitted(
            recipe,
            whole.cutoff_s,
            len(self.cutoffs),
            Vocabulary.of(whole),
            self.lists,
            self.popular,
            weights_of_arrays(load_arrays(tastes, memory_map=True)) if tastes.exists() else None,
            {},
            scorer,
            ReducedRankModel.load(strong, recipe.stacking) if strong.exists() else ReducedRankModel(recipe.stacking),
            ReducedRankModel.load(graded, self.graded_config()) if graded.exists() else None,
            NearModel(**load_arrays(near)) if near.exists() else None,
        )


def popularity(shared: Shared, number: int, folder: Path) -> None:
    """How popular labels are at every cutoff at which pairs are scored or learned."""
    store = shared.shard(number)
    found: Measured = {}
    lists = scored_lists(store, shared.scored)
    for cutoff_s in sorted({*shared.scorer_cutoffs(), *shared.cutoffs, store.cutoff_s}):
        day = shared.day(number, cutoff_s)
        with suppress(NotYetKnown):
            popularity_of(History.of(store, cutoff_s, lists, day), shared.recipe.pairs, day)
        found |= {(cutoff_s, names): one for names, one in day.measured.items()}
    write_measured(folder, found)


def features(shared: Shared, number: int, wanted: Sequence[tuple[str, int]], folder: Path) -> None:
    """Feature sets at cutoffs, but those that lack something of all clients: that is measured."""
    store, fitted = shared.shard(number), shared.fitted(shared.scorer())
    found: Measured = {}
    for cutoff_s in dict.fromkeys(cutoff_s for _, cutoff_s in wanted):
        day = shared.day(number, cutoff_s)
        blocks = Blocks(fitted, store, cutoff_s, day, folder / str(cutoff_s))
        for name in [name for name, other_s in wanted if other_s == cutoff_s]:
            with suppress(NotYetKnown):
                blocks(name)
        found |= {(cutoff_s, names): one for names, one in day.measured.items()}
    write_measured(folder, found)


def moments(shared: Shared, number: int, folder: Path) -> None:
    """Means and deviations of what the regressions and the profile's blocks are made of."""
    found: Measured = {}
    last_s = shared.whole.cutoff_s
    for cutoff_s in (*shared.cutoffs, last_s):
        day, made = shared.day(number, cutoff_s), shared.made(number, cutoff_s)
        inputs = inputs_of_day if cutoff_s == last_s else inputs_of_models
        for name, values in inputs(shared.recipe, made).items():
            with suppress(NotYetKnown):
                day.moments(name, values)
        found |= {(cutoff_s, names): one for names, one in day.measured.items()}
    write_measured(folder, found)


def regressions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """Names of the sums, of the inputs, and of the blocks of every regression."""
    yield STRONG, "strong.inputs", recipe.joined
    if own_blocks(recipe):
        yield GRADED, "graded.inputs", graded_blocks(recipe)


def sums(shared: Shared, number: int, folder: Path) -> None:
    """What the regressions of past windows' labels need."""
    store, recipe = shared.shard(number), shared.recipe
    config = shared.graded_config()
    every = window_labels(store, views_at(store, shared.cutoffs), shared.lists)
    labels = {name: every[name] for name in config.labels if name in every}
    days = [shared.day(number, cutoff_s) for cutoff_s in shared.cutoffs]
    blocks = [inputs_of_models(recipe, shared.made(number, cutoff_s)) for cutoff_s in shared.cutoffs]
    found: Measured = {}
    for names, inputs, of in regressions(recipe):
        values = [one[inputs] for one in blocks]
        of_cutoffs = [day.moments(inputs, one) for day, one in zip(days, values, strict=True)]
        summary = is_summary(shared.made(number, shared.cutoffs[0]), of)
        model = ReducedRankModel(config)
        found[store.cutoff_s, names] = model.sums(values, labels, of_cutoffs, summary, days[0].first_part)
    write_measured(folder, found)


def directions(shared: Shared, number: int, folder: Path) -> None:
    """Deviations of the graded directions, and what near vectors need."""
    cutoff_s, fitted = shared.whole.cutoff_s, shared.fitted()
    day, made = shared.day(number, cutoff_s), shared.made(number, cutoff_s)
    layout = shared.recipe.layout
    if layout.graded:
        (part,) = parts_of(fitted, made, day, ("graded",))
        with suppress(NotYetKnown):
            day.moments(part.name, part.values)
    found: Measured = {(cutoff_s, names): one for names, one in day.measured.items()}
    if layout.near:
        found[cutoff_s, NEAR] = near_sums(near_parts(fitted, made, day), day.first_part)
    write_measured(folder, found)


def embed(shared: Shared, number: int, folder: Path) -> None:
    """Vectors of the shard's clients."""
    cutoff_s, fitted = shared.whole.cutoff_s, shared.fitted()
    day, made = shared.day(number, cutoff_s), shared.made(number, cutoff_s)
    vectors, layout = compose(parts_of(fitted, made, day), shared.recipe.layout.max_width, day)
    save_array(folder / VECTORS_FILE, vectors)
    write_json(folder / LAYOUT_FILE, layout.to_json())


def write_measured(folder: Path, found: Measured) -> None:
    """Writes statistics of a shard."""
    arrays: dict[str, np.ndarray] = {}
    for (cutoff_s, names), statistic in found.items():
        start = f"{cutoff_s}|{type(statistic).__name__}|{','.join(names)}|"
        arrays |= {f"{start}{place}": array for place, array in statistic.packed().items()}
    write_arrays(folder / MEASURED_FILE, arrays)


def measured_of_all(folders: Sequence[Path]) -> Measured:
    """What the shards have measured, in their order, as statistics of all clients."""
    found: Measured = {}
    for folder in folders:
        with safe_open(folder / MEASURED_FILE, "np") as stored:
            of_shard: dict[str, list[str]] = {}
            for name in stored.keys():  # noqa: SIM118 - no dict
                start, place = name.rsplit("|", 1)
                of_shard.setdefault(start, []).append(place)
            for start, places in of_shard.items():
                cutoff_s, statistic, names = start.split("|")
                key = int(cutoff_s), tuple(names.split(","))
                if key not in found:
                    found[key] = STATISTICS[statistic]()
                found[key].unpack(_Stored(stored, start, places))
    return found


@dataclass(frozen=True)
class _Stored(Mapping[str, np.ndarray]):
    """Arrays of a file whose names have the same start, each read when it is asked for."""

    stored: safe_open
    start: str
    places: list[str]

    def __getitem__(self, place: str) -> np.ndarray:
        array: np.ndarray = self.stored.get_tensor(f"{self.start}|{place}")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


Work = Callable[[Path], None]


def of_shard(work: Callable[..., None], shared: Shared, number: int, *more: Any) -> Work:
    """The work on one shard as a function of its folder."""
    return partial(work, shared, number, *more)
