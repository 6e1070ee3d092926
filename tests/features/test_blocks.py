"""Blocks of clients: which clients have features, the same bytes whatever the blocks, memory that blocks bound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ubp_fast.events.labels import make_label_lists
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.events.split import DAY_S
from ubp_fast.features import writing
from ubp_fast.features.aggregated import aggregated_features
from ubp_fast.features.decayed import decayed_features
from ubp_fast.features.history import numbered
from ubp_fast.features.matrix import Features, load_features
from ubp_fast.features.organisers import CountsConfig, count_features
from ubp_fast.features.popular import popular_lists
from ubp_fast.features.rich import rich_features
from ubp_fast.features.static import static_features
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore

Lists = dict[str, tuple[np.ndarray, np.ndarray]]
Make = Callable[[EventStore, int, Lists, Path | None], Features]
FEATURES: dict[str, Make] = {
    "static": lambda store, cutoff_s, lists, path: static_features(store, cutoff_s, path),
    "aggregated": lambda store, cutoff_s, lists, path: aggregated_features(store, cutoff_s, directory=path),
    "decayed": lambda store, cutoff_s, lists, path: decayed_features(store, cutoff_s, lists, directory=path),
    "rich": lambda store, cutoff_s, lists, path: rich_features(store, cutoff_s, lists, directory=path),
    "counts": lambda store, cutoff_s, lists, path: count_features(store, cutoff_s, directory=path),
    "last event": lambda store, cutoff_s, lists, path: count_features(
        store, cutoff_s, CountsConfig(anchor="last_event"), path
    ),
    "sparse counts": lambda store, cutoff_s, lists, path: count_features(
        store, cutoff_s, CountsConfig(top_values=200), path
    ),
}


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("shop") / "events"
    Synthetic(clients=200, days=70, skus=300, categories=20, urls=300, seed=5, relevant=40).prepare(directory)
    return EventDirectory.open(directory)


@pytest.fixture(scope="module")
def store(events: EventDirectory, tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    path = tmp_path_factory.mktemp("store") / "store"
    build_store(events, path, events.split.input_end_s, all_clients=True)
    return EventStore.open(path)


@pytest.fixture(scope="module")
def lists(events: EventDirectory, store: EventStore) -> Lists:
    return make_label_lists(events, store.cutoff_s - 14 * DAY_S, store.cutoff_s, 30)


def of_everybody(store: EventStore) -> EventStore:
    other = EventStore.open(store.path)
    other.__dict__["is_relevant"] = np.ones(store.num_clients, bool)
    return other


@pytest.mark.parametrize("name", FEATURES)
def test_rows_of_clients_that_need_a_profile(store: EventStore, lists: Lists, name: str) -> None:
    """Theirs alone, and what they would be among all.

    Means, learned rates, frequent values and last events are those of the clients.
    """
    cutoff_s = store.cutoff_s - 14 * DAY_S
    found, everybody = (FEATURES[name](each, cutoff_s, lists, None) for each in (store, of_everybody(store)))
    assert 30 < store.is_relevant.sum() <= 40 < store.num_clients
    np.testing.assert_array_equal(found.client_ids, store.client_ids[store.is_relevant])
    columns = [place for place, column in enumerate(found.names) if column in everybody.names]
    assert len(columns) > found.shape[1] / 3
    if name == "rich":
        columns = [place for place in columns if found.units[place] in ("log1p events", "share", "nats")]
    elif name == "last event":
        columns = [found.names.index("page_visit_count")]
    wanted = everybody.rows(np.flatnonzero(store.is_relevant))
    wanted = wanted[:, [everybody.names.index(found.names[place]) for place in columns]]
    np.testing.assert_array_equal(found.rows(slice(None))[:, columns], wanted)
    assert wanted.any()


def test_frequent_values_are_those_of_clients_that_need_a_profile(
    events: EventDirectory, store: EventStore, tmp_path: Path
) -> None:
    build_store(events, tmp_path / "store", store.cutoff_s)
    alone, cutoff_s = EventStore.open(tmp_path / "store"), store.cutoff_s - 7 * DAY_S
    for kind in ("product_buy", "page_visit"):
        for before_s in (cutoff_s, store.cutoff_s):
            among_all, wanted = (popular_lists(each, kind, before_s, 10) for each in (store, alone))
            assert {name: ids.tolist() for name, ids in among_all.items()} == {
                name: ids.tolist() for name, ids in wanted.items()
            }
            others = popular_lists(of_everybody(store), kind, before_s, 10)
            assert any(others[name].tolist() != ids.tolist() for name, ids in wanted.items())


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_threads_and_files_change_no_byte(
    store: EventStore, lists: Lists, name: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FEATURES[name](of_everybody(store), store.cutoff_s, lists, None)
    monkeypatch.setattr(writing, "BLOCK_CLIENTS", 7)
    monkeypatch.setattr(writing, "SMALLEST_BLOCK", 1)
    monkeypatch.setattr("ubp_fast.features.organisers.counts.SPARSE_BLOCK_CLIENTS", 11)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        FEATURES[name](of_everybody(store), store.cutoff_s, lists, tmp_path)
    finally:
        torch.set_num_threads(before)
    parts = load_features(tmp_path)
    assert (parts.names, parts.units) == (whole.names, whole.units)
    np.testing.assert_array_equal(parts.client_ids, whole.client_ids)
    if name == "rich":  # sums of what others have, block by block
        np.testing.assert_allclose(parts.rows(slice(None)), whole.rows(slice(None)), rtol=1e-6, atol=1e-7)
    else:
        np.testing.assert_array_equal(parts.rows(slice(None)), whole.rows(slice(None)))


MEASURE = """
import sys
from pathlib import Path
from support.runs import composed
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.pipeline.stages import make_events, make_features, make_store
from ubp_fast.store.event_store import EventStore

