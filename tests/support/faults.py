"""A small run on a disk that fails at a chosen call; `python -m support.faults`, see `tests/test_faulty_disk.py`.

    LD_PRELOAD=disk.so FAULTY_ROOT=ROOT python -m support.faults ROOT every|COUNT [SEED]

A trial begins with the outputs of all stages but one (or with none, or with all), runs with one refused call, looks at
what lies there, and runs the same again.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import io
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig
from rich.console import Console
from support.runs import TINY, composed, contents

from ubp_fast.files import NO_REASON

SHOP = (
    *("data=synthetic", "data.clients=40", "data.days=70", "data.skus=20", "data.urls=20", "data.categories=4"),
    *("windows.labels=10", "stacking.blocks=[contrastive,decayed]"),
    *("evaluation.readers=[linear]", "evaluation.components=[stacked]"),
)
NUMBERS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT)
NOTHING_THERE, ALL_THERE = "nothing", "everything"
# They tell of times and paths.
OF_ONE_RUN = {"report.html", "environment.json", "config.yaml"}

execution = importlib.import_module("ubp_fast.pipeline.execute")
execution.render_report = lambda summary: "report"  # figures take most of such a run
disk = ctypes.CDLL(None)
disk.faulty_arm.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int)
disk.faulty_calls.restype = ctypes.c_long
disk.faulty_last.restype = ctypes.c_char_p


class Trial(NamedTuple):
    """Of a run that lacks the output of stage `missing`: the call that fails, how, and whether all later ones do."""

    missing: str
    call: int
    number: int
    persistent: bool


def run(root: Path) -> tuple[int, str]:
    """Exit code of a run below `root`; what it said on stderr."""
    said = io.StringIO()
    with redirect_stderr(said):
        code = execution.execute(configuration(root), Console(file=io.StringIO()))
    return code, said.getvalue()


@cache
def configuration(root: Path) -> DictConfig:
    return composed(*TINY, *SHOP, f"root={root}")


def outputs(root: Path) -> dict[str, dict[str, bytes]]:
    """Complete outputs of the stages, and what the run shows beside them."""
    cache, found = root / "cache", {}
    for folder in sorted(cache.iterdir()) if cache.is_dir() else []:
        if "-" in folder.name and not folder.name.endswith(".partial") and not folder.name.startswith("."):
            found[folder.name] = contents(folder)
    for made in root.iterdir() if root.is_dir() else []:
        if made != cache and made.is_dir():
            files = [path for path in sorted(made.rglob("*")) if path.is_file() and "stages" not in path.parts]
            found["run"] = {
                str(path.relative_to(made)): path.read_bytes()
                for path in files
                if path.name not in OF_ONE_RUN
                and not any(part.startswith(".") for part in path.relative_to(made).parts)
            }
    return found


def prepare(root: Path, reference: Path, missing: str) -> None:
    """A cache as the reference's, without the output of a stage."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    if missing != NOTHING_THERE:
        fill(root, reference, missing)


def fill(root: Path, reference: Path, missing: str = ALL_THERE) -> None:
    for folder in sorted((reference / "cache").iterdir()):
        if folder.is_dir() and "-" in folder.name and folder.name.rpartition("-")[0] != missing:
            shutil.copytree(folder, root / "cache" / folder.name, copy_function=os.link, dirs_exist_ok=True)


def wrong(root: Path, expected: dict[str, dict[str, bytes]], whole: bool) -> list[str]:
    """Outputs that are taken for complete and are not, files that are left behind."""
    found = outputs(root)
    bad = [f"{name} is missing" for name in expected if name not in found] if whole else []
    for name, files in found.items():
        right = expected.get(name, {})
        bad += [f"{name}/{file} is wrong" for file, content in files.items() if right.get(file) != content]
        if name != "run" or whole:
            bad += [f"{name}/{file} is missing" for file in right if file not in files]
    if whole:
        bad += [f"{path} is left" for path in root.rglob("*") if path.name.endswith((".tmp", ".partial", ".writing"))]
    return bad


