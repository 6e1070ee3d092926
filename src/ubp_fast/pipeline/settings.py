"""The configuration of a run as typed objects; the only reader of Hydra's configuration besides `run.py`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ubp_fast.evaluation import EvaluationConfig
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.challenge import Challenge
from ubp_fast.events.sources.sql import without_password
from ubp_fast.events.sources.table import EventRows
from ubp_fast.events.split import TARGET_DAYS
from ubp_fast.files import file_digest, flatten, is_url
from ubp_fast.pipeline.cache import digest
from ubp_fast.profiler.bundle import bundle_info, model_folder
from ubp_fast.profiler.reading import columns_of, seconds_of
from ubp_fast.profiler.recipe import Recipe
from ubp_fast.profiles.blocks import LayoutConfig
from ubp_fast.profiles.validator import require_vectors
from ubp_fast.progress import Style

COMPONENTS = ("stacked", "contrastive", "multitask", "features", "profile_features", "baseline_log1p", "baseline_raw")
DEFAULT_COMPONENTS = ("stacked", "baseline_log1p")
FEATURES = ("aggregated", "decayed", "rhythm", "tastes", "pairs")
MODELS = ("contrastive", "multitask", "stacking")
BLOCKS = ("contrastive", "multitask", "aggregated", "decayed", "scores", "rich")
# Feature sets that a network may read beside events.
WIDE_SETS = ("static", "aggregated", "decayed")
# Groups of settings that become objects.
OBJECTS = ("data", "profile", "evaluation", *(f"features.{name}" for name in FEATURES))
OBJECTS += tuple(f"{name}.{part}" for name in MODELS for part in ("config", "optimizer"))
# Types of the settings that no dataclass declares; groups of settings are mappings.
PLAIN_TYPES: dict[str, Any] = {
    **dict.fromkeys((*OBJECTS, "profiles", "store", "windows", "compute", "features", "report"), Mapping),
    **dict.fromkeys(MODELS, Mapping),
    **dict.fromkeys((f"{name}._target_" for name in OBJECTS), str),
    **{f"{name}.training": Mapping | None for name in MODELS},
    "seed": int,
    "stages": str | list[str] | None,
    "root": str,
    "directory": str | None,
    "cache": str,
    "progress": Literal["auto", "bars", "lines", "json"],
    "profiles.at": str | None,
    "profiles.align_to": str | None,
    "profiles.client_order": Literal["ids", "baseline"],
    "profiles.at_once": int,
    "profiles.old_after_days": int,
    "store.min_url_count": int,
    "store.all_clients": bool,
    "windows.days": int,
    "windows.model_cutoffs": int,
    "windows.stacking_cutoffs": int,
    "windows.labels": int,
    "windows.given_lists": bool,
    "report.diagnosis": bool,
    "report.clients": bool,
    "report.against": str | None,
    "report.show_ids": bool,
    "stacking.blocks": list[str],
    "compute.device": str,
    "compute.precision": str,
    "compute.devices": int,
    "compute.nodes": int,
    "compute.wait_s": float,
    "compute.tables": Literal["replicated", "sharded"],
    "compute.engine": Literal["local", "ray"],
    "compute.shards": int,
    "compute.address": str | None,
    "compute.threads": int | None,
    "compute.on_shortage": Literal["refuse", "try"],
    **{f"evaluation.{one.name}": get_type_hints(EvaluationConfig)[one.name] for one in fields(EvaluationConfig)},
    "evaluation.components": str | list[str],
    "evaluation.profiles": str | None,
    "evaluation.common_clients": bool,
}
# Settings that may be left out.
OPTIONAL_TYPES: dict[str, Any] = {
    "contrastive.views": int | None,
    "features.rich": Mapping | None,
    "publish": str | None,
}
# Settings that are folders of a file system.
OF_FILES = ("root", "directory", "cache", "evaluation.profiles", "profiles.align_to", "report.against")
# Names that say how a group becomes an object.
OF_OBJECTS = {"_target_": str, "_partial_": bool}
LONGEST_VALUE = 100
DATA_SUFFIXES = (".parquet", ".npy", ".csv", ".gz", ".safetensors", ".json")


@dataclass(frozen=True)
class Windows:
    """Cutoffs that the models learn from, all before the profiles' own cutoff.

    Attributes:
        days: length of a target window, of models and evaluation, and the distance of two cutoffs; where the log is
            short, they are fewer.
        model_cutoffs: cutoffs of the contrastive and multi-task models, at most as many as the history allows.
        stacking_cutoffs: later cutoffs of the stacking model; the newest lies one window before the profiles' cutoff.
        labels: values per label list (category, sku, new sku, price) that the models learn to predict.
        given_lists: take the lists of categories and skus that the organisers' directory names instead of making them;
            in the challenge everybody was told them. Lists of other sources come from the target window and stay
            unseen.
    """

    days: int = TARGET_DAYS
    model_cutoffs: int = 4
    stacking_cutoffs: int = 1
    labels: int = 100
    given_lists: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, bool) and value < 1:
                raise UserError(f"run: windows.{name} must be >= 1, got {value}")


@dataclass(frozen=True)
class Report:
    """What the report shows beside scores.

    Attributes:
        diagnosis: ROC, calibration, and scores by length of history, age, size of the training sample and block.
        clients: a map of the clients, and a few beside their nearest.
        against: directory of an earlier run, against which the drift of inputs and vectors is shown.
        show_ids: the report names the clients that it shows by the shop's own ids.
    """

    diagnosis: bool = True
    clients: bool = True
    against: str | None = None
    show_ids: bool = False


@dataclass(frozen=True)
class ModelSettings:
    """One model: its architecture, its training (None: closed form), and what makes its optimizer from parameters.

    `views` is how many views a training on all clients draws, see `weighted_views`; None: it takes every one.
    """

    config: Any
    training: Any
    optimizer: Callable[..., Any]
    views: int | None = None


@dataclass(frozen=True)
class Settings:
    """Everything a run needs to know.

    Attributes:
        name: short name for directories and titles.
        plain: the resolved configuration as plain data.
        source: where events come from, with `prepare(directory, progress)`.
        stages: names of the stages that were asked for, or None for all.
        rich: the rich feature set, None without one.
        layout: scales of the profile's blocks.
        stacking_blocks: what the stacking model joins, in this order.
        components: what is scored, some of `COMPONENTS` in their order; nothing when empty.
        submission: folder of vectors to score instead of ours.
        common_clients: score everything on the clients that the submission and the baselines share.
        align_to: model of an earlier run, in whose space the newest vectors shall be; None: in one of their own.
        report: what the report shows beside scores.
        publish: URL of a folder in a bucket for the newest vectors, see `ubp_fast.profiles.publishing`; None: nowhere.
        progress: how a run tells how far it is, see `ubp_fast.progress.RunProgress`.
        client_order: order of the clients in profiles, "ids" or "baseline".
        latest: "end" of the data or a moment (seconds), whose vectors are made beside the backtest's; None: no others.
    """

    name: str
    plain: Mapping[str, Any]
    seed: int
    directory: Path
    cache: Path
    stages: tuple[str, ...] | None
    source: Any
    windows: Windows
    aggregated: Any
    decayed: Any
    rich: Any
    rhythm: Any
    tastes: Any
    pairs: Any
    layout: LayoutConfig
    contrastive: ModelSettings
    multitask: ModelSettings
    stacking: ModelSettings
    stacking_blocks: tuple[str, ...]
    device: str
    devices: int
    nodes: int
    wait_s: float
    tables: str
    engine: str
    shards: int
    address: str | None
    threads: int | None
    evaluation: Any
    components: tuple[str, ...]
    submission: Path | None
    common_clients: bool
    report: Report = Report()
    publish: str | None = None
    progress: Style = "auto"
    client_order: str = "ids"
    latest: int | str | None = None
    align_to: Path | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether clients are worked on shard by shard."""
        return self.shards > 1 or self.engine != "local"

    @property
    def recipe(self) -> Recipe:
        """What of it decides the vectors."""
        return Recipe(
            aggregated=self.aggregated,
            decayed=self.decayed,
            rhythm=self.rhythm,
            tastes=self.tastes,
            pairs=self.pairs,
            rich=self.rich,
            layout=self.layout,
            joined=self.stacking_blocks,
            stacking=self.stacking.config,
            contrastive=self.contrastive.config,
            multitask=self.multitask.config,
            table=columns_of(self.source) if isinstance(self.source, EventRows) else None,
            at_once=self.plain["profiles"]["at_once"],
        )

    def part(self, *names: str) -> dict[str, Any]:
        """The named groups of the plain configuration, for a stage's key."""
        return {name: self.plain[name] for name in names}

    def data_part(self) -> dict[str, Any]:
        """What decides the events: the data group, and the content of what a source reads."""
        data = self.plain["data"]
        return {"data": data, "content": self.source.content()} if hasattr(self.source, "content") else {"data": data}

    @staticmethod
    def content(path: Path, pattern: str = "**/*") -> str:
        """Digest of the data files of a directory."""
        files = (file for file in sorted(path.glob(pattern)) if file.suffix in DATA_SUFFIXES and file.is_file())
        return digest({str(file.relative_to(path)): file_digest(file) for file in files})


