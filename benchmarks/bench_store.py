"""From Parquet to the organisers' 320 features: with the store, built in one pass, and for features only, without it.

Rivals read the same files and make the same cells, but no store, no merged timeline of all kinds and no matrix. They
are held against our way without a store, which makes the features alone, too; that with a store stands beside it.
"""

from __future__ import annotations

import os

os.environ.setdefault("POLARS_MAX_THREADS", "1")

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from bench_windowed_aggregate import DUCKDB_BARS, POLARS_BARS, SMALL, WIDE, agree, two_threads
from contest import Contest
from reference_dataframes import read_with_duckdb, read_with_polars, with_duckdb, with_polars
from shop_logs import CUTOFF_S, DAYS, EVENTS, START_S, write_logs

from ubp_fast.events.parse import parse_codes
from ubp_fast.events.read import EventDirectory
from ubp_fast.events.split import DAY_S
from ubp_fast.features.matrix import Features
from ubp_fast.features.organisers import CountsConfig, count_features, count_features_once
from ubp_fast.store.build import build_store
from ubp_fast.store.event_store import EventStore


def to_features(events: EventDirectory, path: Path, config: CountsConfig, directory: Path | None = None) -> Features:
    """A new store at `path`, and features from it."""
    for old in (path, directory):
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    build_store(events, path, CUTOFF_S)
    return count_features(EventStore.open(path), CUTOFF_S, config, directory)


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keeps all threads of the process on that many cores: Polars decodes on a second one whatever it is told."""
    allowed = sorted(os.sched_getaffinity(0))
    try:
        _keep_on(allowed[:count])
        yield
    finally:
        _keep_on(allowed)


def _keep_on(cores: list[int]) -> None:
    for thread in os.listdir("/proc/self/task"):  # a new thread stays where the one that starts it is
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), cores)


@pytest.mark.parametrize("scale", [0.01, 0.1], ids=["1of100", "1of10"])
@pytest.mark.parametrize("name", ["default", "wide"])
@pytest.mark.parametrize(("way", "cores"), [("no store", 1), ("no store", 2), ("with store", 1)])
def bench_parquet_to_features(contest: Contest, tmp_path: Path, way: str, cores: int, name: str, scale: float) -> None:
    """The bars are those of one core. With a second one Polars decodes and counts at the same time; we do not."""
    events, config = write_logs(tmp_path / "events", scale), SMALL if name == "default" else WIDE
    arguments = config.windows_days, config.top_values
    ours = {
        "no store": lambda: count_features_once(events, CUTOFF_S, config),
        "with store": lambda: to_features(events, tmp_path / "store", config),
    }[way]
    has_bars = way == "no store" and cores == 1 and scale == 0.1
    size = f"{len(config.windows_days)} windows, top {config.top_values}, 1/{round(1 / scale)} size"
    with on_cores(cores):
        contest.run(
            f"Parquet to features, {way}, {size}, {cores} core{'s' * (cores > 1)}",
            ours,
            {
                "Polars": (
                    lambda: with_polars(read_with_polars(events, CUTOFF_S), *arguments),
                    POLARS_BARS[name] if has_bars else None,
                ),
                "DuckDB": (
                    lambda: with_duckdb(*read_with_duckdb(events, CUTOFF_S), *arguments),
                    DUCKDB_BARS[name] if has_bars else None,
                ),
            },
            lambda _, mine, cells: agree(None, config, mine, cells),
            min_rounds=5,
            facts={
                "events": int(sum(EVENTS.values()) * scale),
                "scale": scale,
                "windows_days": list(config.windows_days),
                "cores": cores,
            },
        )


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> EventDirectory:
    """169 M events, 1 M relevant clients."""
    return write_logs(tmp_path_factory.mktemp("full_size") / "events", 1.0)


@pytest.mark.plain_glibc
def bench_full_size(contest: Contest, full_size: EventDirectory, tmp_path: Path) -> None:
    """Features go to a file, so that all memory is beyond the output."""
    events, store = full_size, tmp_path / "store"
    small = write_logs(tmp_path / "small", 0.01)
    to_features(small, tmp_path / "warm", SMALL)  # compiles
    count_features_once(small, CUTOFF_S, SMALL)
    for figure, make in (
        ("store and 320 features at full size", lambda: to_features(events, store, SMALL, tmp_path / "features")),
        (
            "320 features at full size, no store",
            lambda: count_features_once(events, CUTOFF_S, SMALL, tmp_path / "features_once"),
        ),
    ):
        contest.limits(
            f"Parquet to {figure}",
            make,
            most_cpu_s=12.0,
            most_bytes=10**9,
            rounds=3,
            facts={"events": sum(EVENTS.values()), "moonshot_cpu_s": 6.0},
        )
    opened = EventStore.open(store)
    contest.limits(
        "320 features again from the store at full size",
        lambda: count_features(opened, CUTOFF_S, SMALL),
        most_cpu_s=1.5,
        rounds=5,
        facts={"clients": opened.num_clients},
    )


@pytest.mark.plain_glibc
def bench_two_threads_at_full_size(contest: Contest, full_size: EventDirectory, tmp_path: Path) -> None:
    """Features from the store; one thread's time over two threads'."""
    build_store(full_size, tmp_path / "store", CUTOFF_S)
    two_threads(contest, EventStore.open(tmp_path / "store"), "full size", 1.7)


def bench_another_day(contest: Contest, tmp_path: Path) -> None:
    """The last of 140 days on the store of the others, against a new store of all; same bytes."""
    events = write_logs(tmp_path / "events", 0.1)
    day_s = START_S + (DAYS - 1) * DAY_S
    build_store(events, tmp_path / "base", day_s)
    base = EventStore.open(tmp_path / "base")

    def build(name: str, base: EventStore | None) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        build_store(events, tmp_path / name, CUTOFF_S, base=base)
        return tmp_path / name

    def check(_: str, mine: Path, theirs: Path) -> None:
        for path in mine.iterdir():
            assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name

    contest.run(
        "store of another day, 1/10 size",
        lambda: build("mine", base),
        {"a new store": (lambda: build("theirs", None), None)},
        check,
        min_rounds=5,
        facts={"days": DAYS},
    )


def bench_code_vectors(contest: Contest) -> None:
    """Text '[1 2 ... 16]' to 16 checked codes."""
    codes = np.random.default_rng(0).integers(0, 256, (10**6, 16))
    texts = pl.Series("query", [f"[{' '.join(map(str, row))}]" for row in codes.tolist()])
    assert (parse_codes("benchmark", texts).to_numpy() == codes).all()
    contest.limits("a million product-code strings", lambda: parse_codes("benchmark", texts), most_cpu_s=0.2, rounds=9)
