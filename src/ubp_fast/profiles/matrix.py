"""One vector per client: align, select blocks, save and load.

Files of a profile directory, as in a submission to the challenge:

    client_ids.npy   i64 [U]
    embeddings.npy   float16 [U, D] (float32 for vectors that are only passed on), row i belongs to client_ids[i]
    profile.json     what the columns are, see `ubp_fast.profiles.blocks`; none beside the vectors of others
    own_ids.parquet  where the shop's ids are text: value, the id of each row; client_ids are numbers for them

`write_parquet` writes the same as one table with the shop's own ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.events.read import read_array, read_table
from ubp_fast.events.schema import DataError, UserError
from ubp_fast.files import (
    complete_directory,
    load_json,
    put_in_place,
    scratch_directory,
    write_array,
    write_json,
    write_table,
)
from ubp_fast.profiles.blocks import MAX_DIM, Layout

__all__ = ["MAX_DIM", "Profiles"]

IDS_FILE, EMBEDDINGS_FILE, LAYOUT_FILE = "client_ids.npy", "embeddings.npy", "profile.json"
OWN_IDS_FILE = "own_ids.parquet"
FLOAT16_MAX = float(np.finfo(np.float16).max)
_DTYPES = (np.dtype(np.float16), np.dtype(np.float32))
# Rows that are looked at at once: keeps the temporary copies of a 1 M x 2048 matrix small.
BLOCK_ROWS = 65_536
# Of a part of a table: rows of 2048 numbers are 130 MB as float32, and twice that while Parquet packs them.
PART_ROWS = 16_384


@dataclass(frozen=True)
class Profiles:
    """Vectors of clients.

    Attributes:
        client_ids: i64 [U], row order of the vectors.
        embeddings: float16 or float32 [U, D].
        layout: what the D columns are, where that is known.
        own_ids: the shop's own id of each row, where `client_ids` are numbers for them.
    """

    client_ids: np.ndarray
    embeddings: np.ndarray
    layout: Layout | None = None
    own_ids: pl.Series | None = None

    def __post_init__(self) -> None:
        ids, vectors = self.client_ids, self.embeddings
        if ids.ndim != 1 or ids.dtype != np.int64:
            raise ValueError(f"Profiles: client_ids must be int64 [U], got {ids.dtype} of shape {ids.shape}")
        if vectors.ndim != 2 or vectors.dtype not in _DTYPES:
            raise ValueError(
                f"Profiles: embeddings must be float16 or float32 [U, D], got {vectors.dtype} of shape {vectors.shape}"
            )
        if self.own_ids is not None and len(self.own_ids) != len(ids):
            raise ValueError(f"Profiles: own_ids must be {len(ids)} like client_ids, got {len(self.own_ids)}")
        if len(ids) != len(vectors):
            raise ValueError(f"Profiles: embeddings must have {len(ids)} rows like client_ids, got {len(vectors)}")
        if self.layout is not None and self.layout.width != vectors.shape[1]:
            raise ValueError(
                f"Profiles: embeddings must have the {self.layout.width} columns of the layout, got {vectors.shape[1]}"
            )

    @property
    def num_clients(self) -> int:
        """Number of rows."""
        return len(self.client_ids)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.embeddings.shape[1]

    def rows_of(self, client_ids: np.ndarray) -> np.ndarray:
        """Row of each of these clients, i64 [N].

        Raises:
            DataError: a client has no profile, or a profile occurs twice.
        """
        order = np.argsort(self.client_ids, kind="stable")
        ascending = self.client_ids[order]
        twice = ascending[1:][ascending[1:] == ascending[:-1]]
        if len(twice):
            raise DataError(f"profiles: client_ids must be unique, got {len(twice)} repeats, the first of {twice[0]}")
        at = np.searchsorted(ascending, client_ids)
        known = at < len(ascending)
        known[known] = ascending[at[known]] == client_ids[known]
        if not known.all():
            first = int(np.flatnonzero(~known)[0])
            raise DataError(
                f"profiles: client_ids must include every client asked for, got {int((~known).sum())} without a"
                f" profile, the first is {client_ids[first]} (row {first}); make profiles for them or leave them out"
            )
        return order[at]

    def align(self, client_ids: np.ndarray) -> Profiles:
        """The profiles of these clients in this order; see `rows_of` for errors."""
        if np.array_equal(client_ids, self.client_ids):
            return self
        rows = self.rows_of(client_ids)
        own_ids = None if self.own_ids is None else self.own_ids.gather(rows)
        ids = np.asarray(client_ids, np.int64)
        return replace(self, client_ids=ids, embeddings=self.embeddings[rows], own_ids=own_ids)

    def select(self, *blocks: str) -> Profiles:
        """The columns of some blocks alone, in the profile's order.

        Args:
            blocks: names, such as "scores"; `layout.blocks` lists them.

        Raises:
            UserError: no such block, no name at all, or a profile whose blocks are not known.
        """
        if self.layout is None:
            raise UserError(f"profiles: {LAYOUT_FILE} must be there to select blocks, got vectors without it")
        columns = self.layout.columns_of(*blocks)
        return replace(self, embeddings=self.embeddings[:, columns], layout=self.layout.select(*blocks))

    def to_float16(self) -> Profiles:
        """The same in the dtype of a submission.

        Raises:
            DataError: a value is not finite, or becomes infinite in float16 (|value| >= 65,520); names row and column.
        """
        is_half = self.embeddings.dtype == np.float16
        halves = self.embeddings if is_half else np.empty(self.embeddings.shape, np.float16)
        for start in range(0, self.num_clients, BLOCK_ROWS):
            block = self.embeddings[start : start + BLOCK_ROWS]
            if not is_half:
                with np.errstate(over="ignore"):
                    halves[start : start + BLOCK_ROWS] = block
            bad = ~np.isfinite(halves[start : start + BLOCK_ROWS])
            if bad.any():
                row, column = (int(i) for i in np.argwhere(bad)[0])
                raise DataError(
                    f"profiles: column {column} must fit float16 (finite, at most {FLOAT16_MAX:.0f} in size), got"
                    f" {block[row, column]} in row {start + row} (client {self.client_ids[start + row]}) and"
                    f" {int(bad.sum())} such values near it; scale the column, for example with log1p"
                )
        return replace(self, embeddings=halves)

    def save(self, directory: Path, dtype: str = "float16") -> None:
        """Writes the files; each appears complete or not at all, and values are checked before anything is written.

        Args:
            directory: created when needed.
            dtype: "float16" as in a submission, or "float32" for vectors that are only passed on.

        Raises:
            DataError: see `to_float16`; a float32 value that is not finite.
            ValueError: another dtype.
        """
        if dtype not in ("float16", "float32"):
            raise ValueError(f"Profiles.save: dtype must be 'float16' or 'float32', got '{dtype}'")
        if dtype == "float16":
            vectors = self.to_float16().embeddings
        else:
            vectors = self.embeddings.astype(np.float32, copy=False)
            finite = np.isfinite(vectors).all(axis=1)
            if not finite.all():
                row = int(np.flatnonzero(~finite)[0])
                raise DataError(
                    f"profiles: embeddings must be finite, got {int((~finite).sum())} bad rows, the first is row {row}"
                    f" (client {self.client_ids[row]}); look for a diverged training or a division by zero"
                )
        directory.mkdir(parents=True, exist_ok=True)
        write_array(directory / EMBEDDINGS_FILE, vectors)
        self.save_beside(directory)

    def save_beside(self, directory: Path) -> None:
        """Writes what stands beside the vectors: ids and layout."""
        write_array(directory / IDS_FILE, self.client_ids)
        if self.layout is not None:
            write_json(directory / LAYOUT_FILE, self.layout.to_json())
        else:
            (directory / LAYOUT_FILE).unlink(missing_ok=True)
        if self.own_ids is not None and self.own_ids.dtype == pl.String:
            table = pl.DataFrame([self.own_ids.alias("value")])
            write_table(directory / OWN_IDS_FILE, table)
        else:
            (directory / OWN_IDS_FILE).unlink(missing_ok=True)

    def to_frame(self, per_block: bool = False) -> pl.DataFrame:
        """A table with the shop's own ids, `client_id`, and the vectors as fixed-size lists of float32.

        Args:
            per_block: a column for each block, named after it, instead of one column `profile`.

        Raises:
            UserError: `per_block` without a layout.
        """
        ids = pl.Series("client_id", self.client_ids) if self.own_ids is None else self.own_ids.alias("client_id")
        columns: dict[str, slice | np.ndarray] = {"profile": slice(None)}
        if per_block:
            if self.layout is None:
                raise UserError(f"profiles: {LAYOUT_FILE} must be there for a column per block, got vectors without it")
            columns = {block.name: self.layout.columns_of(block.name) for block in self.layout.blocks}
        values = {
            name: np.ascontiguousarray(self.embeddings[:, chosen], np.float32) for name, chosen in columns.items()
        }
        return pl.DataFrame(
            [ids, *(pl.Series(name, one, dtype=pl.Array(pl.Float32, one.shape[1])) for name, one in values.items())]
        )

    def write_parquet(self, path: Path, per_block: bool = False) -> None:
        """Writes `to_frame`: a file or, of more clients than 65,536, a directory of parts; it appears when complete."""
        step = BLOCK_ROWS if self.num_clients <= BLOCK_ROWS else PART_ROWS
        starts = range(0, max(self.num_clients, 1), step)
        with scratch_directory(path.with_name(f".{path.name}.partial")) as partial:
            for number, start in enumerate(starts):
                write_table(part_file(partial, number), self._rows(start, start + step).to_frame(per_block))
            if len(starts) == 1:
                put_in_place(part_file(partial, 0), path)
            else:
                complete_directory(partial, path)

    def _rows(self, first: int, last: int) -> Profiles:
        own_ids = None if self.own_ids is None else self.own_ids.slice(first, last - first)
        return replace(
            self, client_ids=self.client_ids[first:last], embeddings=self.embeddings[first:last], own_ids=own_ids
        )

    @classmethod
    def load(cls, directory: Path | str) -> Profiles:
        """Reads what `save` wrote, or anybody's submission; run `validate` first on files of others.

        Raises:
            DataError: a file is missing or no array of the right dtype and shape, or profile.json is about others.
        """
        directory = Path(directory)
        ids, vectors = (read_array(directory / name) for name in (IDS_FILE, EMBEDDINGS_FILE))
        try:
            return cls(ids, vectors, _layout(directory / LAYOUT_FILE), _own_ids(directory / OWN_IDS_FILE))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{directory}: {error}; run ubp_fast.profiles.validate on it") from error


def part_file(directory: Path, number: int) -> Path:
    """Name of a part of a table that is a directory."""
    return directory / f"part-{number:05d}.parquet"


def _own_ids(path: Path) -> pl.Series | None:
    return read_table(path, ["value"])["value"] if path.exists() else None


def _layout(path: Path) -> Layout | None:
    try:
        return Layout.from_json(load_json(path), str(path))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: file must be JSON, got '{error}'; make the profiles again or remove it") from error
