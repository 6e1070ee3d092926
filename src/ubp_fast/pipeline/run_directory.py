"""The directory of one run: its configuration, its environment, and what came out."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import yaml

from ubp_fast.files import OutputDirectoryError, flatten, writable_directory, write_text

CONFIG_FILE = "config.yaml"
# Which stages to run, and with how many threads, are no property of the result.
NOT_COMPARED = frozenset({"stages", "directory", "root", "cache", "compute"})
PACKAGES = ("torch", "numpy", "numba", "polars", "lightning", "schedulefree", "torchmetrics", "hydra-core")


class RunDirectory:
    """A directory that holds exactly one configuration's results."""

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        self.path = path
        _refuse_foreign_content(path, config)
        writable_directory(path, "the run directory")
        write_text(path / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def link_stage(self, name: str, target: Path) -> None:
        """Shows a stage's cached output as `stages/<name>` inside the run directory."""
        folder = self.path / "stages"
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target.resolve(), folder.resolve()), target_is_directory=True)
        os.replace(temporary, folder / name)


def environment(threads: int) -> dict[str, object]:
    """What the results were made with: machine, versions, and the source commit where there is one."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "ubp_fast": metadata.version("ubp_fast"),
        "commit": _commit(),
    }


def _refuse_foreign_content(path: Path, config: Mapping[str, object]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputDirectoryError(f"{path}: directory must be a directory, got a file; choose another directory=")
    known = path / CONFIG_FILE
    if not known.exists():
        if any(not child.name.startswith(".") for child in path.iterdir()):
            raise OutputDirectoryError(
                f"{path}: directory must be empty or hold an earlier run, got other files; choose another directory="
            )
        return
    earlier = flatten(_compared(yaml.safe_load(known.read_text(encoding="utf-8")) or {}))
    wanted = flatten(_compared(config))
    differing = [name for name in sorted(earlier.keys() | wanted.keys()) if earlier.get(name) != wanted.get(name)]
    if differing:
        shown = ", ".join(f"{name} ({earlier.get(name)!r} there, {wanted.get(name)!r} now)" for name in differing[:5])
        raise OutputDirectoryError(
            f"{path}: directory must hold a run of the same configuration, got {len(differing)} differing keys:"
            f" {shown}; choose another directory=, or leave it out to get one per configuration"
        )


def _compared(config: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in config.items() if name not in NOT_COMPARED}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    source = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
