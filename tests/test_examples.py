"""The examples run from end to end, on a small shop where they take real data."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import TINY

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHOP = ("data=synthetic", "data.clients=400", "data.skus=60", "data.urls=80")
SETTINGS = [*(one for one in TINY if not one.startswith("evaluation.")), *SHOP]


def ran(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, settings: list[str]) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *settings])
    return runpy.run_path(str(EXAMPLES / name))


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {
        *("churn.py", "kernels.py", "retraining.py"),
    }


def test_churn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lightgbm")
    found = ran("churn.py", monkeypatch, tmp_path, SETTINGS)
    assert 0.6 < found["auroc"]["profile"] < 1
    assert sum(found["share"].values()) == pytest.approx(1)


def test_retraining(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lightgbm")
    found = ran("retraining.py", monkeypatch, tmp_path, SETTINGS)
    assert min(found["auroc"].values()) > 0.6
    assert found["agreement"]["old model"] == pytest.approx(1)
    assert found["agreement"]["new, aligned"] > 0.9, "what an alignment is for"
    assert found["agreement"]["new, aligned"] > found["agreement"]["new, as it is"] + 0.01


def test_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = ran("kernels.py", monkeypatch, tmp_path, [])
    assert found["losses"][-1] < 0.9 * found["losses"][0]
    assert found["same"] > 0.5
