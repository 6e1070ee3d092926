"""Vectors in files: the same as in memory, continued after a kill, complete or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.runs import contents, run_tiny

from ubp_fast.events.schema import UserError
from ubp_fast.features.scaling import DayStatistics
from ubp_fast.files import OutputDirectoryError
from ubp_fast.profiler import Profiler, bulk
from ubp_fast.profiler.bundle import save_day
from ubp_fast.profiles import Profiles

SHOP = ("data=synthetic", "data.clients=200", "data.skus=60", "data.urls=80", "stages=[profiles]")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code, made, printed = run_tiny(tmp_path_factory.mktemp("run"), *SHOP)
    assert code == 0, printed
    return made


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "BLOCK_ROWS", 60)


def events_of(run: Path) -> Path:
    return run / "stages" / "events"


def test_directory_and_tables_hold_what_embed_gives(run: Path, tmp_path: Path, small_parts: None) -> None:
    profiler = Profiler.load(run)
    wanted = profiler.embed(events_of(run))
    seen: list[tuple[int, int]] = []
    number = profiler.embed_to(tmp_path / "today", events_of(run), progress=lambda *done: seen.append(done))
    assert number == wanted.num_clients and seen[-1] == (number, number) and len(seen) == 4
    wanted.save(tmp_path / "wanted")
    assert contents(tmp_path / "today") == contents(tmp_path / "wanted")
    profiler.embed_to(tmp_path / "today.parquet", events_of(run))
    table = pl.read_parquet(tmp_path / "today.parquet" / "*.parquet")
    assert table["client_id"].to_list() == wanted.client_ids.tolist()
    assert np.array_equal(table["profile"].to_numpy(), wanted.embeddings.astype(np.float32))
    blocks = json.loads((tmp_path / "today.json").read_text())["blocks"]
    assert [block["name"] for block in blocks] == [block.name for block in wanted.layout.blocks]  # type: ignore[union-attr]
    some = wanted.client_ids[[5, 2, 9]]
    profiler.embed_to(tmp_path / "today.parquet", events_of(run), clients=some, per_block=True)
    table = pl.read_parquet(tmp_path / "today.parquet")
    assert table["client_id"].to_list() == some.tolist()
    assert np.array_equal(table["own"].to_numpy(), wanted.select("own").embeddings[[5, 2, 9]].astype(np.float32))


@pytest.mark.parametrize("name", ["today", "today.parquet"])
def test_what_failed_goes_on_where_it_was(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "BLOCK_ROWS", 60)
    profiler, output = Profiler.load(run), tmp_path / name
    profiler.embed_to(tmp_path / "whole" / name, events_of(run))

    def broken(done: int, total: int) -> None:
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiler.embed_to(output, events_of(run), progress=broken)
    assert not output.exists()
    seen: list[int] = []
    profiler.embed_to(output, events_of(run), progress=lambda done, total: seen.append(done))
    assert seen == [180, 200], "the first two parts were there"
    assert contents(tmp_path / "whole" / name) == contents(output)
    with pytest.raises(KeyboardInterrupt):
        profiler.embed_to(output, events_of(run), progress=broken)
    assert contents(tmp_path / "whole" / name) == contents(output), "the old ones stay until all is there"
    profiler.embed_to(output, events_of(run), at="2022-10-01")
    assert contents(tmp_path / "whole" / name) != contents(output), "parts of another moment are not taken"


def test_parts_of_one_column_are_not_continued_by_those_of_a_column_per_block(
    run: Path, tmp_path: Path, small_parts: None
) -> None:
    def broken(done: int, total: int) -> None:
        if done > 100:
            raise KeyboardInterrupt

    profiler, output = Profiler.load(run), tmp_path / "today.parquet"
    with pytest.raises(KeyboardInterrupt):
        profiler.embed_to(output, events_of(run), progress=broken)
    profiler.embed_to(output, events_of(run), per_block=True)
    assert all("profile" not in pl.read_parquet_schema(part) for part in output.iterdir())


def test_killed_at_random_moments(run: Path, tmp_path: Path) -> None:
    text = (
        "import sys; from ubp_fast.profiler import Profiler, bulk; bulk.BLOCK_ROWS = 8;"
        "profiler = Profiler.load(sys.argv[1]); print('begins', flush=True);"
        "profiler.embed_to(sys.argv[3], sys.argv[2])"
    )
    command = [sys.executable, "-c", text, str(run), str(events_of(run)), str(tmp_path / "today")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for attempt in range(4):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1 + 0.15 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not (tmp_path / "today").exists() or len(contents(tmp_path / "today")) == 3
    subprocess.run(command, env=environment, check=True, capture_output=True)
    Profiler.load(run).embed(events_of(run)).save(tmp_path / "wanted")
    assert contents(tmp_path / "today") == contents(tmp_path / "wanted")


def test_everybody_of_a_day_is_compared_with_each_other(run: Path, tmp_path: Path) -> None:
    copy, moment = Path(shutil.copytree(run, tmp_path / "run")), "2022-10-20"
    events = events_of(copy)
    profiler = Profiler.load(copy)
    before = profiler.embed(events, moment).embeddings
    profiler.embed_to(tmp_path / "before", events, moment)
    assert Profiles.load(tmp_path / "before").embeddings.tobytes() == before.tobytes()
    seen: list[float] = []
    profiler.embed_to(
        tmp_path / "all", events, moment, progress=lambda done, total: seen.append(done / total), everybody=True
    )
    assert seen == sorted(seen) and len(seen) > 5 and seen[-1] == 1
    made = Profiles.load(tmp_path / "all")
    assert not np.array_equal(made.embeddings, before), "the day has means of its own"
    some = made.client_ids[[5, 2, 9]].tolist()
    later = Profiler.load(copy)
    assert later.embed(events, moment, some).embeddings.tobytes() == made.align(np.array(some)).embeddings.tobytes()
    assert later.embed(events, moment, everybody=True).embeddings.tobytes() == made.embeddings.tobytes()
    late = later.embed(events, "2022-10-21", some).embeddings
    assert not np.array_equal(late, Profiler.load(run).embed(events, "2022-10-21", some).embeddings)
    one = {"product_buy": pl.DataFrame({"client_id": [some[0]], "timestamp": [1_660_000_000], "sku": [1001]})}
    with pytest.raises(UserError, match=r"everybody: must be about the \d+ clients of the day before, got 1"):
        later.embed(one, "2022-10-25", everybody=True)
    with pytest.raises(UserError, match="everybody: must have the events of all clients"):
        later.embed(events, "2022-10-25", some, everybody=True)
    shutil.rmtree(copy / "model" / "days")
    (copy / "model" / "days").write_text("in the way")
    with pytest.raises(OutputDirectoryError, match="days of the model must be a writable directory"):
        save_day(copy / "model", 5, DayStatistics())
    (copy / "model" / "days").unlink()
    shutil.copytree(run / "model" / "days", copy / "model" / "days")
    assert profiler.embed(events, moment, everybody=True).embeddings.tobytes() == made.embeddings.tobytes()


def test_no_clients_and_bad_outputs(run: Path, tmp_path: Path) -> None:
    profiler = Profiler.load(run)
    assert profiler.embed_to(tmp_path / "nobody", events_of(run), at=0) == 0
    assert Profiles.load(tmp_path / "nobody").embeddings.shape[0] == 0
    assert profiler.embed_to(tmp_path / "nobody.parquet", events_of(run), at=0) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputDirectoryError, match="got other files"):
        profiler.embed_to(tmp_path / "other", events_of(run))
    with pytest.raises(OutputDirectoryError, match="got a file"):
        profiler.embed_to(tmp_path / "other" / "thesis.txt", events_of(run))
    with pytest.raises(UserError, match="ids must be named once"):
        profiler.embed_to(tmp_path / "twice", events_of(run), clients=[1, 1])
