"""Vectors of any number of clients straight into files: part by part, continued after a kill, complete or not there.

DIR             client_ids.npy, embeddings.npy (a memory map), profile.json, as `Profiles.save`
FILE.parquet    one table, or a directory of parts of 65,536 clients, and FILE.json: the blocks of the vectors
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from ubp_fast.files import (
    OutputDirectoryError,
    clear_directory,
    complete_directory,
    create_array,
    load_json,
    put_in_place,
    restore,
    save_array,
    write_json,
    writing_to,
)
from ubp_fast.profiles import Profiles
from ubp_fast.profiles.blocks import Layout
from ubp_fast.profiles.matrix import BLOCK_ROWS, EMBEDDINGS_FILE, part_file
from ubp_fast.progress import Progress

PROGRESS_FILE = "progress.json"
Make = Callable[[int, int, Progress], np.ndarray]


def write_in_parts(
    output: Path,
    identity: str,
    client_ids: np.ndarray,
    own_ids: pl.Series,
    layout: Layout,
    make: Make,
    per_block: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the vectors of clients into a new directory, or a table when its name ends in .parquet.

    Args:
        output: its content appears when all of it is complete; an earlier one is replaced then.
        identity: of everything that decides the vectors: what a killed attempt with the same one has left is kept.
        client_ids: i64 [N].
        own_ids: N ids of the shop.
        layout: of the vectors.
        make: vectors float16 of the clients first..last; the third argument hears of (clients done, clients in all).
        per_block: a column of the table per block.
        progress: called with (clients done, clients in all).

    Raises:
        OutputDirectoryError: `output` is something else, or cannot be written.
    """
    is_table = output.suffix == ".parquet"
    partial, identity = output.with_name(f".{output.name}.partial"), f"{identity} {per_block}"
    with writing_to(output, "the output", partial):
        restore(output)
    if output.is_dir() and any(output.iterdir()):
        mark = part_file(output, 0) if is_table else output / EMBEDDINGS_FILE
        if not mark.exists():
            raise OutputDirectoryError(f"{output}: output must be new or hold profiles, got other files; name another")
    elif output.exists() and not is_table:
        raise OutputDirectoryError(f"{output}: output must be a directory or end in .parquet, got a file; name another")
    with writing_to(output, "the output", partial):
        output.parent.mkdir(parents=True, exist_ok=True)
        done = _done(partial, identity)
        number = len(client_ids)
        values = None if is_table else _opened(partial / EMBEDDINGS_FILE, (number, layout.width), bool(done))
        report = progress or (lambda done, total: None)
        for first in range(done, max(number, 1), BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, number)
            vectors = make(first, last, report)
            if values is None:
                some = Profiles(client_ids[first:last], vectors, layout, own_ids.slice(first, last - first))
                some.write_parquet(part_file(partial, first // BLOCK_ROWS), per_block)
            else:
                values[first:last] = vectors
                if isinstance(values, np.memmap):  # nothing of nobody is no map
                    values.flush()
            write_json(partial / PROGRESS_FILE, {"identity": identity, "clients": last})
            report(last, number)
        if values is not None:
            del values
            halves: np.ndarray = np.load(partial / EMBEDDINGS_FILE, mmap_mode="r", allow_pickle=False)
            Profiles(client_ids, halves, layout, own_ids).save_beside(partial)
        (partial / PROGRESS_FILE).unlink()
    with writing_to(output.parent, "the folder of the output"):
        _publish(partial, output, layout)


def _done(partial: Path, identity: str) -> int:
    """Clients that an earlier attempt has finished; what belongs to another one is removed."""
    try:
        left = load_json(partial / PROGRESS_FILE)
        if left["identity"] == identity:
            return int(left["clients"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    clear_directory(partial)
    return 0


def _opened(path: Path, shape: tuple[int, int], is_there: bool) -> np.ndarray:
    if is_there or not shape[0]:
        if not shape[0]:
            save_array(path, np.zeros(shape, np.float16))
        return np.load(path, mmap_mode="r+" if shape[0] else None, allow_pickle=False)
    return create_array(path, np.float16, shape)


def _publish(partial: Path, output: Path, layout: Layout) -> None:
    if output.suffix != ".parquet":
        complete_directory(partial, output)
        return
    facts = output.with_suffix(".json")
    facts.unlink(missing_ok=True)  # never of other vectors than those beside it
    if part_file(partial, 1).exists():
        complete_directory(partial, output)
    else:
        put_in_place(part_file(partial, 0), output)
        shutil.rmtree(partial)
    write_json(facts, layout.to_json())
