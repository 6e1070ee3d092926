"""The directory of one run: its configuration, its environment, what it is about in a few lines, and what came out."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from rich.table import Table

from ubp_fast.evaluation import Scores
from ubp_fast.evaluation.evaluator import LEAST_CLIENTS
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import UserError
from ubp_fast.events.split import DAY_S, utc_text
from ubp_fast.files import OutputDirectoryError, flatten, remove_halves, writable_directory, write_text
from ubp_fast.pipeline.model_stages import cutoffs_of, load_lists
from ubp_fast.pipeline.settings import Settings
from ubp_fast.profiler.bundle import CONFIG_FILE
from ubp_fast.store.event_store import EventStore

# Which stages to run, with how many threads, and what is shown are no property of the result.
NOT_COMPARED = frozenset({"stages", "directory", "root", "cache", "progress", "compute", "report"})
PACKAGES = ("torch", "numpy", "numba", "polars", "lightning", "schedulefree", "torchmetrics", "hydra-core")


class RunDirectory:
    """A directory that holds exactly one configuration's results.

    Several processes may run it at once: each writes inside of `alone`. What a kill has left half written is removed.
    """

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        self.path = path
        _refuse_foreign_content(path, config)
        writable_directory(path, "the run directory")
        with self.alone():
            remove_halves(path)
            write_text(path / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process writes into the directory, and keeps others waiting."""
        with (self.path / ".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def link_stage(self, name: str, target: Path) -> None:
        """Shows a stage's cached output as `stages/<name>` inside the run directory."""
        folder = self.path / "stages"
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        with self.alone():
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


def config_of(run: Path) -> dict[str, Any]:
    """The resolved configuration of an earlier run.

    Raises:
        UserError: there is none, or its file was damaged.
    """
    file = run / CONFIG_FILE
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{type(config).__name__} instead of names with values")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{run}: must be the directory of a run, got no {CONFIG_FILE} there; check the path") from error
    except (ValueError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"{file}: file must be as a run wrote it, got '{found}'; copy it again or remove it") from error
    return config


