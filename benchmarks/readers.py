"""What profiles are worth to the models that people put behind them: all readers, beside what profiles are made from.

    python benchmarks/readers.py --output FILE --data NAME [--root runs] [key=value ...]

Words with "=" are overrides of the run's configuration (`data=synthetic data.clients=20000`). One run of the pipeline
scores the profile, the features side by side (log1p aggregated, decayed, static), both together and the log1p baseline
with every reader; the network, which takes columns as they are, is given the profile and the baseline. A whitened
singular value decomposition of the features, 128 columns, is one more rival for the search for neighbours. `python
benchmarks/bars.py` makes the tables of the documentation from the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from contest import machine
from hydra import compose, initialize_config_dir
from rich.console import Console

import ubp_fast
from ubp_fast.evaluation import EvaluationConfig, Scores, build_targets, evaluate
from ubp_fast.events.read import EventDirectory
from ubp_fast.features.matrix import load_features
from ubp_fast.features.scaling import moments, standardised
from ubp_fast.files import load_json, write_json
from ubp_fast.pipeline.execute import run_stages
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.profiles import Profiles

COMPONENTS = {
    "stacked": "profile",
    "features": "features",
    "profile_features": "profile + features",
    "baseline_log1p": "log1p baseline",
}
OF_NETWORK = ("stacked", "baseline_log1p")
WHITENED, WHITENED_WIDTH = "whitened SVD-128 of the features", 128
CONF = Path(ubp_fast.__file__).resolve().parent / "conf"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the pipeline and collects its scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", required=True, help="what the tables call the data")
    parser.add_argument("--root", type=Path, default=Path("runs"))
    options, overrides = parser.parse_known_args(arguments)
    if bad := [word for word in overrides if "=" not in word]:
        parser.error(f"overrides must have the form key=value, got {bad}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        wanted = f"evaluation.components=[{','.join(COMPONENTS)}]"
        config = compose("run", overrides=["evaluation.orders=4", wanted, *overrides, f"root={options.root}"])
    settings = read_settings(config)
    asked = [
        f"evaluate-{component}-{reader}"
        for reader in settings.evaluation.readers
        for component in (OF_NETWORK if reader == "network" else COMPONENTS)
    ]
    run = run_stages(replace(settings, stages=tuple(asked)), Console(file=sys.stderr))
    rows: dict[str, dict[str, Any]] = {}
    for component, name in COMPONENTS.items():
        for reader in settings.evaluation.readers:
            if reader == "network" and component not in OF_NETWORK:
                continue
            stored = load_json(run / "stages" / f"evaluate-{component}-{reader}" / "scores.json")
            rows.setdefault(reader, {})[name] = _tasks(Scores.from_json(stored), reader)
    if "neighbours" in rows:
        rows["neighbours"][WHITENED] = _tasks(_whitened(run, settings.evaluation), "neighbours")
    named = [word for word in overrides if not word.startswith(("data.path=", "data.dir="))]
    report = {"data": options.data, "overrides": named, "machine": machine(), "readers": rows}
    write_json(options.output, report)
    print(json.dumps(rows, indent=1))


def _tasks(scores: Scores, reader: str) -> dict[str, Any]:
    """Task -> AUROC in every row order or label sample, mean and standard error."""
    spread = scores.aurocs()[reader]
    return {
        task: {"mean": spread[task][0], "standard_error": spread[task][1], "samples": list(samples)}
        for task, samples in scores.repetitions()[reader].items()
    }


def _whitened(run: Path, config: EvaluationConfig) -> Scores:
    """Leading left singular vectors of the standardised features, all of deviation one."""
    features = load_features(run / "stages" / "raw_features" / "values")
    values = features.rows(slice(None))
    whole = np.concatenate([rows for _, rows in standardised(values, *moments(values))])
    left = np.linalg.svd(whole, full_matrices=False)[0][:, :WHITENED_WIDTH] * len(whole) ** 0.5
    targets = build_targets(EventDirectory.open(run / "stages" / "events"), features.client_ids, config.tasks)
    settings = EvaluationConfig(tasks=config.tasks, readers=("neighbours",), orders=config.orders, seed=config.seed)
    return evaluate(Profiles(features.client_ids, left.astype(np.float32)), targets, settings)


if __name__ == "__main__":
    main()
