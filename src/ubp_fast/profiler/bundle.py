"""The files of `model/`: everything that turns events into the vectors of a run, in JSON and safetensors.

    bundle.json                format, versions, configuration, cutoff, layout, and size and digest of every other file
    vocabulary.safetensors     ids and products
    lists.safetensors          label lists and frequent values
    tastes.safetensors         weights of the items, where a block needs them
    pairs.safetensors          scorer of pairs, where a block needs it
    strong.safetensors, graded.safetensors, near.safetensors, contrastive.safetensors, multitask.safetensors
    maps/<column>.parquet      how text ids of items were numbered, edges of the price buckets, order of dates
    alignment.safetensors      what turns the vectors into those of an earlier run, where asked for
    days/<seconds>.safetensors means and deviations among all clients, and how many, one file per day

Nothing is executed that a file holds, and nothing points outside of the folder: a copy works wherever it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError

from ubp_fast.events.schema import DataError
from ubp_fast.features.scaling import DayStatistics, MinMaxScaler
from ubp_fast.features.tastes import arrays_of_weights, weights_of_arrays
from ubp_fast.files import (
    load_arrays,
    load_json,
    load_tensors,
    why,
    write_arrays,
    write_json,
    write_table,
    write_tensors,
    writing_to,
)
from ubp_fast.models.contrastive import ContrastiveModel
from ubp_fast.models.layers.event_embedding import EventSizes
from ubp_fast.models.multitask import MultitaskModel
from ubp_fast.models.near import NearModel
from ubp_fast.models.pair_scorer import PairScorer
from ubp_fast.models.reduced_rank import ReducedRankConfig, ReducedRankModel
from ubp_fast.models.stacking import StackingModel
from ubp_fast.profiler.parts import Fitted, Network
from ubp_fast.profiler.recipe import Recipe, from_plain, to_plain
from ubp_fast.profiles.alignment import Alignment
from ubp_fast.profiles.blocks import Layout
from ubp_fast.store.in_memory import Vocabulary

BUNDLE_FILE, DAYS, MAPS = "bundle.json", "days", "maps"
MODEL_FOLDER = "model"
# Of every run, from its beginning; `RunDirectory` writes it.
CONFIG_FILE = "config.yaml"
FORMAT = 5
WIDE = "wide.weight"
PACKAGES = ("ubp_fast", "torch", "numpy", "numba", "polars", "safetensors")


def model_folder(run: Path) -> Path:
    """The folder of a bundle: a run's `model`, or the folder itself."""
    return run / MODEL_FOLDER if not (run / BUNDLE_FILE).exists() and (run / MODEL_FOLDER).is_dir() else run


def versions() -> dict[str, str]:
    """Of what decides the numbers of a model and of its vectors."""
    return {name: metadata.version(name) for name in PACKAGES}