def _refuse_foreign_content(path: Path, config: Mapping[str, object]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputDirectoryError(f"{path}: directory= must name a directory, got a file; choose another directory=")
    known = path / CONFIG_FILE
    if not known.exists():
        if any(not child.name.startswith(".") for child in path.iterdir()):
            raise OutputDirectoryError(
                f"{path}: directory must be empty or hold an earlier run, got other files; choose another directory="
            )
        return
    earlier = flatten(_compared(config_of(path)))
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


def facts_of(run: Path, settings: Settings) -> dict[str, str]:
    """Facts of a run whose first stages are there, of what it makes alone; empty before that.

    Args:
        run: its directory.
        settings: its settings.
    """
    folders = run / "stages"
    if not (folders / "events").exists():
        return {}
    events = EventDirectory.open(folders / "events")
    split, info = events.split, events.info
    input_end, validation_start, end = map(utc_text, (split.input_end_s, split.validation_start_s, split.end_s))
    days = (split.end_s - info["first_s"]) / DAY_S
    purchases = events.scan("product_buy").select("client_id", "timestamp_s")
    past = purchases.filter(pl.col("timestamp_s") < split.input_end_s).select("client_id").unique().collect()
    facts = {"source": str(info["source"])}
    if (folders / "store").exists():
        store = EventStore.open(folders / "store")
        facts["clients with a profile"] = f"{int(store.is_relevant.sum()):,}"
        facts["of these with a purchase so far"] = _share(store.client_ids[store.is_relevant], past["client_id"])
    facts["events"] = ", ".join(f"{rows:,} {kind}" for kind, rows in info["rows"].items())
    facts["span"] = f"{utc_text(info['first_s'])} to {end} ({days:.0f} days)"
    is_scored = bool(settings.components) or settings.submission is not None
    if is_scored or settings.latest is None:
        facts["profiles see events before"] = input_end
    if settings.latest is not None:
        newest_s = events.last_s + 1 if settings.latest == "end" else int(settings.latest)
        facts["latest profiles see events before"] = utc_text(newest_s)
    if (folders / "store").exists():
        cutoffs = cutoffs_of(store, settings)[1]
        wanted = settings.windows.stacking_cutoffs
        few = f" ({wanted} were asked for, the history is short)" if len(cutoffs) < wanted else ""
        facts["past windows learned from"] = f"from {', '.join(utc_text(cutoff)[:10] for cutoff in cutoffs)}{few}"
    if not is_scored:
        return facts
    facts["readers learn from"] = f"{input_end} to {validation_start}"
    facts["scores are of"] = f"{validation_start} to {end} (inclusive)"
    for name, (start_s, end_s) in (
        ("learned from", split.train_window_s),
        ("scored", split.validation_window_s),
    ):
        inside = purchases.filter((pl.col("timestamp_s") >= start_s) & (pl.col("timestamp_s") < end_s))
        buyers = inside.select(pl.col("client_id").unique()).collect()["client_id"]
        churned = 1 - past["client_id"].is_in(buyers.implode()).mean() if len(past) else None  # type: ignore[operator]
        rate = "" if churned is None else f", {churned:.0%} of those who bought before do not (churn)"
        facts[f"buyers in the window {name}"] = f"{len(buyers):,}{rate}"
    facts["values bought in the window learned from"] = ", ".join(
        f"{count:,} of {name}" for name, count in _different(events).items()
    )
    facts["repetitions (evaluation.orders)"] = str(settings.evaluation.orders)
    return facts


def _different(events: EventDirectory) -> dict[str, int]:
    """How many values the purchases of the first target window have."""
    window = events.purchases(*events.split.train_window_s)
    return {name: window[name].n_unique() for name in ("category", "sku", "price")}


def _share(clients: np.ndarray, buyers: pl.Series) -> str:
    ids = pl.Series(clients)
    return f"{int(ids.is_in(buyers.implode()).sum()):,}"


def facts_table(facts: dict[str, str]) -> Table:
    """The facts for a terminal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in facts.items():
        table.add_row(name, text)
    return table


def warnings_of(run: Path, settings: Settings, scores: Mapping[str, Scores]) -> list[str]:
    """What must be known before a run is trusted, one sentence each: of the data, clients, labels, age and scores.

    Args:
        run: its directory.
        settings: its settings.
        scores: component -> its scores, of those that were scored.
    """
    folders = run / "stages"
    found: list[str] = []
    if (folders / "events").exists():
        events = EventDirectory.open(folders / "events")
        found += events.info["notes"]
        newest = next((folders / name for name in ("latest-store", "store") if (folders / name).exists()), None)
        if newest is not None:
            store = EventStore.open(newest)
            found += [*_empty_clients(store), *_without_vector(store, events)]
            found += _old(store, events, settings.plain["profiles"]["old_after_days"])
            found += _rare_labels(newest.with_name(newest.name.replace("store", "features")), store, events)
    said_of: dict[str, list[str]] = {}
    for component, one in scores.items():
        found += [f"{task}: left out, {reason}" for task, reason in one.missing.items()]
        found += [f"{name}: {remark}" for name, remark in one.remarks.items()]
        for reader, warning in one.warnings():
            said_of.setdefault(warning, []).append(f"{component}, {reader}")
    # What is said of several vectors or readers is the task's.
    found += [warning if len(whose) > 1 else f"{whose[0]}, {warning}" for warning, whose in said_of.items()]
    return list(dict.fromkeys(found))


def _empty_clients(store: EventStore) -> list[str]:
    empty = store.num_empty
    if not empty:
        return []
    return [
        f"clients: {empty:,} of the {int(store.is_relevant.sum()):,} with a profile have no event before"
        f" {utc_text(store.cutoff_s)}; their vectors are alike and say only that"
    ]


def _without_vector(store: EventStore, events: EventDirectory) -> list[str]:
    """Clients who come first after the moment of the newest vectors, where no source says who needs one."""
    if events.relevant_clients is not None:
        return []
    behind = [events.scan(kind).filter(pl.col("timestamp_s") >= store.cutoff_s) for kind in events.kinds]
    found = pl.concat([rows.select(pl.col("client_id").unique()) for rows in behind]).collect(engine="streaming")
    late = len(np.setdiff1d(found["client_id"].to_numpy(), store.client_ids))
    if not late:
        return []
    return [
        f"clients: {'1 client comes' if late == 1 else f'{late:,} clients come'} first at or after"
        f" {utc_text(store.cutoff_s)}, the moment of the newest vectors, and {'has' if late == 1 else 'have'} none;"
        " profiles.at=end makes vectors of all"
    ]


def _old(store: EventStore, events: EventDirectory, limit_days: int) -> list[str]:
    days = (events.last_s - store.cutoff_s) / DAY_S
    if days <= limit_days:
        return []
    return [
        f"profiles: the newest vectors are of {utc_text(store.cutoff_s)}, {days:.0f} days before the newest event;"
        " profiles.at=end makes those of the end"
    ]


def _rare_labels(features: Path, store: EventStore, events: EventDirectory) -> list[str]:
    """Labels that models learn and hardly anybody bought in the window that they were chosen from."""
    start_s = store.cutoff_s - store.target_days * DAY_S
    lists = load_lists(features) if features.exists() else {}
    purchases = events.purchases(start_s, store.cutoff_s) if lists else None
    found = []
    for name, (ids, _) in lists.items():
        assert purchases is not None
        column = name.rpartition("_")[2]
        buyers = purchases.group_by(column).agg(pl.col("client_id").n_unique()).rows()
        often = {value for value, count in buyers if count >= LEAST_CLIENTS}
        rare = sum(label not in often for label in ids.tolist())
        if rare:
            found.append(
                f"{name}: {rare} of {len(ids)} labels that models learn have fewer than {LEAST_CLIENTS} buyers in the"
                f" window from {utc_text(start_s)}; a smaller windows.labels leaves the rarest out, a larger"
                " windows.days makes longer windows"
            )
    return found
