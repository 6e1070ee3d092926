"""Commands beside a run on a disk that fails at a chosen call; see `tests/test_faulty_disk.py`.

    LD_PRELOAD=disk.so FAULTY_ROOT=ROOT python -m support.faulty_commands ROOT every|COUNT [SEED]

A trial begins with what a run, older vectors and a cache have left, runs a command with one refused call, looks at what
lies there, and runs the same command again.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import polars as pl
from omegaconf import DictConfig
from rich.console import Console
from support.faults import NUMBERS, disk, execution, is_sentence
from support.runs import TINY, composed, contents

from ubp_fast.cli import main as ubp_fast
from ubp_fast.events.read import EventDirectory
from ubp_fast.pipeline.cache import RECORDS, USERS
from ubp_fast.profiler import bulk
from ubp_fast.profiles import Profiles, matrix

SHOP = (
    *("data=synthetic", "data.clients=40", "data.days=70", "data.skus=20", "data.urls=20", "data.categories=4"),
    *("windows.labels=10", "evaluation=off", "profiles.at=2022-08-20", "features.pairs.windows=1"),
)
EARLIER = "2022-08-10"
DIRECTORY, PARTS, TABLE = "today", "parts.parquet", "table.parquet"
LEFT = (".tmp", ".partial", ".before", ".doomed", ".everybody")
Units = dict[str, dict[str, bytes]]

# Tables of so few clients are in parts.
bulk.BLOCK_ROWS = matrix.BLOCK_ROWS = matrix.PART_ROWS = 16


class Trial(NamedTuple):
    """The call of a command that fails, how, and whether all later ones do."""

    command: str
    call: int
    number: int
    persistent: bool


@cache
def configuration(root: Path) -> DictConfig:
    return composed(*TINY, *SHOP, f"root={root}", f"directory={root / 'run'}")


def again(root: Path) -> int:
    return execution.execute(configuration(root), Console(file=io.StringIO()))


def command(*words: str) -> Callable[[Path], int]:
    return lambda root: ubp_fast([word.replace("ROOT", str(root)) for word in words])


EMBED = ("embed", "ROOT/run", "--events", "ROOT/run/stages/events")
COMMANDS: dict[str, Callable[[Path], int]] = {
    "embed into a directory": command(*EMBED, "--output", f"ROOT/{DIRECTORY}"),
    "embed into parts": command(*EMBED, "--output", f"ROOT/{PARTS}"),
    "embed into a table": command(
        *EMBED, "--clients", "ROOT/some.txt", "--blocks", "near", "--output", f"ROOT/{TABLE}"
    ),
    "embed everybody": command(*EMBED, "--everybody", "--output", f"ROOT/{DIRECTORY}"),
    "append": command("embed", "ROOT/run", "--append", "--events", "ROOT/day"),
    "forget": command("forget", "ROOT/run", "--clients", "ROOT/some.txt"),
    "prune": command("cache", "prune", "--cache", "ROOT/cache"),
    "run": again,
}


def act(name: str, root: Path) -> tuple[int, str]:
    """Exit code of a command, and what it said on stderr."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        code = COMMANDS[name](root)
    return code, said.getvalue()


def made(root: Path) -> None:
    """A run, its cache with outputs that nobody shows, and vectors of an earlier moment."""
    code, run = again(root), root / "run"
    assert code == 0
    ids = Profiles.load(run / "latest").client_ids[:3].tolist()
    (root / "some.txt").write_text("\n".join(map(str, ids)))
    (root / "day").mkdir()
    events = EventDirectory.open(run / "stages" / "events")
    for kind in events.kinds:
        frame = events.frame(kind).rename({"timestamp_s": "timestamp"})
        frame.filter(pl.col("timestamp") >= 1_660_953_600).write_parquet(root / "day" / f"{kind}.parquet")
    given = (*EMBED, "--at", EARLIER)
    some = ("--clients", "ROOT/some.txt", "--blocks", "near")
    for output, more in ((DIRECTORY, ()), (PARTS, some), (TABLE, ())):
        assert command(*given, *more, "--output", f"ROOT/{output}")(root) == 0
    for made in sorted((root / "cache").glob("*store-*")):
        if made.is_dir():
            shutil.copytree(made, made.with_name(f"{made.name[:-3]}000"))


def spoiled(root: Path) -> None:
    """The run's folders as another version might have left them: the next run replaces all of it."""
    run = root / "run"
    for name, other in (("latest", DIRECTORY), ("latest.parquet", PARTS)):
        shutil.rmtree(run / name)
        (shutil.copytree if (root / other).is_dir() else shutil.copy)(root / other, run / name)
    bundle = run / "model" / "bundle.json"
    bundle.write_text(bundle.read_text().replace('"format"', '"was"'))


def prepare(root: Path, before: Path, name: str) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(before, root, symlinks=True)
    if name == "run":
        spoiled(root)


