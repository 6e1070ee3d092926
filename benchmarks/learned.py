"""What each learned part of a profile is worth to a linear reader: alone, beside the features, and left out.

    python benchmarks/learned.py --output FILE --data NAME [--root runs] [--lengths] [key=value ...]

Words with "=" are overrides of the run's configuration (`data=synthetic data.clients=20000`); the experiment is
`best` unless they say otherwise. One run makes a profile of all blocks; the rows are some of its columns, beside the
organisers' counts as log1p. `--lengths` asks instead what all learned parts together are worth to clients with few
events before the cutoff: AUROC by length of history, with them and without. CPU minutes are those of the stages that
train where the cache does not have them. `python benchmarks/bars.py` makes the table of the documentation from the
file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from components import CONF
from contest import machine
from hydra import compose, initialize_config_dir
from rich.console import Console

from ubp_fast.evaluation import EvaluationConfig, Targets, build_targets, evaluate
from ubp_fast.evaluation.diagnostics import activity, by_length
from ubp_fast.evaluation.readers.linear import Regression, option_of
from ubp_fast.events.read import EventDirectory
from ubp_fast.files import load_json, write_json
from ubp_fast.pipeline.execute import run_stages
from ubp_fast.pipeline.settings import Settings, read_settings
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import Layout

EVERYTHING, FEATURES, BASELINE = "profile", "features", "log1p baseline"
# What is learned -> where its columns lie: block, and how their names begin.
LEARNED = {"contrastive": ("learned", "contrastive."), "multitask": ("learned", "multitask."), "scores": ("scores", "")}
# Blocks whose columns are learned parts themselves.
LEARNED_BLOCKS, WITHOUT = ("scores", "tastes", "learned"), "profile without learned blocks"
TRAINING_STAGES = ("features", "contrastive", "multitask")
CACHED_S = 2.0  # of CPU at most for a stage that is there already


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the pipeline and reads some of its columns at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", required=True, help="what the tables call the data")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--lengths", action="store_true", help="AUROC by length of history, with and without")
    options, overrides = parser.parse_known_args(arguments)
    if bad := [word for word in overrides if "=" not in word]:
        parser.error(f"overrides must have the form key=value, got {bad}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        named = [word for word in ("experiment=best",) if not any(one.startswith("experiment=") for one in overrides)]
        settings = read_settings(compose("run", overrides=[*named, *overrides, f"root={options.root}"]))
    report = load_json(options.output) if options.output.exists() else {"readers": {"linear": {}}, "cpu_minutes": {}}
    report |= {
        "data": options.data,
        "overrides": [word for word in overrides if not word.startswith(("data.path=", "data.dir="))],
        "machine": machine(),
    }
    run = run_to_profiles(settings, report["cpu_minutes"])
    whole = Profiles.load(run / "profiles")
    assert whole.layout is not None
    events = EventDirectory.open(run / "stages" / "events")
    targets = build_targets(events, whole.client_ids)
    config = EvaluationConfig(readers=("linear",))
    if options.lengths:
        report = {name: report[name] for name in ("data", "overrides", "machine")}
        report["lengths"] = _of_lengths(whole, targets, activity(events, whole.client_ids)[0], config)
        return write_json(options.output, report)
    found = report["readers"]["linear"]
    for name, columns in _rows(whole.layout).items():
        if name not in found:
            found[name] = of_tasks(evaluate(_part(whole, columns), targets, config).aurocs()["linear"])
            write_json(options.output, report)
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    if BASELINE not in found:
        baseline = Profiles.load(run / "stages" / "baselines" / "baseline_log1p").align(whole.client_ids)
        found[BASELINE] = of_tasks(evaluate(baseline, targets, config).aurocs()["linear"])
    write_json(options.output, report)


def run_to_profiles(settings: Settings, minutes: dict[str, float]) -> Path:
    """Makes one stage after another, and adds the CPU time of those that were not there."""
    console = Console(quiet=True)
    run_stages(replace(settings, stages=("store",)), console)
    for stage in (one for one in TRAINING_STAGES if one == "features" or one in settings.stacking_blocks):
        before_s = time.process_time()
        run_stages(replace(settings, stages=(stage,)), console)
        spent_s = time.process_time() - before_s
        if spent_s > CACHED_S:
            minutes[stage] = round(spent_s / 60, 2)
    return run_stages(replace(settings, stages=("baselines", "profiles")), console)


def _rows(layout: Layout) -> dict[str, np.ndarray]:
    """Name -> columns i64 of the profile."""
    names = np.array([column for block in layout.blocks for column in block.columns])
    of_block = np.array([block.name for block in layout.blocks for _ in block.columns])
    parts = {
        name: np.flatnonzero((of_block == block) & np.char.startswith(names, begin))
        for name, (block, begin) in LEARNED.items()
    }
    parts = {name: columns for name, columns in parts.items() if len(columns)}
    features, everything = layout.columns_of("own"), np.arange(layout.width)
    without = np.flatnonzero(~np.isin(of_block, LEARNED_BLOCKS))
    stack = np.sort(np.concatenate([features, *parts.values()]))
    return {
        EVERYTHING: everything,
        FEATURES: features,
        **parts,
        **{f"features + {name}": np.sort(np.concatenate([features, columns])) for name, columns in parts.items()},
        f"features + {' + '.join(parts)}": stack,
        **{f"profile without {name}": np.setdiff1d(everything, columns) for name, columns in parts.items()},
        WITHOUT: without,
    }


def _part(whole: Profiles, columns: np.ndarray) -> Profiles:
    """Some columns i64, ascending, of a profile; what is left of its blocks tells the reader what forecasts."""
    assert whole.layout is not None
    starts = np.cumsum([0, *(len(block.columns) for block in whole.layout.blocks)])
    blocks = []
    for block, start in zip(whole.layout.blocks, starts, strict=False):
        kept = [name for place, name in enumerate(block.columns, start) if place in columns]
        if kept:
            blocks.append(replace(block, columns=tuple(kept)))
    return Profiles(whole.client_ids, whole.embeddings[:, columns], Layout(tuple(blocks)))


def _of_lengths(
    whole: Profiles, targets: Targets, lengths: np.ndarray, config: EvaluationConfig
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Vectors -> task -> groups of `by_length`, read by the regression that `evaluate` has chosen."""
    assert whole.layout is not None
    rows = {name: _rows(whole.layout)[name] for name in (EVERYTHING, WITHOUT, FEATURES)}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, columns in rows.items():
        read = _part(whole, columns)
        forecasts = None if read.layout is None else read.layout.forecasts
        vectors, scores = torch.from_numpy(read.embeddings), evaluate(read, targets, config).others["linear"]
        found[name] = {}
        for task, one in targets.tasks.items():
            option = option_of(scores[task].samples[0].choice)
            if option is not None:
                clients = np.flatnonzero(one.included)
                regression = Regression(vectors, clients, one.train.take(clients).dense(), forecasts)
                predicted = regression.predicted(option, vectors, clients)
                found[name][task] = by_length(predicted, one.validation.take(clients), lengths[clients])
                print(f"{name}, {task}: {json.dumps(found[name][task])}", flush=True)
    return found


def of_tasks(aurocs: dict[str, tuple[float, float | None]]) -> dict[str, Any]:
    return {task: {"mean": mean} for task, (mean, _) in aurocs.items()}


if __name__ == "__main__":
    main()
