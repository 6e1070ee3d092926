"""Runs that are killed at random moments, in every stage, and continued: the same bytes as those of one left alone.

`make torture` kills 100 times and prints where each one hit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import NETWORK, TINY, contents

NETWORKS = ("contrastive", "multitask")
TRAININGS = (*NETWORKS, "stacking")
STEPS = ":steps"
SETTINGS = (
    *TINY,
    *NETWORK,
    "data=synthetic",
    "data.clients=150",
    "data.skus=60",
    "data.urls=80",
    "evaluation.readers=[network,linear]",
    "evaluation.components=[stacked]",
    "stacking.blocks=[contrastive,multitask,aggregated,decayed]",
    # Small tables and networks: a checkpoint after every step.
    *(f"{name}.config.events.sku_width=16" for name in NETWORKS),
    "contrastive.config.events={url_width: 16, code_width: 16, age_width: 16, age_bins: 16}",
    "contrastive.config.history={heads: 2, feed_forward: 64}",
    "contrastive.config.future={heads: 2, feed_forward: 64}",
    "multitask.config.events.content_width=16",
    "multitask.config.encoder={heads: 1, feed_forward: 64}",
    "multitask.config.experts={expert_hidden: 16, expert_width: 16}",
    "stacking.config.profile_width=16",
    *(f"{name}.training={{checkpoint_every_s: 0, batch_size: 16}}" for name in TRAININGS),
    "multitask.training.epochs=2",
)
OTHER = "stacking.config.profile_width=8"
# What follows the last stage.
PUBLISHING = "publishing"
# Of the processor time that a place took undisturbed: later it may be over.
LATEST = 0.8

# Libraries are imported once; every run is a process of its own. Each writes down where it comes to. It asks the kernel
# for SIGKILL after some of its own processor time from the wanted place on, in trainings from the second step, so that
# other work on the machine moves no kill into another stage. Instead of that it can stay where it is.
SERVER = """
    import ctypes, os, signal, sys, time
    from dataclasses import replace
    import lightning, numba, schedulefree
    from rich.console import Console
    from support.runs import composed
    from ubp_fast.evaluation.readers import linear, network
    from ubp_fast.pipeline import execute as module
    module = sys.modules["ubp_fast.pipeline.execute"]

    class Event(ctypes.Structure):
        _fields_ = [("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("rest", ctypes.c_int * 13)]

    def kill_after(seconds):
        if seconds < 0:
            time.sleep(1e6)
        timer, library = ctypes.c_void_p(), ctypes.CDLL(None, use_errno=True)
        of_process = 2
        assert library.timer_create(of_process, ctypes.byref(Event(signal=signal.SIGKILL)), ctypes.byref(timer)) == 0
        at = (ctypes.c_long * 4)(0, 0, int(seconds), max(int(seconds % 1 * 1e9), 1))
        assert library.timer_settime(timer, 0, at, None) == 0

    def run(trace, wanted, seconds, settings):
        plan, publish = module.plan, module._publish
        def come_to(place, file=os.open(trace, os.O_CREAT | os.O_APPEND | os.O_WRONLY)):
            os.write(file, f"{place} {time.process_time()}\\n".encode())
            if place == wanted:
                kill_after(float(seconds))
        def watched(stage):
            steps = []
            def make(settings, inputs, folder, update):
                def seen(done, total):
                    steps.append(done)
                    if len(steps) == 2:
                        come_to(stage.name + ":steps")
                    update(done, total)
                come_to(stage.name)
                stage.make(settings, inputs, folder, seen)
            return replace(stage, make=make, reaches=stage.begins)
        def published(*arguments):
            come_to("publishing")
            publish(*arguments)
        module.plan, module._publish = lambda settings: [watched(stage) for stage in plan(settings)], published
        with open(trace + ".log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = module.execute(composed(*settings), Console(file=log, width=200))
        come_to("end")
        os._exit(code)

    module.identified(module.plan(module.read_settings(composed(*sys.argv[1:]))))
    print("ready", flush=True)
    for line in sys.stdin:
        asked, *more = line.rstrip("\\n").split("\\t")
        if asked.isdigit():
            print(os.waitstatus_to_exitcode(os.waitpid(int(asked), 0)[1]), flush=True)
        elif (child := os.fork()) == 0:
            run(asked, *more[:2], more[2:])
        else:
            print(child, flush=True)
"""


class Server:
    """Starts runs from one process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SERVER), *SETTINGS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=Path(__file__).parent.parent,
        )
        assert self._said() == "ready"

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, *words: str) -> int:
        """Sends one line; the number that comes back."""
        assert self._process.stdin is not None
        self._process.stdin.write("\t".join(words) + "\n")
        return int(self._said())

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class Run:
    """A process that begins or continues the run below a directory.

    Args:
        server: starts it.
        root: below which it writes.
        settings: more of them.
        cache: another one than its own.
        kill_in: the place where it is killed, `STEPS` behind the name of a training.
        after_s: of processor time there; below 0 it is held there.
    """

    def __init__(
        self,
        server: Server,
        root: Path,
        *settings: str,
        cache: Path | None = None,
        kill_in: str = "",
        after_s: float = 0.0,
    ) -> None:
        self._server, self._trace = server, root.with_name(f"{root.name}-{time.monotonic_ns()}")
        where = (f"root={root}", f"cache={cache or root / 'cache'}")
        self._child = server.ask(str(self._trace), kill_in, str(after_s), *SETTINGS, *where, *settings)

    def printed(self) -> str:
        return Path(f"{self._trace}.log").read_text()

    def places(self) -> dict[str, float]:
        """Where it has come to, and how many seconds of processor time that took until then."""
        lines = self._trace.read_text().splitlines() if self._trace.exists() else []
        return {place: float(seconds) for place, seconds in (line.split() for line in lines)}

    def wait_until(self, is_there: Callable[[Run], bool]) -> None:
        while not is_there(self):
            time.sleep(0.05)

    def kill(self) -> None:
        os.kill(self._child, signal.SIGKILL)
        assert self._server.ask(str(self._child)) == -signal.SIGKILL

    def is_killed(self) -> bool:
        """Waits for the end; False when it was over before."""
        code = self._server.ask(str(self._child))
        assert code in (0, -signal.SIGKILL), self.printed()
        return code != 0

    def finish(self) -> None:
        assert not self.is_killed()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.stop()


