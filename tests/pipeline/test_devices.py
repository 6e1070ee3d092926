"""compute.devices: networks trained by several processes are those of one; one that ends says so, and is continued."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runs import TINY, run_tiny

from ubp_fast.files import load_tensors
from ubp_fast.models.training import MODEL_FILE

SETTINGS = (
    *TINY,
    "data=synthetic",
    "data.clients=150",
    "data.skus=60",
    "data.urls=80",
    "stages=contrastive",
    "stacking.blocks=[contrastive,decayed]",
    "contrastive.config.history={heads: 2, feed_forward: 64, causal: true, attention_dropout: 0.1}",
    "contrastive.config.next_event_weight=1",
    "contrastive.config.future={heads: 2, feed_forward: 64}",
    "contrastive.config.events={sku_width: 16, url_width: 16, code_width: 16, age_width: 16, age_bins: 16}",
    "contrastive.training={checkpoint_every_s: 0, batch_size: 16, max_steps: 4}",
)


def trained(root: Path, *more: str) -> dict[str, torch.Tensor]:
    code, _, _ = run_tiny(root, *SETTINGS, *more)
    assert code == 0
    assert not list(root.glob("cache/**/*-of-*"))
    (found,) = root.glob(f"cache/**/training/{MODEL_FILE}")
    return load_tensors(found)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("tables", ["replicated", "sharded"])
def test_two_devices_train_what_one_trains(tables: str, one: dict[str, torch.Tensor], tmp_path: Path) -> None:
    two = trained(tmp_path, "compute.devices=2", f"compute.tables={tables}")
    for name, part in one.items():
        error = (two[name].double() - part.double()).abs().max()
        assert error <= 1e-4 * part.double().abs().max().clamp_min(0.1), f"{name}: {error:.1e}"


def test_devices_that_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each ends in one sentence."""
    wrong = ("contrastive.training.table_updates=row_sparse", "+contrastive.optimizer.weight_decay=0.1")
    assert run_tiny(tmp_path / "two", *SETTINGS, "compute.devices=2", *wrong)[0] == 2
    said = capfd.readouterr().err.splitlines()
    assert any("error: contrastive: process" in line and "weight decay moves" in line for line in said), said
    assert run_tiny(tmp_path, *SETTINGS, "compute.devices=0")[0] == 2
    assert "compute.devices must be >= 1, got 0" in capfd.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ("profiles.at_once=1",),
        pytest.param(("profiles.at_once=16", "compute.threads=2"), marks=pytest.mark.slow),
    ],
)
def test_vectors_of_several_processes_are_those_of_one(more: tuple[str, ...], tmp_path: Path) -> None:
    """From the network that one process has trained: only the vectors are taken away."""
    trained(tmp_path, *more)
    (stage,) = (tmp_path / "cache").glob("contrastive-*")
    files = {path.name: path.read_bytes() for path in stage.glob("vectors-*.npy")}
    assert files
    partial = stage.with_name(f"{stage.name}.partial")
    stage.rename(partial)
    for name in files:
        (partial / name).unlink()
    trained(tmp_path, *more, "compute.devices=2")
    assert {path.name: path.read_bytes() for path in stage.glob("vectors-*.npy")} == files
