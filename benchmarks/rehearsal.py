"""Dress rehearsal of `experiment=winner` on synthetic data: time, memory and disk of every stage, into one JSON file.

    python benchmarks/rehearsal.py --share 0.01 --root /tmp/rehearsal --output rehearsal.json [--kill] [--full-widths]

`--share` is the part of the challenge's size (19 M clients, 1 M of them relevant, 169 M events; 680 of its 6,800
categories at most, because the generator computes a taste of every client for every category). With `--files` events
are written as the challenge's files first, outside the measurement, and the run reads those. Every stage runs in a
process of its own. Widths are cut to what a CPU can do and trainings to a few steps; what does not depend on them, the
stages without training, is as in a full run. `--kill` makes everything once more in another folder, kills every stage
at a random moment, continues, and compares the profiles byte by byte. `--stacking-inputs` reads what the stack learns
from once, as its training would; vectors of networks that were not trained are random numbers. What lies in `--root` is
not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from hydra import compose, initialize_config_dir

import ubp_fast
from ubp_fast.evaluation import Scores
from ubp_fast.events.checks import CODES
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import PRODUCT_TABLE
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.features.matrix import load_features
from ubp_fast.models.stacking import JoinedBlocks, StackingModel
from ubp_fast.pipeline.model_stages import cutoffs_of
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.profiles import validate
from ubp_fast.sequences import ViewLoader, views_at
from ubp_fast.store.event_store import EventStore

CLIENTS, RELEVANT, SKUS, URLS = 19_000_000, 1_000_000, 1_260_000, 373_000
CATEGORIES, MOST_CATEGORIES, ACTIVITY = 6_800, 680, 0.015
STAGES = ("events", "store", "features", "baselines", "contrastive", "multitask", "stacking", "evaluate")
CUT = (
    "contrastive.config.events={sku_width: 32, category_width: 16, price_width: 8, code_width: 32, url_width: 16,"
    " age_width: 32, width: 64}",
    "contrastive.config.history={heads: 2, layers: 1, feed_forward: 128}",
    "contrastive.config.future={heads: 2, feed_forward: 128}",
    "multitask.config.events={sku_width: 32, category_width: 16, price_width: 8, content_width: 32}",
    "multitask.config.encoder={layers: 1, feed_forward: 128}",
    "multitask.config.profile_width=64",
    "multitask.training.epochs=2",
)
STEPS = 100
VECTORS = "vectors"
CLIENTS_FILE = "input/relevant_clients.npy"
CONF = Path(ubp_fast.__file__).resolve().parent / "conf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--full-widths", action="store_true")
    parser.add_argument("--files", action="store_true", help="read the challenge's files instead of a generator")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--stacking-inputs", action="store_true", help="also read what the stack learns from")
    parser.add_argument("--read-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("overrides", nargs="*", help="more settings of the run")
    options = parser.parse_args()
    command = _command(options)
    if options.read_only:
        return _read_inputs(command[3:], options.root)
    stages = STAGES[: STAGES.index(options.until) + 1]
    report: dict[str, Any] = {"share": options.share, "overrides": command[3:], "machine": _machine(), "stages": {}}
    for stage in stages:
        report["stages"][stage] = measured([*command, f"root={options.root}", f"stages=[{stage}]"], options.root)
        print(stage, json.dumps(report["stages"][stage]), flush=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.stacking_inputs:
        again = [sys.executable, *sys.argv, "--read-only"]
        report["stages"]["stacking inputs"] = measured(again, options.root)
        print("stacking inputs", json.dumps(report["stages"]["stacking inputs"]), flush=True)
    run = _run_in(options.root)
    report |= _facts(run)
    if options.kill:
        report["same_after_kills"] = _killed(
            command, stages, options.root.with_name(options.root.name + "-killed"), run
        )
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _sizes(share: float) -> dict[str, int]:
    sizes = {"clients": CLIENTS, "relevant": RELEVANT, "skus": SKUS, "categories": CATEGORIES, "urls": URLS}
    sizes = {name: max(20, round(number * share)) for name, number in sizes.items()}
    return {**sizes, "categories": min(sizes["categories"], MOST_CATEGORIES)}


def _as_files(options: argparse.Namespace) -> Path:
    """The synthetic events as the challenge's files; what is there already stays."""
    directory = options.root.with_name(options.root.name + "-files")
    if (directory / CLIENTS_FILE).exists():
        return directory
    generated = options.root.with_name(options.root.name + "-generated")
    if not generated.exists():
        Synthetic(**_sizes(options.share), activity=ACTIVITY).prepare(generated)
    write_challenge_files(EventDirectory.open(generated), directory)
    return directory