def save_bundle(
    directory: Path, fitted: Fitted, layout: Layout, day: DayStatistics, maps: Mapping[str, pl.DataFrame]
) -> None:
    """Writes a bundle into a new or empty directory, bundle.json last.

    Args:
        directory: created.
        fitted: what was learned.
        layout: of the vectors.
        day: statistics of the cutoff's day.
        maps: how text ids of items were numbered; those of clients are of no use here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MAPS).mkdir(exist_ok=True)
    for name, table in maps.items():
        write_table(directory / MAPS / f"{name}.parquet", table)
    write_arrays(directory / "vocabulary.safetensors", fitted.vocabulary.arrays)
    lists: dict[str, np.ndarray] = {}
    for name, (ids, popularity) in fitted.lists.items():
        lists |= {f"labels/{name}": ids, f"popularity/{name}": popularity}
    for kind, columns in fitted.popular.items():
        lists |= {f"popular/{kind}/{column}": values for column, values in columns.items()}
    write_arrays(directory / "lists.safetensors", lists)
    if fitted.taste_weights is not None:
        write_arrays(directory / "tastes.safetensors", arrays_of_weights(fitted.taste_weights))
    models: dict[str, Any] = {}
    for name, network in fitted.networks.items():
        models[name] = {"sizes": network.sizes._asdict(), "outputs": network.outputs}
        write_tensors(directory / f"{name}.safetensors", network.model.state_dict())
        if network.scaler is not None:
            arrays = {"shift": network.scaler.shift, "scale": network.scaler.scale}
            write_arrays(directory / f"{name}_scaler.safetensors", arrays)
    if isinstance(fitted.strong, ReducedRankModel):
        fitted.strong.save(directory / "strong.safetensors")
    else:
        outputs = {label: head.out_features for label, head in fitted.strong.heads.items()}
        models["strong"] = {"num_inputs": fitted.strong.profile.in_features, "outputs": outputs}
        write_tensors(directory / "strong.safetensors", fitted.strong.state_dict())
    if fitted.graded is not None:
        fitted.graded.save(directory / "graded.safetensors")
    if fitted.alignment is not None:
        write_arrays(directory / "alignment.safetensors", fitted.alignment.turns)
    if fitted.near is not None:
        write_arrays(directory / "near.safetensors", {"mean": fitted.near.mean, "directions": fitted.near.directions})
    if fitted.scorer is not None:
        write_arrays(directory / "pairs.safetensors", fitted.scorer.arrays)
    save_day(directory, fitted.cutoff_s, day)
    write_json(
        directory / BUNDLE_FILE,
        {
            "format": FORMAT,
            "versions": versions(),
            "cutoff_s": fitted.cutoff_s,
            "windows": fitted.windows,
            "recipe": to_plain(fitted.recipe),
            "vocabulary": dict(fitted.vocabulary.numbers),
            "label_lists": list(fitted.lists),
            "models": models,
            "layout": layout.to_json(),
            "before_alignment": None if fitted.alignment is None else fitted.alignment.own.to_json(),
            "files": {
                str(path.relative_to(directory)): _fingerprint(path)
                for path in sorted([*directory.glob("*.safetensors"), *directory.glob(f"{MAPS}/*.parquet")])
            },
        },
    )


def load_bundle(directory: Path) -> tuple[Fitted, Layout]:
    """Reads what `save_bundle` wrote.

    Raises:
        DataError: no bundle, one of another format, or a file that is missing, cut off or changed; names it.
    """
    path, info = directory / BUNDLE_FILE, bundle_info(directory)
    try:
        for name, expected in info["files"].items():
            _require_whole(directory / name, expected)
        return _fitted(directory, info), Layout.from_json(info["layout"], str(path))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: model must be complete, got {error!r}; copy it again or make the run again"
        ) from error


def bundle_info(directory: Path) -> dict[str, Any]:
    """The content of bundle.json.

    Raises:
        DataError: no bundle, or one of another format.
    """
    path = directory / BUNDLE_FILE
    try:
        info = load_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(_no_model(directory)) from error
    except ValueError as error:
        raise DataError(f"{path}: file must be complete, got '{error}'; copy it again or make the run again") from error
    found = info.get("format") if isinstance(info, dict) else type(info).__name__
    if found != FORMAT:
        remedy = "; make the run again"
        if isinstance(found, int):
            remedy = " of a newer version of ubp_fast: install that version"
            if found < FORMAT:
                remedy = " of an older version of ubp_fast: make the run again, or install that version"
        raise DataError(f"{path}: format must be {FORMAT}, got {found}{remedy}")
    return dict(info)


def _no_model(directory: Path) -> str:
    """Why there is no bundle where one was looked for."""
    if not directory.exists():
        return f"{directory}: must be the directory of a run, got none there; check the path"
    if not directory.is_dir():
        return f"{directory}: must be the directory of a run, got a file; name the directory"
    if (directory / CONFIG_FILE).exists():
        return (
            f"{directory}: a run must have made its model, got one that stopped before, or whose stages have no"
            " profiles; run the same command again to its end"
        )
    return (
        f"{directory}: must be the directory of a run, or its folder {MODEL_FOLDER}, got neither {MODEL_FOLDER}/ nor"
        f" {BUNDLE_FILE}; check the path"
    )


def load_maps(directory: Path) -> dict[str, pl.DataFrame]:
    """How the run numbered text ids: "sku", "url", "category" -> (value, id); "price_edges" -> (edge,).

    "date_order" -> (order,) is there where dates of the log could be read in two ways.
    """
    return {path.stem: pl.read_parquet(path) for path in sorted((directory / MAPS).glob("*.parquet"))}


def save_day(directory: Path, cutoff_s: int, day: DayStatistics) -> None:
    """Keeps what was measured among all clients on a day, for whoever is embedded from then on."""
    with writing_to(directory / DAYS, "days of the model"):
        (directory / DAYS).mkdir(exist_ok=True)
        write_arrays(directory / DAYS / f"{cutoff_s}.safetensors", day.arrays)


def has_day(directory: Path, at_s: int) -> bool:
    """Whether means and deviations of this very moment are kept."""
    return (directory / DAYS / f"{at_s}.safetensors").exists()


def load_day(directory: Path, at_s: int) -> DayStatistics:
    """The statistics of the newest day at or before a moment, of the oldest one when all are later.

    Raises:
        DataError: there is none, or its file is damaged.
    """
    days = sorted(int(path.stem) for path in (directory / DAYS).glob("*.safetensors"))
    if not days:
        raise DataError(f"{directory / DAYS}: a model must hold the statistics of a day, got none; copy the run again")
    path = directory / DAYS / f"{max([day for day in days if day <= at_s], default=days[0])}.safetensors"
    try:
        return DayStatistics(load_arrays(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: file must be complete, got '{why(error)}'; copy the run again") from error


def _fitted(directory: Path, info: Mapping[str, Any]) -> Fitted:
    recipe: Recipe = from_plain(info["recipe"], str(directory / BUNDLE_FILE))
    lists = load_arrays(directory / "lists.safetensors")
    popular: dict[str, dict[str, np.ndarray]] = {}
    for name, values in lists.items():
        group, *rest = name.split("/")
        if group == "popular":
            popular.setdefault(rest[0], {})[rest[1]] = values
    models, files = info["models"], info["files"]
    tastes, pairs, near = (directory / f"{name}.safetensors" for name in ("tastes", "pairs", "near"))
    strong: ReducedRankModel | StackingModel
    if isinstance(recipe.stacking, ReducedRankConfig):
        strong = ReducedRankModel.load(directory / "strong.safetensors", recipe.stacking)
    else:
        strong = StackingModel(recipe.stacking, **models["strong"])
        strong.load_state_dict(load_tensors(directory / "strong.safetensors"))
    graded = directory / "graded.safetensors"
    return Fitted(
        recipe,
        info["cutoff_s"],
        info["windows"],
        Vocabulary(load_arrays(directory / "vocabulary.safetensors"), info["vocabulary"]),
        {name: (lists[f"labels/{name}"], lists[f"popularity/{name}"]) for name in info["label_lists"]},
        popular,
        weights_of_arrays(load_arrays(tastes)) if tastes.name in files else None,
        {name: _network(directory, name, recipe, models[name]) for name in models if name != "strong"},
        PairScorer.of_arrays(load_arrays(pairs), recipe.pairs) if pairs.name in files else None,
        strong,
        ReducedRankModel.load(graded, ReducedRankConfig()) if graded.name in files else None,
        NearModel(**load_arrays(near)) if near.name in files else None,
        _alignment(directory, info),
    )


def _alignment(directory: Path, info: Mapping[str, Any]) -> Alignment | None:
    if info["before_alignment"] is None:
        return None
    own, layout = (Layout.from_json(info[name], BUNDLE_FILE) for name in ("before_alignment", "layout"))
    return Alignment(own, layout, load_arrays(directory / "alignment.safetensors"))


def _network(directory: Path, name: str, recipe: Recipe, shape: Mapping[str, Any]) -> Network:
    sizes = EventSizes(**shape["sizes"] | {"kinds": tuple(shape["sizes"]["kinds"])})
    scaler = None
    if name == "multitask":
        arrays = load_arrays(directory / f"{name}_scaler.safetensors")
        scaler = MinMaxScaler(arrays["shift"], arrays["scale"])
    return load_network(directory / f"{name}.safetensors", recipe, sizes, scaler, shape["outputs"])


def load_network(
    path: Path, recipe: Recipe, sizes: EventSizes, scaler: MinMaxScaler | None, outputs: Mapping[str, int] | None
) -> Network:
    """A trained network from its weights: the contrastive one has no scaler, the multi-task one has."""
    # Probes watch a training and make no vector.
    state = {name: value for name, value in load_tensors(path).items() if not name.startswith("probes.")}
    num_wide = state[WIDE].shape[1] if WIDE in state else 0
    model: ContrastiveModel | MultitaskModel
    if scaler is None:
        model = ContrastiveModel(recipe.contrastive, sizes, num_wide=num_wide)
    else:
        model = MultitaskModel(recipe.multitask, sizes, len(scaler.shift), outputs or {}, num_wide)
    model.load_state_dict(state)
    return Network(model, sizes, scaler, outputs)


def _fingerprint(path: Path) -> dict[str, Any]:
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return {"bytes": path.stat().st_size, "blake2b": state.hexdigest()}


def _require_whole(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise DataError(f"{path}: file must exist, got none; copy the whole folder again or make the run again")
    if path.stat().st_size != expected["bytes"]:
        raise DataError(
            f"{path}: file must have {expected['bytes']} bytes, got {path.stat().st_size}; it is cut off: copy it again"
        )
    if _fingerprint(path) != expected:
        raise DataError(f"{path}: file must be as the run wrote it, got other content; copy it again")