def read_settings(config: DictConfig) -> Settings:
    """Instantiates the parts of a composed configuration.

    Raises:
        UserError: a value that the part it belongs to refuses.
    """
    try:
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except MissingMandatoryValue as error:
        raise UserError(
            f"run: {error.full_key} must be given, got none; add {error.full_key}=... to the command"
        ) from error
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        raise UserError(f"run: {error.full_key} cannot be read: {str(error).splitlines()[0]}") from error
    named = {
        name: value
        for name, value in plain.items()
        if name not in ("stages", "directory", "root", "cache", "publish", "progress", "compute", "report")
    }
    _require_types(plain)
    _require_paths(plain)
    built, windows = _make(plain["data"]), Windows(**plain["windows"])
    if isinstance(built, Challenge):
        built.check_days(windows.days)
    if "uri" in plain["data"]:  # what is written beside the results holds no password
        plain["data"]["uri"] = without_password(plain["data"]["uri"])
    source = plain["data"]["_target_"].rsplit(".", 2)[-2]
    name = f"{source}-{digest(named)[:8]}"
    evaluation = dict(plain["evaluation"])
    components, submission = _components(evaluation.pop("components")), evaluation.pop("profiles")
    common_clients = bool(evaluation.pop("common_clients"))
    stages, threads = plain["stages"], plain["compute"]["threads"]
    if plain["seed"] < 0:
        raise UserError(f"run: seed must be >= 0, got {plain['seed']}")
    if plain["profiles"]["at_once"] < 1:
        raise UserError(f"run: profiles.at_once must be >= 1, got {plain['profiles']['at_once']}")
    for part in ("devices", "nodes", "shards"):
        if plain["compute"][part] < 1:
            raise UserError(f"run: compute.{part} must be >= 1, got {plain['compute'][part]}")
    if not 1 <= plain["compute"]["wait_s"] <= 86_400:
        raise UserError(f"run: compute.wait_s must be in 1..86400 seconds, got {plain['compute']['wait_s']}")
    if threads is not None and threads < 1:
        raise UserError(f"run: compute.threads must be >= 1 or null, got {threads}")
    return Settings(
        name=name,
        plain=plain,
        seed=int(plain["seed"]),
        directory=Path(plain["directory"] or Path(plain["root"]) / name),
        cache=Path(plain["cache"]),
        stages=None if stages in ("all", None) else tuple([stages] if isinstance(stages, str) else stages),
        source=built,
        windows=windows,
        aggregated=_make(plain["features"]["aggregated"]),
        decayed=_make(plain["features"]["decayed"]),
        rich=_make(plain["features"].get("rich")),
        rhythm=_make(plain["features"]["rhythm"]),
        tastes=_make(plain["features"]["tastes"]),
        pairs=_make(plain["features"]["pairs"]),
        layout=_make(plain["profile"]),
        contrastive=_model(plain, "contrastive"),
        multitask=_model(plain, "multitask"),
        stacking=_model(plain, "stacking"),
        stacking_blocks=_blocks(plain),
        device=plain["compute"]["device"],
        devices=plain["compute"]["devices"],
        nodes=plain["compute"]["nodes"],
        wait_s=float(plain["compute"]["wait_s"]),
        tables=plain["compute"]["tables"],
        engine=plain["compute"]["engine"],
        shards=plain["compute"]["shards"],
        address=plain["compute"]["address"],
        threads=threads,
        evaluation=_make(evaluation),
        components=components,
        submission=None if submission is None else _vectors(submission),
        client_order=plain["profiles"]["client_order"],
        latest=_latest(plain["profiles"]["at"]),
        align_to=_old_model(plain["profiles"]["align_to"]),
        common_clients=common_clients,
        report=_report(**plain.get("report", {})),
        publish=plain.get("publish"),
        progress=plain.get("progress", "auto"),
    )


