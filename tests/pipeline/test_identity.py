"""What a stage's output follows from: neither less than what runs, nor everything."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from support.runs import TINY, composed, run_tiny

from ubp_fast.pipeline import execute as run_command
from ubp_fast.pipeline import identity
from ubp_fast.pipeline.cache import digest
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.pipeline.stages import Stage, plan

EXECUTE = sys.modules[run_command.__module__]
SHOP = ("data=synthetic", "data.clients=150", "data.skus=60", "data.urls=80")
EVERYTHING = (
    *SHOP,
    "stacking.blocks=[contrastive,multitask,aggregated,decayed]",
    "features=rich",
    "profiles.at=end",
    "evaluation.readers=[network,linear,neighbours,boosting]",
    "evaluation.components=[stacked,contrastive,features,profile_features]",
    "report.diagnosis=true",
    "report.clients=true",
    # All sources run, on few columns: regressions of thousands of them took nine tenths of the time.
    "windows.labels=10",
    "profile.max_width=600",
)
# How a run tells of itself, what makes the objects that stages are given, and the hook that every step of an optimizer
# calls in a process that has trained tables.
NOT_OF_STAGES = {
    "ubp_fast.progress",
    "ubp_fast.pipeline.settings",
    "ubp_fast.pipeline.execute",
    "ubp_fast.interruption",
    "ubp_fast.optim.table_optimizer",
}


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing that was read stays in memory."""
    cached = (identity._definition, identity._module, identity._path, identity._tree)
    for one in cached:
        one.cache_clear()
    yield
    for one in cached:
        one.cache_clear()


def sources(*settings: str) -> dict[str, dict[str, str]]:
    stages = plan(read_settings(composed(*TINY, *settings)))
    return {stage.name: identity.made_by(stage.begins) for stage in stages}


def changed(before: dict[str, dict[str, str]], *settings: str) -> set[str]:
    now = sources(*settings)
    return {name for name in before if before[name] != now[name]}


def modules_of(made: dict[str, str]) -> set[str]:
    names = {key.removeprefix("source of ") for key in made if key.startswith("source of ")}
    return names | {name.rpartition(".")[0] for name in names}