def units(root: Path) -> Units:
    """What is shown, each of it complete or not there at all."""
    run, found = root / "run", {}
    for path in (run / "latest", root / DIRECTORY):
        found[str(path)] = contents(path)
    for path in (run / "latest.parquet", root / PARTS, root / TABLE):
        found[str(path)] = {"": path.read_bytes()} if path.is_file() else contents(path)
        facts = path.with_suffix(".json")
        if facts.exists():
            found[f"{facts}"] = {"": facts.read_bytes()}
    model = contents(run / "model")
    found["model"] = {name: text for name, text in model.items() if not name.startswith("days/")}
    found |= {name: {"": text} for name, text in model.items() if name.startswith("days/")}
    current = run / "history" / "current.json"
    if current.exists():
        facts = json.loads(current.read_text())
        found["history"] = contents(run / "history" / str(facts.pop("number")))
        found["history"][""] = json.dumps(facts).encode()
    if (run / "report.html").exists():
        found["report"] = {"": (run / "report.html").read_bytes()}
    for folder in (root / "cache").iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in (RECORDS, USERS):
            found[folder.name] = contents(folder)
    return {name: files for name, files in found.items() if files}


def wrong(root: Path, before: Units, after: Units) -> list[str]:
    """What is neither as it was nor as it shall be."""
    now = units(root)
    bad = [f"{name} is wrong" for name, files in now.items() if files not in (before.get(name), after.get(name))]
    for name in before.keys() & after.keys() - now.keys():
        path = root / "run" / "model" if name.startswith(("model", "days/")) else Path(name)
        aside = path.with_name(f".{path.name}.before")  # where the disk refused to give it back, too
        if path.suffix != ".json" and not (path.is_absolute() and aside.exists()):
            bad.append(f"{name} is gone")
    for path in (root / PARTS, root / TABLE):
        facts = str(path.with_suffix(".json"))
        both = [{facts: seen.get(facts), path: seen.get(str(path))} for seen in (now, before, after)]
        if both[0][facts] is not None and both[0] not in both[1:]:
            bad.append(f"{facts} is of other vectors")
    return bad


def failures(trial: Trial, root: Path, before_at: Path, before: Units, after: Units) -> list[str]:
    """What is wrong after a command with a refused call, and after the same command again."""
    prepare(root, before_at, trial.command)
    disk.faulty_arm(trial.call, trial.number, trial.persistent)
    code, said = act(trial.command, root)
    place = disk.faulty_last().decode()
    disk.faulty_arm(-1, 0, 0)
    bad = wrong(root, before, after) if code else differing(root, after)
    if code not in (0, 2):
        bad.append(f"ended with {code}, {said[-1500:]!r}")
    elif code == 2 and not is_sentence(said, trial.number):
        bad.append(f"said {said!r}")
    code, said = act(trial.command, root)
    bad += [f"again: {one}" for one in differing(root, after)]
    if code != 0:
        bad.append(f"again: ended with {code}, {said!r}")
    return [f"{trial}, {place.replace(str(root), '')}: {one}" for one in bad]


def differing(root: Path, after: Units) -> list[str]:
    now = units(root)
    bad = [f"{name} is not as it shall be" for name in now.keys() | after.keys() if now.get(name) != after.get(name)]
    return bad + [f"{path} is left" for path in root.rglob("*") if path.name.endswith(LEFT)]


def main() -> None:
    """Prints a line per failure, and how many trials there were."""
    base, which, seed = Path(sys.argv[1]), sys.argv[2], int((sys.argv[3:] or ["0"])[0])
    root, before_at = base / "commands", base / "before"
    disk.faulty_arm(-1, 0, 0)
    with redirect_stdout(io.StringIO()):
        made(root)
    shutil.copytree(root, before_at, symlinks=True)
    before, after, places = {}, {}, []
    for name in COMMANDS:
        prepare(root, before_at, name)
        before[name] = units(root)
        disk.faulty_arm(-1, 0, 0)
        code, said = act(name, root)
        assert code == 0, said
        places += [(name, call) for call in range(disk.faulty_calls())]
        after[name] = units(root)
        assert after[name] != before[name], name
    found = [
        Trial(name, call, NUMBERS[(call + turn) % 4], (call + turn) % 8 == 5)
        for turn in range(4)
        for name, call in places
    ]
    found = found if which == "every" else random.Random(seed).sample(found, int(which))
    bad: list[str] = []
    for number, trial in enumerate(found):
        bad += (here := failures(trial, root, before_at, before[trial.command], after[trial.command]))
        if "-v" in sys.argv and (here or number % 100 == 99):
            print(*here, f"{number + 1} of {len(found)}", sep="\n", file=sys.stderr, flush=True)
    shutil.rmtree(root)
    shutil.copytree(before_at, root, symlinks=True)
    unchanged = units(root) == before["append"]
    told = {"calls": len(places), "trials": len(found), "first": 0, "bad": bad}
    print(json.dumps({**told, "reference is unchanged": unchanged}))


if __name__ == "__main__":
    main()
