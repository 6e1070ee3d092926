"""The shape of the house: who may import whom, one reference per kernel, no room that grew too large."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "ubp_fast"
ORDER = (
    "compiled",
    "files",
    "interruption",
    "progress",
    "events",
    "ranks",
    "store",
    "features",
    "sequences",
    "optim",
    "models",
    "profiles",
    "profiler",
    "shards",
    "evaluation",
    "report",
    "pipeline",
    "run",
    "transformer",
    "doctor",
    "options",
    "cli",
)
MODULES = sorted(SOURCE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})
MOST_FILES = 10
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}


def named(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def stage_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction, write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def imported_stages(path: Path) -> set[str]:
    inside = (name.split(".") for name in imported_modules(path) if name.startswith("ubp_fast."))
    return {parts[1] for parts in inside if len(parts) > 1}


def folder_of(module: str) -> Path | None:
    """The folder of a module of ours, written with dots."""
    path = SOURCE.parent.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return path.parent
    return path if path in FOLDERS else None


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_point_left(path: Path) -> None:
    stage = stage_of(path)
    if stage == "__init__":
        return
    known = imported_stages(path) & {*ORDER, "kernels"}
    if stage == "kernels":
        assert not known - {"kernels", "compiled"}, f"kernels import no stage, {path} imports {sorted(known)}"
        return
    assert stage in ORDER, f"{path}: '{stage}' is not in the order of stages"
    allowed = {*ORDER[: ORDER.index(stage) + 1], "kernels"}
    assert known <= allowed, f"{path} may import {sorted(allowed)}, imports {sorted(known - allowed)}"


def test_no_folders_import_each_other() -> None:
    """Subfolders included; a package's `__init__` gathers what lies below it and is left out."""
    imports: dict[str, set[str]] = defaultdict(set)
    for path in MODULES:
        if path.name == "__init__.py":
            continue
        found = {folder_of(name) for name in imported_modules(path) if name.startswith("ubp_fast.")}
        imports[named(path.parent)] |= {named(folder) for folder in found if folder not in (None, SOURCE, path.parent)}
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        pytest.fail(f"these folders import each other: {' <- '.join(error.args[1])}")


def test_hydra_stays_at_the_edge() -> None:
    users = {
        stage_of(path)
        for path in MODULES
        if {name.split(".")[0] for name in imported_modules(path)} & {"hydra", "omegaconf"}
    }
    assert users <= {"run", "pipeline"}


def test_lightning_appears_once() -> None:
    users = [path.name for path in MODULES if any(name.split(".")[0] == "lightning" for name in imported_modules(path))]
    assert users == ["training.py"]


def test_files_reach_the_disk_in_one_place() -> None:
    assert [named(path) for path in MODULES if "fsync" in path.read_text(encoding="utf-8")] == ["files.py"]


def test_every_kernel_has_one_interface_and_one_reference() -> None:
    operations = [path for path in (SOURCE / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(operations) >= 3
    for operation in operations:
        present = {path.name for path in operation.glob("*.py")}
        assert {"__init__.py", "api.py", "reference.py"} <= present, operation.name


@pytest.mark.parametrize("folder", FOLDERS, ids=named)
def test_folders_stay_readable(folder: Path) -> None:
    files = {path.name for path in folder.glob("*.py")}
    assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files, at most {MOST_FILES}: {sorted(files)}"
    assert not files & FORBIDDEN_NAMES
