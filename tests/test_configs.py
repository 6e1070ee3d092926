"""Every yaml composes, builds its objects, and repeats the defaults that live in the dataclasses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from support.runs import CONF, composed

from ubp_fast.evaluation import EvaluationConfig
from ubp_fast.evaluation.evaluator import row_orders
from ubp_fast.evaluation.tasks import TASKS
from ubp_fast.events.schema import UserError
from ubp_fast.files import flatten
from ubp_fast.pipeline import command
from ubp_fast.pipeline.command import as_typed
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.pipeline.stages import plan
from ubp_fast.profiles import Profiles

REQUIRED = {
    "challenge": ("data.dir=somewhere",),
    "table": ("data.path=events.parquet",),
    "sql": ("data.uri=sqlite:///shop.db", "data.query=events"),
}
ENTRY = {
    "data": "data",
    "compute": "compute",
    "features": "features",
    "evaluation": "evaluation",
    "experiment": "experiment",
    "profile": "profile",
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def test_every_group_is_covered() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert groups == {*ENTRY, "model", "optimizer"}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in ENTRY for option in options(group)])
def test_option_composes_and_builds(group: str, option: str) -> None:
    settings = read_settings(composed(f"{ENTRY[group]}={option}", *REQUIRED.get(option, ())))
    assert settings.name
    assert settings.directory.parent == Path("runs")


@pytest.mark.parametrize("option", options("optimizer"))
@pytest.mark.parametrize("model", ["contrastive", "multitask", "stacking"])
def test_optimizers_of_every_model(model: str, option: str) -> None:
    import torch

    settings = read_settings(composed(f"optimizer@{model}.optimizer={option}"))
    optimizer = getattr(settings, model).optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert isinstance(optimizer, torch.optim.Optimizer)


def differences(value: object, default: object, path: str = "") -> list[str]:
    if isinstance(value, tuple) and isinstance(default, tuple) and len(value) == len(default):
        pairs = enumerate(zip(value, default, strict=True))
        return [line for index, (one, other) in pairs for line in differences(one, other, f"{path}[{index}]")]
    if not dataclasses.is_dataclass(value):
        return [] if value == default else [f"{path}: yaml {value!r}, dataclass {default!r}"]
    assert type(value) is type(default)
    return [
        line
        for item in dataclasses.fields(value)
        for line in differences(getattr(value, item.name), getattr(default, item.name), f"{path}.{item.name}")
    ]


def test_yaml_repeats_the_constructors_defaults() -> None:
    settings = read_settings(composed("~experiment"))
    objects = [settings.source, settings.aggregated, settings.decayed, settings.evaluation, settings.windows]
    objects += [read_settings(composed("profile=blocks")).layout, settings.tastes]
    for model in (settings.contrastive, settings.multitask, settings.stacking):
        objects += [model.config, model.training]
    objects.append(read_settings(composed("~experiment", "model@stacking=reduced_rank")).stacking.config)
    objects.append(read_settings(composed("features=rich")).rich)
    for option in options("data"):
        objects.append(read_settings(composed(f"data={option}", *REQUIRED.get(option, ()))).source)
    required = {"dir": "somewhere", "path": "events.parquet", "uri": "sqlite:///shop.db", "query": "events"}
    for value in objects:
        needed = {item.name: required[item.name] for item in dataclasses.fields(value) if item.name in required}
        assert differences(value, type(value)(**needed), type(value).__name__) == []


@pytest.fixture(scope="module")
def components() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "components.py"
    spec = importlib.util.spec_from_file_location("components", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_the_table_of_components_compose(components: ModuleType) -> None:
    names = set()
    for overrides, folder in components.ROWS.values():
        settings = read_settings(composed(*overrides, f"stages=[{folder.split('/')[0]}]"))
        assert folder.split("/")[0] in {stage.name for stage in plan(settings)}
        names.add((settings.name, folder))
    assert len(names) == len(components.ROWS), "no row twice"


def test_table_of_components_is_paired_order_by_order(components: ModuleType) -> None:
    rows = {
        components.REFERENCE: {"auroc": {"churn": [[0.5, 0.7]]}},
        "two seeds": {"auroc": {"churn": [[0.6, 0.8], [0.7, 0.9]]}},
        "one order so far": {"auroc": {"churn": [[0.75]]}},
    }
    report = {"oracle": {"churn": 0.9}, "rows": rows}
    components.summarise(report)
    found = {name: row["tasks"]["churn"] for name, row in rows.items()}
    assert found["two seeds"]["mean"] == pytest.approx(0.75)
    assert found["two seeds"]["standard_error"] == pytest.approx(0.1)  # of .65 and .85: seeds are no further draws
    assert found["two seeds"]["difference"] == pytest.approx(0.15)
    assert found["two seeds"]["difference_error"] == pytest.approx(0.0, abs=1e-12)
    assert found["one order so far"]["difference"] == pytest.approx(0.25)  # to the reference in that order alone
    assert found["one order so far"]["standard_error"] is None
    assert found["one order so far"]["oracle_share"] == pytest.approx(0.75 / 0.9)


def test_table_of_components_adds_only_what_its_file_lacks(
    components: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []

    def aurocs(profiles: Profiles, targets: object, tasks: Sequence[str]) -> dict[str, float]:
        scored.append((int(profiles.client_ids[0]), *tasks))
        return {task: 0.5 for task in tasks if task != "propensity_new_sku"}  # the data has no new product

    for name in ("first", "second"):
        Profiles(np.arange(7), np.zeros((7, 2), np.float16)).save(tmp_path / name / "stages/stacking/stacked")
    folders = {"stacking.blocks=[aggregated]": "first", "stacking.blocks=[decayed]": "second"}
    monkeypatch.setattr(components, "run_to", lambda overrides, folder, root: tmp_path / folders[overrides[0]])
    monkeypatch.setattr(components, "targets_of", lambda run, profiles: None)
    monkeypatch.setattr(components, "oracle_aurocs", lambda run, targets: None)
    monkeypatch.setattr(components, "_aurocs", aurocs)
    arguments = ["--output", str(tmp_path / "table.json"), "--rows", "decayed", "aggregated"]

    components.main([*arguments, "--orders", "1", "--tasks", "churn"])
    components.main([*arguments[:-1], "--orders", "2", "--tasks", "churn"])
    components.main([*arguments, "--orders", "2"])
    rest = [task for task in TASKS if task != "churn"]
    known = [task for task in rest if task != "propensity_new_sku"]
    orders = [int(order[0]) for order in row_orders(np.arange(7), EvaluationConfig(orders=2))]
    assert scored == [
        (orders[0], "churn"),
        (orders[0], "churn"),
        (orders[1], "churn"),
        (orders[0], *rest),
        (orders[0], *known),
        (orders[1], *known),
        (orders[1], "churn", *known),
    ]
    scored.clear()
    components.main([*arguments, "--orders", "2"])
    assert scored == []
    rows = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["aggregated", "decayed"]
    assert {task: len(orders[0]) for task, orders in rows["decayed"]["auroc"].items()} == dict.fromkeys(
        ["churn", *known], 2
    )


def test_demo_is_smaller_than_the_winner() -> None:
    demo, winner = read_settings(composed()), read_settings(composed("experiment=winner"))
    assert demo.contrastive.config.events.width < winner.contrastive.config.events.width == 512
    assert winner.multitask.training.epochs == 25
    assert winner.contrastive.config.temperature == 0.02


def test_best_trains_the_models_that_the_demo_leaves_out() -> None:
    stages = {
        name: {stage.name for stage in plan(read_settings(composed(*name)))} for name in ((), ("experiment=best",))
    }
    assert stages[("experiment=best",)] - stages[()] == {"contrastive", "multitask"}


def test_unknown_key_is_named() -> None:
    with pytest.raises(ConfigCompositionException, match=r"data\.clinets"):
        composed("data=synthetic", "data.clinets=5")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+data.end_s=5", "configuration of .*CompleteJourney must fit its fields, got: .*'end_s'"),
        ("+contrastive.config.events.widht=5", "configuration of .*ContrastiveConfig must fit its fields.*'widht'"),
        ("+contrastive.optimizer.rate=5", "^run: contrastive.optimizer must fit schedulefree.*, got: .*'rate'"),
        ("contrastive.config.next_event_weight=1", "^ContrastiveConfig: history.causal must be true .* sees the one"),
        ("evaluation.precision=fp64", "^EvaluationConfig: precision must be 'fp32' or 'bf16', got 'fp64'$"),
        ("evaluation.epochs=many", "^run: evaluation.epochs must be a whole number, got 'many'$"),
        ("evaluation.readers=[forest]", "^evaluation: readers must be different ones of .*, got .*forest"),
        ("evaluation.components=[stacked,raw]", "^run: evaluation.components must be .*, got .*raw"),
        ("evaluation.tasks=churn", "^run: evaluation.tasks must be a list of a text, got 'churn'$"),
        ("evaluation.tasks=[curn]", "evaluation: tasks must be among"),
        ("windows.model_cutoffs=0", "^run: windows.model_cutoffs must be >= 1, got 0$"),
        (
            "evaluation.components=most",
            "^run: evaluation.components must be 'default', 'all' or a list of some of .*, got most$",
        ),
    ],
)
def test_wrong_value_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_settings(composed(override))
    assert "\n" not in str(caught.value)


def test_a_setting_that_must_be_given_is_named() -> None:
    with pytest.raises(UserError, match=r"^run: data.path must be given, got none; add data.path=\.\.\. to"):
        read_settings(composed("data=table"))


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("data.path=ü.parquet", "ü.parquet"),
        ("data.path=day=1.parquet", "day=1.parquet"),
        ("data.path=/x y/a (1).csv", "/x y/a (1).csv"),
        ("data.path=a,b.csv", "a,b.csv"),
        ("data.path=it's", "it's"),
        ("data.path=[a,b]", ["a", "b"]),
        ("data.path='a=b'", "a=b"),
        ("data.path=plain.csv", "plain.csv"),
        ("data.path=;", ";"),
        ("data.path=n > 0 AND country = 'UK'", "n > 0 AND country = 'UK'"),
    ],
)
def test_values_work_as_they_are_typed(typed: str, value: object) -> None:
    assert composed("data=table", *as_typed([typed])).data.path == value


def test_other_arguments_stay_as_they_are() -> None:
    arguments = ["--config-dir=my folder", "data=table", "~experiment", "+data.x=1", "stages=[a]", "model@stacking=x"]
    assert as_typed(arguments) == arguments


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("evaluation.order=4", "there is no setting 'evaluation.order', did you mean evaluation.orders"),
        ("orders=4", "there is no setting 'orders', did you mean evaluation.orders?"),
        ("dat=table", "there is no setting 'dat', did you mean data"),
        ("data.path=x", "there is no setting 'data.path' of this source, but of data=table"),
        ("zzz=1", "there is no setting 'zzz'; ubp-fast settings shows them all"),
        ("data=tabl", "data must be one of challenge, complete_journey, sql, synthetic, table, got 'tabl'"),
        ("model@stacking=none", "model@stacking must be one of contrastive, multitask, reduced_rank, stacking"),
        ("data=null", "data must be one of challenge,"),
        ("compute.threads", "settings must have the form name=value, got 'compute.threads'"),
        (
            "windows=5",
            "windows is a group of settings (days, model_cutoffs, stacking_cutoffs, labels,",
        ),
        ("features.pairs=null", "features.pairs is a group of settings (kinds,"),
        ("compute=[0,0]", "compute must be one of auto, cpu, gpu, got '[0,0]'"),
        ("multitask.config.encoder=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("+windows.months=1", "there is no setting 'windows.months'"),
        ("~windows.days", "windows.days must be given, got none"),
        ("data._target_=os.getcwd", "data._target_ must name a class, got 'os.getcwd'"),
        (
            "profiles.align_to=/",
            "profiles.align_to: /: must be the directory of a run, or its folder model, got neither",
        ),
        (
            "report.against=/tmp/nowhere",
            "must be the directory of a run with profiles and stages, got /tmp/nowhere: no",
        ),
        (
            "evaluation.profiles=/tmp/nowhere",
            "must hold client_ids.npy and embeddings.npy, got no such directory; check",
        ),
        ("windows.days=abc", "windows.days must be a whole number, got 'abc'"),
        ("data=challenge data.dir=x windows.days=7", "windows.days must be 14, as the organisers fixed it, got 7"),
        ("windows.days=true", "windows.days must be a whole number, got True"),
        ("seed=-1", "seed must be >= 0, got -1"),
        ("evaluation.seed=-1", "seed must be >= 0, got -1"),
        ("compute.shards=0", "compute.shards must be >= 1, got 0"),
        ("compute.engine=spark", "compute.engine must be one of local, ray, got 'spark'"),
        ("features.pairs.hidden=[3]", "features.pairs.hidden must be a list of 2 times a whole number, got [3]"),
        ("evaluation.readers='[network'", "evaluation.readers must be a list of a text, got '[network'"),
        ("profile.graded=nan", "profile.graded must be a number"),
        ("compute.device=tpu", "must be one of cpu, cuda, auto, got 'tpu'"),
        ("compute.threads=0", "compute.threads must be >= 1 or null, got 0"),
        ("contrastive.optimizer.lr=fast", "contrastive.optimizer.lr must be a number > 0, got 'fast'"),
        ("stacking.training=true", "stacking.training must be a group of settings or null, got True"),
        ("profiles.at=yesterday", "profiles.at must be 'end' or a date such as 2026-11-28, got 'yesterday'"),
    ],
)
def test_mistakes_are_named_with_the_remedy(typed: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        read_settings(command.composed(["data=synthetic", typed] if not typed.startswith("data=") else typed.split()))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# Choices of groups that random settings begin with, and values that right and wrong ones are drawn from.
GROUPS = (
    ("data=synthetic",),
    ("data=table", "data.path=events.csv"),
    ("data=sql", "data.uri=sqlite:///shop.db", "data.query=orders"),
    ("data=challenge", "data.dir=shop"),
    ("data=synthetic", "experiment=winner"),
    ("data=synthetic", "experiment=best", "features=rich"),
    ("data=synthetic", "model@stacking=stacking", "optimizer@stacking.optimizer=adamw", "evaluation=off"),
)
REMOVED = object()
PLAIN: tuple[Any, ...] = (-1, 0, 1, 2, 7, 2.5, -0.5, 1e-9, 10**12, 2**63, math.nan, math.inf, None, True, False)
PLAIN += ("abc", "", " ", "end", "2026-11-28", "/", "none", "\u00e4", "${seed}", "${nowhere}", "${oc.env:NOTHING}")
PLAIN += ("???", "stacked", "network", "churn", "product_buy", "cuda", "auto", "all", "[", "a=b", "1e400")
PLAIN += ([], [1], [1, 2], [2, 1], [0, 0], ["a"], [None], [[1]], ["network", "network"], {}, {"a": 1})
PLAIN += ({"_target_": "os.getcwd"}, "ubp_fast.files")


def random_changes(random: np.random.Generator, flat: dict[str, Any]) -> list[tuple[str, Any]]:
    """Some settings and new values: of the old one's kind, of another one's, or of anything."""
    leaves = list(flat)
    parents = sorted({name.rsplit(".", depth)[0] for name in leaves for depth in range(1, name.count(".") + 1)})
    changes = []
    for _ in range(random.integers(1, 4)):
        kind, name = random.random(), str(random.choice(leaves))
        value, other = flat[name], flat[str(random.choice(leaves))]
        if kind < 0.05:
            name = str(random.choice(parents))
        elif kind < 0.08:
            value = REMOVED
        elif kind < 0.11:
            name += str(random.choice(["s", ".x", "_", "_days"]))
        draw = random.random()
        if draw < 0.3 and isinstance(value, int | float) and not isinstance(value, bool):
            other = type(value)(value * random.choice([0, 1, 2, -1, 100]))
        elif draw < 0.3 and isinstance(value, list) and value:
            other = [value[index] for index in random.integers(0, len(value), random.integers(0, 4))]
        elif draw < 0.5:
            alike = [one for one in flat.values() if isinstance(one, type(value))]
            other = alike[random.integers(len(alike))]
        elif draw < 0.9:
            other = PLAIN[random.integers(len(PLAIN))]
        changes.append((name, REMOVED if value is REMOVED else other))
    return changes


def outcome(groups: tuple[str, ...], base: DictConfig, changes: list[tuple[str, Any]], typed: bool) -> str:
    """ "plan", or the one sentence that is said."""
    try:
        if typed:
            config = command.composed(as_typed([*groups, *(_as_text(name, value) for name, value in changes)]))
        else:
            config = copy.deepcopy(base)
            for name, value in changes:
                # No such place, which `composed` says.
                with contextlib.suppress(OmegaConfBaseException, AttributeError, KeyError, TypeError, ValueError):
                    if value is REMOVED:
                        parent, _, last = name.rpartition(".")
                        with open_dict(config):
                            del (OmegaConf.select(config, parent) if parent else config)[last]
                    else:
                        OmegaConf.update(config, name, value, merge=False, force_add=True)
        plan(read_settings(config))
    except UserError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{groups} {changes}: {type(error).__name__}: {error}") from error
    return "plan"


def _as_text(name: str, value: Any) -> str:
    if value is REMOVED:
        return f"~{name}"
    return f"{name}={json.dumps(value) if isinstance(value, list | dict) else 'null' if value is None else value}"


@pytest.mark.parametrize("count", [70, pytest.param(20_000, marks=pytest.mark.slow)])
def test_random_settings_give_a_plan_or_one_sentence(count: int) -> None:
    random = np.random.default_rng(count)
    bases = [(groups, command.composed(groups)) for groups in GROUPS]
    flats = [flatten(OmegaConf.to_container(base, resolve=False)) for _, base in bases]  # type: ignore[arg-type]
    said = []
    for number in range(count):
        chosen = number % len(GROUPS)
        said.append(outcome(*bases[chosen], random_changes(random, flats[chosen]), typed=number % 25 == 0))
    plans = said.count("plan")
    assert plans > count / 20
    assert count - plans > count / 5
    assert not [text for text in said if "\n" in text or not text]


def test_name_of_a_run_follows_what_matters() -> None:
    names = [
        read_settings(composed(*extra)).name for extra in ((), ("compute.threads=1",), ("stages=[store]",), ("seed=1",))
    ]
    assert names[0] == names[1] == names[2] != names[3]