def write_challenge_files(events: EventDirectory, directory: Path) -> None:
    """The organisers' raw layout of some events; what is there already stays, the list of clients comes last."""
    (directory / "input").mkdir(parents=True, exist_ok=True)
    tables = {kind: events.scan(kind) for kind in events.kinds} | {PRODUCT_TABLE: events.products().lazy()}
    for name, rows in tables.items():
        if not (directory / f"{name}.parquet").exists():
            found = rows.collect_schema()
            columns = [_code_text(column) if found[column] == CODES else pl.col(column) for column in found]
            rows = rows.select(columns).with_columns(pl.from_epoch("^timestamp_s$"))
            partial = directory / f"{name}.partial"
            rows.rename({"timestamp_s": "timestamp"}, strict=False).sink_parquet(partial)
            partial.rename(directory / f"{name}.parquet")
    assert events.relevant_clients is not None
    np.save(directory / CLIENTS_FILE, events.relevant_clients)


def _code_text(column: str) -> pl.Expr:
    """Sixteen codes as the challenge writes them: [1 2 3]."""
    texts = pl.col(column).arr.to_list().cast(pl.List(pl.String)).list.join(" ")
    return pl.format("[{}]", texts).alias(column)


def _command(options: argparse.Namespace) -> list[str]:
    if options.files:
        data = ["data=challenge", f"data.dir={_as_files(options)}"]
    else:
        sizes = {**_sizes(options.share), "activity": ACTIVITY}
        data = ["data=synthetic", *(f"data.{name}={value}" for name, value in sizes.items())]
    training = [f"{name}.training.max_steps={options.steps}" for name in ("contrastive", "multitask", "stacking")]
    views = [f"contrastive.views={round(2_000_000 * options.share)}"]
    return [
        *(sys.executable, "-m", "ubp_fast.run", "experiment=winner", *data),
        *([] if options.full_widths else CUT),
        *training,
        *views,
        "evaluation.components=[stacked,baseline_log1p,baseline_raw]",
        "evaluation.readers=[linear]",  # the challenge's network takes a CPU hours
        *options.overrides,
    ]


def measured(command: list[str], root: Path, family: bool = False) -> dict[str, Any]:
    """Runs a command: seconds, peak of its own memory and of all pages, disk below `root` after it.

    With `family` the processes that it starts count, too, also those that nobody waits for: the CPU time of all, the
    memory of the largest, and the peak of all at a time. Each is looked at every quarter of a second.

    Raises:
        RuntimeError: it failed.
    """
    started_s, cpu_before_s = time.monotonic(), _cpu_s()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = {"anonymous": 0, "resident": 0, "together": 0}
    cpu_of: dict[int, float] = {}
    while process.poll() is None:
        pids = _family(process.pid) if family else [process.pid]
        of_field = {field: [_status(pid, field) for pid in pids] for field in ("RssAnon", "VmRSS")}
        for name, field in (("anonymous", "RssAnon"), ("resident", "VmRSS")):
            peak[name] = max(peak[name], *of_field[field])
        if family:
            peak["together"] = max(peak["together"], sum(of_field["RssAnon"]))
            cpu_of |= {pid: used_s for pid in pids if (used_s := _cpu_of(pid))}
        time.sleep(0.25 if family else 0.05)
    assert process.stdout is not None
    text = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {text}")
    disk = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return {
        "seconds": round(time.monotonic() - started_s, 1),
        "cpu_seconds": round(sum(cpu_of.values()) if family else _cpu_s() - cpu_before_s, 1),
        "peak_anonymous_mb": round(peak["anonymous"] / 1e6),
        "peak_resident_mb": round(peak["resident"] / 1e6),
        **({"peak_of_all_mb": round(peak["together"] / 1e6)} if family else {}),
        "disk_mb": round(disk / 1e6),
    }


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if (found := _stat(int(entry.name))) is not None:
            below.setdefault(int(found[1]), []).append(int(entry.name))
    pids = [pid]
    for one in pids:
        pids += below.get(one, [])
    return pids