def _require_paths(plain: Mapping[str, Any]) -> None:
    """Refuses addresses of objects where files are renamed and mapped, and paths where objects are put.

    Raises:
        UserError: names the setting.
    """
    values = flatten(plain)
    for name in OF_FILES:
        if is_url(value := values.get(name)):
            raise UserError(
                f"run: {name} must be a path of a file system, got '{value}'; data.path, data.dir and publish take"
                " addresses of buckets"
            )
    publish = plain.get("publish")
    if publish is not None and not is_url(publish):
        raise UserError(
            f"run: publish must be an address such as s3://bucket/profiles, got '{publish}'; directory= names where"
            " files are written"
        )


def _components(named: Any) -> tuple[str, ...]:
    """What is to be scored, in the order of `COMPONENTS`."""
    if named in ("default", "all"):
        return COMPONENTS if named == "all" else DEFAULT_COMPONENTS
    if not isinstance(named, list) or not set(named) <= set(COMPONENTS):
        raise UserError(
            f"run: evaluation.components must be 'default', 'all' or a list of some of {list(COMPONENTS)}, got {named}"
        )
    return tuple(component for component in COMPONENTS if component in named)


def _latest(at: Any) -> int | str | None:
    try:
        return at if at in (None, "end") else seconds_of(at)
    except UserError as error:
        raise UserError(f"run: profiles.at must be 'end' or a date such as 2026-11-28, got '{at}'") from error