def trials(root: Path, reference: Path, stages: list[str]) -> Iterator[tuple[str, int]]:
    """(missing stage, call) of every call that a run makes, once each."""
    for missing in (NOTHING_THERE, *stages, ALL_THERE):
        prepare(root, reference, missing)
        begins: list[int] = []
        ends: list[int] = []
        build, link = execution.StageCache.build, execution.RunDirectory.link_stage

        def built(cache, name, *rest, begins=begins, true=build):  # type: ignore[no-untyped-def]
            begins.append(disk.faulty_calls())
            return true(cache, name, *rest)

        def linked(made, name, *rest, missing=missing, ends=ends, true=link):  # type: ignore[no-untyped-def]
            true(made, name, *rest)
            if name == missing:
                ends.append(disk.faulty_calls())

        execution.StageCache.build, execution.RunDirectory.link_stage = built, linked
        disk.faulty_arm(-1, 0, 0)
        code, said = run(root)
        execution.StageCache.build, execution.RunDirectory.link_stage = build, link
        assert code == 0, said
        if missing == NOTHING_THERE:
            span = range(begins[0])
        elif missing == ALL_THERE:
            span = range(disk.faulty_calls())
        else:
            span = range(begins[0], ends[0])
        yield from ((missing, call) for call in span)


def is_sentence(said: str, number: int) -> bool:
    """Whether one line tells of this error; where a library hides it and the next try works, of an error."""
    return said.startswith("error: ") and said.count("\n") == 1 and (os.strerror(number) in said or NO_REASON in said)


def failures(trial: Trial, root: Path, reference: Path, expected: dict[str, dict[str, bytes]]) -> list[str]:
    """What is wrong after a run with a refused call, and after the run that continues it."""
    prepare(root, reference, trial.missing)
    disk.faulty_arm(trial.call, trial.number, trial.persistent)
    code, said = run(root)
    place = disk.faulty_last().decode()
    disk.faulty_arm(-1, 0, 0)
    bad = wrong(root, expected, whole=code == 0)
    if code not in (0, 2):
        bad.append(f"ended with {code}, {said[-500:]!r}")
    elif code == 2 and not is_sentence(said, trial.number):
        bad.append(f"said {said!r}")
    if trial.missing == NOTHING_THERE:
        fill(root, reference)
    code, said = run(root)
    bad += [f"again: {one}" for one in wrong(root, expected, whole=True)]
    if code != 0:
        bad.append(f"again: ended with {code}, {said!r}")
    return [f"{trial}, {place.replace(str(root), '')}: {one}" for one in bad]


def main() -> None:
    """Prints a line per failure, and how many trials there were."""
    base, which, seed = Path(sys.argv[1]), sys.argv[2], int((sys.argv[3:] or ["0"])[0])
    reference, root = base / "reference", base / "trial"
    disk.faulty_arm(-1, 0, 0)
    code, said = run(reference)
    assert code == 0, said
    expected = outputs(reference)
    stages = [name.rpartition("-")[0] for name in expected if name != "run"]
    places = list(trials(root, reference, stages))
    found = [
        Trial(missing, call, NUMBERS[(call + turn) % 4], (call + turn) % 8 == 5)
        for turn in range(4)
        for missing, call in places
    ]
    first = [Trial(missing, 0, number, True) for missing in (NOTHING_THERE, ALL_THERE) for number in NUMBERS[1:3]]
    found = found if which == "every" else first + random.Random(seed).sample(found, int(which))
    bad: list[str] = []
    started_s, told_s = time.monotonic(), time.monotonic()
    for number, trial in enumerate(found):
        bad += (here := failures(trial, root, reference, expected))
        if here and "-v" in sys.argv:
            print(*here, sep="\n", file=sys.stderr, flush=True)
        if "-v" in sys.argv and time.monotonic() - told_s > 30:
            told_s = time.monotonic()
            print(f"{number + 1} of {len(found)}, {told_s - started_s:.0f} s", file=sys.stderr, flush=True)
    unchanged = outputs(reference) == expected
    told = {"calls": len(places), "trials": len(found), "first": len(first), "bad": bad}
    print(json.dumps({**told, "reference is unchanged": unchanged}))


if __name__ == "__main__":
    main()
