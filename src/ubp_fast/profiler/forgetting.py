"""Clients who want to be forgotten: their events, vectors and ids leave a run, and a search proves it.

What a model has learned from all clients together stays, and is named: only another run has not seen them. Folders of
stages hold single clients; they go, with the folders of the cache that they are links to. The events of all others stay
in `history/`, so that days can be appended as before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ubp_fast.events.schema import DataError, UserError
from ubp_fast.files import (
    clear_directory,
    complete_directory,
    load_array,
    remove_at_once,
    restore,
    write_table,
    writing_to,
)
from ubp_fast.profiler.history import History
from ubp_fast.profiler.profiler import LATEST, Profiler
from ubp_fast.profiler.reading import own_ids
from ubp_fast.profiles import Profiles

VECTORS = ("profiles", LATEST)
# Stages that hold scores of labels, and nobody.
OF_NOBODY = "evaluate-"
# Shows single clients by what they did; the next run writes it anew.
REPORT = "report.html"
# A shorter id may stand in a text for anything.
SHORTEST_SEARCHED = 6


@dataclass(frozen=True)
class Forgotten:
    """What was done.

    Attributes:
        clients: how many of those asked for the run knew.
        removed: folders of stages that were removed, wherever they lay.
        learned_from: parts of the model that were learned from all clients, these included.
    """

    clients: int
    removed: tuple[Path, ...]
    learned_from: tuple[str, ...]


def forget(run: Path | str, clients: Sequence[Any] | np.ndarray | pl.Series) -> Forgotten:
    """Removes clients from a run, and its report; the vectors of others keep their bytes. Called again, it goes on.

    Args:
        run: directory of a run.
        clients: ids as they stand in the events; one that the run does not know is no error.

    Raises:
        DataError: no whole run, or an id that the search found where nobody expected it.
        UserError: ids of another kind than those of the events, or none.
    """
    with writing_to(Path(run), "the run directory"):
        return _forget(Path(run), clients)


def _forget(path: Path, clients: Sequence[Any] | np.ndarray | pl.Series) -> Forgotten:
    profiler = Profiler.load(path)
    if profiler.directory.parent != path or not len(clients):
        raise UserError(
            f"forget: needs the directory of a run and the ids of its clients, got {path}, {len(clients)} ids"
        )
    history = History.of(path, profiler.fitted.cutoff_s, profiler.maps)
    known = pl.Series("id", history.wanted) if history.clients is None else history.clients.own
    gone = own_ids(clients, known).unique()
    if history.clients is None:
        numbers = gone.to_numpy()
    else:
        numbers = history.clients.numbers[known.is_in(gone.implode()).to_numpy()]
    found = int(np.isin(history.histories.client_ids, numbers).sum())
    for name in VECTORS:
        for shown in (path / name, path / f"{name}.parquet"):
            restore(shown)
        _without_vectors(path / name, numbers)
        _without_rows(path / f"{name}.parquet", gone)
    history.without(numbers).save(path)
    (path / REPORT).unlink(missing_ok=True)
    for unfinished in path.glob(".*.partial"):  # left by a kill
        remove_at_once(unfinished)
    removed = tuple(_remove_stages(path / "stages"))
    if left := [str(file) for file in path.rglob("*") if file.is_file() and _holds(file, gone, numbers)]:
        raise DataError(f"{path}: no file may hold an id of who was forgotten, got {left}; remove them")
    fitted = profiler.fitted
    parts = {"graded": fitted.graded, "near": fitted.near, "scores": fitted.scorer, "tastes": fitted.taste_weights}
    learned = ("strong", *(name for name, part in parts.items() if part is not None), *fitted.networks)
    return Forgotten(found, removed, learned)


def _without_vectors(folder: Path, numbers: np.ndarray) -> None:
    if not folder.is_dir():
        return
    profiles = Profiles.load(folder)
    kept = ~np.isin(profiles.client_ids, numbers)
    if kept.all():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    clear_directory(partial)
    own = None if profiles.own_ids is None else profiles.own_ids.filter(pl.Series(kept))
    rows = replace(profiles, client_ids=profiles.client_ids[kept], embeddings=profiles.embeddings[kept], own_ids=own)
    rows.save(partial)
    complete_directory(partial, folder)


def _without_rows(table: Path, gone: pl.Series) -> None:
    """Drops rows of a table of vectors, or of each of its parts."""
    files = sorted(table.glob("*.parquet")) if table.is_dir() else [table] if table.exists() else []
    for file in files:
        frame = pl.read_parquet(file)
        kept = frame.filter(~pl.col("client_id").is_in(gone.cast(frame["client_id"].dtype, strict=False).implode()))
        if len(kept) < len(frame):
            write_table(file, kept)


def _remove_stages(stages: Path) -> Iterator[Path]:
    for entry in sorted(stages.iterdir()) if stages.is_dir() else []:
        if entry.name.startswith(OF_NOBODY):
            continue
        target = entry.resolve()
        if target.is_dir():
            with writing_to(target, "a stage that holds clients"):
                remove_at_once(target)
            yield target
        if entry.is_symlink():
            entry.unlink()


def _holds(file: Path, gone: pl.Series, numbers: np.ndarray) -> bool:
    """Whether a file holds one of the ids: as a row of a table or array of clients, or as a word."""
    if file.suffix == ".npy":
        is_ids = file.stem in ("client_ids", "wanted")
        return is_ids and bool(np.isin(load_array(file), numbers).any())
    if file.suffix == ".parquet":
        frame = pl.read_parquet(file)
        is_table_of_clients = "client_id" in frame.columns or file.stem == "own_ids"
        names = [name for name, dtype in frame.schema.items() if dtype in (pl.Int64, pl.String)]
        return is_table_of_clients and any(
            bool(frame[name].is_in(gone.cast(frame[name].dtype, strict=False).drop_nulls().implode()).any())
            for name in names
            if name != "id"
        )
    words = [str(value) for value in gone.to_list() if len(str(value)) >= SHORTEST_SEARCHED]
    if not words:
        return False
    pattern = re.compile(b"(?<![\\w.-])(?:" + b"|".join(re.escape(word.encode()) for word in words) + b")(?![\\w.-])")
    return pattern.search(file.read_bytes()) is not None
