"""What changes when a constant of the winner's system that is not public is varied: vectors through a linear reader.

    python benchmarks/constants.py --output FILE [--seeds 2] [--root runs] [key=value ...]

`experiment=winner` with widths cut to what a CPU can do, on a synthetic shop with all five kinds of events; words with
"=" are further overrides (`data.clients=10000`). Every variation trains the model that it belongs to once per seed and
is compared with the unvaried model of the same seed. The file is written after every variation, and what it holds is
not made again. `python benchmarks/bars.py` makes the table of docs/winner.md from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from components import run_to, targets_of
from contest import machine
from rehearsal import CUT

from ubp_fast.evaluation import EvaluationConfig, evaluate
from ubp_fast.files import load_json, write_json
from ubp_fast.profiles import Profiles

CONTRASTIVE, STACKED = "contrastive/contrastive", "stacking/stacked"
BASES = {"contrastive vectors": CONTRASTIVE, "stacked vectors": STACKED}
# What is varied -> (of which vectors, overrides).
VARIATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "temperature 0.1": ("contrastive vectors", ("contrastive.config.temperature=0.1",)),
    "contrast in both directions": ("contrastive vectors", ("contrastive.config.negatives=symmetric",)),
    "history of 32 events": ("contrastive vectors", ("contrastive.config.history_length=32",)),
    "history of 128 events": ("contrastive vectors", ("contrastive.config.history_length=128",)),
    "target of 16 events": ("contrastive vectors", ("contrastive.config.future_length=16",)),
    "mean of the history instead of the LSTM": ("contrastive vectors", ("contrastive.config.history.pooling=mean",)),
    "repeats of visits and searches dropped": ("contrastive vectors", ("contrastive.config.drop_repeats=true",)),
    "learning rate 3e-4": ("contrastive vectors", ("contrastive.optimizer.lr=3e-4",)),
    "learning rate 3e-3": ("contrastive vectors", ("contrastive.optimizer.lr=3e-3",)),
    "batches of 256": ("contrastive vectors", ("contrastive.training.batch_size=256",)),
    "a quarter of the epochs": ("contrastive vectors", ("contrastive.training.epochs=1",)),
    "four times the epochs": ("contrastive vectors", ("contrastive.training.epochs=16",)),
    "no bins of prices among the counts": ("stacked vectors", ("features.aggregated.price_bins=0",)),
    "stack learns all eight labels": (
        "stacked vectors",
        ("stacking.config.labels=[churn,buy_sku,buy_category,buy_price,add,add_sku,add_category,add_price]",),
    ),
    "stack learns for three epochs": ("stacked vectors", ("stacking.training.epochs=3",)),
    "stack in batches of 256": ("stacked vectors", ("stacking.training.batch_size=256",)),
}
SHOP = ("experiment=winner", "data=synthetic", "data.clients=10000", "contrastive.views=null", "profile=strong")
TRAINING = ("contrastive.training.epochs=4", "contrastive.training.validation_views=0", "multitask.training.epochs=4")


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the variations that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=2)
    options, overrides = parser.parse_known_args(arguments)
    if bad := [word for word in overrides if "=" not in word]:
        parser.error(f"overrides must have the form key=value, got {bad}")
    common = [*SHOP, *CUT, *TRAINING, *overrides]
    report = load_json(options.output) if options.output.exists() else {"overrides": common, "variations": {}}
    if report["overrides"] != common:
        sys.exit(f"{options.output}: must hold variations of {common}; name another file")
    report["machine"] = machine()
    rows: dict[str, tuple[str, tuple[str, ...]]] = {name: (name, ()) for name in BASES}
    for name, (base, varied) in {**rows, **VARIATIONS}.items():
        found = report["variations"].setdefault(name, {"of": base, "overrides": list(varied), "seeds": []})
        for seed in range(len(found["seeds"]), options.seeds):
            run = run_to([*common, *varied, f"seed={seed}"], BASES[base], options.root)
            profiles = Profiles.load(run / "stages" / BASES[base])
            scores = evaluate(profiles, targets_of(run, profiles), EvaluationConfig(readers=("linear",)))
            found["seeds"].append({task: auroc for task, (auroc, _) in scores.aurocs()["linear"].items()})
            write_json(options.output, report)
            print(f"{name}, seed {seed}: {found['seeds'][-1]}", flush=True)


if __name__ == "__main__":
    main()
