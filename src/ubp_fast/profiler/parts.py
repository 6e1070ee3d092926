"""From the events of some clients to the parts of their vectors: what a run does at its cutoff, and `Profiler` later.

    store at a moment -> Blocks: features, vectors of networks -> parts_of: regressions, columns as they are -> compose

Nothing here depends on which clients are at hand: whatever is compared among clients comes from `DayStatistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ubp_fast.events.schema import LabelLists
from ubp_fast.features.aggregated import AggregatedConfig, aggregated_features
from ubp_fast.features.decayed import OF_LABEL, decayed_features
from ubp_fast.features.matrix import FeatureMatrix, Features
from ubp_fast.features.organisers import CountsConfig, count_features
from ubp_fast.features.popular import PopularLists
from ubp_fast.features.rich import rich_features
from ubp_fast.features.scaling import DayStatistics, MinMaxScaler, Rows, ScaledRows, standardised
from ubp_fast.features.static import static_features
from ubp_fast.features.tastes import Weights, taste_features
from ubp_fast.models.contrastive import ContrastiveModel
from ubp_fast.models.layers.encoder import EncoderLayer
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.layers.linear import rows_alone
from ubp_fast.models.multitask import MultitaskModel
from ubp_fast.models.near import NearModel, NearPart
from ubp_fast.models.pair_scorer import OF_CLIENTS, PairScorer
from ubp_fast.models.reduced_rank import ReducedRankModel
from ubp_fast.models.stacking import JoinedBlocks, StackingModel
from ubp_fast.models.training import embed
from ubp_fast.profiler.recipe import Recipe
from ubp_fast.profiles.alignment import Alignment
from ubp_fast.profiles.blocks import Layout, LayoutConfig, Part, compose
from ubp_fast.progress import Progress
from ubp_fast.sequences import ViewLoader, Views, views_at
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.in_memory import Vocabulary

NETWORKS = ("contrastive", "multitask")
# Clients whose histories go through a network at once.
CLIENTS_OF_NETWORKS = 32
# Numbers that torch computes side by side at most.
LANES = 32
OWN_BLOCKS = ("aggregated", "decayed", "static")
# Falls slower than the singular values, for distances in which the first directions are not alone.
GRADING = 0.75
# Scores of a client alone are few, and say most of whether he comes back: so many times as large as those of pairs.
OF_CLIENT = 50
# Directions that near vectors look at, and what each of their parts counts.
NEAR_DIRECTIONS = 200
NEAR_WEIGHTS = {"graded": 1.0, "level": 1.6, "scores": 1.0, "decayed": 1.0, "rhythm": 0.3}
# Blocks of the profile whose columns are scaled by their deviation.
SCALED_BLOCKS = ("graded", "scores", "own", "tastes", "rhythm", "learned")
# A wide column lies within so many deviations: counts have long tails.
WIDE_LIMIT = 5.0
Block = np.ndarray | Features
Made = Callable[[str], Block]
Directions = tuple[np.ndarray, np.ndarray]


class Network(NamedTuple):
    """A trained model of histories.

    Attributes:
        model: it.
        sizes: of its tables.
        scaler: of the static features that it reads beside the history, None without any.
        outputs: labels of each of its tasks, None without any.
    """

    model: ContrastiveModel | MultitaskModel
    sizes: EventSizes
    scaler: MinMaxScaler | None = None
    outputs: Mapping[str, int] | None = None

    def vectors(
        self,
        store: EventStore,
        cutoff_s: int,
        features: Rows | None,
        at_once: int,
        file: Path | None = None,
        progress: Progress | None = None,
        part: slice = slice(None),
    ) -> np.ndarray:
        """Float16 [U, E] of the relevant clients of a store, or of some of them.

        With `at_once=1` in one thread, and so that a client's vector does not depend on the others of its batch.

        Args:
            store: event store.
            cutoff_s: seconds since 1970 UTC.
            features: of these clients, see `network_rows`; None where the model reads none.
            at_once: see `Recipe`.
            file: the result is written there and mapped from there.
            progress: called as progress(batches done, batches in all).
            part: which of the clients; the vectors are those of all where it begins with a batch of all.
        """
        every = views_at(store, [cutoff_s])
        views = Views(every.row[part], every.cutoff_s[part])
        config = self.model.config
        loader = ViewLoader(
            store,
            views,
            batch_size=_alone_at_once(self.model) if at_once == 1 else at_once,
            history_length=config.history_length,
            drop_repeats=config.drop_repeats,
            features=features,
        )
        return halves(self.model, loader, at_once == 1, file, progress)


class NetworkRows:
    """What a network knows of clients of one day beside their events, float32 [U, F]: static features, then wide ones.

    Args:
        static: features and their scaler; None without any.
        wide: features side by side; None without any.
        statistics: mean and deviation of the wide columns among all clients of the day.
    """

    def __init__(
        self,
        static: tuple[Rows, MinMaxScaler] | None,
        wide: Rows | None,
        statistics: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        self._static, self._wide, self._statistics = static and ScaledRows(*static), wide, statistics
        parts: list[Rows] = [part for part in (self._static, self._wide) if part is not None]
        self.shape = (len(parts[0]), sum(part.shape[1] for part in parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        parts = [] if self._static is None else [self._static[chosen]]
        if self._wide is not None and self._statistics is not None:
            rows = self._wide[chosen]
            for part, values in standardised(rows, *self._statistics, dtype=np.float32):
                rows[part] = values.clip(-WIDE_LIMIT, WIDE_LIMIT)
            parts.append(rows)
        return np.concatenate(parts, axis=1)


def network_rows(
    name: str,
    scaler: MinMaxScaler | None,
    wide: tuple[str, ...],
    made: Made,
    day: DayStatistics,
    raw_counts: bool,
) -> NetworkRows | None:
    """What a network reads of the clients of a day beside their events; None where it reads nothing.

    Args:
        name: of the network.
        scaler: of its static features, None where it reads none.
        wide: feature sets of its wide columns.
        made: name -> features of the clients.
        day: knows, or learns from these clients, the means and deviations of the wide columns.
        raw_counts: see `Recipe`.
    """
    static = None if scaler is None else (joined(made, ("static",), unit_length=False), scaler)
    if not wide:
        return None if static is None else NetworkRows(static, None, None)
    columns = joined(made, wide, unit_length=False, raw_counts=raw_counts)
    return NetworkRows(static, columns, day.moments(f"{name}.inputs", columns))


def _alone_at_once(model: ContrastiveModel | MultitaskModel) -> int:
    """How many clients at a time leave a row's result the same wherever in a batch it stands, given products that do.

    torch computes elementwise functions other than sums, products and maxima in vectors of numbers, and what is left of
    a tensor one by one, with other roundings. Attention of heads wider than the kernels' depends on the padding.
    """
    config = model.config.history if isinstance(model, ContrastiveModel) else model.config.encoder
    pads = any(layer.pads for layer in model.modules() if isinstance(layer, EncoderLayer))
    has_equal_rows = not pads and (config.activation == "relu" or config.feed_forward % LANES == 0)
    return CLIENTS_OF_NETWORKS if has_equal_rows and config.pooling != "lstm" else 1


def halves(
    model: torch.nn.Module,
    loader: ViewLoader,
    alone: bool,
    file: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """`embed` in float16; `alone`: in one thread and with products whose rows do not depend on each other."""
    if not alone:
        return embed(model, loader, progress, dtype=np.float16, file=file)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with rows_alone():
            return embed(model, loader, progress, dtype=np.float16, file=file)
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Fitted:
    """Everything that was learned from the events before a cutoff.

    Attributes:
        recipe: the configuration.
        cutoff_s: what lies before it was learned from.
        windows: past windows whose labels the joining models learned.
        vocabulary: ids and products of the store.
        lists: label lists.
        popular: kind -> lists of frequent values.
        taste_weights: see `fit_tastes`; None where no block needs them.
        networks: name -> trained model.
        scorer: scores pairs of clients and labels; None where no block needs it.
        strong: makes the strong columns.
        graded: makes the graded directions and ranks the features; None where no block needs it.
        near: shortens near vectors; None where no block needs it.
        alignment: turns the vectors into those of an earlier model; None: they stay as they are.
    """

    recipe: Recipe
    cutoff_s: int
    windows: int
    vocabulary: Vocabulary
    lists: LabelLists
    popular: Mapping[str, PopularLists]
    taste_weights: Weights | None
    networks: Mapping[str, Network]
    scorer: PairScorer | None
    strong: ReducedRankModel | StackingModel
    graded: ReducedRankModel | None
    near: NearModel | None = None
    alignment: Alignment | None = None


def features_and_networks(recipe: Recipe) -> list[str]:
    """Everything that `Blocks` makes for a whole profile."""
    layout = recipe.layout
    looked_at = [*recipe.joined, *own_blocks(recipe), *graded_blocks(recipe)]
    looked_at += _near_blocks(layout) if layout.near else []
    looked_at += [name for name in ("scores", "tastes", "rhythm") if getattr(layout, name)]
    return list(dict.fromkeys(looked_at))


def own_blocks(recipe: Recipe) -> tuple[str, ...]:
    """Features that the profile holds themselves, and that its graded directions are made of."""
    if not recipe.layout.own and not recipe.layout.graded and not recipe.layout.near:
        return ()
    return OWN_BLOCKS if recipe.rich is None else (*OWN_BLOCKS, "rich")


def graded_blocks(recipe: Recipe) -> tuple[str, ...]:
    """What the graded directions are made of."""
    own = own_blocks(recipe)
    return (*own, "scores") if own and recipe.layout.scores else own


def graded_rank(recipe: Recipe) -> int:
    """Directions that are fitted: those of the graded block, and those that near vectors look at."""
    return max(recipe.layout.directions, NEAR_DIRECTIONS) if recipe.layout.near else recipe.layout.directions


class Blocks:
    """Features and vectors of the relevant clients of a store at a moment, each made when it is asked for first.

    Args:
        fitted: what was learned.
        store: of the clients; in the ids of the vocabulary.
        cutoff_s: the moment.
        day: knows what stands for what a client lacks, or learns it from these clients.
        directory: for matrices that do not fit into memory.
    """

    def __init__(
        self, fitted: Fitted, store: EventStore, cutoff_s: int, day: DayStatistics, directory: Path | None = None
    ) -> None:
        self._fitted, self._store, self._cutoff_s = fitted, store, cutoff_s
        self._day, self._directory = day, directory
        self._made: dict[str, Block] = {}

    def __call__(self, name: str) -> Block:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: str) -> Block:
        fitted, recipe, store, cutoff_s = self._fitted, self._fitted.recipe, self._store, self._cutoff_s
        folder = None if self._directory is None else self._directory / name
        if name in fitted.networks:
            network = fitted.networks[name]
            features = network_rows(name, network.scaler, network.model.config.wide, self, self._day, recipe.raw_counts)
            return network.vectors(store, cutoff_s, features, recipe.at_once)
        if name == "static":
            return static_features(store, cutoff_s, folder)
        if name == "aggregated":
            return aggregated_block(store, cutoff_s, recipe.aggregated, fitted.popular, folder)
        if name == "decayed":
            return decayed_features(store, cutoff_s, fitted.lists, recipe.decayed, folder)
        if name == "tastes":
            assert fitted.taste_weights is not None
            return taste_features(store, cutoff_s, recipe.tastes, folder, fitted.taste_weights)
        if name == "scores":
            assert fitted.scorer is not None
            return fitted.scorer.transform(store, cutoff_s, folder, self._day)
        config = recipe.rhythm if name == "rhythm" else recipe.rich
        return rich_features(store, cutoff_s, fitted.lists, config, folder, self._day, name)


def aggregated_block(
    store: EventStore,
    cutoff_s: int,
    config: AggregatedConfig | CountsConfig,
    lists: Mapping[str, PopularLists],
    directory: Path | None,
) -> Features:
    """Aggregated features in our layout or in the organisers', by their configuration."""
    if isinstance(config, CountsConfig):
        return count_features(store, cutoff_s, config, directory, lists)
    return aggregated_features(store, cutoff_s, config, directory=directory, lists=lists)