def durations(places: dict[str, float]) -> dict[str, float]:
    """Seconds of processor time in every place, without the places of no training's steps."""
    kept = {place: at for place, at in places.items() if place.removesuffix(STEPS) in (place, *TRAININGS)}
    begun = [*kept.values()]
    return {place: end - at for place, at, end in zip(kept, begun, begun[1:], strict=False)}


def inside_of_epoch(root: Path, place: str) -> str:
    """Epoch and step of the checkpoint that a killed training continues from."""
    for path in root.glob(f"cache/{place}-*.partial/training/checkpoint.pt"):
        state = torch.load(path, weights_only=True, mmap=True)
        return f"checkpoint of epoch {len(state['losses'])}, step {len(state['views'])}"
    return ""


def stages_of(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but the lists of its users and locks."""
    return {name: text for name, text in contents(cache).items() if not name.startswith(("users/", "."))}


def results_of(root: Path) -> dict[str, bytes]:
    """What a run shows, but for times and paths, and which files there are."""
    (run,) = (path for path in root.iterdir() if path.name != "cache")
    found = contents(run / "profiles") | contents(run / "model")
    found |= {name: (run / name).read_bytes() for name in ("profiles.parquet", "scores.json")}
    return found | {"files": "\n".join(sorted(str(path.relative_to(run)) for path in run.rglob("*"))).encode()}


def outcome(root: Path) -> dict[str, bytes]:
    return stages_of(root / "cache") | results_of(root)


@pytest.mark.timeout(7200)
def test_killed_anywhere_and_continued(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    kills: int = request.config.getoption("--kills")
    # The first run may compile, which no later one does.
    for name in ("compiled", "whole"):
        whole = Run(server, tmp_path / name)
        whole.finish()
    took_s, undisturbed, random = durations(whole.places()), outcome(tmp_path / "whole"), np.random.default_rng()
    assert undisturbed == outcome(tmp_path / "compiled")
    assert set(TRAININGS) < took_s.keys()
    hits: Counter[str] = Counter()
    inside = rounds = 0
    while hits.total() < kills:
        root = tmp_path / f"killed-{rounds}"
        rounds += 1
        for wanted in took_s:
            run = Run(server, root, kill_in=wanted, after_s=random.uniform(0, LATEST * took_s[wanted]))
            if run.is_killed():
                place = [*run.places()][-1].removesuffix(STEPS)
                where = inside_of_epoch(root, place)
                inside += bool(where) and "step 0" not in where
                hits[place] += 1
                print(f"kill {hits.total():3}  {place:34} {where}")
            if hits.total() == kills:
                break
        Run(server, root).finish()
        found = outcome(root)
        assert found.keys() == undisturbed.keys()
        assert [name for name in found if found[name] != undisturbed[name]] == []
        print(f"run {rounds}: continued to the end, {len(found)} files with the same bytes")
    print(*(f"{place:34} {number}" for place, number in sorted(hits.items())), sep="\n")
    stages = {place.removesuffix(STEPS) for place in took_s}
    assert inside >= kills // 12
    assert min(hits[stage] for stage in stages) >= min(kills // 20, 5) - (kills < 100)


def test_runs_at_once_share_a_cache_and_lose_nothing(server: Server, tmp_path: Path) -> None:
    """Two processes in one run directory and a third with another configuration; the one that trains is killed."""
    Run(server, tmp_path / "alone").finish()
    Run(server, tmp_path / "other", OTHER).finish()
    shared, held = tmp_path / "shared", "contrastive" + STEPS
    first = Run(server, tmp_path / "same", cache=shared, kill_in=held, after_s=-1)
    first.wait_until(lambda run: held in run.places())
    (checkpoint,) = shared.glob("contrastive-*.partial/training/checkpoint.pt")
    others = [Run(server, tmp_path / "same", cache=shared), Run(server, tmp_path / "third", OTHER, cache=shared)]
    for other in others:
        other.wait_until(lambda run: "contrastive: another run makes it; waiting for that one" in run.printed())
    assert not any("contrastive" in other.places() for other in others)
    first.kill()
    for other in others:
        other.finish()
    # One of them went on from the checkpoint, the other found what came of it.
    assert [("contrastive" in other.places()) for other in others].count(True) == 1
    assert not checkpoint.exists()
    made = stages_of(shared)
    for name, root in (("alone", "same"), ("other", "third")):
        alone = stages_of(tmp_path / name / "cache")
        assert alone == {path: made[path] for path in alone}
        assert results_of(tmp_path / name) == results_of(tmp_path / root)