def test_whatever_a_stage_runs_is_part_of_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[str, set[str]] = defaultdict(set)
    package = str(identity.ROOT)

    def watched(stage: Stage) -> Stage:
        def make(*arguments: object) -> None:
            def seen(frame: object, event: str, argument: object) -> None:
                code = frame.f_code  # type: ignore[attr-defined]
                if code.co_filename.startswith(package) and code.co_name != "<module>":
                    ran[stage.name].add(code.co_filename)

            sys.setprofile(seen)
            threading.setprofile(seen)
            try:
                stage.make(*arguments)  # type: ignore[arg-type]
            finally:
                sys.setprofile(None)
                threading.setprofile(None)

        return replace(stage, make=make)

    original: Callable[..., list[Stage]] = EXECUTE.plan
    monkeypatch.setattr(EXECUTE, "plan", lambda settings: [watched(stage) for stage in original(settings)])
    code, _, text = run_tiny(tmp_path, *EVERYTHING)
    assert code == 0, text
    made = sources(*EVERYTHING)
    assert len(ran) == len(made) >= 20
    for name, files in ran.items():
        modules = {
            ".".join(("ubp_fast", *Path(file).relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
            for file in files
        }
        assert modules - modules_of(made[name]) - NOT_OF_STAGES == set(), name


@pytest.mark.parametrize(
    ("file", "old", "new", "again"),
    [
        ("report/__init__.py", '"""', '"""More. ', set()),
        ("features/decayed.py", '"""', '"""More. ', set()),
        ("report/html.py", "from __future__ import annotations", "ONE = 1", set()),
        ("features/organisers/once.py", "from __future__ import annotations", "ONE = 1", {"baselines"}),
        ("pipeline/stages.py", "np.positive", "np.negative", {"baselines"}),
        ("evaluation/readers/linear.py", "FOLDS = 5", "FOLDS = 6", {"evaluate-stacked-linear"}),
        ("store/build.py", "from __future__ import annotations", "ONE = 1", None),
    ],
)
def test_a_changed_source_is_seen_by_those_who_use_it(
    file: str,
    old: str,
    new: str,
    again: set[str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh: None,
) -> None:
    settings = (*SHOP, "evaluation.components=[stacked]", "evaluation.readers=[network,linear]")
    before = sources(*settings)
    shutil.copytree(identity.ROOT, tmp_path / "ubp_fast", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "ubp_fast" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    for one in (identity._definition, identity._module, identity._path, identity._tree):
        one.cache_clear()
    monkeypatch.setattr(identity, "ROOT", tmp_path / "ubp_fast")
    found = changed(before, *settings)
    if again is None:
        assert "store" in found
        assert "events" not in found
    else:
        assert found == again


def test_libraries_count_where_they_are_used(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    settings = (*SHOP, "stacking.blocks=[contrastive,decayed]", "evaluation.readers=[boosting]")
    before, true = sources(*settings), metadata.version
    for library, using, not_using in (
        ("numba", {"store", "features", "baselines", "contrastive"}, set()),
        ("torch", {"contrastive", "stacking", "features"}, {"store"}),
        ("lightgbm", {"evaluate-stacked-boosting"}, {"store", "features", "contrastive", "stacking"}),
        ("lightning", {"contrastive"}, {"store", "baselines"}),
    ):
        identity._definition.cache_clear()
        identity._module.cache_clear()
        monkeypatch.setattr(metadata, "version", lambda name, of=library: "9.9" if name == of else true(name))
        found = changed(before, *settings)
        assert found >= using
        assert not found & not_using


def test_a_rebuilt_extension_is_seen(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    settings = (*SHOP, "stacking.blocks=[contrastive,decayed]")
    before, true = sources(*settings), identity.file_digest
    identity._definition.cache_clear()
    monkeypatch.setattr(identity, "file_digest", lambda path: "new" if path.name.startswith("_core") else true(path))
    found = changed(before, *settings)
    assert "contrastive" in found
    assert not found & {"events", "store", "baselines"}


# What is changed -> the stages whose keys change; all others are found in the cache.
ALL = {"events", "store", "features", "contrastive", "stacking", "baselines", "evaluate-stacked-linear"}
AGAIN = {
    "a constant of the compiled module": {"features", "contrastive", "stacking", "evaluate-stacked-linear"},
    "version of numba": ALL,  # texts of ids and codes are parsed by compiled functions
    "version of torch": ALL - {"events", "store"},
    "a byte of the data": ALL,
    "a docstring of report/": set(),
    "seed": {"features", "contrastive", "stacking", "evaluate-stacked-linear"},
}


@pytest.mark.parametrize("change", AGAIN)
def test_exactly_the_right_stages_run_again(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    data = tmp_path / "events.csv"
    data.write_text("client_id,timestamp,sku\n1,2024-01-31 10:00:00,5\n")
    named = (f"data.path={data}", "evaluation.readers=[linear]", "evaluation.components=[stacked]")
    given = ["data=table", *named, "stacking.blocks=[contrastive,decayed]"]

    def keys() -> dict[str, str]:
        for one in (identity._definition, identity._module, identity._path, identity._tree):
            one.cache_clear()
        made = EXECUTE.identified(plan(read_settings(composed(*TINY, *given))))
        return {name: digest(parts) for name, parts in made.items()}

    before = keys()
    assert set(before) == ALL
    version, content = metadata.version, identity.file_digest
    if change.startswith("version of"):
        library = change.split()[-1]
        monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == library else version(name))
    elif change == "a constant of the compiled module":
        monkeypatch.setattr(
            identity, "file_digest", lambda path: "other" if path.name.startswith("_core") else content(path)
        )
    elif change == "a byte of the data":
        times = data.stat()
        data.write_text(data.read_text().replace(",5", ",6"))
        os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert (data.stat().st_size, data.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    elif change == "seed":
        given.append("seed=5")
    else:
        shutil.copytree(identity.ROOT, tmp_path / "ubp_fast", ignore=shutil.ignore_patterns("__pycache__"))
        path = tmp_path / "ubp_fast" / "report" / "html.py"
        path.write_text(path.read_text().replace('"""', '"""More. ', 1))
        monkeypatch.setattr(identity, "ROOT", tmp_path / "ubp_fast")
    now = keys()
    assert {name for name in before if before[name] != now[name]} == AGAIN[change]