def joined(made: Made, names: tuple[str, ...], unit_length: bool, raw_counts: bool = False) -> JoinedBlocks:
    """Some blocks side by side; counts as logarithms, or as they are."""
    blocks = [made(name) for name in names]
    return JoinedBlocks([blocks], [name == "aggregated" for name in names], unit_length, raw_counts)


def parts_of(fitted: Fitted, made: Made, day: DayStatistics, blocks: tuple[str, ...] | None = None) -> list[Part]:
    """The parts of the vectors of some clients, from left to right.

    Args:
        fitted: what was learned.
        made: name -> features or vectors of the clients.
        day: statistics of the day.
        blocks: names of the wanted ones, all when None.
    """
    layout = fitted.recipe.layout
    directions = cache(lambda: _directions(fitted, made, day))
    makers: dict[str, Callable[..., list[Part]]] = {
        "strong": _strong,
        "graded": partial(_graded, directions),
        "near": partial(_near, directions),
        "scores": _scores,
        "own": _own,
        "tastes": _as_it_is,
        "rhythm": _as_it_is,
        "learned": _learned,
    }
    wanted = [
        name for name in makers if (name == "strong" or getattr(layout, name)) and (blocks is None or name in blocks)
    ]
    return [part for name in wanted for part in makers[name](fitted, made, day, name)]


