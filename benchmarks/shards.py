"""Shards of the clients against one pass and against data frame engines: same results, time, memory of a process.

    python benchmarks/shards.py --root DIR --output FILE [--scale 0.1] [--shards 8 64] [--parts features run]

`features`: from the same Parquet files to a store and the decayed features of every client that needs a profile, by one
pass, by shards, and by rivals that make the same cells without a store. `run`: `ubp-fast run stages=profiles` on the
challenge's files, with `--ray` also on a cluster of three nodes of this machine. Every contestant is a process of its
own with one thread; its start and imports count. Those that start others (Ray, PySpark, which has to be installed for
it, with a Java) may use two at a time, on the cluster three, and all of their processes count. What FILE holds is not
measured again, what lies in `--root` is made once: events, label lists, what one pass has made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("POLARS_MAX_THREADS", "1")

import numpy as np
import polars as pl
from shop_logs import CUTOFF_S, write_logs

from ubp_fast.events.read import EventDirectory
from ubp_fast.events.split import DAY_S

HALF_LIVES_DAYS, LABEL_HALF_LIFE_DAYS, WINDOWS_DAYS = (2, 5, 10, 20, 60, 180), 60, (14, 30, 90)
LABEL_KINDS = ("product_buy", "add_to_cart")
SUMS = [f"decayed_{days}" for days in HALF_LIVES_DAYS]
ONE_PASS = "one pass"
SHOWN = ("shards", "compared", "seconds", "cpu_seconds", "peak_anonymous_mb", "peak_resident_mb", "peak_of_all_mb")
RIVALS = {"Polars": False, "DuckDB": False, "Ray Data": True, "PySpark": True}  # whether they have several processes
ON_RAY = " on Ray"
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}
START = "start and imports of one pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--scale", type=float, default=0.1, help="part of the challenge's size, 169 M events")
    parser.add_argument("--shards", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--ray", type=int, nargs="*", default=[], help="numbers of shards that a cluster works on, too")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=["Polars", "DuckDB"])
    parser.add_argument("--parts", nargs="*", choices=("features", "run"), default=["features", "run"])
    parser.add_argument(
        "--alone", action="store_true", help="`run` without one pass: no bytes are compared, FILE says so"
    )
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--on-cluster", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        return make(options.make, options.root)
    if options.on_cluster:
        return _on_cluster(options.on_cluster)
    events = _events(options.root, options.scale)
    report: dict[str, Any] = {"scale": options.scale}
    if options.output.exists():
        report |= json.loads(options.output.read_text(encoding="utf-8"))
    from contest import machine

    report |= {"machine": machine(), "events": {kind: events.num_rows(kind) for kind in events.kinds}}
    report["clients"] = len(_clients(events))
    ways = [ONE_PASS, *(f"{number} shards" for number in options.shards)]
    on_ray = [f"{number} shards{ON_RAY}" for number in options.ray]
    contestants = {"features": [*ways, START, *options.rivals], "run": [*ways[options.alone :], *on_ray]}
    for part in options.parts:
        measure = {"features": _features, "run": _runs}[part]
        found = report.setdefault(part, {})
        for name, measured in measure(options.root, contestants[part], {*found}):
            report[part][name] = {key: measured[key] for key in SHOWN if key in measured}
            print(part, name, json.dumps(report[part][name]), flush=True)
            options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _events(root: Path, scale: float) -> EventDirectory:
    """Events and label lists that everybody reads."""
    from ubp_fast.events.labels import make_label_lists

    if not (root / "events").exists():
        root.mkdir(parents=True, exist_ok=True)
        write_logs(root / "events", scale)
    events = EventDirectory.open(root / "events")
    if not (root / "lists.npz").exists():
        lists = make_label_lists(events, CUTOFF_S - 14 * DAY_S, CUTOFF_S)
        np.savez(root / "lists.npz", **{name: ids for name, (ids, _) in lists.items()})
    return events


def _clients(events: EventDirectory) -> np.ndarray:
    assert events.relevant_clients is not None
    return np.sort(events.relevant_clients)


def _lists(root: Path) -> dict[str, np.ndarray]:
    """Name of a list -> its labels, in the order of the names."""
    with np.load(root / "lists.npz") as stored:
        return {name: stored[name] for name in sorted(stored.files)}


def _features(root: Path, contestants: list[str], known: Container[str]) -> Any:
    """Name and measures of every contestant; a rival whose cells are not those of one pass ends the benchmark."""
    from rehearsal import measured

    made = root / "made"
    for name in ("one pass", "2 shards"):  # compiles
        _events(root / "warm", 0.001)
        shutil.rmtree(root / "warm" / "made", ignore_errors=True)
        make(name, root / "warm")
    for name in contestants:
        if name in known and (name != ONE_PASS or (made / name).exists()):
            continue
        shutil.rmtree(made / name, ignore_errors=True)
        (made / name).mkdir(parents=True)
        command = [sys.executable, *sys.argv, "--make", name]
        found = measured(command, made / name, family=RIVALS.get(name, False))
        if name == ONE_PASS:
            yield name, found
            continue
        if name in RIVALS:
            _agree(root, _cells_of_files(made / ONE_PASS), made / name)
        elif name != START:
            wanted = _cells_of_files(made / ONE_PASS)
            assert _cells_of_files(made / name).equals(wanted), f"{name}: features must be those of one pass"
            found |= _shards(made / name / "store")
        shutil.rmtree(made / name)
        yield name, found


def _runs(root: Path, ways: list[str], known: Container[str]) -> Any:
    """Name and measures of every run, whose profiles and model have the bytes of one pass, if that is among `ways`."""
    from rehearsal import measured, write_challenge_files

    files, runs = root / "files", root / "runs"
    write_challenge_files(EventDirectory.open(root / "events"), files)
    command = [sys.executable, "-m", "ubp_fast.run", "experiment=demo", "compute.threads=1"]
    for number in (1, 2):  # compiles
        small = ["data=synthetic", f"root={root / 'warm'}", "stages=[profiles]", f"compute.shards={number}"]
        measured([*command, *small], root)
    command += ["data=challenge", f"data.dir={files}"]
    for name in ways:
        number, at = 1 if name == ONE_PASS else int(name.split()[0]), runs / name.replace(" ", "-")
        if name in known and (name != ONE_PASS or at.exists()):
            continue
        shutil.rmtree(at, ignore_errors=True)
        run = [*command, f"root={at}", f"directory={at / 'run'}", f"compute.shards={number}"]
        measured([*run, "stages=[events]"], at)
        cluster = [sys.executable, __file__, "--root", str(root), "--on-cluster"] if name.endswith(ON_RAY) else []
        found = measured([*cluster, *run, "stages=[profiles]"], at, family=bool(cluster))
        if ONE_PASS in ways:
            for folder in ("profiles", "model"):
                wanted, other = (one / "run" / folder for one in (runs / "one-pass", at))
                for file in (path for path in wanted.rglob("*") if path.is_file()):
                    same = (other / file.relative_to(wanted)).read_bytes() == file.read_bytes()
                    assert same, f"{name}: {folder}/{file.name} must have the bytes of one pass"
        else:
            found["compared"] = False
        yield name, found | _shards(at / "run" / "stages" / "store")
        if name != ONE_PASS:
            shutil.rmtree(at)


def _on_cluster(command: list[str]) -> None:
    """Three nodes of one CPU each on this machine, and a run that asks them for its tasks."""
    # For a machine with other work: nodes may start slowly, workers are no nicer than the rivals. Read by the import.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        subprocess.run([*command, "compute.engine=ray", f"compute.address={cluster.address}"], check=True)
    finally:
        cluster.shutdown()


def _shards(store: Path) -> dict[str, int]:
    """How many a sharded store has: at most as many as were asked for, and as parts of 4,096 clients."""
    number = len(list((store / "shards").glob("*")))
    return {"shards": number} if number else {}


def make(name: str, root: Path) -> None:
    """What one contestant does in its process; its result goes to `made/<name>`."""
    events, into = EventDirectory.open(root / "events"), root / "made" / name
    rivals = {"Polars": _with_polars, "DuckDB": _with_duckdb, "Ray Data": _with_ray_data, "PySpark": _with_pyspark}
    if name in rivals:
        rivals[name](events, _lists(root), into)
    else:
        into.mkdir(parents=True, exist_ok=True)
        _with_ours(events, {name: (ids, np.zeros(len(ids))) for name, ids in _lists(root).items()}, name, into)


def _with_ours(events: EventDirectory, lists: dict[str, tuple[np.ndarray, np.ndarray]], way: str, into: Path) -> None:
    import torch

    from ubp_fast.features.decayed import decayed_features
    from ubp_fast.store.build import build_store
    from ubp_fast.store.event_store import EventStore

    torch.set_num_threads(1)
    if way == START:
        return
    if way == "one pass":
        build_store(events, into / "store", CUTOFF_S)
        decayed_features(EventStore.open(into / "store"), CUTOFF_S, lists, directory=into / "features")
        return
    from hydra import compose, initialize_config_dir
    from rehearsal import CONF

    from ubp_fast.pipeline.settings import read_settings
    from ubp_fast.shards.engine import LocalEngine
    from ubp_fast.shards.stages import make_features, make_store
    from ubp_fast.shards.work import Shared

    with initialize_config_dir(str(CONF), version_base="1.3"):
        recipe = read_settings(compose("run", overrides=["data=synthetic"])).recipe
    engine, folders = LocalEngine(), [into / folder for folder in ("store", "features", "models")]
    for folder in folders:
        folder.mkdir()
    make_store(events, CUTOFF_S, 1, int(way.split()[0]), engine, folders[0], lambda *_: None)
    shared = Shared(*folders, recipe, (), lists, {}, 0)
    make_features(shared, [("decayed", CUTOFF_S)], engine, lambda *_: None)


class Cells(NamedTuple):
    """Features without the zeros.

    Attributes:
        names: of the columns.
        rows: int64 [N] of the client, ascending.
        columns: int32 [N].
        values: float32 [N].
    """

    names: tuple[str, ...]
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def equals(self, other: Cells) -> bool:
        return self.names == other.names and all(map(np.array_equal, self[1:], other[1:]))


def _cells_of_files(made: Path) -> Cells:
    """Of one pass, or of all shards end to end."""
    from ubp_fast.features.matrix import load_features

    files = sorted((made / "features").glob("**/names.json"))
    parts, first, found = [load_features(file.parent) for file in files], 0, []
    for part in parts:
        rows = first + np.repeat(np.arange(len(part.client_ids)), np.diff(part.indptr))
        found.append((rows, part.indices, part.values))
        first += len(part.client_ids)
    return Cells(parts[0].names, *(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def _agree(root: Path, ours: Cells, theirs: Path) -> None:
    """Every value of a rival is ours to rounding, and we have no others but those of clients without such events."""
    clients, places = _clients(EventDirectory.open(root / "events")), {name: at for at, name in enumerate(ours.names)}
    keys = ours.rows * len(ours.names) + ours.columns
    seen = np.zeros(len(keys), bool)

    def check(client_id: pl.Series, column: np.ndarray, value: np.ndarray) -> None:
        value = np.log1p(value).astype(np.float32)
        rows = np.searchsorted(clients, client_id.to_numpy())
        key = (rows * len(ours.names) + column)[value > 0]
        at = np.searchsorted(keys, key)
        assert np.array_equal(keys[at], key)
        np.testing.assert_allclose(ours.values[at], value[value > 0], rtol=1e-5, atol=1e-6)
        seen[at] = True

    for file in sorted(theirs.glob("activity-*.parquet")):
        kind, table = file.stem.split("-")[1], _table(file)
        of = {f"decayed_{days}": f"{kind}_activity_{days}d" for days in HALF_LIVES_DAYS}
        of |= {
            f"active_{window}": f"{kind}_active_days_{window}" for window in (*(f"{d}d" for d in WINDOWS_DAYS), "all")
        }
        of |= {"newest_s": f"{kind}_last_days", "oldest_s": f"{kind}_first_days"}
        for name, column in of.items():
            values = table[name].to_numpy() / (DAY_S if name.endswith("_s") else 1)
            check(table["client_id"], np.full(len(table), places[column]), values)
        never = np.setdiff1d(np.arange(len(clients)), np.searchsorted(clients, table["client_id"].to_numpy()))
        for end in ("last", "first"):  # the whole history's length
            seen[np.searchsorted(keys, never * len(ours.names) + places[f"{kind}_{end}_days"])] = True
    for file in sorted(theirs.glob("labels-*.parquet")):
        _, kind, name = file.stem.split("-")
        table = _table(file)
        column = np.array([places[f"{kind}_decayed_{name}_{label}"] for label in table["label"].to_list()], np.int64)
        check(table["client_id"], column, table["decayed"].to_numpy())
    assert seen.all(), f"{theirs.name}: {int((~seen).sum())} of our {len(seen)} values are not among theirs"


def _table(path: Path) -> pl.DataFrame:
    """A file or a folder of parts."""
    return pl.read_parquet(path / "*.parquet" if path.is_dir() else path)


def _files(events: EventDirectory, kind: str) -> str:
    path = events.path / f"{kind}.parquet"
    return f"{path}/*.parquet" if path.is_dir() else str(path)


def _with_polars(events: EventDirectory, lists: dict[str, np.ndarray], into: Path) -> None:
    """Lazy queries on the streaming engine: sums per client and day first, few rows, then per client."""
    clients = pl.LazyFrame({"client_id": _clients(events)})
    products = pl.scan_parquet(events.path / "product_properties.parquet").select("sku", "category", "price")
    age = (CUTOFF_S - pl.col("timestamp_s")).alias("age_s")
    for kind in events.kinds:
        rows = pl.scan_parquet(_files(events, kind)).filter(pl.col("timestamp_s") < CUTOFF_S)
        rows = rows.join(clients, on="client_id", how="semi").with_columns(age)
        sums = [_decayed(days).sum().alias(name) for days, name in zip(HALF_LIVES_DAYS, SUMS, strict=True)]
        newest, oldest = pl.col("age_s").min().alias("newest_s"), pl.col("age_s").max().alias("oldest_s")
        of_days = rows.group_by("client_id", day=pl.col("timestamp_s") // DAY_S).agg(*sums, newest, oldest)
        active = [(pl.col("newest_s") <= days * DAY_S).sum().alias(f"active_{days}d") for days in WINDOWS_DAYS]
        active.append(pl.len().alias("active_all"))
        ends = [pl.col("newest_s").min(), pl.col("oldest_s").max()]
        found = of_days.group_by("client_id").agg(pl.col(SUMS).sum(), *ends, *active)
        found.sink_parquet(into / f"activity-{kind}.parquet")
        if kind not in LABEL_KINDS:
            continue
        bought = rows.join(products, on="sku").with_columns(_decayed(LABEL_HALF_LIFE_DAYS).alias("decayed"))
        for name, ids in lists.items():
            column = name.rpartition("_")[2]
            listed = bought.join(pl.LazyFrame({column: ids}), on=column)
            found = listed.group_by("client_id", label=column).agg(pl.col("decayed").sum())
            found.sink_parquet(into / f"labels-{kind}-{name}.parquet")


def _decayed(half_life_days: int) -> pl.Expr:
    return (pl.col("age_s") * (-math.log(2) / (half_life_days * DAY_S))).exp()


def _with_duckdb(events: EventDirectory, lists: dict[str, np.ndarray], into: Path) -> None:
    """The same in SQL; up to 8 GB of memory, then its files beside the result."""
    import duckdb

    base = duckdb.connect()
    base.execute("set threads = 1")
    base.execute("set memory_limit = '8GB'")
    base.execute(f"set temp_directory = '{into}/temporary'")
    base.execute("set preserve_insertion_order = false")
    tables = _small_tables(events, lists, into)
    for name, file in tables.items():
        base.execute(f"create table {name} as from read_parquet('{file}')")
    for kind in events.kinds:
        base.execute(
            "create or replace temp view events as "
            + _relevant(kind, f"read_parquet('{_files(events, kind)}')", "//", "semi join")
        )
        base.execute(f"copy ({_activity()}) to '{into}/activity-{kind}.parquet'")
        if kind not in LABEL_KINDS:
            continue
        base.execute(f"create or replace temp table bought as {BOUGHT}")
        for name in lists:
            base.execute(f"copy ({_labels(name)}) to '{into}/labels-{kind}-{name}.parquet'")


def _with_pyspark(events: EventDirectory, lists: dict[str, np.ndarray], into: Path) -> None:
    """The same SQL on two threads of one executor, in a heap of 3 GB."""
    from pyspark.sql import SparkSession

    settings = {
        "spark.driver.memory": "3g",
        "spark.ui.enabled": "false",
        "spark.sql.shuffle.partitions": "8",  # for two threads; 200 by default
        "spark.local.dir": str(into / "temporary"),
    }
    session = SparkSession.builder.master("local[2]").config(map=settings).getOrCreate()
    for name, file in _small_tables(events, lists, into).items():
        session.read.parquet(str(file)).createOrReplaceTempView(name)
    for kind in events.kinds:
        session.read.parquet(_files(events, kind)).createOrReplaceTempView("logged")
        session.sql(_relevant(kind, "logged", "div", "left semi join")).createOrReplaceTempView("events")
        session.sql(_activity()).write.parquet(f"{into}/activity-{kind}.parquet")
        if kind not in LABEL_KINDS:
            continue
        bought = session.sql(BOUGHT).cache()
        bought.createOrReplaceTempView("bought")
        for name in lists:
            session.sql(_labels(name)).write.parquet(f"{into}/labels-{kind}-{name}.parquet")
        bought.unpersist()
    session.stop()


def _small_tables(events: EventDirectory, lists: dict[str, np.ndarray], into: Path) -> dict[str, Path]:
    """Table -> file."""
    tables = {name: pl.DataFrame({"label": ids}) for name, ids in lists.items()}
    tables["clients"] = pl.DataFrame({"client_id": _clients(events)})
    products = pl.scan_parquet(events.path / "product_properties.parquet")
    tables["products"] = products.select("sku", "category", "price").collect()
    files = {name: into / f"{name}.table" for name in tables}
    for name, file in files.items():
        tables[name].write_parquet(file)
    return files


def _decayed_sql(days: int) -> str:
    return f"exp(age_s * {-math.log(2) / (days * DAY_S)!r})"


BOUGHT = (
    f"select client_id, sku, category, price, {_decayed_sql(LABEL_HALF_LIFE_DAYS)} as decayed"
    " from events join products using (sku)"
)


def _relevant(kind: str, logged: str, divided: str, semi_join: str) -> str:
    """Events that count, in SQL."""
    item = ", sku" if kind in LABEL_KINDS else ""
    return (
        f"select client_id, timestamp_s {divided} {DAY_S} as day, {CUTOFF_S} - timestamp_s as age_s{item} from {logged}"
        f" {semi_join} clients using (client_id) where timestamp_s < {CUTOFF_S}"
    )


def _activity() -> str:
    """Sums per client and day first, few rows, then per client, in SQL."""
    sums = ", ".join(f"sum({_decayed_sql(days)}) as {name}" for days, name in zip(HALF_LIVES_DAYS, SUMS, strict=True))
    totals = ", ".join(f"sum({name}) as {name}" for name in SUMS)
    active = ", ".join(f"count(*) filter (where newest_s <= {days * DAY_S}) as active_{days}d" for days in WINDOWS_DAYS)
    return (
        f"with of_days as (select client_id, day, {sums}, min(age_s) as newest_s, max(age_s) as oldest_s"
        f" from events group by client_id, day) select client_id, {totals}, min(newest_s) as newest_s,"
        f" max(oldest_s) as oldest_s, {active}, count(*) as active_all from of_days group by client_id"
    )


def _labels(name: str) -> str:
    """Decayed counts of a list's labels, in SQL."""
    return (
        f"select client_id, label, sum(decayed) as decayed from bought join {name}"
        f" on {name.rpartition('_')[2]} = label group by client_id, label"
    )


