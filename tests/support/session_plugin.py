"""A pytest plugin for runs whose time is short: every outcome is on disk at once, and no test outlasts its share.

`-p support.session_plugin --record FILE --seconds-per-test N`. It also knows the settings of pytest-timeout, so that
the project's configuration is valid where that is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", help="file that gets one JSON line for each outcome")
    parser.addoption("--seconds-per-test", type=int, default=120)
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "of pytest-timeout, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:
        config.addinivalue_line("markers", "timeout: of pytest-timeout, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise TimeoutError(f"{item.nodeid} took more than {seconds} seconds")

    seconds = item.config.getoption("--seconds-per-test")
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        text = "" if report.passed else report.longreprtext
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "text": text}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if report.failed:
            print(f"\nFAILED {report.nodeid}\n{text}\n", flush=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    path = session.config.getoption("--record")
    if path and not hasattr(session.config, "workerinput"):  # not in the workers of pytest-xdist
        session.config.pluginmanager.register(_Recorder(Path(path)))