def measure(fitted: Fitted, made: Made, day: DayStatistics) -> None:
    """Learns what is compared among the clients at hand; from then on `day` suffices for each of them alone."""
    recipe = fitted.recipe
    if isinstance(fitted.strong, ReducedRankModel):
        day.moments("strong.inputs", joined(made, recipe.joined, unit_length=True))
    for part in parts_of(fitted, made, day, SCALED_BLOCKS):
        if part.scale is not None:
            day.moments(part.name, part.values)
    for name in _near_blocks(recipe.layout) if recipe.layout.near else ():
        day.moments(name, joined(made, (name,), unit_length=False))


def inputs_of_models(recipe: Recipe, made: Made) -> dict[str, JoinedBlocks]:
    """What the regressions look at, by the name under which its means and deviations among all clients are known."""
    found = {"strong.inputs": joined(made, recipe.joined, unit_length=True, raw_counts=recipe.raw_counts)}
    if own_blocks(recipe):
        found["graded.inputs"] = joined(made, graded_blocks(recipe), unit_length=False)
    return found


def inputs_of_day(recipe: Recipe, made: Made) -> dict[str, JoinedBlocks]:
    """The same, and what else is brought to mean 0 and deviation 1 among the clients of a profile's day."""
    layout, found = recipe.layout, inputs_of_models(recipe, made)
    if layout.own:
        found["own"] = joined(made, own_blocks(recipe), unit_length=False)
    names = [name for name in ("scores", "tastes", "rhythm") if getattr(layout, name)]
    for name in dict.fromkeys([*names, *(_near_blocks(layout) if layout.near else ())]):
        found[name] = joined(made, (name,), unit_length=False)
    return found


