"""The driver of a GPU session: a step or a test that fails or hangs loses nothing else, and the plan fits its time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLANTED = """
import time
def test_good(): pass
def test_wrong(): assert 1 == 2, "planted"
def test_hangs(): time.sleep(60)
def test_also_good(): pass
"""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "benchmarks" / "gpu_session.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_session", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_failure_and_a_time_out_lose_nothing_else(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_planted.py").write_text(PLANTED, encoding="utf-8")

    def planted(session: object) -> list[str]:
        return session.pytest(str(tmp_path / "test_planted.py"), "-c", os.devnull, seconds_per_test=2)  # type: ignore[attr-defined]

    def say(text: str, seconds: int = 0):
        code = f"import time; print({text!r}, flush=True); time.sleep({seconds})"
        return lambda session: [session.python, "-c", code]

    steps = (
        driver.Step("tests", "first", 60, planted),
        driver.Step("hangs", "first", 1, say("before it hung", 600)),
        driver.Step("raises", "first", 20, lambda session: [session.python, "-c", "raise SystemExit('planted end')"]),
        driver.Step("good", "first", 20, say("all is well")),
    )
    monkeypatch.setattr(driver, "STEPS", steps)
    assert driver.main([str(tmp_path / "out"), "first"]) == 1
    summary = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert len(summary) <= 40 and "{'passed': 2, 'failed': 2}" in summary[0]
    states = {line.split()[0]: " ".join(line.split()[1:3]) for line in summary[1:5]}
    assert states["hangs"] == "FAILED (time-out)" and states["tests"] == "FAILED (1)" == states["raises"]
    assert states["good"].startswith("ok")
    assert (
        sum(
            line.startswith("FAILED ") and line.partition("::")[2][:9] in ("test_wron", "test_hang") for line in summary
        )
        == 2
    )
    found = [json.loads(line) for line in (tmp_path / "out" / "tests.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {test["test"].partition("::")[2]: test["text"] for test in found}
    assert "planted" in texts["test_wrong"] and "took more than 2 seconds" in texts["test_hangs"]
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        logs = {Path(name).name for name in archive.getnames()}
    assert {"tests.log", "hangs.log", "raises.log", "good.log", "tests.jsonl"} <= logs
    assert "before it hung" in (tmp_path / "out" / "logs" / "hangs.log").read_text(encoding="utf-8")


def test_a_command_ends_in_time(driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step gets what is left, and one that gets too little is told, not started."""
    for name, seconds in (("COMMAND_S", 3), ("LEAST_S", 2), ("REHEARSAL", 1)):
        monkeypatch.setattr(driver, name, seconds)

    def sleeping(session: object) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    steps = tuple(driver.Step(name, "first", 60, sleeping) for name in ("long", "late"))
    monkeypatch.setattr(driver, "STEPS", steps)
    assert driver.main([str(tmp_path / "out"), "first"]) == 1
    long, late = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8").splitlines()[1:3]
    assert long.startswith("long") and "FAILED (time-out)" in long
    assert late.startswith("late") and "not run" in late


def test_plan_fits_two_commands() -> None:
    """8 and 6 minutes, from cases that are collected as a device would run them."""
    command = [str(ROOT / "benchmarks" / "gpu_session.sh"), "/nowhere", "plan"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sums = {line.split()[0]: int(line.split()[2]) for line in done.stdout.splitlines() if " command: " in line}
    assert 0 < sums["first"] <= 480 and 0 < sums["second"] <= 360, done.stdout
    assert "no cases" not in done.stdout


@pytest.mark.parametrize("arguments", [[], ["out"], ["out", "unknown-step"]], ids=str)
def test_wrong_use_is_explained(driver: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(arguments) == 2
    assert "build" in capsys.readouterr().out