def _old_model(run: str | None) -> Path | None:
    """What is no model is said before the work."""
    if run is None:
        return None
    folder = model_folder(Path(run))
    try:
        bundle_info(folder)
    except DataError as error:
        raise UserError(f"run: profiles.align_to: {error}") from error
    return folder


def _vectors(directory: str) -> Path:
    """What is not there is said before the work."""
    require_vectors(Path(directory))
    return Path(directory)


def _report(against: str | None = None, **others: bool) -> Report:
    if against is not None:
        lacking = [name for name in ("profiles", "stages/store") if not (Path(against) / name).is_dir()]
        if lacking:
            found = f"{' and '.join(lacking)} missing" if Path(against).is_dir() else "no such directory"
            raise UserError(
                f"run: report.against must be the directory of a run with profiles and stages, got {against}: {found};"
                " check the path, or run that one again without evaluation=off"
            )
    return Report(against=against, **others)


def _blocks(plain: Mapping[str, Any]) -> tuple[str, ...]:
    """Named blocks; rich features that were asked for are one more."""
    named = list(plain["stacking"]["blocks"])
    has_rich = plain["features"].get("rich") is not None
    if has_rich and "rich" not in named:
        named.append("rich")
    allowed = BLOCKS if has_rich else BLOCKS[:-1]
    if not named or len(set(named)) < len(named) or not set(named) <= set(allowed):
        raise UserError(f"run: stacking.blocks must be different ones of {list(allowed)}, got {named}")
    return tuple(named)


def _model(plain: Mapping[str, Any], name: str) -> ModelSettings:
    group = plain[name]
    rate = group["optimizer"].get("lr")
    if not _fits(rate, float) or not rate > 0:
        raise UserError(f"run: {name}.optimizer.lr must be a number > 0, got {rate!r}")
    optimizer = _make(group["optimizer"])
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise UserError(f"run: {name}.optimizer must fit {group['optimizer']['_target_']}, got: {error}") from error
    wide = group["config"].get("wide", [])
    if len(set(wide)) < len(wide) or not set(wide) <= set(WIDE_SETS):
        raise UserError(f"run: {name}.config.wide must be different ones of {list(WIDE_SETS)}, got {wide}")
    if wide and name == "contrastive" and plain["store"]["all_clients"]:
        raise UserError(
            "run: contrastive.config.wide must be [] with store.all_clients=true, got"
            f" {wide}; features are made of clients that need a profile alone"
        )
    views = group.get("views")
    if views is not None and views < 1:
        raise UserError(f"run: {name}.views must be >= 1 or null, got {views}")
    return ModelSettings(_make(group["config"]), _make(group["training"]), optimizer, views)