def is_summary(made: Made, names: Sequence[str]) -> np.ndarray:
    """Bool [F], columns of some blocks side by side that sum a client up instead of counting one label."""
    found = []
    for name in names:
        columns = column_names(made(name))
        found += [name == "static" or (name == "decayed" and OF_LABEL not in column) for column in columns]
    return np.array(found)


def rows_of(made: Made, first: int, last: int) -> Made:
    """What was made of the clients first..last alone."""

    def some(name: str) -> Block:
        block, rows = made(name), slice(first, last)
        if isinstance(block, np.ndarray):
            return block[rows]
        if isinstance(block, FeatureMatrix):
            return replace(block, client_ids=block.client_ids[rows], values=block.values[rows])
        indptr = block.indptr[first : last + 1]
        entries = slice(indptr[0], indptr[-1])
        return replace(
            block,
            client_ids=block.client_ids[rows],
            indptr=indptr - indptr[0],
            indices=block.indices[entries],
            values=block.values[entries],
        )

    return cache(some)


def vectors_of(fitted: Fitted, made: Made, day: DayStatistics, layout: Layout) -> np.ndarray:
    """Vectors float16 [N, D] of clients, in the blocks of a layout: that of the model or a part of it."""
    names = tuple(block.name for block in layout.blocks)
    alignment = fitted.alignment
    own = layout if alignment is None else alignment.own.select(*names)
    vectors, _ = compose(parts_of(fitted, made, day, names), day=day, layout=own)
    return vectors if alignment is None else alignment.apply(vectors, layout)


def _strong(fitted: Fitted, made: Made, day: DayStatistics, name: str) -> list[Part]:
    inputs = joined(made, fitted.recipe.joined, unit_length=True, raw_counts=fitted.recipe.raw_counts)
    if isinstance(fitted.strong, ReducedRankModel):
        vectors = fitted.strong.transform(inputs, day.moments("strong.inputs", inputs))
        vectors[:, -1] = fitted.recipe.layout.constant
        columns = [*(f"direction_{column}" for column in range(vectors.shape[1] - 1)), "constant"]
    else:
        views = Views(np.arange(len(inputs)), np.full(len(inputs), fitted.cutoff_s))
        size = fitted.recipe.at_once
        if alone := size == 1:
            size = CLIENTS_OF_NETWORKS if fitted.strong.config.profile_width % LANES == 0 else 1
        vectors = halves(fitted.strong, ViewLoader(None, views, batch_size=size, features=inputs), alone)
        columns = [f"activation_{column}" for column in range(vectors.shape[1])]
    what = "what says most about what clients do next"
    return [Part(name, vectors, columns, None, what, _source(fitted, fitted.recipe.joined))]


def _graded(found: Callable[[], Directions], fitted: Fitted, made: Made, day: DayStatistics, name: str) -> list[Part]:
    assert fitted.graded is not None
    layout = fitted.recipe.layout
    directions, share = (values[..., : layout.directions] for values in found())
    columns = [f"direction_{column}" for column in range(directions.shape[1])]
    scale = tuple((layout.graded * share).tolist())
    what = "what says most next, as large as it says"
    return [Part(name, directions, columns, scale, what, _source(fitted, graded_blocks(fitted.recipe)))]