def _with_ray_data(events: EventDirectory, lists: dict[str, np.ndarray], into: Path) -> None:
    """Sums of every block, then of every client, whose rows a shuffle by hash has brought together.

    The client ids and the products go to every worker: nothing is joined by a shuffle that is small enough not to be.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # no nicer than the rivals; read by the import
    import pyarrow
    import ray

    ray.init(num_cpus=2, object_store_memory=2 << 30, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    clients = _clients(events)
    products = pl.read_parquet(events.path / "product_properties.parquet", columns=["sku", "category", "price"])
    sums = [pl.col(SUMS).sum(), pl.col("newest_s").min(), pl.col("oldest_s").max()]

    def relevant(block: pyarrow.Table) -> pl.DataFrame:
        rows = pl.DataFrame(block).filter(pl.col("timestamp_s") < CUTOFF_S)
        places = np.searchsorted(clients, rows["client_id"].to_numpy()).clip(max=len(clients) - 1)
        rows = rows.filter(clients[places] == rows["client_id"].to_numpy())
        return rows.with_columns((CUTOFF_S - pl.col("timestamp_s")).alias("age_s"))

    def of_days(block: pyarrow.Table) -> pyarrow.Table:
        terms = [_decayed(days).sum().alias(name) for days, name in zip(HALF_LIVES_DAYS, SUMS, strict=True)]
        ends = [pl.col("age_s").min().alias("newest_s"), pl.col("age_s").max().alias("oldest_s")]
        rows = relevant(block).group_by("client_id", day=pl.col("timestamp_s") // DAY_S).agg(*terms, *ends)
        return rows.to_arrow()

    def of_clients(block: pyarrow.Table) -> pyarrow.Table:
        active = [(pl.col("newest_s") <= days * DAY_S).sum().alias(f"active_{days}d") for days in WINDOWS_DAYS]
        days = pl.DataFrame(block).group_by("client_id", "day").agg(*sums)
        return days.group_by("client_id").agg(*sums, *active, pl.len().alias("active_all")).to_arrow()

    def of_labels(block: pyarrow.Table) -> pyarrow.Table:
        bought = relevant(block).join(products, on="sku").with_columns(_decayed(LABEL_HALF_LIFE_DAYS).alias("decayed"))
        found = []
        for name, ids in lists.items():
            column = name.rpartition("_")[2]
            listed = bought.join(pl.DataFrame({"label": ids}), left_on=column, right_on="label")
            found.append(listed.select("client_id", pl.lit(name).alias("list"), label=column, decayed="decayed"))
        return of_clients_labels(pl.concat(found).to_arrow())

    def of_clients_labels(block: pyarrow.Table) -> pyarrow.Table:
        return pl.DataFrame(block).group_by("client_id", "list", "label").agg(pl.col("decayed").sum()).to_arrow()

    def grouped(rows: Any, of_block: Any, of_all: Any) -> Any:
        whole = {"batch_format": "pyarrow", "batch_size": None}
        return rows.map_batches(of_block, **whole).repartition(8, keys=["client_id"]).map_batches(of_all, **whole)

    for kind in events.kinds:
        columns = ["client_id", "timestamp_s", *(["sku"] if kind in LABEL_KINDS else [])]
        rows = ray.data.read_parquet(str(events.path / f"{kind}.parquet"), columns=columns)
        grouped(rows, of_days, of_clients).write_parquet(f"{into}/activity-{kind}.parquet")
        if kind not in LABEL_KINDS:
            continue
        grouped(rows, of_labels, of_clients_labels).write_parquet(f"{into}/{kind}", partition_cols=["list"])
        for name in lists:
            (into / kind / f"list={name}").rename(into / f"labels-{kind}-{name}.parquet")
    ray.shutdown()


if __name__ == "__main__":
    main()