def high_water_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

def made(clients, relevant, folder):
    settings = read_settings(composed(
        "data=synthetic", f"data.clients={clients}", f"data.relevant={relevant}", "data.days=80", "data.skus=5000",
        "features=rich", "store.all_clients=true", "stacking.blocks=[multitask,aggregated,decayed,rich]",
        "windows.model_cutoffs=1", "windows.stacking_cutoffs=1",
    ))
    inputs = {name: folder / name for name in ("events", "store", "features")}
    for name, make in (("events", make_events), ("store", make_store), ("features", make_features)):
        inputs[name].mkdir(parents=True, exist_ok=True)
        if name == "store":
            inputs[name].rmdir()
        if name == "features":
            Path("/proc/self/clear_refs").write_text("5")
            before = high_water_mb()
        make(settings, inputs, inputs[name], lambda *_: None)
    assert EventStore.open(inputs["store"]).num_clients > 0.75 * clients
    output = sum(file.stat().st_size for file in inputs["features"].rglob("*.npy")) / 2**20
    return high_water_mb() - before - output

folder = Path(sys.argv[1])
made(300, 50, folder / "compile")
print(made(int(sys.argv[2]), int(sys.argv[3]), folder / "measured"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark of memory")
def test_memory_beyond_the_output_does_not_follow_the_store(tmp_path: Path) -> None:
    """All clients' features were once made before those of the relevant ones were chosen: gigabytes here."""
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", MEASURE, str(tmp_path), "66667", "500"]
    found = subprocess.run(command, cwd=tests, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    beyond_mb = float(found.stdout.split()[-1])
    assert beyond_mb < 300, f"{beyond_mb:.0f} MB"


def test_equal_codes_get_equal_numbers() -> None:
    state = np.random.default_rng(0)
    different = state.integers(0, 256, (300, 16), np.uint8)
    different[150:] = different[:150]
    different[150:, 15] += 1  # half of each row is that of another one
    which = state.integers(0, 300, 2_000)
    found = numbered(different[which])
    assert found.dtype == np.int32
    assert set(found) == set(range(len(np.unique(which))))
    assert len({*zip(which.tolist(), found.tolist(), strict=True)}) == len(np.unique(which))
    assert numbered(different[:0]).shape == (0,)
