"""What the report shows beside scores: clients, their neighbours, weeks, drift."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError
from ubp_fast.events.sources.synthetic import Synthetic
from ubp_fast.profiles import Profiles
from ubp_fast.report import data_read, drift, portray
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    directory = tmp_path_factory.mktemp("synthetic") / "events"
    Synthetic(clients=120, skus=60, urls=60).prepare(directory)
    return EventDirectory.open(directory)


@pytest.fixture(scope="module")
def store(events: EventDirectory, tmp_path_factory: pytest.TempPathFactory) -> EventStore:
    directory = tmp_path_factory.mktemp("store") / "store"
    build_store(events, directory, events.split.input_end_s)
    return EventStore.open(directory)


@pytest.fixture(scope="module")
def profiles(store: EventStore) -> Profiles:
    ids = store.client_ids[store.is_relevant]
    return Profiles(ids, np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32))


def test_weeks_hold_every_event(events: EventDirectory) -> None:
    found = data_read(events)
    for kind in events.kinds:
        assert sum(found["events"][kind]) == found["rows"][kind] == events.num_rows(kind)
    cutoff = found["weeks"].index(events.split.input_end_s)
    late = events.scan("product_buy").filter(pl.col("timestamp_s") >= events.split.input_end_s).collect()
    assert sum(found["events"]["product_buy"][cutoff:]) == len(late)
    json.dumps(found, allow_nan=False)


def test_portrait_counts_what_clients_did_before_the_cutoff(events: EventDirectory, profiles: Profiles) -> None:
    cutoff_s = events.split.input_end_s
    found = portray(profiles, events, cutoff_s)
    json.dumps(found, allow_nan=False)
    clients = found["map"]
    past = {
        kind: events.scan(kind).filter(pl.col("timestamp_s") < cutoff_s).collect()["client_id"] for kind in events.kinds
    }
    assert sum(clients["events"]) == sum(int(one.is_in(profiles.client_ids).sum()) for one in past.values())
    assert [sum(one) for one in zip(*clients["kinds"].values(), strict=True)] == clients["events"]
    buyers = events.purchases(cutoff_s, cutoff_s + 14 * 86_400)["client_id"].unique()
    assert clients["buys"] == [int(one in buyers) for one in profiles.client_ids.tolist()]
    assert min(clients["x"]) == 0 and max(clients["x"]) == 1000
    unit = profiles.embeddings / np.linalg.norm(profiles.embeddings, axis=1, keepdims=True)
    asked = [entry["events"][0] for entry in found["neighbours"]]
    assert asked == sorted(asked) and len(asked) == 4
    for entry in found["neighbours"]:
        assert entry["cosine"] == sorted(entry["cosine"], reverse=True) and len(entry["counts"]) == 4
        assert any(np.isclose(np.sort(unit @ one)[-4:-1][::-1], entry["cosine"][1:]).all() for one in unit)
        assert all(sum(counts) <= total for counts, total in zip(entry["counts"], entry["events"], strict=True))


def test_ids_are_shown_when_they_are_asked_for(events: EventDirectory, profiles: Profiles) -> None:
    cutoff_s = events.split.input_end_s
    named = replace(profiles, own_ids=pl.Series([f"client-{one}" for one in profiles.client_ids]))
    assert "client-" not in json.dumps(portray(named, events, cutoff_s))
    found = portray(named, events, cutoff_s, show_ids=True)
    assert found["map"]["ids"] == named.own_ids.to_list()  # type: ignore[union-attr]
    assert all(name.startswith("client-") for entry in found["neighbours"] for name in entry["ids"])


def test_without_scikit_learn_the_map_says_what_to_install(
    events: EventDirectory, profiles: Profiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    found = portray(profiles, events, events.split.input_end_s)
    assert "pip install 'ubp_fast[evaluate]'" in found["map_missing"] and "map" not in found
    assert found["neighbours"]


def test_alike_clients_lie_close_on_the_map(events: EventDirectory, profiles: Profiles) -> None:
    side = np.arange(profiles.num_clients) % 2
    vectors = np.random.default_rng(1).normal(size=profiles.embeddings.shape).astype(np.float32)
    vectors[:, 0] += 40 * (2 * side - 1)
    places = portray(replace(profiles, embeddings=vectors), events, events.split.input_end_s)["map"]
    points = np.stack([places["x"], places["y"]], axis=1).astype(float)
    far = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    np.fill_diagonal(far, np.inf)
    assert (side[far.argmin(axis=1)] == side).mean() > 0.95


def test_drift_of_a_run_against_itself_is_none(store: EventStore, profiles: Profiles) -> None:
    found = drift(store, profiles, store, profiles)
    assert all(one["psi"] == 0 for one in found["inputs"])
    assert found["vectors"] == [{"block": "", "cka": pytest.approx(1), "neighbours": 1.0, "explained": None}]
    assert found["clients"] == {"both": profiles.num_clients, "new": 0, "gone": 0}


def test_drift_sees_other_inputs_and_vectors_but_no_turn(
    store: EventStore, profiles: Profiles, events: EventDirectory, tmp_path: Path
) -> None:
    build_store(events, tmp_path / "store", events.split.input_end_s - 35 * 86_400)
    earlier = EventStore.open(tmp_path / "store")
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))[0].astype(np.float32)
    turned = replace(profiles, embeddings=3 * profiles.embeddings @ turn)
    found = drift(store, profiles, earlier, turned)
    assert found["vectors"][0]["cka"] == pytest.approx(1, abs=1e-5) and found["vectors"][0]["neighbours"] > 0.99
    assert max(one["psi"] for one in found["inputs"]) > 0.1
    other = replace(profiles, embeddings=np.random.default_rng(3).normal(size=(len(turned.client_ids), 8)).astype("f4"))
    found = drift(store, profiles, store, other)
    assert found["vectors"][0]["cka"] < 0.3 and found["vectors"][0]["neighbours"] < 0.3


def test_drift_against_another_shop_is_refused(store: EventStore, profiles: Profiles) -> None:
    foreign = replace(profiles, client_ids=profiles.client_ids + 10**9)
    with pytest.raises(DataError, match="share more than 10 clients"):
        drift(store, profiles, store, foreign)
