"""What a run needs of disk and memory: told before the work, never less than it takes, refused where it is too much."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import composed, run_tiny

from ubp_fast.events.read import EventDirectory
from ubp_fast.pipeline import needs
from ubp_fast.pipeline.needs import Need, needs_of_models, needs_of_store, told
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.store.event_store import EventStore

SHOP = ("data=synthetic", "data.clients=300", "data.skus=80", "data.urls=60", "data.relevant=100")
WINNER = ("experiment=winner", "multitask.training.epochs=1", "stages=[multitask]")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code, run, printed = run_tiny(tmp_path_factory.mktemp("needs"), *SHOP, *WINNER)
    assert code == 0, printed
    assert printed.count("needs at most about") == 2
    return run


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.resolve().rglob("*") if path.is_file())


def test_stages_leave_no_more_than_was_said(run: Path) -> None:
    settings, stages = read_settings(composed(*SHOP, *WINNER)), run / "stages"
    store = EventStore.open(stages / "store")
    of_store = needs_of_store(EventDirectory.open(stages / "events"), settings.plain["store"])
    small = 200_000  # descriptions, and columns of single items
    assert size_of(stages / "store") < of_store.disk + small
    found = {
        need.stage: need for need in needs_of_models(store, settings, ["features", "multitask", "latest-features"])
    }
    assert list(found) == ["features", "multitask"]
    for name, need in found.items():
        assert size_of(stages / name) < need.disk + small, name
    tables = store.num_skus * 384 + store.num_urls * 384
    assert found["multitask"].memory > tables * 12


def test_more_clients_and_wider_tables_need_more(run: Path) -> None:
    store = EventStore.open(run / "stages" / "store")
    before, wide = (
        needs_of_models(store, read_settings(composed(*SHOP, *WINNER, *extra)), ["contrastive", "multitask"])
        for extra in ((), ("contrastive.config.events.sku_width=1000",))
    )
    assert wide[0].memory - before[0].memory == store.num_skus * (1000 - 384) * 16
    assert wide[1] == before[1]


@pytest.mark.parametrize(
    ("need", "message"),
    [
        (Need("store", 10**18), r"disk must be at least 1000000000\.0 GB, got .* free some, or take another root="),
        (Need("multitask", 0, 0, 10**18), "memory must be at least .* for stage 'multitask'; take smaller tables"),
    ],
)
def test_too_little_is_refused_unless_tried(need: Need, message: str, tmp_path: Path) -> None:
    settings = read_settings(composed(*SHOP))
    with pytest.raises(needs.UserError, match=message):
        told([need], tmp_path, settings)
    tried = read_settings(composed(*SHOP, "compute.on_shortage=try"))
    assert told([need], tmp_path, tried).startswith("needs at most about")


def test_a_refused_run_has_made_nothing_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needs, "available_memory", lambda: 10**9)
    code, run, _ = run_tiny(tmp_path, *SHOP, *WINNER)
    assert code == 2
    assert "compute.on_shortage=try" in capsys.readouterr().err
    assert {path.name for path in (run / "stages").iterdir()} == {"events"}
