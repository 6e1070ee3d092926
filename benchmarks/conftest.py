"""Runs the cases pinned to one thread, writes results/<machine>/<commit>.json, prints the table of bars."""

from __future__ import annotations

import functools
import gc
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]  # contest, bars; the tests' rule of closeness

import bars  # noqa: E402
import peaks  # noqa: E402
from contest import Contest, GpuContest, Ratio, give_memory_back, keep_freed_memory, machine  # noqa: E402

RATIOS = pytest.StashKey[list[Ratio]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=HERE / "results", help="folder of the JSON files")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RATIOS] = []
    config.addinivalue_line("markers", "plain_glibc: measured with the C library as it is; these cases run first")
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The setting of `keep_freed_memory` cannot be taken back, so the cases without it come first.
    items.sort(key=lambda item: item.get_closest_marker("plain_glibc") is None)
    for item in items:
        item.add_marker(pytest.mark.timeout(0))  # a race of minutes is none that hangs
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Contest]:
    """Hands the case its race; pytest-benchmark stores what it measures."""
    torch.manual_seed(0)
    is_plain = request.node.get_closest_marker("plain_glibc") is not None
    benchmark.extra_info["glibc_keeps_freed_memory"] = not is_plain and keep_freed_memory()
    yield Contest(benchmark, request.config.stash[RATIOS])
    _write(request.config, request.node.name, benchmark.extra_info)
    give_memory_back()  # the next case may need most of the machine


@pytest.fixture
def gpu_contest(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Contest]:
    """The same on a CUDA device."""
    torch.manual_seed(0)
    yield GpuContest(benchmark, request.config.stash[RATIOS])
    _write(request.config, request.node.name, benchmark.extra_info)
    gc.collect()
    torch.cuda.empty_cache()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0 and bars.missed(session.config.stash[RATIOS]):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ratios = config.stash[RATIOS]
    if not ratios:
        return
    terminalreporter.section("figures against bars (wall clock, median of rounds)")
    terminalreporter.write_line(bars.table(ratios))
    for item in bars.missed(ratios):
        terminalreporter.write_line(
            f"BELOW ITS BAR: {item.figure} against {item.rival}: {item.ratio:.2f}x < {item.bar}x"
        )


def _write(config: pytest.Config, case: str, info: dict[str, Any]) -> None:
    """Adds a case to the file of this machine and commit as soon as it is known; other cases in it stay."""
    if "figure" not in info:  # it failed before it was timed
        return
    facts = machine()
    if "gpu" not in facts:
        facts["gflops of one core"] = peaks.measured()
    name = facts.get("gpu", f"{facts['cpu']}-{facts['cores']}-cores")
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = Path(config.getoption("--results")) / name / f"{_commit()}.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    cases[case] = dict(info)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": facts, "cases": dict(sorted(cases.items()))}, indent=1)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


@functools.cache
def _commit() -> str:
    """Short hash of HEAD, "-dirty" when tracked sources differ from it, "unknown" outside a clone."""
    try:
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
        changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", "../src", "../csrc", "."]
        state = subprocess.run(changed, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if state else commit
