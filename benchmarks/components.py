"""What every part of a profile is worth: each component alone, pairs, all of them, each addition, through the network.

    python benchmarks/components.py --output FILE [--seeds 3] [--orders 4] [key=value ...]
                                    [--rows NAME ...] [--tasks TASK ...]

Words with "=" are overrides of the run's configuration (`data=synthetic data.clients=20000`). Every row is a run of the
pipeline; rows share its cache, so a model is trained once per seed; rows without a trained model are made once. All
rows are scored on the same clients in the same row orders, and differences to the log1p baseline are taken order by
order before they are averaged. Where the source wrote the truth beside its events, its probabilities are scored on the
same labels: the oracle.

Row orders are taken one after another, in each of them all rows. The file is written after every row, and what it holds
is not made again: the same command continues, and one with more `--orders` adds to it; `--rows` and `--tasks` add them
where they are worth their time.
`python benchmarks/bars.py` makes the README's tables from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console

import ubp_fast
from ubp_fast.evaluation import EvaluationConfig, Targets, build_targets, evaluate
from ubp_fast.evaluation.evaluator import row_orders
from ubp_fast.evaluation.tasks import TASKS
from ubp_fast.evaluation.tasks.metrics import auroc
from ubp_fast.events.read import EventDirectory
from ubp_fast.files import load_json, write_json
from ubp_fast.pipeline.execute import run_stages
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.profiles import Profiles

REFERENCE = "baseline log1p"
CONF = Path(ubp_fast.__file__).resolve().parent / "conf"


def _joined(*blocks: str) -> tuple[str, ...]:
    return (f"stacking.blocks=[{','.join(blocks)}]",)


# Row -> (overrides, folder of the profile below the run's `stages/`).
ROWS: dict[str, tuple[tuple[str, ...], str]] = {
    "baseline raw": ((), "baselines/baseline_raw"),
    REFERENCE: ((), "baselines/baseline_log1p"),
    "contrastive, its own vectors": ((), "contrastive/contrastive"),
    "multitask, its own vectors": ((), "multitask/multitask"),
    "contrastive": (_joined("contrastive"), "stacking/stacked"),
    "multitask": (_joined("multitask"), "stacking/stacked"),
    "aggregated": (_joined("aggregated"), "stacking/stacked"),
    "decayed": (_joined("decayed"), "stacking/stacked"),
    "contrastive + multitask": (_joined("contrastive", "multitask"), "stacking/stacked"),
    "contrastive + aggregated": (_joined("contrastive", "aggregated"), "stacking/stacked"),
    "contrastive + decayed": (_joined("contrastive", "decayed"), "stacking/stacked"),
    "multitask + aggregated": (_joined("multitask", "aggregated"), "stacking/stacked"),
    "multitask + decayed": (_joined("multitask", "decayed"), "stacking/stacked"),
    "aggregated + decayed": (_joined("aggregated", "decayed"), "stacking/stacked"),
    "all four": (_joined("contrastive", "multitask", "aggregated", "decayed"), "stacking/stacked"),
    "contrastive, next event": (
        (
            *_joined("contrastive"),
            "contrastive.config.history.causal=true",
            "contrastive.config.next_event_weight=1",
        ),
        "stacking/stacked",
    ),
    "contrastive, time bias": (
        (*_joined("contrastive"), "contrastive.config.history.time_bias_buckets=64"),
        "stacking/stacked",
    ),
    "contrastive, one cutoff": ((*_joined("contrastive"), "windows.model_cutoffs=1"), "stacking/stacked"),
    "contrastive, batch 1,024": ((*_joined("contrastive"), "contrastive.training.batch_size=1024"), "stacking/stacked"),
    "decayed, no price labels": (
        (*_joined("decayed"), "stacking.config.labels=[churn,buy_sku,buy_category]"),
        "stacking/stacked",
    ),
    "decayed + rich": ((*_joined("decayed"), "features=rich"), "stacking/stacked"),
    "decayed, ridge 0.1": ((*_joined("decayed"), "stacking.config.ridge=0.1"), "stacking/stacked"),
    "decayed, summaries as labels": ((*_joined("decayed"), "stacking.config.summary_weight=1"), "stacking/stacked"),
    "decayed, rank 12": ((*_joined("decayed"), "stacking.config.rank=12"), "stacking/stacked"),
    "decayed, faint detail": ((*_joined("decayed"), "profile.own=0.02"), "stacking/stacked"),
    "all four, stacking network": (
        ("model@stacking=stacking", "stacking.config.standardise=true"),
        "stacking/stacked",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the rows that are not there yet."""
    options = _options(arguments)
    report = _read(options.output, options)
    for number in range(options.orders):
        for name in options.rows:
            row = report["rows"].setdefault(name, {"overrides": list(ROWS[name][0]), "auroc": {}})
            missing = [task for task in options.tasks if _is_missing(row, task, number, report)]
            if not missing:
                continue
            _score(name, row, number, missing, report, options)
            summarise(report)
            report["rows"] = dict(sorted(report["rows"].items(), key=_place))
            write_json(options.output, report)
            print(f"order {number + 1}, {line(name, report)}", flush=True)


def _place(item: tuple[str, Any]) -> int:
    """Where a row stands in the file; one that is no longer made stands last."""
    return list(ROWS).index(item[0]) if item[0] in ROWS else len(ROWS)


def _is_missing(row: Mapping[str, Any], task: str, number: int, report: Mapping[str, Any]) -> bool:
    without_labels = report.get("tasks_without_labels", ())
    return task not in without_labels and any(len(orders) <= number for orders in row["auroc"].get(task, [[]]))


