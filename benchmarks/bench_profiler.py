"""Vectors of any moment from a run's model: many clients, one client, one more day.

Clients of Complete Journey have 548 purchases each, those of the synthetic shop about 40 events of five kinds. Times
are from a store that exists to vectors in memory, on one thread.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from contest import Contest, torch_threads

import ubp_fast
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.split import DAY_S, utc_text
from ubp_fast.profiler import Profiler
from ubp_fast.store.event_store import EventStore
from ubp_fast.store.in_memory import Histories

# What is asked for. Networks and scores of pairs are learned, and graded and near columns look at scores.
CLIENTS_PER_S, CLIENTS_PER_S_OF_NETWORKS = 20_000, 500
BLOCKS = {
    "all blocks": None,
    "all that needs no scores": ["strong", "own", "tastes", "rhythm"],
    "strong": ["strong"],
    "networks": None,
}
ONE_CLIENT_S, ONE_CLIENT_OF_NETWORKS_S = 0.020, 0.060
DAY_SHARE = 0.2
EVENTS_OF_ONE = 500
SHOPS = {
    "complete_journey": ("data=complete_journey",),
    "ordinary": ("data=synthetic", "data.clients=20000", "data.activity=0.3"),
}
NETWORKS = ("experiment=best", "windows.model_cutoffs=1", "windows.stacking_cutoffs=1")
MOST_CLIENTS = 10_240
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes a run of some settings, each once."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}

    def make(*settings: str) -> Path:
        if settings not in runs:
            place = folder / str(len(runs))
            given = (f"directory={place / 'run'}", f"cache={place / 'cache'}", "stages=[profiles]", "evaluation=off")
            with torch_threads(1):
                runs[settings] = ubp_fast.run([*settings, *given, "compute.threads=1"], quiet=True)
        return runs[settings]

    return make


@pytest.mark.parametrize(
    ("shop", "blocks"),
    [(shop, blocks) for shop in SHOPS for blocks in BLOCKS if blocks != "networks" or shop == "complete_journey"],
)
def bench_many_clients(contest: Contest, made: Made, shop: str, blocks: str) -> None:
    run = made(*SHOPS[shop], *(NETWORKS if blocks == "networks" else ()))
    profiler, store = Profiler.load(run), EventStore.open(run / "stages" / "store")
    histories, ids = Histories.of_store(store), np.asarray(store.client_ids)[np.asarray(store.is_relevant)]
    ids = ids[: MOST_CLIENTS // (10 if blocks == "networks" else 1)]
    events = sum(int(offsets[-1]) for offsets, *_ in histories.kinds.values()) / len(histories.client_ids)
    contest.limits(
        f"profiler {shop}, {len(ids):,} clients of {events:.0f} events, {blocks}",
        lambda: profiler.of_histories(histories, ids, store.cutoff_s, BLOCKS[blocks]),
        most_cpu_s=len(ids) / (CLIENTS_PER_S_OF_NETWORKS if blocks == "networks" else CLIENTS_PER_S),
        facts={"clients": len(ids), "events_per_client": events, "width": profiler.layout.width},
    )


@pytest.mark.parametrize("networks", [False, True], ids=["decayed", "networks"])
def bench_one_client(contest: Contest, made: Made, networks: bool) -> None:
    run = made(*SHOPS["complete_journey"], *(NETWORKS if networks else ()))
    profiler = Profiler.load(run)
    bought = EventDirectory.open(run / "stages" / "events").frame("product_buy")
    counts = bought.filter(pl.col("timestamp_s") < profiler.fitted.cutoff_s)["client_id"].value_counts()
    one = counts.sort((pl.col("count") - EVENTS_OF_ONE).abs())["client_id"][0]
    table = {"product_buy": bought.filter(pl.col("client_id") == one).rename({"timestamp_s": "timestamp"})}
    contest.limits(
        f"profiler, one client of {EVENTS_OF_ONE} events, {'all blocks and networks' if networks else 'strong'}",
        lambda: profiler.embed(table, profiler.fitted.cutoff_s, [one], None if networks else ["strong"]),
        most_cpu_s=ONE_CLIENT_OF_NETWORKS_S if networks else ONE_CLIENT_S,
        rounds=30,
    )


def bench_one_more_day(contest: Contest, made: Made, tmp_path: Path) -> None:
    run = made(*SHOPS["complete_journey"])  # compiles what the runs to be compared need
    last_s = EventDirectory.open(run / "stages" / "events").last_s
    morning_s = last_s - last_s % DAY_S
    before = time.process_time()
    run = made(*SHOPS["complete_journey"], f"profiles.at='{utc_text(morning_s)}'")
    whole_s = time.process_time() - before
    events = EventDirectory.open(run / "stages" / "events")
    day = events.frame("product_buy").rename({"timestamp_s": "timestamp"}).filter(pl.col("timestamp") >= morning_s)

    def append() -> Any:
        copy = tmp_path / "run"
        with contest.off_the_clock():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run, copy)
        with torch_threads(1):
            before = time.process_time()
            Profiler.load(copy).append({"product_buy": day})
            return time.process_time() - before

    append()
    seconds = contest.alone(append)
    facts = {"run_cpu_s": whole_s, "day_cpu_s": seconds, "events": len(day)}
    contest.at_most("profiler, share of a whole run that one more day costs", "", seconds / whole_s, DAY_SHARE, facts)
