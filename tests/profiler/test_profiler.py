"""A run's model embeds the run's own events to the run's own bytes, and any others to something sensible."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
import torch
from support.runs import ALL_BLOCKS, NETWORK, WIDE, run_tiny

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.sql import Sql
from ubp_fast.features.matrix import FeatureMatrix
from ubp_fast.features.scaling import DayStatistics, MinMaxScaler
from ubp_fast.profiler import Profiler
from ubp_fast.profiler.parts import network_rows, rows_of
from ubp_fast.profiles import Profiles

SHOP = ("data=synthetic", "data.clients=200", "data.skus=60", "data.urls=80", "stages=[profiles]")
DAY_S = 86_400


@pytest.fixture(
    scope="module", params=[("features=rich", ALL_BLOCKS, *WIDE), (*NETWORK, ALL_BLOCKS)], ids=["closed", "network"]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    code, made, printed = run_tiny(tmp_path_factory.mktemp("run"), *SHOP, *request.param)
    assert code == 0, printed
    return made


def test_what_networks_read_is_compared_among_the_clients_of_the_day() -> None:
    """Static features keep their fitted scale; wide ones do not depend on who is at hand once the day is known."""
    random = np.random.default_rng(0)
    ids, static, counts = np.arange(300), random.random((300, 2)), random.poisson(1.0, (300, 3)) ** 4
    counts[0, 0] = 10**9
    made = {
        "static": FeatureMatrix(ids, static.astype(np.float32), ("one", "two")),
        "aggregated": FeatureMatrix(ids, counts.astype(np.float32), ("a", "b", "c")),
    }
    scaler, day = MinMaxScaler(np.array([0.5, 0.0]), np.array([2.0, 1.0])), DayStatistics()
    rows = network_rows("multitask", scaler, ("aggregated",), made.__getitem__, day, raw_counts=False)
    assert rows is not None and rows.shape == (300, 5)
    values = rows[np.arange(300)]
    np.testing.assert_allclose(values[:, :2], (static - [0.5, 0.0]) * [2.0, 1.0], rtol=1e-5, atol=1e-6)
    logs = np.log1p(counts)
    expected = ((logs - logs.mean(axis=0)) / logs.std(axis=0)).clip(-5, 5)
    assert (np.abs(expected) == 5).any()
    np.testing.assert_allclose(values[:, 2:], expected, rtol=1e-4, atol=1e-5)
    known = DayStatistics(day.arrays)
    few = network_rows("multitask", scaler, ("aggregated",), rows_of(made.__getitem__, 3, 9), known, raw_counts=False)
    assert few is not None and np.array_equal(few[np.arange(6)], values[3:9])
    assert network_rows("contrastive", None, (), made.__getitem__, day, raw_counts=False) is None


@pytest.fixture(scope="module")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pl.DataFrame]:
    """A shop whose ids are all text."""
    folder = tmp_path_factory.mktemp("table")
    frame = text_events()
    frame.write_parquet(folder / "events.parquet")
    code, made, printed = run_tiny(folder / "runs", *TABLE, f"data.path={folder / 'events.parquet'}")
    assert code == 0, printed
    return made, frame


TABLE = (
    "data=table",
    "data.client_column=customer",
    "data.timestamp_column=time",
    "data.kind_column=event",
    "data.kinds={order: product_buy, view: page_visit, find: search_query}",
    "data.sku_column=article",
    "data.url_column=article",
    "data.query_column=text",
    "data.category_column=department",
    "data.price_column=price",
    "data.quantity_column=pieces",
    "data.name_column=text",
    "stages=[profiles]",
)


def text_events() -> pl.DataFrame:
    state = np.random.default_rng(3)
    count = 4_000
    article = state.integers(0, 40, count)
    kind = state.choice(["order", "view", "find"], count)
    clients = [str(uuid.UUID(int=int(client) + 7)) for client in state.integers(0, 80, count)]
    seconds = np.sort(state.integers(1_660_000_000, 1_660_000_000 + 110 * DAY_S, count))
    return pl.DataFrame(
        {
            "customer": clients,
            "time": pl.Series(seconds * 1_000_000).cast(pl.Datetime("us", "UTC")).dt.convert_time_zone("Asia/Tokyo"),
            "event": kind,
            "article": [f"A{number}" for number in article],
            "department": [f"D{number % 7}" for number in article],
            "price": 1.5 + article,
            "text": [f"red shoe {number}" for number in article],
            "pieces": state.integers(1, 9, count),
        }
    )


def whole(run: Path) -> Profiles:
    return Profiles.load(run / "profiles")


def same(found: Profiles, wanted: Profiles, rows: np.ndarray | slice = slice(None)) -> bool:
    return found.embeddings.tobytes() == np.ascontiguousarray(wanted.embeddings[rows]).tobytes()


def cutoff_s(run: Path) -> int:
    return EventDirectory.open(run / "stages" / "events").split.input_end_s


def test_all_clients_have_the_bytes_of_the_run(run: Path) -> None:
    found = Profiler.load(run).embed(run / "stages" / "events", cutoff_s(run))
    assert np.array_equal(found.client_ids, whole(run).client_ids)
    assert same(found, whole(run))
    assert found.layout == whole(run).layout


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_and_threads_change_nothing(run: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, state = whole(run), np.random.default_rng(0)
    monkeypatch.setattr("ubp_fast.profiler.profiler.CLIENTS_AT_ONCE", 37)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 2, 5, 90):
            rows = state.permutation(wanted.num_clients)[:count]
            found = Profiler.load(run).embed(run / "stages" / "events", cutoff_s(run), wanted.client_ids[rows])
            assert np.array_equal(found.client_ids, wanted.client_ids[rows])
            assert same(found, wanted, rows)
    finally:
        torch.set_num_threads(before)


def test_a_moved_copy_works_in_a_new_process(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "copy")
    text = (
        "import numpy as np, sys; from ubp_fast.profiler import Profiler;"
        f"found = Profiler.load(sys.argv[1]).embed(sys.argv[2], {cutoff_s(run)}, [{whole(run).client_ids[3]}]);"
        "np.save(sys.argv[3], found.embeddings)"
    )
    arguments = [str(tmp_path / "copy"), str(run / "stages" / "events"), str(tmp_path / "one.npy")]
    subprocess.run([sys.executable, "-c", text, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert np.load(tmp_path / "one.npy").tobytes() == whole(run).embeddings[3].tobytes()


def test_some_blocks_are_the_columns_of_all(run: Path) -> None:
    events = run / "stages" / "events"
    found = Profiler.load(run).embed(events, cutoff_s(run), blocks=["tastes", "strong"])
    wanted = whole(run).select("strong", "tastes")
    assert same(found, wanted) and found.layout == wanted.layout
    with pytest.raises(UserError, match="blocks must be among"):
        Profiler.load(run).embed(events, cutoff_s(run), blocks=["taste"])


def test_nothing_from_the_moment_on_is_seen(run: Path) -> None:
    events = EventDirectory.open(run / "stages" / "events")
    moment, state = cutoff_s(run) + 9 * DAY_S, np.random.default_rng(5)
    names = {"sku": "sku", "url": "url", "query": "query"}
    tables, changed, count = {}, {}, 0
    for kind in events.kinds:
        frame = events.frame(kind).rename({"timestamp_s": "timestamp"})
        past, later = frame.filter(pl.col("timestamp") < moment), frame.filter(pl.col("timestamp") >= moment)
        item = next(name for name in names if name in frame.columns)
        count += len(later)
        tables[kind] = frame
        changed[kind] = pl.concat([later.with_columns(pl.col(item).reverse(), pl.col("client_id") + 1), past])
    assert count > 500
    profiler = Profiler.load(run)
    ids = state.permutation(whole(run).client_ids)[:60]
    before = profiler.embed(tables, moment, ids)
    assert same(profiler.embed(changed, moment, ids), before)
    assert not same(profiler.embed(tables, moment + 5 * DAY_S, ids), before), "the days behind it count later"


def test_a_moment_long_after_the_log_is_warned_of(run: Path) -> None:
    events = EventDirectory.open(run / "stages" / "events")
    profiler, ids = Profiler.load(run), whole(run).client_ids[:2]
    profiler.embed(events.path, events.last_s + 30 * DAY_S, ids)
    with pytest.warns(UserWarning, match=r"the moment, 2035-01-01 00:00:00, lies 4,\d\d\d days after the newest event"):
        profiler.embed(events.path, "2035-01-01", ids)
    with pytest.raises(UserError, match="at: must be seconds since 1970, got 1668000000000; divide milliseconds"):
        profiler.embed(events.path, 1_668_000_000_000, ids)


def test_own_ids_of_a_text_shop(table_run: tuple[Path, pl.DataFrame]) -> None:
    run, frame = table_run
    wanted = whole(run)
    names = pl.read_parquet(run / "stages" / "events" / "maps" / "client_id.parquet")
    own = pl.DataFrame({"id": wanted.client_ids}).join(names, on="id", how="left", maintain_order="left")["value"]
    profiler, moment = Profiler.load(run), cutoff_s(run)
    assert same(profiler.embed(frame, moment, own), wanted)
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1).sort("time", maintain_order=True)
    later = profiler.embed(shuffled, moment)
    assert later.own_ids is not None and later.own_ids.to_list() == sorted(own.to_list())
    one = profiler.embed(frame.filter(pl.col("customer") == own[4]), moment, [own[4], "nobody"])
    assert one.embeddings[0].tobytes() == wanted.embeddings[4].tobytes()
    assert np.isfinite(one.embeddings[1]).all()


def test_pandas_arrow_and_files_are_the_same(table_run: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    run, frame = table_run
    profiler, moment = Profiler.load(run), "2022-11-20 12:00:00"
    wanted = profiler.embed(frame, moment)
    pandas = pytest.importorskip("pandas")
    local = frame.with_columns(pl.col("time").dt.convert_time_zone("UTC").dt.strftime("%Y-%m-%d %H:%M:%S"))
    local.write_csv(tmp_path / "events.csv")
    assert same(profiler.embed(tmp_path / "events.csv", moment), wanted)
    shop = pandas.DataFrame(local.to_dict(as_series=False))
    shop["customer"] = [uuid.UUID(text) for text in shop["customer"]]
    assert same(profiler.embed(shop, moment), wanted)
    arrow = pytest.importorskip("pyarrow")
    batches = frame.to_arrow().to_batches(max_chunksize=700)
    assert len(batches) > 3
    for table in (arrow.Table.from_batches(batches), arrow.RecordBatchReader.from_batches(batches[0].schema, batches)):
        assert same(profiler.embed(table, moment), wanted)


def test_zones_of_events_and_moments(table_run: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    """Events and moments may name any zone; what names none is the shop's own clock."""
    run, frame = table_run
    profiler = Profiler.load(run)
    wanted = profiler.embed(frame, "2022-11-20 12:00:00")
    there = frame.with_columns(pl.col("time").dt.convert_time_zone("America/New_York"))
    moment = datetime(2022, 11, 20, 7, tzinfo=ZoneInfo("America/New_York"))
    assert same(profiler.embed(there, moment), wanted)
    assert same(profiler.embed(frame, "2022-11-20T21:00:00+09:00"), wanted)
    local = frame.with_columns(pl.col("time").dt.convert_time_zone("Europe/Warsaw").dt.replace_time_zone(None))
    local.write_parquet(tmp_path / "events.parquet")
    settings = (*TABLE, f"data.path={tmp_path / 'events.parquet'}", "data.timezone=Europe/Warsaw")
    code, made, printed = run_tiny(tmp_path / "runs", *settings)
    assert code == 0, printed
    shop, ids = Profiler.load(made), [frame["customer"][0]]
    clock = shop.embed(local, "2022-11-20 13:00:00", ids)
    assert same(shop.embed(frame, "2022-11-20 13:00:00", ids), clock), "instants move to the shop's clock"
    assert same(shop.embed(local, datetime(2022, 11, 20, 12, tzinfo=timezone.utc), ids), clock)
    assert not same(shop.embed(local, "2022-11-20 12:00:00", ids), clock), "the moment alone decides ages"


