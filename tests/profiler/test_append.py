"""Days appended to a run's events: the vectors of whole histories, whatever the steps and whenever it is killed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.runs import contents, run_tiny

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.split import DAY_S
from ubp_fast.profiler import Profiler, profiler
from ubp_fast.profiles import Profiles

SHOP = ("data=synthetic", "data.clients=200", "data.skus=60", "data.urls=80", "stages=[profiles]", "evaluation=off")
DAYS = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, pl.DataFrame], int]:
    """A run that ends ten days before its events, these events, and the second after the last one."""
    code, run, printed = run_tiny(tmp_path_factory.mktemp("run"), *SHOP, "profiles.at=2022-10-28")
    assert code == 0, printed
    events = EventDirectory.open(run / "stages" / "events")
    tables = {kind: events.frame(kind).rename({"timestamp_s": "timestamp"}) for kind in events.kinds}
    return run, tables, events.last_s + 1


@pytest.fixture
def run(made: tuple[Path, Mapping[str, pl.DataFrame], int], tmp_path: Path) -> Path:
    """A copy of the run, which a test may change."""
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def between(tables: Mapping[str, pl.DataFrame], start_s: int, end_s: int) -> dict[str, pl.DataFrame]:
    inside = (pl.col("timestamp") >= start_s) & (pl.col("timestamp") < end_s)
    return {kind: frame.filter(inside) for kind, frame in tables.items()}


def test_ten_days_are_one_pass(made: tuple[Path, Mapping[str, pl.DataFrame], int], run: Path, tmp_path: Path) -> None:
    _, tables, end_s = made
    once = Path(shutil.copytree(run, tmp_path / "once"))
    start_s = Profiler.load(run).fitted.cutoff_s
    edges = np.linspace(start_s, end_s, DAYS + 1).astype(int)
    for first_s, last_s in itertools.pairwise(edges.tolist()):
        profiles = Profiler.load(run).append(between(tables, first_s, last_s), at=last_s)
    seen: list[float] = []
    Profiler.load(once).append(between(tables, start_s, end_s), progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen) and len(seen) > 5 and seen[-1] == 1
    assert end_s - start_s > 9 * DAY_S
    assert contents(run / "latest") == contents(once / "latest")
    assert (run / "latest.parquet").read_bytes() == (once / "latest.parquet").read_bytes()
    whole = Profiler.load(run).embed(tables, end_s, profiles.client_ids)
    assert whole.embeddings.tobytes() == Profiles.load(run / "latest").embeddings.tobytes()
    everybody = Profiler.load(shutil.copytree(made[0], tmp_path / "everybody"))
    assert everybody.embed(tables, end_s, everybody=True).embeddings.tobytes() == whole.embeddings.tobytes()
    before = Profiles.load(made[0] / "latest")
    assert not np.array_equal(before.embeddings, profiles.align(before.client_ids).embeddings)
    assert profiles.num_clients > before.num_clients, "some came for the first time"
    assert [path.name for path in (run / "history").iterdir() if path.is_dir()] == ["10"]
    moved = Path(shutil.copytree(run, tmp_path / "moved", ignore=shutil.ignore_patterns("stages")))
    day = {"product_buy": pl.DataFrame({"client_id": [7], "timestamp": [end_s + 5], "sku": [1001]})}
    assert Profiler.load(moved).append(day).num_clients == profiles.num_clients + (7 not in profiles.client_ids)


@pytest.mark.parametrize("step", ["save_day", "write_in_parts", "Profiles.write_parquet", "History.save"])
def test_stopped_anywhere_it_goes_on(
    step: str,
    made: tuple[Path, Mapping[str, pl.DataFrame], int],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, tables, _ = made
    start_s = Profiler.load(run).fitted.cutoff_s
    other = Path(shutil.copytree(run, tmp_path / "other"))
    day = between(tables, start_s, start_s + 2 * DAY_S)
    Profiler.load(other).append(day)
    place = profiler
    *owners, name = step.split(".")
    for owner in owners:
        place = getattr(place, owner)
    original = getattr(place, name)

    def stopped(*arguments: object, **named: object) -> None:
        original(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            Profiler.load(run).append(day)
    Profiler.load(run).append(day)
    for folder in ("latest", "model", "history"):
        assert contents(run / folder) == contents(other / folder), folder


def test_text_ids_keep_their_numbers(tmp_path: Path) -> None:
    state = np.random.default_rng(4)
    count, begin_s = 3_000, 1_660_003_200
    seconds = np.sort(state.integers(begin_s, begin_s + 110 * DAY_S, count))
    article = state.integers(0, 40, count)
    frame = pl.DataFrame(
        {
            "client_id": [f"c{number}" for number in state.integers(0, 70, count)],
            "timestamp": seconds,
            "sku": [f"A{number}" for number in article],
            "category": [f"D{number % 7}" for number in article],
            "price": 1.5 + article,
            "pieces": state.integers(1, 9, count),
        }
    )
    middle_s = begin_s + 95 * DAY_S
    later = frame.filter(pl.col("timestamp") >= middle_s)
    # New clients and new items on both days, the second one described a day after it came.
    for moment_s, client, sku, category in (
        (middle_s + DAY_S, "new-b", "X1", None),
        (middle_s + 2 * DAY_S, "new-a", "X1", "D3"),
        (middle_s + 3 * DAY_S, "new-c", "X2", "D1"),
    ):
        row = pl.DataFrame({"client_id": [client], "timestamp": [moment_s], "sku": [sku], "category": [category]})
        later = pl.concat(
            [
                later,
                row.with_columns(price=pl.lit(9.5), pieces=pl.lit(moment_s % 5 + 1, pl.Int64)).select(later.columns),
            ]
        )
    early = frame.filter(pl.col("timestamp") < middle_s)
    early.write_parquet(tmp_path / "events.parquet")
    source = ("data=table", f"data.path={tmp_path / 'events.parquet'}", "data.category_column=category")
    amounts = ("data.price_column=price", "data.quantity_column=pieces")
    settings = (*source, *amounts, "stages=[profiles]", "evaluation=off", "profiles.at=end")
    code, run, printed = run_tiny(tmp_path / "runs", *settings)
    assert code == 0, printed
    once = Path(shutil.copytree(run, tmp_path / "once"))
    later = later.sort("timestamp", maintain_order=True)
    for number in range(3):
        inside = (pl.col("timestamp") - middle_s) // (5 * DAY_S) == number
        profiles = Profiler.load(run).append(later.filter(inside))
    found = Profiler.load(once).append(later)
    assert profiles.own_ids is not None and {"new-a", "new-b", "new-c"} < set(profiles.own_ids)
    assert profiles.own_ids.to_list() == found.own_ids.to_list()  # type: ignore[union-attr]
    assert profiles.embeddings.tobytes() == found.embeddings.tobytes()
    whole = Profiler.load(run).embed(pl.concat([early, later]), clients=profiles.own_ids)
    assert whole.embeddings.tobytes() == found.embeddings.tobytes()
    day = later.tail(5).with_columns(timestamp=int(later["timestamp"].max()) + 5)  # type: ignore[call-overload]
    with pytest.raises(DataError, match="purchases must have a column 'price'"):
        Profiler.load(run).append(day.drop("price"))
    (run / "history" / "3" / "product_buy.amounts.npy").unlink()
    with pytest.raises(DataError, match="history must be complete"):
        Profiler.load(run).append(day)


def test_what_cannot_be_appended(made: tuple[Path, Mapping[str, pl.DataFrame], int], run: Path, tmp_path: Path) -> None:
    _, tables, end_s = made
    start_s = Profiler.load(run).fitted.cutoff_s
    with pytest.raises(UserError, match="must lie after the newest event"):
        Profiler.load(run).append(between(tables, start_s, end_s), at=start_s + DAY_S)
    alone = tmp_path / "alone"
    shutil.copytree(run / "model", alone / "model")
    with pytest.raises(DataError, match="a run must hold stages/latest-store or stages/store"):
        Profiler.load(alone).append(between(tables, start_s, end_s))
    Profiler.load(run).append(between(tables, start_s, start_s + DAY_S))
    (run / "history" / "1" / "client_ids.npy").unlink()
    with pytest.raises(DataError, match="history must be complete"):
        Profiler.load(run).append(between(tables, start_s, end_s))
