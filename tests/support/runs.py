"""Small runs of the whole pipeline for tests."""

from __future__ import annotations

import io
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

import ubp_fast
from ubp_fast.features import scaling
from ubp_fast.pipeline import execute

CONF = Path(ubp_fast.__file__).resolve().parent / "conf"
SMALL = Path(__file__).resolve().parent.parent / "golden" / "small"

# Seconds instead of minutes: one cutoff each, narrow models, one epoch of the evaluation's network on one task.
TINY = (
    "windows.model_cutoffs=1",
    "windows.stacking_cutoffs=1",
    "contrastive.config.events.width=32",
    "contrastive.config.history_length=16",
    "contrastive.config.future_length=8",
    "multitask.config.history_length=16",
    "multitask.config.profile_width=32",
    "windows.labels=100",
    "evaluation.tasks=[churn]",
    "evaluation.epochs=1",
    "compute.threads=1",
    "features.pairs.pairs=2000",
    "features.pairs.epochs=1",
    "report.diagnosis=false",
    "report.clients=false",
)

# Everything that can be joined, where the demo joins decayed counts only.
ALL_BLOCKS = "stacking.blocks=[contrastive,multitask,aggregated,decayed]"

# Networks that read features beside events.
WIDE = ("contrastive.config.wide=[static,aggregated,decayed]", "multitask.config.wide=[decayed]")

# The winner's stacking network instead of the reduced-rank regression.
NETWORK = ("model@stacking=stacking", "stacking.config.profile_width=64", "stacking.config.standardise=true")

# A run that shards can work on; more clients than are drawn for what does not add up.
CLOSED_FORMS = (
    *TINY,
    "data=synthetic",
    "data.clients=400",
    "data.skus=60",
    "data.urls=80",
    "windows.stacking_cutoffs=2",
    "features.tastes.clients=90",
    "features.pairs.clients=50",
    "stages=profiles",
)


def composed(*overrides: str) -> DictConfig:
    """The configuration that the command line would make of these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("run", overrides=list(overrides))


def run_tiny(root: Path, *overrides: str) -> tuple[int, Path, str]:
    """Runs in this process; exit code, run directory (the only one below `root`), and what was printed."""
    text = io.StringIO()
    code = execute(composed(*TINY, f"root={root}", *overrides), Console(file=text, width=160))
    runs = [path for path in root.iterdir() if path.name != "cache"] if root.exists() else []
    return code, runs[0] if runs else root, text.getvalue()


def contents(directory: Path) -> dict[str, bytes]:
    """Bytes of every file below a directory, by relative name."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def few_rows() -> None:
    """Parts of sums hold 16 clients from now on; also for workers of a cluster."""
    scaling.ROWS_AT_ONCE = 16
