"""Disks that are full, read-only, broken or slow, and clocks that jump: an error in one line, nothing wrong left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import contents, run_tiny

SUPPORT = Path(__file__).parent / "support"
SHOP = ("data=synthetic", "data.clients=60", "data.days=70", "data.skus=60", "data.urls=80", "stages=[stacking]")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SUPPORT / "faulty_disk.c", "-ldl"], check=True)
    return library


@pytest.mark.timeout(86_400)
@pytest.mark.parametrize("which", ["12", pytest.param("every", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["faults", "faulty_commands"])
def test_a_call_that_fails_leaves_nothing_wrong_and_is_made_good(
    what: str, which: str, disk: Path, tmp_path: Path
) -> None:
    """EIO, ENOSPC, EROFS and EDQUOT at calls of all libraries: the message, what is left, the bytes of the next run."""
    environment = {**os.environ, "LD_PRELOAD": str(disk), "FAULTY_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"support.{what}", str(tmp_path), which]
    done = subprocess.run(command, env=environment, cwd=SUPPORT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bad"] == []
    assert found["reference is unchanged"]
    assert found["calls"] > 800
    assert found["trials"] == (4 * found["calls"] if which == "every" else int(which) + found["first"])


def test_a_slow_disk_and_a_clock_that_jumps_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, plain, _ = run_tiny(tmp_path / "plain", *SHOP)
    assert code == 0
    flush, replace, now = os.fsync, os.replace, time.time
    calls = []

    def slowly(true, *arguments):  # type: ignore[no-untyped-def]
        time.sleep(0.02)
        return true(*arguments)

    def backwards() -> float:
        calls.append(None)
        return now() - 86_400 * len(calls)

    monkeypatch.setattr(os, "fsync", lambda *arguments: slowly(flush, *arguments))
    monkeypatch.setattr(os, "replace", lambda *arguments: slowly(replace, *arguments))
    monkeypatch.setattr(time, "time", backwards)
    code, slow, _ = run_tiny(tmp_path / "slow", *SHOP)
    assert code == 0
    for folder in ("profiles", "model", "stages/store", "stages/features"):
        assert contents(slow / folder) == contents(plain / folder)