def _directions(fitted: Fitted, made: Made, day: DayStatistics) -> Directions:
    """All graded directions float32 [N, R], deviation 1, and how large each shall be, of the first one."""
    assert fitted.graded is not None
    inputs = joined(made, graded_blocks(fitted.recipe), unit_length=False)
    directions = fitted.graded.transform(inputs, day.moments("graded.inputs", inputs))[:, :-1]
    return directions, (fitted.graded.singular_values / fitted.graded.singular_values[0]) ** GRADING


def near_parts(
    fitted: Fitted, made: Made, day: DayStatistics, found: Callable[[], Directions] | None = None
) -> list[NearPart]:
    """What near vectors are made of; `found` gives the directions where they are there already."""
    directions, share = _directions(fitted, made, day) if found is None else found()
    # Lengths are lost in angles: how far a client goes along the first direction becomes an angle to a one.
    level = np.stack([directions[:, 0], np.ones(len(directions), np.float32)], axis=1)
    parts = [
        NearPart(directions, np.zeros(directions.shape[1]), 1 / share, NEAR_WEIGHTS["graded"]),
        NearPart(level, np.zeros(2), np.ones(2), NEAR_WEIGHTS["level"]),
    ]
    for name in _near_blocks(fitted.recipe.layout):
        values = joined(made, (name,), unit_length=False)
        parts.append(NearPart(values, *day.moments(name, values), NEAR_WEIGHTS[name]))
    return parts


def _near_blocks(layout: LayoutConfig) -> list[str]:
    """Features that near vectors look at beside the directions."""
    scales = (("scores", layout.scores), ("decayed", layout.near), ("rhythm", layout.rhythm))
    return [name for name, scale in scales if scale]


def _near(found: Callable[[], Directions], fitted: Fitted, made: Made, day: DayStatistics, name: str) -> list[Part]:
    assert fitted.near is not None
    vectors = fitted.near.transform(near_parts(fitted, made, day, found)) * np.float32(fitted.recipe.layout.near)
    columns = [f"near_{column}" for column in range(vectors.shape[1])]
    what = "unit vectors whose cosine says who is alike"
    return [Part(name, vectors, columns, None, what, "graded, scores, decayed, rhythm")]


def _own(fitted: Fitted, made: Made, day: DayStatistics, name: str) -> list[Part]:
    assert fitted.graded is not None
    names = own_blocks(fitted.recipe)
    columns = [f"{block}.{column}" for block in names for column in column_names(made(block))]
    values, scale = joined(made, names, unit_length=False), fitted.recipe.layout.own
    importance = fitted.graded.importance[: len(columns)]
    return [Part(name, values, columns, scale, "the features", ", ".join(names), importance)]


def _scores(fitted: Fitted, made: Made, day: DayStatistics, name: str) -> list[Part]:
    columns = column_names(made(name))
    scale = tuple(fitted.recipe.layout.scores * (OF_CLIENT if column in OF_CLIENTS else 1) for column in columns)
    what, source = "log odds that anything and each listed label is bought", "own counts, tastes, recency, popularity"
    return [Part(name, joined(made, (name,), unit_length=False), columns, scale, what, f"{source}; past windows")]


def _as_it_is(fitted: Fitted, made: Made, day: DayStatistics, name: str) -> list[Part]:
    what, source = {
        "tastes": ("factors of all items, pages and searches", "decayed counts of every item, page and search"),
        "rhythm": ("when, how often, how much at once, at what price, how much of it new", "times, items and prices"),
    }[name]
    scale: float = getattr(fitted.recipe.layout, name)
    return [Part(name, joined(made, (name,), unit_length=False), column_names(made(name)), scale, what, source)]


def _learned(fitted: Fitted, made: Made, day: DayStatistics, name: str) -> list[Part]:
    names = tuple(network for network in fitted.recipe.joined if network in NETWORKS)
    if not names:
        return []
    columns = [f"{network}.{column}" for network in names for column in column_names(made(network))]
    values, scale = joined(made, names, unit_length=False), fitted.recipe.layout.learned
    return [Part(name, values, columns, scale, "vectors of the trained models", ", ".join(names))]


def column_names(block: Block) -> list[str]:
    """Names of a block's columns; a network's vectors are numbered."""
    return list(map(str, range(block.shape[1]))) if isinstance(block, np.ndarray) else list(block.names)


def _source(fitted: Fitted, names: tuple[str, ...]) -> str:
    return f"{', '.join(names)}; labels of {fitted.windows} past windows"