def _require_types(plain: Mapping[str, Any], path: str = "") -> None:
    """Refuses a value that its field, of whatever `_target_` names, does not take, and a configuration with gaps.

    Raises:
        UserError: names the setting.
    """
    if not path:
        for name in PLAIN_TYPES:
            parent, _, last = name.rpartition(".")
            if last not in (_at(plain, parent) if parent else plain):
                raise UserError(f"run: {name} must be given, got none; leave out what removes it")
    is_object = "_target_" in plain
    if is_object:
        _require_fit(f"{path}_target_", plain["_target_"], str)
    known = PLAIN_TYPES | OPTIONAL_TYPES
    hints = _hints(plain["_target_"], path) | OF_OBJECTS if is_object else {}
    for name, value in plain.items():
        place = f"{path}{name}"
        if (str(name).startswith("_") and name not in OF_OBJECTS) or not (is_object or place in known):
            raise UserError(f"run: there is no setting '{place}'")
        hint = known.get(place) or hints.get(name, Any)
        _require_fit(place, value, hint)
        if is_dataclass(hint) and "_target_" not in value:
            raise UserError(f"run: {place}._target_ must be given, got none; leave out what removes it")
        parts = {f"{place}[{number}].": one for number, one in enumerate(value if isinstance(value, list) else ())}
        for inside, one in {f"{place}.": value, **parts}.items():
            if isinstance(one, Mapping) and (place in known or "_target_" in one):
                _require_types(one, inside)


def _at(plain: Any, path: str) -> Any:
    """What lies at a path of names; nothing where a value stands in the way, which its type tells."""
    for name in path.split("."):
        plain = plain.get(name, {}) if isinstance(plain, Mapping) else {}
    return plain if isinstance(plain, Mapping) else PLAIN_TYPES


def _require_fit(place: str, value: Any, hint: Any) -> None:
    if _fits(value, hint) and _is_finite(value):
        return
    shown = repr(value)
    shown = shown if len(shown) <= LONGEST_VALUE else f"{shown[:LONGEST_VALUE]}..."
    raise UserError(f"run: {place} must be {described(hint) if hint is not Any else 'finite'}, got {shown}")


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _hints(target: str, path: str) -> dict[str, Any]:
    """Declared types of what a `_target_` takes; those of other packages check themselves.

    Raises:
        UserError: there is no such class.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not isinstance(found, type):
        raise UserError(f"run: {path}_target_ must name a class, got '{target}'")
    return _fields(found)


@cache
def _fields(found: type) -> dict[str, Any]:
    return get_type_hints(found) if is_dataclass(found) else {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can stand for the type; what is not plain is left to whoever takes it."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return value in inside
    if Mapping in (hint, origin) or is_dataclass(hint):
        return isinstance(value, Mapping)
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list | tuple):
            return False
        each = inside[:1] * len(value) if origin is not tuple or inside[1:] == (...,) else inside
        return len(value) == len(each) and all(map(_fits, value, each))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return hint is not type(None) or value is None


def described(hint: Any) -> str:
    """A type of a setting in words."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(described, inside))
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin in (tuple, list, Sequence):
        number = "" if origin is not tuple or inside[1:] == (...,) else f"{len(inside)} times "
        return f"a list of {number}{described(inside[0])}"
    if Mapping in (hint, origin) or is_dataclass(hint):
        return "a group of settings"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _make(group: Any) -> Any:
    """Builds what `_target_` names, innermost first."""
    try:
        return _with_tuples(instantiate(group, _convert_="all"))
    except InstantiationException as error:
        reason = error.__cause__
        if not isinstance(reason, TypeError | ValueError):
            raise
        message = str(reason)
        if isinstance(reason, TypeError):  # the constructor's own text tells of a key that it does not know
            message = f"run: configuration of {group['_target_']} must fit its fields, got: {reason}"
        raise UserError(message) from error


def _with_tuples(value: Any) -> Any:
    """Lists of the configuration as the tuples that the dataclasses declare."""
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    if is_dataclass(value):
        for item in fields(value):
            object.__setattr__(value, item.name, _with_tuples(getattr(value, item.name)))
    return value