def _stat(pid: int) -> list[str] | None:
    """What the kernel says of a process, beginning with its state; None when it has just ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None


def _cpu_of(pid: int) -> float:
    """Seconds, without those of its children; 0 when it has just ended."""
    found = _stat(pid)
    return 0.0 if found is None else (int(found[11]) + int(found[12])) / os.sysconf("SC_CLK_TCK")


def _cpu_s() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _status(pid: int, field: str) -> int:
    """Bytes that the kernel says of a process; 0 when it has just ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _facts(run: Path) -> dict[str, Any]:
    events, stages = EventDirectory.open(run / "stages" / "events"), run / "stages"
    facts: dict[str, Any] = {"events": {kind: events.num_rows(kind) for kind in events.kinds}}
    if (stages / "store").exists():
        store = EventStore.open(stages / "store")
        facts |= {"clients": store.num_clients, "skus": store.num_skus, "urls": store.num_urls}
        facts["relevant"] = int(store.is_relevant.sum())
    for name in ("contrastive", "multitask", "stacking"):
        losses = stages / name / "training" / "losses.json"
        if losses.exists():
            facts[f"{name}_epochs"] = json.loads(losses.read_text(encoding="utf-8"))["epochs"]
    if (run / "profiles").exists():
        facts["valid"] = validate(run / "profiles", events.relevant_clients).passed
    if (run / "scores.json").exists():
        scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
        facts["auroc"] = {
            profile: {
                reader: {task: auroc for task, (auroc, _) in tasks.items()}
                for reader, tasks in Scores.from_json(found).aurocs().items()
            }
            for profile, found in scores.items()
            if profile != "warnings"
        }
    return facts


def _killed(command: list[str], stages: tuple[str, ...], root: Path, run: Path) -> bool:
    """Every stage killed once, at a random moment of the time it takes, and continued: the same profiles?"""
    moments = random.Random(0)
    for stage in stages[: stages.index("stacking") + 1]:
        whole = [*command, f"root={root}", f"stages=[{stage}]"]
        process = subprocess.Popen(whole, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        time.sleep(5 + moments.uniform(0, 20))
        process.kill()
        process.wait()
        subprocess.run(whole, check=True, stdout=subprocess.DEVNULL)
    return _digest(_run_in(root)) == _digest(run)


def _run_in(root: Path) -> Path:
    (run,) = (path for path in root.iterdir() if path.name not in ("cache", VECTORS))
    return run


def _read_inputs(overrides: list[str], root: Path) -> None:
    """One epoch of the stack's inputs: vectors that no network has made are written, joined, scaled and read."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = read_settings(compose("run", overrides=overrides))
    run = _run_in(root)
    store, features = EventStore.open(run / "stages" / "store"), run / "stages" / "features"
    _, cutoffs = cutoffs_of(store, settings)
    named = settings.stacking_blocks
    (root / VECTORS).mkdir(exist_ok=True)
    blocks = [
        [
            load_features(features / f"{name}-{when}")
            if (features / f"{name}-{when}").exists()
            else _random_vectors(root / VECTORS / f"{name}-{when}.npy", int(store.is_relevant.sum()))
            for name in named
        ]
        for when in cutoffs
    ]
    joined = JoinedBlocks(blocks, [name == "aggregated" for name in named], raw_counts=settings.recipe.raw_counts)
    StackingModel(settings.stacking.config, joined.shape[1], {"churn": 1}).fit_scaling(joined)
    size = settings.stacking.training.batch_size
    views = views_at(store, cutoffs)
    loader = ViewLoader(None, views, batch_size=size, features=joined, labels={}, shuffle_seed=0)
    assert sum(len(batch.features) for batch in loader) == len(views.row)


def _random_vectors(path: Path, clients: int) -> np.ndarray:
    """float16 [clients, 512] in a file, written block by block."""
    vectors = np.lib.format.open_memmap(path, "w+", np.float16, (clients, 512))
    for first in range(0, clients, 65536):
        block = vectors[first : first + 65536]
        block[:] = np.random.default_rng(first).standard_normal(block.shape, np.float32)
    vectors.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _digest(run: Path) -> list[str]:
    names = ("client_ids.npy", "embeddings.npy")
    return [hashlib.sha256(np.load(run / "profiles" / name).tobytes()).hexdigest() for name in names]


def _machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpus": os.cpu_count(), "memory_gb": round(memory / 1e9, 1), "load": os.getloadavg()[0]}


if __name__ == "__main__":
    main()