def _score(
    name: str,
    row: dict[str, Any],
    number: int,
    tasks: Sequence[str],
    report: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    """Adds to the row what one row order gives in these tasks, for every seed."""
    overrides, folder = ROWS[name]
    scored = []
    for seed in range(options.seeds if _is_random(name) else 1):
        run = run_to([*options.overrides, *overrides, f"seed={seed}"], folder, options.root)
        profiles = Profiles.load(run / "stages" / folder)
        order = row_orders(profiles.client_ids, EvaluationConfig(orders=options.orders + 1))[number]
        profiles = Profiles(profiles.client_ids[order], profiles.embeddings[order])
        targets = targets_of(run, profiles)
        scored.append(_aurocs(profiles, targets, tasks))
        report["oracle"] = report["oracle"] or oracle_aurocs(run, targets)
    report["tasks_without_labels"] = sorted({*report.get("tasks_without_labels", ()), *set(tasks) - set(scored[0])})
    for task in scored[0]:
        seeds = row["auroc"].setdefault(task, [[] for _ in scored])
        for orders, aurocs in zip(seeds, scored, strict=True):
            orders.append(aurocs[task])


def _is_random(row: str) -> bool:
    """Counts and the regression on them are the same for every seed."""
    return any(word in row for word in ("contrastive", "multitask", "all four"))


def summarise(report: dict[str, Any]) -> None:
    """Adds to every row per task: mean, standard error, the paired difference to the reference, share of the oracle."""
    reference = report["rows"].get(REFERENCE)
    for row in report["rows"].values():
        row["tasks"] = {}
        for task, values in row["auroc"].items():
            # An order is one draw: seeds are averaged inside it, so that the error is that of independent rows.
            by_order = np.mean(values, axis=0)
            entry = {"mean": float(by_order.mean()), "standard_error": _error(by_order)}
            if reference is not None and task in reference["auroc"]:
                others = np.mean(reference["auroc"][task], axis=0)
                difference = by_order[: len(others)] - others[: len(by_order)]
                entry |= {"difference": float(difference.mean()), "difference_error": _error(difference)}
            if task in (report["oracle"] or {}):
                entry["oracle_share"] = entry["mean"] / report["oracle"][task]
            row["tasks"][task] = entry


def line(name: str, report: Mapping[str, Any]) -> str:
    """One row as text."""
    parts = []
    for task, entry in report["rows"][name]["tasks"].items():
        share = f" ({entry['oracle_share']:.0%} of the oracle)" if "oracle_share" in entry else ""
        parts.append(f"{task.removeprefix('propensity_')} {entry['mean']:.4f}{share}")
    return f"{name}: {', '.join(parts)}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    options, overrides = parser.parse_known_args(arguments)
    if bad := [word for word in overrides if "=" not in word]:
        parser.error(f"overrides must have the form key=value, got {bad}")
    if options.seeds < 1 or options.orders < 1:
        parser.error(f"needs 1 seed and 1 order at least, got {options.seeds} and {options.orders}")
    options.overrides = overrides
    return options


def _read(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    made_from = {"overrides": options.overrides, "seeds": options.seeds}
    if not path.exists():
        return {**made_from, "oracle": None, "rows": {}}
    report: dict[str, Any] = load_json(path)
    if {name: report[name] for name in made_from} != made_from:
        sys.exit(f"{path}: must hold rows of {made_from}; name another file")
    return report


def run_to(overrides: Sequence[str], folder: str, root: Path) -> Path:
    """Makes the stage that `folder` belongs to; the run's directory."""
    stage = folder.split("/")[0]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("run", overrides=["profile=strong", *overrides, f"stages=[{stage}]", f"root={root}"])
    return run_stages(read_settings(config), Console(quiet=True))


def targets_of(run: Path, profiles: Profiles) -> Targets:
    """What the run's clients did, in the order of the profiles' rows."""
    return build_targets(EventDirectory.open(run / "stages" / "events"), profiles.client_ids)


def _aurocs(profiles: Profiles, targets: Targets, tasks: Sequence[str]) -> dict[str, float]:
    """Task -> AUROC of the epoch that counts, in the order of the profiles' rows."""
    scores = evaluate(profiles, targets, EvaluationConfig(tasks=tuple(tasks), precision="bf16"))
    return {
        name: float(task.orders[0][epoch].auroc)
        for name, task in scores.tasks.items()
        if (epoch := task.best_epochs[0]) is not None
    }


def oracle_aurocs(run: Path, targets: Targets) -> dict[str, float] | None:
    """AUROC of the true probabilities on the labels of the validation window; None when there is no truth."""
    truth = run / "stages" / "events" / "truth"
    if not truth.is_dir():
        return None
    ids = np.load(truth / "client_ids.npy", allow_pickle=False)
    rows = np.argsort(ids)[np.searchsorted(np.sort(ids), targets.client_ids)]
    found = {}
    for name, task in targets.tasks.items():
        path = truth / f"validation_{name if task.task.column else 'purchase'}.npy"
        if not path.exists():  # a label list that the evaluation made itself
            continue
        chance = np.load(path, allow_pickle=False)[rows][task.included]
        # Churn and conversion ask for "no purchase".
        chance = chance if task.task.column else 1.0 - chance[:, None]
        found[name] = auroc(
            torch.from_numpy(np.ascontiguousarray(chance)), task.validation.take(np.flatnonzero(task.included))
        )
    return found


def _error(by_order: np.ndarray) -> float | None:
    """Standard error of the mean over row orders; None of one."""
    return float(by_order.std(ddof=1) / len(by_order) ** 0.5) if len(by_order) > 1 else None


if __name__ == "__main__":
    main()
