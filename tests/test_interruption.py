"""Signals end a command within seconds, whatever it is doing, and the next one continues."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support.runs import TINY, contents, run_tiny

SHOP = ("data=synthetic", "data.clients=150", "data.skus=60", "data.urls=80", "evaluation.readers=[network,linear]")
ALL = (*SHOP, "stacking.blocks=[contrastive,multitask,aggregated,decayed]")

# A process that takes a signal at the first moment of every stage, then in its middle, and starts again each time.
STAGES = """
    import importlib, io, os, signal, sys, time
    from dataclasses import replace
    from pathlib import Path
    from rich.console import Console
    from support.runs import composed

    module = importlib.import_module("ubp_fast.pipeline.execute")
    plan, waiting, sent, slowest, name = module.plan, [], [], 0, sys.argv[1]
    def interrupted(stage):
        def make(settings, inputs, folder, update):
            asked = [moment for moment in waiting if moment[0] == stage.name]
            def take(moment):
                if asked and asked[0][1] == moment:
                    waiting.remove(asked[0])
                    sent.append(time.monotonic())
                    os.kill(os.getpid(), asked.pop(0)[2])
            def seen(done, total):
                update(done, total)
                take("middle")
            take("start")
            stage.make(settings, inputs, folder, seen)
        return replace(stage, make=make)
    module.plan = lambda settings: [interrupted(stage) for stage in plan(settings)]
    config = composed(*sys.argv[2:], "root=" + name)
    stages = [stage.name for stage in plan(module.read_settings(config))]
    for stage in stages:
        waiting += [(stage, "start", signal.SIGTERM), (stage, "start", signal.SIGINT), (stage, "middle", signal.SIGINT)]
    counts = {130: 0, 143: 0}
    while (code := module.execute(config, Console(file=io.StringIO()))) != 0:
        counts[code] += 1
        slowest = max(slowest, time.monotonic() - sent[-1])
    print(len(stages), counts[143], counts[130], slowest, [moment[0] for moment in waiting])
"""

# Compiled code that does not let go: the handler of Python never runs. It says that it is ready from within.
HELD = """
    import signal, sys, threading
    from numba import njit
    from ubp_fast.interruption import run_interruptibly

    @njit(nogil=True)
    def held(rounds):
        total = 0.0
        for number in range(rounds):
            total += number ** 0.5 % 3.0
        return total

    held(10)
    def work():
        threading.Timer(0.3, print, ["ready"], {"flush": True}).start()
        held(1 << 50)
        return 0
    sys.exit(run_interruptibly(work))
"""

# A second signal while the first one is being answered.
SLOW = """
    import sys, time
    from ubp_fast.interruption import run_interruptibly

    def work():
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("ending", flush=True)
            for _ in range(100):
                time.sleep(0.02)
        return 0
    sys.exit(run_interruptibly(work))
"""


def started(program: str, *arguments: str, sigint: str = "default_int_handler") -> subprocess.Popen[str]:
    # These tests may run in a job that ignores Ctrl-C, and its children inherit that.
    first = f"import signal\nsignal.signal(signal.SIGINT, signal.{sigint})\n"
    return subprocess.Popen(
        [sys.executable, "-c", first + textwrap.dedent(program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )


def test_every_stage_ends_at_once_and_is_continued(tmp_path: Path) -> None:
    process = started(STAGES, str(tmp_path / "cut"), *TINY, *ALL)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    stages, terminated, interrupted, slowest_s, left = output.split(maxsplit=4)
    assert int(terminated) == int(stages) >= 9
    # Stages that tell of no progress have no middle.
    assert int(interrupted) >= int(stages) + 6
    assert float(slowest_s) < 5
    assert not {"contrastive", "multitask", "store"} & set(left.split("'"))
    assert errors.count("terminated; the same command continues from here\n") == int(terminated)
    assert errors.count("interrupted; the same command continues from here\n") == int(interrupted)
    code, whole, _ = run_tiny(tmp_path / "whole", *ALL)
    assert code == 0
    (cut,) = (path for path in (tmp_path / "cut").iterdir() if path.name != "cache")
    for folder in ("profiles", "model", "stages/contrastive/training", "stages/evaluate-stacked-network"):
        assert contents(cut / folder) == contents(whole / folder)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")]
)
def test_compiled_code_ends_within_seconds(number: signal.Signals, code: int, word: str) -> None:
    process = started(HELD)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    asked_s = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - asked_s < 10  # three seconds, on a machine that does other things as well
    assert process.returncode == code
    assert errors.startswith(word)
    assert "Traceback" not in errors


def test_a_second_signal_ends_at_once() -> None:
    process = started(SLOW)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; the same command continues from here\n"


def test_a_second_signal_waits_for_the_sentence() -> None:
    slowly = """
        class Slowly:
            def write(self, text):
                sys.__stderr__.write(text)
                sys.__stderr__.flush()
                print("writing", flush=True)
                time.sleep(1)

            def flush(self):
                sys.__stderr__.flush()

        sys.stderr = Slowly()
        sys.exit(run_interruptibly(work))
    """
    slow = textwrap.dedent(SLOW)
    process = started(slow.replace("sys.exit(run_interruptibly(work))", textwrap.dedent(slowly)))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ending\n"
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; the same command continues from here\n"


def test_a_second_signal_ends_compiled_code() -> None:
    patient = HELD.replace(
        "    held(10)\n", "    from ubp_fast import interruption\n    interruption.GRACE_S = 1e6\n    held(10)\n"
    )
    assert patient != HELD
    process = started(patient)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "terminated; the same command continues from here\n"


def test_what_a_background_job_ignores_stays_ignored() -> None:
    process = started(SLOW, sigint="SIG_IGN")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "terminated; the same command continues from here\n"


def test_nothing_is_left_behind() -> None:
    from ubp_fast.interruption import run_interruptibly

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    assert run_interruptibly(lambda: run_interruptibly(lambda: 7)) == 7
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before