def test_a_day_of_dates_is_read_as_the_log_was(tmp_path: Path) -> None:
    """A month decides that the day comes first; the file of one day cannot, and means the same."""
    frame = text_events().with_columns(pl.col("time").dt.convert_time_zone("UTC").dt.replace_time_zone(None))
    written = frame.with_columns(pl.col("time").dt.strftime("%d/%m/%Y %H:%M:%S"))
    (tmp_path / "log.csv").write_text(written.write_csv())
    code, made, printed = run_tiny(tmp_path / "runs", *TABLE, f"data.path={tmp_path / 'log.csv'}", "profiles.at=end")
    assert code == 0, printed
    day = written.head(20).with_columns(time=pl.lit("05/12/2022 10:00:00"))
    (tmp_path / "day.csv").write_text(day.write_csv())
    wanted = Profiler.load(made).embed(frame.head(20).with_columns(time=pl.lit("2022-12-05 10:00:00")))
    assert same(Profiler.load(made).embed(tmp_path / "day.csv"), wanted)
    assert same(Profiler.load(made).embed(day), wanted)
    older = Path(shutil.copytree(made / "model", tmp_path / "older"))
    (older / "maps" / "date_order.parquet").unlink()
    info = json.loads((older / "bundle.json").read_text())
    del info["files"]["maps/date_order.parquet"]
    (older / "bundle.json").write_text(json.dumps(info))
    assert same(Profiler.load(older).embed(frame.head(20).with_columns(time=pl.lit("2022-12-05 10:00:00"))), wanted)
    with pytest.raises(
        DataError, match=r"which is 2022-12-05 10:00:00 or 2022-05-12 .* \(month first\); data.\* are set"
    ):
        Profiler.load(older).embed(tmp_path / "day.csv")
    Profiler.load(made).append(tmp_path / "day.csv")
    Profiler.load(made).append(day.with_columns(time=pl.lit("06/12/2022 10:00:00")))
    days = {int(path.stem) // DAY_S for path in (made / "model" / "days").glob("*.safetensors")}
    assert {datetime(2022, 12, one, tzinfo=timezone.utc).timestamp() // DAY_S for one in (5, 6)} <= days


def test_tables_of_the_organisers_in_a_directory(run: Path, tmp_path: Path) -> None:
    events = EventDirectory.open(run / "stages" / "events")
    for kind in events.kinds:
        frame = events.frame(kind).rename({"timestamp_s": "timestamp"})
        time = pl.from_epoch("timestamp").dt.strftime("%Y-%m-%d %H:%M:%S")
        if "query" in frame.columns:
            text = pl.format("[{}]", pl.col("query").cast(pl.List(pl.String)).list.join(" "))
            frame = frame.with_columns(query=text)
        frame.with_columns(timestamp=time).write_parquet(tmp_path / f"{kind}.parquet")
    found = Profiler.load(run).embed(tmp_path, cutoff_s(run), whole(run).client_ids)
    assert same(found, whole(run))
    (tmp_path / "other").mkdir()
    for name in ("1.csv", "2.csv.gz"):
        (tmp_path / "other" / name).touch()
    with pytest.raises(
        DataError, match=r"such as events='.*/other/\*.csv', or all of them, .*: events='.*/other/\*.csv\*'$"
    ):
        Profiler.load(run).embed(tmp_path / "other")
    (tmp_path / "product_buy.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"product_buy\.parquet"):
        Profiler.load(run).embed(tmp_path)


def test_a_database_is_read_like_a_table(table_run: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    pytest.importorskip("adbc_driver_sqlite")
    run, frame = table_run
    rows = frame.with_columns(pl.col("time").dt.convert_time_zone("UTC").dt.strftime("%Y-%m-%d %H:%M:%S"))
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute("create table log (customer text, time text, event text, article text, department text,"
                           " price real, text text, pieces integer)")  # fmt: skip
        connection.executemany("insert into log values (?, ?, ?, ?, ?, ?, ?, ?)", rows.rows())
        connection.commit()
    columns = {one.removeprefix("data.").split("=")[0]: one.split("=")[1] for one in TABLE if "_column" in one}
    kinds = {"order": "product_buy", "view": "page_visit", "find": "search_query"}
    moment = "2022-11-20 12:00:00"
    source = Sql(f"sqlite:///{tmp_path / 'shop.db'}", "log", kinds=kinds, **columns)
    assert same(Profiler.load(run).embed(source, moment), Profiler.load(run).embed(frame, moment))
    settings = ("data=sql", f"data.uri=sqlite:///{tmp_path / 'shop.db'}", "data.query=log", *TABLE[1:])
    code, made, printed = run_tiny(tmp_path / "runs", *settings)
    assert code == 0, printed
    profiler = Profiler.load(made)
    assert same(profiler.embed(frame, moment), profiler.embed(source, moment)), "a frame with the shop's own columns"


def test_what_is_known_of_a_new_item_counts(table_run: tuple[Path, pl.DataFrame]) -> None:
    run, frame = table_run
    profiler, client = Profiler.load(run), frame["customer"][0]
    order = frame.filter((pl.col("event") == "order") & (pl.col("customer") == client)).tail(1)
    history = frame.filter(pl.col("customer") == client)
    again = order.with_columns(pl.col("time") + pl.duration(hours=3))

    def with_order(**columns: str) -> np.ndarray:
        new = again.with_columns(**{name: pl.lit(value) for name, value in columns.items()})
        return profiler.embed(pl.concat([history, new]), "2022-12-20", [client]).embeddings

    unknown, known = with_order(article="NEW", department="NEVER"), with_order(article="NEW", department="D3")
    assert not np.array_equal(unknown, known), "its department is one of the run's"
    assert np.array_equal(with_order(article="OTHER", department="D3"), known), "its own name is nothing yet"


def test_empty_and_incomplete_tables(table_run: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    run, frame = table_run
    profiler = Profiler.load(run)
    nobody = profiler.embed(frame.head(0), "2022-12-01", ["a", "b"])
    assert nobody.num_clients == 2 and np.array_equal(nobody.embeddings[0], nobody.embeddings[1])
    assert profiler.embed(frame.head(0)).num_clients == 0
    frame.rename({"customer": "who"}).write_csv(tmp_path / "day.csv")
    with pytest.raises(DataError, match=r"column 'customer' must exist, got .*; rename the columns to those of .*log$"):
        profiler.embed(tmp_path / "day.csv")
    with pytest.raises(DataError, match="column 'time' must exist"):
        profiler.embed(frame.drop("time"))
    with pytest.raises(DataError, match="column 'event' must exist"):
        profiler.embed(frame.drop("event"))
    with pytest.raises(DataError, match="rows of kind search_query must have a column for 'query'"):
        profiler.embed(frame.drop("text"))
    bare = frame.filter(pl.col("event") == "order").drop("text", "department")
    assert np.isfinite(profiler.embed(bare).embeddings).all()
    with pytest.raises(DataError, match=r"events: purchases must have a column 'price', .* how much money, got none"):
        profiler.embed(bare.drop("price"))
    with pytest.raises(DataError, match="column 'pieces' must exist"):
        profiler.embed(bare.drop("pieces"))
    looked = frame.filter(pl.col("event") == "view").drop("text", "price", "department")
    assert np.isfinite(profiler.embed(looked).embeddings).all(), "no purchase, no price"
    with pytest.raises(DataError, match="must hold text as in the run"):
        profiler.embed(frame.with_columns(pl.lit(5).alias("article")))
    with pytest.raises(UserError, match="ids must be String as in the events, got Int64"):
        profiler.embed(frame, clients=[1, 2])
    with pytest.raises(
        UserError, match=r"at: must be a date or a date-time like '2026-11-28 12:00:00', got '9/12/2022'"
    ):
        Profiler.load(run).embed({}, "9/12/2022")
    with pytest.raises(UserError, match="at: must be seconds"):
        profiler.embed(frame, at=3.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="events: must be a polars"):
        profiler.embed([1, 2, 3])


def test_money_counts(table_run: tuple[Path, pl.DataFrame]) -> None:
    """A hundredfold price changes its client's vector and nobody else's, and so does another number of pieces."""
    run, frame = table_run
    profiler, client = Profiler.load(run), frame["customer"][0]
    assert profiler.fitted.vocabulary.amounts == ("quantity", "spend")
    plain = profiler.embed(frame, "2022-12-20")
    is_own = (pl.col("customer") == client) & (pl.col("event") == "order")
    for name, value in (("pieces", pl.col("pieces") * 100), ("price", pl.col("price") * 100)):
        changed = profiler.embed(
            frame.with_columns(pl.when(is_own).then(value).otherwise(name).alias(name)), "2022-12-20"
        )
        differs = (changed.embeddings != plain.embeddings).any(axis=1)
        assert plain.own_ids is not None and plain.own_ids.filter(pl.Series(differs)).to_list() == [client]
    names = next(block.columns for block in profiler.layout.blocks if block.name == "rhythm")
    assert {"spend_90d", "quantity_basket_last", "spend_of_a_piece"} <= {*names}


def test_amounts_in_tables_of_the_organisers(run: Path, table_run: tuple[Path, pl.DataFrame], tmp_path: Path) -> None:
    """A model of a log without them leaves them out; one that knows them asks for them, by name."""
    events = EventDirectory.open(run / "stages" / "events")
    tables = {kind: events.frame(kind).rename({"timestamp_s": "timestamp"}) for kind in events.kinds}
    tables["product_buy"] = tables["product_buy"].with_columns(quantity=pl.lit(-3), spend=pl.lit("much"))
    assert same(Profiler.load(run).embed(tables, cutoff_s(run), whole(run).client_ids), whole(run))
    made, _ = table_run
    events = EventDirectory.open(made / "stages" / "events")
    tables = {kind: events.frame(kind).rename({"timestamp_s": "timestamp"}) for kind in events.kinds}
    tables["product_properties"] = events.products()
    profiler, ids = Profiler.load(made), whole(made).client_ids
    assert same(profiler.embed(tables, cutoff_s(made), ids), whole(made))
    assert same(profiler.embed(events.path, cutoff_s(made), ids), whole(made))
    with pytest.raises(DataError, match=r"product_buy: purchases must have a column 'spend', .* how much money"):
        profiler.embed(tables | {"product_buy": tables["product_buy"].drop("spend")})
    without = EventDirectory.open(run / "stages" / "events")
    with pytest.raises(DataError, match=r"events: purchases must have a column 'quantity', .* how many pieces"):
        profiler.embed(without.path)
    for wrong, message in (
        (pl.lit(-1.0), "must hold finite numbers >= 0, got -1.0"),
        (pl.lit("x"), "must hold numbers"),
    ):
        bought = tables["product_buy"].with_columns(spend=wrong)
        with pytest.raises(DataError, match=f"column 'spend' {message}"):
            profiler.embed(tables | {"product_buy": bought})


def test_one_client_with_a_million_events(table_run: tuple[Path, pl.DataFrame]) -> None:
    run, frame = table_run
    many = frame.filter(pl.col("customer") == frame["customer"][0])
    many = pl.concat([many] * (1_000_000 // len(many) + 1))
    found = Profiler.load(run).embed(many)
    assert found.num_clients == 1 and np.isfinite(found.embeddings).all()


def test_damaged_models_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(run / "model", tmp_path / name))

    with pytest.raises(DataError, match=r"bundle\.json"):
        Profiler.load(tmp_path)
    later = copied("later")
    info = json.loads((later / "bundle.json").read_text())
    (later / "bundle.json").write_text(json.dumps(info | {"format": info["format"] + 1}))
    with pytest.raises(DataError, match="a newer version of ubp_fast"):
        Profiler.load(later)
    foreign = copied("foreign")
    info["recipe"]["tastes"]["class"] = "Popen"
    (foreign / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="configuration must be one of this version, got 'Popen'"):
        Profiler.load(foreign)
    (foreign / "bundle.json").write_text(json.dumps({"format": info["format"]}))
    with pytest.raises(DataError, match="model must be complete"):
        Profiler.load(foreign)
    cut = copied("cut")
    (cut / "strong.safetensors").write_bytes((cut / "strong.safetensors").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"strong\.safetensors: file must have \d+ bytes"):
        Profiler.load(cut)
    turned = copied("turned")
    data = bytearray((turned / "vocabulary.safetensors").read_bytes())
    data[-1] ^= 1
    (turned / "vocabulary.safetensors").write_bytes(data)
    with pytest.raises(DataError, match=r"vocabulary\.safetensors: file must be as the run wrote it"):
        Profiler.load(turned)
    missing = copied("missing")
    (missing / "lists.safetensors").unlink()
    with pytest.raises(DataError, match=r"lists\.safetensors: file must exist"):
        Profiler.load(missing)


@pytest.mark.parametrize("evaluation", ["default", "off"])
def test_profiles_of_the_end_beside_the_backtest(evaluation: str, tmp_path: Path) -> None:
    source = (*SHOP, f"evaluation={evaluation}")
    code, made, printed = run_tiny(tmp_path / "end", *source, "profiles.at=end")
    assert code == 0, printed
    profiler = Profiler.load(made)
    events = EventDirectory.open(made / "stages" / "events")
    assert profiler.fitted.cutoff_s == events.last_s + 1 > events.split.end_s
    latest = Profiles.load(made / "latest")
    assert same(profiler.embed(events.path), latest) and profiler.embed(events.path).layout == latest.layout
    assert (made / "profiles").exists() == (evaluation == "default")
    if evaluation == "default":
        code, alone, _ = run_tiny(tmp_path / "alone", *source)
        assert code == 0
        assert same(Profiles.load(made / "profiles"), Profiles.load(alone / "profiles")), "the backtest sees no more"


def test_a_new_run_in_the_space_of_an_old_one(tmp_path: Path) -> None:
    source = (*SHOP, ALL_BLOCKS, "evaluation=off")
    code, old, printed = run_tiny(tmp_path / "old", *source, "profiles.at=2022-10-01")
    assert code == 0, printed
    later = (*source, "seed=3", "features.tastes.seed=3", "profiles.at=2022-10-29")
    code, new, printed = run_tiny(tmp_path / "new", *later, f"profiles.align_to={old}")
    assert code == 0, printed
    events, ids = new / "stages" / "events", Profiles.load(new / "latest").client_ids
    assert Profiles.load(new / "latest").layout == Profiles.load(old / "latest").layout
    found = Profiler.load(new).embed(events, "2022-10-29", ids)
    assert same(found, Profiles.load(new / "latest")), "the model turns as the run did"
    some = Profiler.load(new).embed(events, "2022-10-29", ids[5:9], blocks=["strong", "tastes"])
    assert same(some, found.select("strong", "tastes"), slice(5, 9))
    code, alone, _ = run_tiny(tmp_path / "alone", *later)
    assert code == 0
    there = Profiler.load(old).embed(events, "2022-10-29", ids).select("strong", "tastes", "learned").embeddings
    here = found.select("strong", "tastes", "learned").embeddings
    unaligned = Profiles.load(alone / "latest").select("strong", "tastes", "learned").embeddings

    def distance(vectors: np.ndarray) -> float:
        scale = np.maximum(there.std(axis=0, dtype=np.float64), 1e-9)
        return float(np.square((vectors.astype(np.float64) - there) / scale).mean())

    assert distance(here) < 0.8 * distance(unaligned)
    code, _, _ = run_tiny(tmp_path / "back", *source, "profiles.at=2022-09-20", f"profiles.align_to={new}")
    assert code == 2, "what is older must not learn from what came later"


def test_what_models_keep_in_an_aligned_space(tmp_path: Path) -> None:
    source = (*SHOP[:-1], "evaluation=default", "evaluation.readers=[linear]", "evaluation.components=[stacked]")
    code, old, printed = run_tiny(tmp_path / "old", *source[:-3], "evaluation=off", "profiles.at=2022-09-20")
    assert code == 0, printed
    code, new, printed = run_tiny(tmp_path / "new", *source, "seed=3", "compute=auto", f"profiles.align_to={old}")
    assert code == 0, printed
    found = json.loads((new / "stages" / "alignment" / "alignment.json").read_text())
    areas, kept = found["auroc"]["linear"], found["kept"]["linear"]
    assert areas["old"]["churn"] > 0.6
    assert kept["aligned"] == pytest.approx((areas["aligned"]["churn"] - 0.5) / (areas["old"]["churn"] - 0.5))
    assert kept["aligned"] > 0.9 and kept["aligned"] != kept["unaligned"]
    said = f"linear: {kept['aligned']:.1%} (unaligned {kept['unaligned']:.1%})"
    assert said in json.loads((new / "scores.json").read_text())["stacked"]["remarks"]["alignment"]
    assert said in " ".join(printed.split()) and said in (new / "report.html").read_text()
