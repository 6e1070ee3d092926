"""Triton without a GPU: its interpreter runs the tests of the kernels, its compiler shows what a GPU would get.

Each in a process of its own: TRITON_INTERPRET is read when kernels are defined, and kernels that are interpreted
cannot be compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_triton_*.py"))


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE.parent.parent,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the device")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted_kernels_match_their_references(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    found = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1")
    with capfd.disabled():
        print(f"\nTriton's interpreter: {found.stdout.strip().splitlines()[-1]}")
    assert found.returncode == 0, found.stdout


def test_kernels_compile_without_spills(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    found = run(str(HERE / "compile_triton.py"))
    with capfd.disabled():
        print(f"\n{found.stdout}")
    assert found.returncode == 0, found.stdout
