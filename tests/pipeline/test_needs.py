"""What a run needs of disk and memory: told before the work, never less than it takes, refused where it is too much."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.runs import composed, run_tiny
from support.shops import write_rows

from ubp_fast.events.read import EventDirectory
from ubp_fast.features import scaling
from ubp_fast.pipeline import needs
from ubp_fast.pipeline.execute import _peak_bytes
from ubp_fast.pipeline.needs import Need, needs_of_models, needs_of_store, told
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.store.build import build_store
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


def test_a_store_with_amounts_takes_no_more_than_was_said(tmp_path: Path) -> None:
    rows = [(client, time, time % 5) for client in range(20) for time in range(4_000)]
    events = write_rows(tmp_path / "events", {"product_buy": rows}, amounts=("quantity", "spend"))
    build_store(events, tmp_path / "store", 10**8)
    need = needs_of_store(events, {"all_clients": False})
    assert need.disk - 200_000 < size_of(tmp_path / "store") < need.disk + 20_000


def test_memory_is_that_of_all_processes_of_the_host(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EventStore.open(run / "stages" / "store")

    def memory(*more: str) -> int:
        (need,) = needs_of_models(store, read_settings(composed(*SHOP, *WINNER, *more)), ["multitask"])
        return need.memory

    one = memory("multitask.training.batch_size=1")
    assert 3 * one < memory("compute.devices=3", "multitask.training.batch_size=3") < 4 * one
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in {**launched, "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, str(value))
    assert memory("multitask.training.batch_size=8") == 2 * one


def test_shards_need_what_the_largest_holds_and_those_that_fit_are_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = EventStore.open(run / "stages" / "store")
    monkeypatch.setattr(needs, "BYTES_OF_SHARD_PER_CLIENT", 10**8)
    monkeypatch.setattr(needs, "available_memory", lambda: 7 * 10**9)
    monkeypatch.setattr(scaling, "ROWS_AT_ONCE", 16)  # 100 clients are 7 parts of sums

    def stacking(*more: str) -> Need:
        (need,) = needs_of_models(store, read_settings(composed(*SHOP, *more)), ["stacking"])
        return need

    with pytest.raises(needs.UserError, match=r"got 7\.0 GB for stage 'stacking'; compute\.shards=4 needs 4\.[4-9] GB"):
        told([stacking()._replace(memory=10**12)], tmp_path, read_settings(composed(*SHOP)))
    assert stacking(*WINNER).remedy == "take smaller tables or a larger machine"
    found = []
    for bounds in ([0, 48, 100], [0, 16, 100]):
        monkeypatch.setattr(needs, "first_rows", lambda _, bounds=bounds: bounds)
        found.append(stacking("compute.shards=2"))
    assert found[1].memory - found[0].memory == (84 - 52) * 10**8
    assert "compute.shards=4 needs" in found[0].remedy
    assert "no number of shards fits" in stacking("compute.shards=8").remedy


MEASURE = """
import sys
from pathlib import Path
from support import shops
from ubp_fast.events.labels import make_label_lists
from ubp_fast.events.read import EventDirectory
from ubp_fast.features.tastes import TastesConfig, fit_tastes
from ubp_fast.models.pair_scorer import PairScorer, PairScorerConfig
from ubp_fast.pipeline.needs import bytes_of_tastes
from ubp_fast.sequences import training_cutoffs

def in_memory(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024

def shop(skus, clients, folder):
    shops.NUM_SKUS = skus
    store = shops.make_store(folder, kinds=("product_buy", "add_to_cart"), clients=clients)
    events = EventDirectory.open(next(folder.rglob("dataset.json")).parent)
    lists = make_label_lists(events, store.cutoff_s - 14 * shops.DAY_S, store.cutoff_s, 10)
    return store, lists, training_cutoffs(store, 2, 1)

def fit(what, store, lists, cutoffs, folder):
    if what == "tastes":
        fit_tastes(store, store.cutoff_s)
        return bytes_of_tastes(store, TastesConfig())
    config = PairScorerConfig(epochs=1, client_epochs=1, pairs=500, clients=500)
    found = PairScorer.fit(store, cutoffs, lists, config, folder=folder)
    assert len(found.past) == 3
    return bytes_of_tastes(store, config.factors) + 2 * sum(one.weights.nbytes for one in found.factors.items.values())

folder = Path(sys.argv[1])
fit(sys.argv[2], *shop(2_000, 500, folder / "compile"), folder / "compiled")
given = shop(90_000, 8_000, folder / "shop")
Path("/proc/self/clear_refs").write_text("5")
before = in_memory("VmRSS:")
said = fit(sys.argv[2], *given, folder / "fitted")
print(said, in_memory("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
@pytest.mark.parametrize("what", ["tastes", "scorer"])
def test_fits_of_many_items_take_no_more_memory_than_was_said(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path), what]
    tests = Path(__file__).resolve().parents[1]
    given_back = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}  # not what the allocator keeps
    done = subprocess.run(command, cwd=tests, env=os.environ | given_back, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, taken = map(int, done.stdout.split())
    libraries = 80e6  # theirs, which a run counts apart
    assert said / 3 < taken < said + libraries, f"{taken / 1e6:.0f} MB of {said / 1e6:.0f} MB"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere a process inherits its parent's figure")
def test_the_peak_of_a_run_is_not_that_of_who_started_it() -> None:
    large = np.ones(1_500_000_000, np.uint8)
    command = [sys.executable, "-c", "from ubp_fast.pipeline.execute import _peak_bytes; print(_peak_bytes())"]
    peak_bytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 50_000_000 < peak_bytes < large.nbytes < _peak_bytes()


def test_features_of_networks_are_kept_at_their_cutoffs(run: Path) -> None:
    store = EventStore.open(run / "stages" / "store")
    need, wide = (
        needs_of_models(store, read_settings(composed(*SHOP, *only, *more)), ["features"])[0].disk
        for only in [("stages=[multitask]", "profile=strong")]
        for more in ((), ("multitask.config.wide=[decayed]",))
    )
    assert wide > 1.5 * need


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
