"""A GRU autoencoder and the next event, as rivals of the networks of `experiment=best`: same inputs, same budget.

    python benchmarks/rivals.py --output FILE --data NAME [--root runs] [--seeds 1] [key=value ...]
                                [--readers linear boosting] [--rows ROW ...]

Words with "=" are overrides of the run's configuration (`data=synthetic data.clients=5000`). The rivals read the store,
the views, the cutoffs and, with `wide`, the features of that experiment's contrastive model; its optimizer and batches
are theirs, too, and they take six epochs, about the minutes of the multi-task model; no list of labels is shown to
them. Each of the vectors is read alone, beside the features, beside the profile of the demo, which has no networks, and
those of the rivals beside the profile of `best`. CPU minutes are those of training and vectors where they were not
there yet. The file is written after every row, and what it holds is not made again. `python benchmarks/bars.py` makes
the table of the documentation from it.

    autoencoder   GRU over event vectors; its last state, 64 columns, is what another GRU tells the newest events from,
                  newest first: kind, category, hashed item, price, and time to the one after; and the wide features
    next event    causal transformer; every state tells its successor among those of the batch, and how soon it comes;
                  the last one, which is the vector, the first event of the next window, and whether there is any
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from components import CONF
from contest import machine
from hydra import compose as compose_config
from hydra import initialize_config_dir
from learned import CACHED_S, of_tasks, run_to_profiles
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.evaluation import EvaluationConfig, build_targets, evaluate
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import EVENT_KINDS
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import load_features
from ubp_fast.features.scaling import DayStatistics, Rows
from ubp_fast.files import load_json, write_json
from ubp_fast.kernels import nt_xent
from ubp_fast.models.contrastive import content_ids, rows_with_successor
from ubp_fast.models.layers.dropout import dropout
from ubp_fast.models.layers.encoder import EncoderConfig, SequenceEncoder
from ubp_fast.models.layers.event_embedding import EventSizes, ProjectedEventConfig, ProjectedEventEmbedding
from ubp_fast.models.layers.linear import Linear
from ubp_fast.models.training import OptimizerFactory, TrainingConfig, embed, fit, initialise
from ubp_fast.pipeline.model_stages import INFERENCE_BATCH, ViewRows, cutoffs_of
from ubp_fast.pipeline.settings import Settings, read_settings
from ubp_fast.profiler.parts import network_rows
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import Layout, Part, compose
from ubp_fast.sequences import (
    SequenceBatch,
    ViewBatch,
    ViewLoader,
    age_quantiles_days,
    views_at,
)
from ubp_fast.store.event_store import EventStore

NETWORKS, SCORES, FEATURES = ("contrastive", "multitask"), "scores", "features"
PROFILE, BEST = "profile", "profile of best"
# Columns of a block have the deviation that the profile's learned block has.
DEVIATION = 0.0001
EPOCHS = 6


@dataclass(frozen=True)
class RivalConfig:
    """Sizes of both rivals; those that the contrastive model of `best` has, too, are taken from it."""

    history_length: int = 128  # last events before the cutoff
    drop_repeats: bool = False  # of visits and searches, see `ViewLoader`
    events: ProjectedEventConfig = field(default_factory=ProjectedEventConfig)  # event vectors
    encoder: EncoderConfig = field(default_factory=EncoderConfig)  # of the next event
    temperature: float = 0.1  # divides the cosine similarities of events
    next_events: int = 2048  # events of a batch whose successor is asked for, spread evenly
    wide: tuple[str, ...] = ()  # feature sets, standardised, that a linear layer adds to the vector
    wide_dropout: float = 0.4  # share of the wide features dropped in training
    width: int = 64  # columns of the autoencoder's state
    decoded: int = 32  # newest events that the autoencoder has to tell
    buckets: int = 1024  # that skus and pages are hashed into


class Inputs(NamedTuple):
    """What a rival learns from.

    Attributes:
        store: of the events.
        cutoffs_s: of the views.
        rows_of: cutoff -> wide features of all relevant clients, float32 [U, F].
    """

    store: EventStore
    cutoffs_s: tuple[int, ...]
    rows_of: Callable[[int], Rows]


class Rival(nn.Module):
    """Event vectors and wide features.

    Args:
        config: sizes.
        sizes: vocabulary sizes of the store.
        num_wide: columns F of the wide features.
        width: columns E of the vector.
    """

    def __init__(self, config: RivalConfig, sizes: EventSizes, num_wide: int, width: int) -> None:
        super().__init__()
        self.config, self.embedding_width = config, width
        self.events = ProjectedEventEmbedding(config.events, sizes)
        self.wide = Linear(num_wide, width, bias=False) if num_wide else None

    def forward(self, batch: ViewBatch) -> Tensor:
        """Vectors float32 [B, E] of the batch's histories."""
        return self.vector_and_states(batch)[0]

    def vector_and_states(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        """Vectors float32 [B, E], and whatever the loss reads beside them."""
        raise NotImplementedError

    def with_wide(self, vector: Tensor, batch: ViewBatch) -> Tensor:
        """Adds what the wide features say."""
        if self.wide is None:
            return vector
        assert batch.features is not None
        return vector + self.wide(dropout(batch.features, self.config.wide_dropout, self.training, batch.first_view))


class Autoencoder(Rival):
    """GRU over a history, GRU that tells its newest events from the last state alone."""

    def __init__(self, config: RivalConfig, sizes: EventSizes, num_wide: int) -> None:
        super().__init__(config, sizes, num_wide, config.width)
        self.encoder = nn.GRU(config.events.width + 1, config.width, batch_first=True)
        self.start = Linear(config.width, config.width)
        self.decoder = nn.GRU(config.width, config.width, batch_first=True)
        heads = {"kind": 1 + len(EVENT_KINDS), "item": config.buckets, "gap": 1}
        heads |= {name: rows for name, rows in sizes._asdict().items() if name in ("num_categories", "num_prices")}
        self.heads = nn.ModuleDict({name: Linear(config.width, columns) for name, columns in heads.items()})
        self.told_wide = Linear(config.width, num_wide) if num_wide else None

    def vector_and_states(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        history = _history(batch)
        rows = torch.cat([self.events(history, with_age=True), log_days(gaps_s(history, ahead=False))[:, None]], dim=1)
        lengths = history.lengths()
        # Who has no event is read as one of zeros.
        padded = rows.new_zeros(len(lengths), max(int(lengths.max()), 1), rows.shape[1])
        view = history.segments()
        padded[view, torch.arange(len(rows)) - history.cu_seqlens.long()[view]] = rows
        packed = nn.utils.rnn.pack_padded_sequence(padded, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
        return self.with_wide(self.encoder(packed)[1][0], batch), lengths

    def loss(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Named terms whose sum is minimised."""
        history, (vector, lengths) = _history(batch), self.vector_and_states(batch)
        steps = torch.arange(min(self.config.decoded, max(int(lengths.max()), 1)))
        is_event = steps < lengths[:, None]
        told = (history.cu_seqlens[1:].long()[:, None] - 1 - steps)[is_event]
        start = torch.tanh(self.start(vector))
        # Every step is given the vector and no event: what came before says too much of what comes next.
        states = self.decoder(vector[:, None].expand(-1, len(steps), -1).contiguous(), start[None])[0][is_event]
        sku, url = history.sku[told], history.url[told]
        has_item = (sku > 0) | (url > 0)
        item = torch.where(sku > 0, 2 * sku, 2 * url + 1) * 2_654_435_761 % (1 << 32) % self.config.buckets
        of_item = states[has_item]
        terms = {
            "kind": functional.cross_entropy(self.heads["kind"](states), history.kind[told]),
            "item": _cross_entropy(self.heads["item"](of_item), item[has_item]),
            "gap": functional.mse_loss(self.heads["gap"](states)[:, 0], log_days(gaps_s(history, ahead=True))[told]),
        }
        for name, ids in (("num_categories", history.category), ("num_prices", history.price)):
            terms[name.removeprefix("num_")] = _cross_entropy(self.heads[name](states[sku > 0]), ids[told][sku > 0])
        if self.told_wide is not None:
            assert batch.features is not None
            terms["wide"] = functional.mse_loss(self.told_wide(vector), batch.features)
        return terms


class NextEvent(Rival):
    """Causal transformer over a history whose states tell the event that follows."""

    def __init__(self, config: RivalConfig, sizes: EventSizes, num_wide: int) -> None:
        width = config.events.width
        super().__init__(config, sizes, num_wide, width)
        self.encoder = SequenceEncoder(width, replace(config.encoder, causal=True, pooling="last"))
        self.ahead = Linear(width, width)
        self.gap, self.inactive = Linear(width, 1), Linear(width, 1)

    def vector_and_states(self, batch: ViewBatch) -> tuple[Tensor, Tensor]:
        history = _history(batch)
        states = self.encoder.states(self.events(history, with_age=True), history)
        return self.with_wide(self.encoder.pool(states, history), batch), states

    def loss(self, batch: ViewBatch) -> dict[str, Tensor]:
        """Named terms whose sum is minimised."""
        history, future, (vector, states) = _history(batch), batch.future, self.vector_and_states(batch)
        assert future is not None
        rows = rows_with_successor(history, self.config.next_events)
        soon = log_days(gaps_s(history, ahead=True))
        has_future = future.lengths() > 0
        first = future.cu_seqlens[:-1].long()[has_future]
        ahead = vector.new_zeros(vector.shape)
        ahead[has_future] = self.ahead(self.events(future, with_age=False)[first])
        ids = -1 - torch.arange(len(vector))
        ids[has_future] = content_ids(future)[first]
        terms = {
            "next_event": nt_xent(
                states[rows],
                self.ahead(self.events(history, with_age=False)[rows + 1]),
                temperature=self.config.temperature,
                ids=content_ids(history)[rows + 1],
            ),
            "gap": functional.mse_loss(self.gap(states[rows])[:, 0], soon[rows]),
            "future_event": nt_xent(vector, ahead, temperature=self.config.temperature, valid=has_future, ids=ids),
            "inactive": functional.binary_cross_entropy_with_logits(self.inactive(vector)[:, 0], (~has_future).float()),
        }
        return terms


# Rival -> its model, and whether it reads the wide features.
RIVALS: dict[str, tuple[type[Autoencoder | NextEvent], bool]] = {
    "autoencoder": (Autoencoder, False),
    "autoencoder, wide": (Autoencoder, True),
    "next event": (NextEvent, False),
    "next event, wide": (NextEvent, True),
}

_ADDED = (*NETWORKS, *RIVALS, SCORES)
ROWS = (
    *(FEATURES, PROFILE, BEST, *_ADDED),
    *(f"{PROFILE} + {name}" for name in (*NETWORKS, *RIVALS)),
    *(f"{FEATURES} + {name}" for name in _ADDED),
    *(f"{BEST} + {name}" for name in RIVALS),
)


def _history(batch: ViewBatch) -> SequenceBatch:
    assert batch.history is not None
    return batch.history


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Its mean; 0 of nothing."""
    return functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def gaps_s(history: SequenceBatch, ahead: bool) -> Tensor:
    """Seconds to each event from the one before, 0 of a view's first; or `ahead` to the one after or the cutoff."""
    time_s, ends = history.timestamp_s, history.cu_seqlens.long()
    has_events = ends.diff() > 0
    if ahead:
        after = time_s.roll(-1)
        after[ends[1:][has_events] - 1] = history.cutoff_s[has_events]
        return after - time_s
    before = time_s.roll(1)
    first = ends[:-1][has_events]
    before[first] = time_s[first]
    return time_s - before


def log_days(seconds: Tensor) -> Tensor:
    """log(1 + days), float32."""
    return torch.log1p(seconds.float() / DAY_S)


def trained(
    name: str,
    inputs: Inputs,
    config: RivalConfig,
    optimizer: OptimizerFactory,
    training: TrainingConfig,
    directory: Path,
) -> Rival:
    """Trains a rival on all views of the cutoffs; what a directory holds is loaded."""
    kind, is_wide = RIVALS[name]
    store = inputs.store
    views = views_at(store, inputs.cutoffs_s, with_history=True)
    loader = ViewLoader(
        store,
        views,
        batch_size=training.batch_size,
        history_length=config.history_length,
        drop_repeats=config.drop_repeats,
        future_length=1,
        features=ViewRows(store, views, inputs.rows_of) if is_wide else None,
        shuffle_seed=training.seed,
    )
    num_wide = 0 if loader.features is None else loader.features.shape[1]
    rival = initialise(lambda: kind(config, EventSizes.of(store), num_wide), training.seed)
    bins = config.events.age_bins
    edges = age_quantiles_days(store, views, max_length=config.history_length, bins=bins)
    rival.events.age.edges.copy_(torch.from_numpy(edges))
    fit(rival, loader, optimizer, training, directory)
    return rival


def vectors_at(rival: Rival, inputs: Inputs, cutoff_s: int) -> np.ndarray:
    """Vectors float32 [U, E] of all relevant clients at a cutoff."""
    views = views_at(inputs.store, [cutoff_s])
    features = None if rival.wide is None else ViewRows(inputs.store, views, inputs.rows_of)
    config = rival.config
    loader = ViewLoader(
        inputs.store,
        views,
        batch_size=INFERENCE_BATCH,
        history_length=config.history_length,
        drop_repeats=config.drop_repeats,
        features=features,
    )
    return embed(rival, loader)


def inputs_of(run: Path, settings: Settings) -> Inputs:
    """What the contrastive model of a run learned from."""
    folder = run / "stages" / "features"
    store = EventStore.open(run / "stages" / "store")
    wide, raw_counts = settings.contrastive.config.wide, settings.recipe.raw_counts

    def rows_of(cutoff_s: int) -> Rows:
        made = network_rows(
            "contrastive",
            None,
            wide,
            lambda name: load_features(folder / f"{name}-{cutoff_s}"),
            DayStatistics(),
            raw_counts,
        )
        assert made is not None
        return made

    return Inputs(store, cutoffs_of(store, settings)[0], rows_of)


def config_of(settings: Settings) -> RivalConfig:
    """Sizes of the contrastive model."""
    config = settings.contrastive.config
    return RivalConfig(
        config.history_length,
        config.drop_repeats,
        config.events,
        config.history,
        config.temperature,
        config.next_events,
        config.wide,
        config.wide_dropout,
    )


def training_of(settings: Settings) -> TrainingConfig:
    """That of the contrastive model, without the past window that would say when to end."""
    return replace(settings.contrastive.training, epochs=EPOCHS, validation_views=0, patience=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the runs and trains the rivals of every seed, and reads their vectors."""
    options = _options(arguments)
    report = load_json(options.output) if options.output.exists() else {"rivals": {}, "cpu_minutes": {}, "width": {}}
    report |= {
        "data": options.data,
        "overrides": [word for word in options.overrides if not word.startswith(("data.path=", "data.dir="))],
        "machine": machine(),
    }
    for seed in range(options.seeds):
        _read_seed(seed, options, report)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", required=True, help="what the tables call the data")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--readers", nargs="+", choices=("linear", "boosting"), default=["linear"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    options, overrides = parser.parse_known_args(arguments)
    if bad := [word for word in overrides if "=" not in word or word.startswith(("experiment=", "seed="))]:
        parser.error(f"overrides must have the form key=value, and be neither experiment nor seed, got {bad}")
    options.overrides = overrides
    return options


def _settings(experiment: str, seed: int, options: argparse.Namespace) -> Settings:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        named = [f"experiment={experiment}", *options.overrides, f"seed={seed}", f"root={options.root}"]
        return read_settings(compose_config("run", overrides=named))


def _read_seed(seed: int, options: argparse.Namespace, report: dict[str, Any]) -> None:
    minutes, best = report["cpu_minutes"].setdefault(str(seed), {}), _settings("best", seed, options)
    run = run_to_profiles(best, minutes)
    whole = {BEST: Profiles.load(run / "profiles")}
    whole[PROFILE] = Profiles.load(run_to_profiles(_settings("demo", seed, options), {}) / "profiles")
    write_json(options.output, report)  # the minutes: the next time what they were spent on is there
    trained_there = [name for name in NETWORKS if name in best.stacking_blocks]
    vectors = {name: Profiles.load(run / "stages" / name / name) for name in trained_there}
    inputs, client_ids = inputs_of(run, best), whole[PROFILE].client_ids
    for name in RIVALS:
        before_s = time.process_time()
        directory = options.root / "rivals" / run.name / name.replace(", ", "-").replace(" ", "-")
        rival = trained(name, inputs, config_of(best), best.contrastive.optimizer, training_of(best), directory)
        found = vectors_at(rival, inputs, inputs.store.cutoff_s)
        vectors[name] = Profiles(np.asarray(inputs.store.client_ids)[np.asarray(inputs.store.is_relevant)], found)
        if (spent_s := time.process_time() - before_s) > CACHED_S:
            minutes[name] = round(spent_s / 60, 2)
            write_json(options.output, report)
        print(f"{name}, seed {seed}: {minutes.get(name)} CPU minutes", flush=True)
    targets = build_targets(EventDirectory.open(run / "stages" / "events"), client_ids)
    parts = {name: _part(name, one.align(client_ids).embeddings) for name, one in vectors.items()}
    report["width"] |= {name: one.embeddings.shape[1] for name, one in parts.items()}
    for row, columns in _rows(whole, parts).items():
        if row not in options.rows:
            continue
        for reader in options.readers:
            samples = report["rivals"].setdefault(reader, {}).setdefault(row, [])
            if len(samples) == seed:
                scores = evaluate(columns(), targets, EvaluationConfig(readers=(reader,)))
                samples.append({task: one["mean"] for task, one in of_tasks(scores.aurocs()[reader]).items()})
                write_json(options.output, report)
                print(f"{reader}, {row}, seed {seed}: {json.dumps(samples[-1])}", flush=True)
    write_json(options.output, report)


def _part(name: str, vectors: np.ndarray) -> Profiles:
    """Vectors as a block of a profile."""
    columns = [f"{name}.{number}" for number in range(vectors.shape[1])]
    what = Part(name, vectors.astype(np.float32), columns, DEVIATION, "vectors of a rival", name)
    halves, layout = compose([what])
    return Profiles(np.arange(len(halves)), halves, layout)


def _rows(whole: Mapping[str, Profiles], parts: Mapping[str, Profiles]) -> dict[str, Callable[[], Profiles]]:
    """Name -> what makes the columns."""
    profile, best = whole[PROFILE], whole[BEST].align(whole[PROFILE].client_ids)
    assert profile.layout is not None and best.layout is not None
    features = profile.select("own")
    every = {**parts, SCORES: profile.select(SCORES)}
    rows: dict[str, Callable[[], Profiles]] = {
        FEATURES: lambda: features,
        PROFILE: lambda: profile,
        BEST: lambda: best,
    }

    def beside(one: Profiles, other: Profiles) -> Callable[[], Profiles]:
        def made() -> Profiles:
            assert one.layout is not None and other.layout is not None
            blocks = Layout((*one.layout.blocks, *other.layout.blocks))
            return Profiles(one.client_ids, np.concatenate([one.embeddings, other.embeddings], axis=1), blocks)

        return made

    rows |= {name: lambda part=part: Profiles(profile.client_ids, part.embeddings) for name, part in every.items()}
    rows |= {f"{PROFILE} + {name}": beside(profile, part) for name, part in parts.items()}
    rows |= {f"{FEATURES} + {name}": beside(features, part) for name, part in every.items()}
    return rows | {f"{BEST} + {name}": beside(best, parts[name]) for name in RIVALS}


if __name__ == "__main__":
    main()
