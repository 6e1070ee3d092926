"""A table or query of a database with a row per event: PostgreSQL, SQLite, DuckDB."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from ubp_fast.events.checks import require_columns
from ubp_fast.events.formats import RawTable, natural
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.events.sources.table import EventRows

_PASSWORD = re.compile(r"(://[^:/@]*):[^@/]*@")
_TABLE = re.compile(r"[\w.$\"]+")


def without_password(uri: str) -> str:
    """A connection string that may be shown and kept."""
    return _PASSWORD.sub(r"\1:***@", uri)


@dataclass(frozen=True)
class Sql(EventRows):
    """A table or query as a source.

    The order of rows is the query's: give it an ORDER BY, for the same bytes every time.

    Attributes:
        uri: `postgresql://user@host/database`, `sqlite:///file.db`, `duckdb:///file.duckdb` (relative paths; a fourth
            slash begins an absolute one).
        query: name of a table, or a SELECT.
    """

    uri: str
    query: str

    def __post_init__(self) -> None:
        super().__post_init__()
        _reader(self.uri)

    def content(self) -> str:
        """Digest of the rows as the database holds them now."""
        state = hashlib.blake2b(str(self._frame.schema).encode(), digest_size=8)
        state.update(self._frame.hash_rows().to_numpy().tobytes())
        return state.hexdigest()

    @property
    def name(self) -> str:
        return self.query if _TABLE.fullmatch(self.query) else "query"

    def raw(self) -> RawTable:
        return RawTable(self.name, self._frame, ((self.name, len(self._frame)),))

    @cached_property
    def _frame(self) -> pl.DataFrame:
        """The columns that are asked for; read once."""
        query = f"SELECT * FROM {self.query}" if _TABLE.fullmatch(self.query) else self.query.rstrip("; \n")
        columns = self._wanted()
        read, uri = _reader(self.uri)
        # A driver would make an empty database of a path that is not there.
        if uri != self.uri and not Path(uri).is_file():
            raise DataError(f"{self.uri}: the file must exist, got none at '{Path(uri).absolute()}'; check data.uri")
        try:
            frame = read(uri, query)
        except UserError:
            raise
        except Exception as error:  # every driver has its own
            reason = without_password(re.sub(r"\s+", " ", str(error)).strip())
            raise DataError(
                f"{without_password(self.uri)}: the database must answer '{query}', got: {reason}; check data.uri and"
                " data.query"
            ) from error
        require_columns(without_password(self.uri), frame.columns, columns, "name the column in the configuration")
        return pl.DataFrame([_plain(column) for column in frame.select(columns)])


def _plain(column: pl.Series) -> pl.Series:
    """Numbers of any precision, which a driver hands over as text with a name of its own, as numbers."""
    if "Extension" not in type(column.dtype).__name__:
        return column
    stored = column.ext.storage()
    return natural(stored) if stored.dtype == pl.String and "numeric" in str(column.dtype) else stored


def _reader(uri: str) -> tuple[Callable[[str, str], pl.DataFrame], str]:
    """What reads a database of this kind, and what it calls the database.

    Raises:
        UserError: another kind.
    """
    kind, _, rest = uri.partition("://")
    if kind in ("postgresql", "postgres"):
        return _read_adbc("adbc_driver_postgresql"), uri
    if kind == "sqlite":
        return _read_adbc("adbc_driver_sqlite"), rest.removeprefix("/")
    if kind == "duckdb":
        return _read_duckdb, rest.removeprefix("/")
    raise UserError(
        "source: uri must begin with postgresql://, sqlite:/// or duckdb:///, got"
        f" '{without_password(uri)}'; export the table of another database as Parquet or CSV"
    )


def _read_adbc(driver: str) -> Callable[[str, str], pl.DataFrame]:
    def read(uri: str, query: str) -> pl.DataFrame:
        module = _driver(f"{driver}.dbapi")
        with module.connect(uri) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return pl.DataFrame(cursor.fetch_arrow())

    return read


def _read_duckdb(path: str, query: str) -> pl.DataFrame:
    with _driver("duckdb").connect(path, read_only=True) as connection:
        return pl.DataFrame(connection.sql(query))


def _driver(name: str) -> Any:
    """A module of the extra `sql`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"source: {error}; pip install 'ubp_fast[sql]'") from error
