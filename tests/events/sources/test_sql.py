"""A database gives the bytes that the Parquet file of the same rows gives."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest
from support.runs import composed, contents

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.sql import Sql, without_password
from ubp_fast.events.sources.table import Table
from ubp_fast.pipeline.settings import read_settings

ROWS = pl.DataFrame(
    {
        "client_id": [7, 9, 7, 8],
        "time": ["2024-01-01 10:00:00", "2024-02-01 11:30:00", "2024-03-01 00:00:00", "2024-03-20 23:59:59"],
        "item": ["cup", "pan", "cup", "it's"],
        "price": [2.5, 10.0, 2.75, 1.0],
    }
)
VALUES = ", ".join(f"({client}, '{time}', '{item}', {price})" for client, time, item, price in
                   ROWS.with_columns(pl.col("item").str.replace("'", "''")).iter_rows())  # fmt: skip
COLUMNS = {"timestamp_column": "time", "sku_column": "item", "price_column": "price"}


def events_of(source: Table | Sql, folder: Path) -> dict[str, bytes]:
    source.prepare(folder)
    return {name: content for name, content in contents(folder).items() if name != "dataset.json"}


def from_parquet(folder: Path) -> dict[str, bytes]:
    ROWS.with_columns(pl.col("time").str.to_datetime()).write_parquet(folder / "log.parquet")
    return events_of(Table(str(folder / "log.parquet"), **COLUMNS), folder / "from_parquet")


@pytest.mark.parametrize("query", ["events", "SELECT * FROM events WHERE price > 0 ORDER BY time;"])
def test_sqlite(tmp_path: Path, query: str) -> None:
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute("create table events (client_id integer, time text, item text, price real)")
        connection.execute(f"insert into events values {VALUES}")
        connection.commit()
    source = Sql(f"sqlite:///{tmp_path / 'shop.db'}", query, **COLUMNS)
    assert events_of(source, tmp_path / "from_sql") == from_parquet(tmp_path)


def test_duckdb(tmp_path: Path) -> None:
    import duckdb

    with duckdb.connect(str(tmp_path / "shop.duckdb")) as connection:
        connection.execute("create table events (client_id integer, time timestamp, item text, price decimal(9, 2))")
        connection.execute(f"insert into events values {VALUES}")
    source = Sql(f"duckdb:///{tmp_path / 'shop.duckdb'}", "events", **COLUMNS)
    assert events_of(source, tmp_path / "from_sql") == from_parquet(tmp_path)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Connection string of a server of this test run, on a socket of its own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    if not found[-1].name:
        pytest.skip("needs a PostgreSQL server: initdb is not installed")
    folder, programs = tmp_path_factory.mktemp("postgres"), found[-1].parent
    as_user: list[str] = []
    if os.getuid() == 0:  # the server does not run as root
        if shutil.which("runuser") is None:
            pytest.skip("needs runuser to start PostgreSQL as another user")
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
        for parent in folder.parents[:2]:
            parent.chmod(parent.stat().st_mode | 0o711)
    data = folder / "data"
    silent = {"check": True, "cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*as_user, programs / "initdb", "-D", data, "-A", "trust", "-U", "shop", "--no-sync"], **silent)
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    control = [*as_user, programs / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-o", options, "start"], **silent)
    yield f"postgresql://shop@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], **silent)


def test_postgresql(tmp_path: Path, postgres: str) -> None:
    import adbc_driver_postgresql.dbapi

    with adbc_driver_postgresql.dbapi.connect(postgres) as connection, connection.cursor() as cursor:
        cursor.execute("create table events (client_id bigint, time timestamp, item text, price numeric(9, 2))")
        cursor.execute(f"insert into events values {VALUES}")
        connection.commit()
    source = Sql(postgres, "select * from events order by time", **COLUMNS)
    assert events_of(source, tmp_path / "from_sql") == from_parquet(tmp_path)


def test_other_rows_are_another_run(tmp_path: Path) -> None:
    digests = []
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute("create table events (client_id integer, time text, item text, price real)")
        for _ in range(2):
            connection.execute(f"insert into events values {VALUES}")
            connection.commit()
            digests += [Sql(f"sqlite:///{tmp_path / 'shop.db'}", "events", **COLUMNS).content() for _ in range(2)]
    assert digests[0] == digests[1] != digests[2] == digests[3]


@pytest.mark.parametrize(
    ("uri", "query", "message"),
    [
        ("sqlite:///{}/shop.db", "no_such", "the database must answer 'SELECT .* FROM no_such', got: .*no such table"),
        ("sqlite:///{}/shop.db", "select 1 as x", "column 'client_id' must exist, got columns"),
        ("sqlite:///{}/none.db", "events", "none.db: the file must exist, got none at '/.*none.db'"),
        ("duckdb:///{}/none.duckdb", "events", "none.duckdb: the file must exist"),
        (
            "postgresql://ada:secret@127.0.0.1:1/x",
            "events",
            r"^postgresql://ada:\*\*\*@127.0.0.1:1/x: the data",
        ),
    ],
)
def test_what_a_database_refuses_is_one_line(tmp_path: Path, uri: str, query: str, message: str) -> None:
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute("create table orders (time text)")
    with pytest.raises(DataError, match=message) as caught:
        Sql(uri.format(tmp_path), query).prepare(tmp_path / "events")
    assert [path.name for path in tmp_path.iterdir()] == ["shop.db"]
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_other_databases_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"uri must begin with postgresql://, sqlite:/// or duckdb:///, got 'mysql://x'"
    ):
        Sql("mysql://x", "events")


def test_passwords_are_not_kept() -> None:
    uri = "postgresql://ada:s3cret@host:5432/shop"
    assert without_password(uri) == "postgresql://ada:***@host:5432/shop"
    settings = read_settings(composed("data=sql", f"data.uri='{uri}'", "data.query=events"))
    assert settings.source.uri == uri and "s3cret" not in str(settings.plain)
