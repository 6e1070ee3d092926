"""The shape of the house: who may import whom, one reference per kernel, no room that grew too large."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "ubp_fast"
ORDER = (
    "events",
    "store",
    "features",
    "sequences",
    "optim",
    "models",
    "profiles",
    "evaluation",
    "report",
    "pipeline",
    "run",
)
MODULES = sorted(SOURCE.rglob("*.py"))
MAX_LINES, MAX_KERNEL_LINES = 300, 500
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_left(path: Path) -> None:
    stage = stage_of(path)
    if stage == "__init__":
        return
    known = imported_stages(path) & {*ORDER, "kernels"}
    if stage == "kernels":
        assert not known - {"kernels"}, f"kernels import no stage, {path} imports {sorted(known)}"
        return
    assert stage in ORDER, f"{path}: '{stage}' is not in the order of stages"
    allowed = {*ORDER[: ORDER.index(stage) + 1], "kernels"}
    assert known <= allowed, f"{path} may import {sorted(allowed)}, imports {sorted(known - allowed)}"


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


def test_every_kernel_has_one_interface_and_one_reference() -> None:
    operations = [path for path in (SOURCE / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(operations) >= 3
    for operation in operations:
        present = {path.name for path in operation.glob("*.py")}
        assert {"__init__.py", "api.py", "reference.py"} <= present, operation.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_stay_readable(path: Path) -> None:
    limit = MAX_KERNEL_LINES if stage_of(path) == "kernels" else MAX_LINES
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= limit, f"{path.name} has {lines} lines, at most {limit}"
    assert path.name not in FORBIDDEN_NAMES
