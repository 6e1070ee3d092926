"""Feature matrices of any size: made block by block of clients, straight into their files when there is a directory."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch

from ubp_fast.features.matrix import (
    NAMES_FILE,
    FeatureMatrix,
    SparseFeatureMatrix,
    load_array,
    write_array,
    write_json,
)

# A block of 320 columns per thread stays in the cache of a large CPU while all kinds of events are added to it.
BLOCK_CLIENTS = 1 << 13
BLOCK_VALUES = 1 << 22
DTYPES = ("float32", "float16")
LARGEST_FLOAT16 = 65_504.0
SMALLEST_MAPPING = 1 << 22
Fill = Callable[[np.ndarray, int, int], None]
T = TypeVar("T")


def in_client_blocks(
    client_ids: np.ndarray,
    names: tuple[str, ...],
    units: tuple[str, ...],
    fill: Fill,
    directory: Path | None = None,
    dtype: str = "float32",
    block_clients: int | None = None,
    fill_missing: bool = False,
) -> FeatureMatrix:
    """The matrix whose rows first..last are what `fill(block, first, last)` writes over float32 zeros.

    Blocks are filled by as many threads as torch uses, in any order; each one owns its rows.

    Args:
        client_ids: int64 [U].
        names: of the columns.
        units: of the columns.
        fill: called from several threads.
        directory: values are written there and never held in memory as a whole; the result is mapped from there.
        dtype: "float32" or "float16"; what float16 cannot hold becomes +-65,504, never infinite.
        block_clients: clients at a time; by default at most 8,192, fewer when the columns are many.
        fill_missing: what is NaN, because a client lacks what its column measures, becomes the mean of the column's
            other values, 0 without any.
    """
    check_dtype(dtype)
    shape = (len(client_ids), len(names))
    step = block_clients or clients_at_once(shape[1])
    values = _zeros(shape, dtype) if directory is None else None
    file = None if directory is None else _new_file(directory, shape, dtype)
    free: list[np.ndarray] = []

    def make(first: int) -> tuple[np.ndarray, np.ndarray] | None:
        last = min(first + step, shape[0])
        if values is not None and dtype == "float32":
            fill(values[first:last], first, last)
            return _of_known(values[first:last]) if fill_missing else None
        buffer = free.pop() if free else np.empty((step, shape[1]), np.float32)
        block = buffer[: last - first]
        block[:] = 0
        fill(block, first, last)
        known = _of_known(block) if fill_missing else None
        stored = block if dtype == "float32" else block.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16)
        if values is not None:
            values[first:last] = stored
        else:
            assert file is not None
            _write_at(file[0], stored, file[1] + first * shape[1] * stored.itemsize)
        free.append(buffer)
        return known

    try:
        known = list(_in_order(make, range(0, shape[0], step)))
    finally:
        if file is not None:
            os.close(file[0])
    if any(part is not None for part in known):
        whole = np.load(_temporary(directory), mmap_mode="r+", allow_pickle=False) if directory else values
        assert whole is not None
        _fill_missing(whole, known, step)
    if directory is None:
        assert values is not None
        return FeatureMatrix(client_ids, values, names, units)
    return _finished(directory, client_ids, names, units)


def in_sparse_blocks(
    client_ids: np.ndarray, names: tuple[str, ...], units: tuple[str, ...], fill: Fill, directory: Path | None = None
) -> SparseFeatureMatrix:
    """`in_client_blocks` without the zeros, for float32 columns that are mostly zero; no value may be NaN."""
    writer, step = SparseWriter(directory), clients_at_once(len(names))

    def make(first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        last = min(first + step, len(client_ids))
        block = np.zeros((last - first, len(names)), np.float32)
        fill(block, first, last)
        rows, columns = np.nonzero(block)
        return np.bincount(rows, minlength=last - first), columns.astype(np.int32), block[rows, columns]

    for part in _in_order(make, range(0, len(client_ids), step)):
        writer.append(*part)
    return writer.finish(client_ids, names, units)


class SparseWriter:
    """Writes a `SparseFeatureMatrix` block of rows by block of rows, into files when there is a directory."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._lengths = [np.zeros(1, np.int64)]
        self._parts: tuple[list[np.ndarray], list[np.ndarray]] = ([np.zeros(0, np.int32)], [np.zeros(0, np.float32)])
        self._files: list[BinaryIO] = []
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            for name, (nothing,) in zip(("indices", "values"), self._parts, strict=True):
                self._files.append(_temporary(directory, name).open("wb"))
                _write_header(self._files[-1], nothing.shape, nothing.dtype)

    def append(self, lengths: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
        """Adds rows: number of entries of each one, int32 columns and float32 values of all entries."""
        self._lengths.append(lengths)
        for place, array in enumerate((indices, values)):
            if self._files:
                self._files[place].write(np.ascontiguousarray(array).data)
            else:
                self._parts[place].append(array)

    def finish(self, client_ids: np.ndarray, names: tuple[str, ...], units: tuple[str, ...]) -> SparseFeatureMatrix:
        """The matrix; its files get their names, names.json last."""
        indptr = np.cumsum(np.concatenate(self._lengths))
        if self._directory is None:
            indices, values = (np.concatenate(parts) for parts in self._parts)
            return SparseFeatureMatrix(client_ids, indptr, indices, values, names, units)
        for name, file, (nothing,) in zip(("indices", "values"), self._files, self._parts, strict=True):
            file.seek(0)
            # An npy header keeps room for a longer first dimension.
            start = _write_header(file, (int(indptr[-1]),), nothing.dtype)
            assert file.seek(0, os.SEEK_END) == start + int(indptr[-1]) * nothing.itemsize
            file.close()
            os.replace(_temporary(self._directory, name), self._directory / f"{name}.npy")
        write_array(self._directory / "client_ids.npy", client_ids)
        write_array(self._directory / "indptr.npy", indptr)
        write_json(self._directory / NAMES_FILE, {"names": names, "units": units})
        return SparseFeatureMatrix.load(self._directory, memory_map=True)


def clients_at_once(num_columns: int) -> int:
    """Clients of a block: what it takes does not grow with the number of columns either."""
    return max(1 << 8, min(BLOCK_CLIENTS, BLOCK_VALUES // max(num_columns, 1)))


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless it is one that features can be stored in."""
    if dtype not in DTYPES:
        raise ValueError(f"features: dtype must be one of {list(DTYPES)}, got '{dtype}'")


def _in_order(make: Callable[[int], T], starts: Sequence[int]) -> Iterator[T]:
    """make(start) of every start by as many threads as torch uses; few results wait for their turn."""
    threads = max(1, min(torch.get_num_threads(), len(starts)))
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in starts:
            waiting.append(pool.submit(make, start))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _of_known(block: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Sum and number of the values of each column that are not NaN; None when all are."""
    missing = np.isnan(block)
    if not missing.any():
        return None
    return np.where(missing, 0, block).sum(axis=0, dtype=np.float64), (~missing).sum(axis=0)


def _fill_missing(values: np.ndarray, known: Sequence[tuple[np.ndarray, np.ndarray] | None], step: int) -> None:
    """Puts the mean of a column's other values in the place of NaN."""
    blocks = [values[first : first + step] for first in range(0, len(values), step)]
    parts = [
        (block.sum(axis=0, dtype=np.float64), np.full(values.shape[1], len(block))) if part is None else part
        for block, part in zip(blocks, known, strict=True)
    ]
    total, number = (np.sum([part[place] for part in parts], axis=0) for place in (0, 1))
    mean = (total / np.maximum(number, 1)).astype(values.dtype)
    for block in blocks:
        rows, columns = np.nonzero(np.isnan(block))
        block[rows, columns] = mean[columns]


def _zeros(shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Untouched memory in huge pages where the system has them: np.zeros takes small ones, np.empty is not clean."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < SMALLEST_MAPPING or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A system without huge pages keeps its small ones.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: str | np.dtype) -> int:
    """Writes the header of an npy file; where its values begin."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _new_file(directory: Path, shape: tuple[int, int], dtype: str) -> tuple[int, int]:
    """Descriptor of an npy file under a temporary name with its header, and where its values begin."""
    directory.mkdir(parents=True, exist_ok=True)
    with _temporary(directory).open("wb") as file:
        start = _write_header(file, shape, dtype)
    return os.open(_temporary(directory), os.O_WRONLY), start


def _write_at(descriptor: int, block: np.ndarray, position: int) -> None:
    # Writing costs a third of filling a new memory map, whose every page is a fault of its own.
    left = memoryview(block.view(np.uint8).reshape(-1))  # type: ignore[arg-type]
    while len(left):
        written = os.pwrite(descriptor, left, position)
        left, position = left[written:], position + written


def _finished(directory: Path, client_ids: np.ndarray, names: tuple[str, ...], units: tuple[str, ...]) -> FeatureMatrix:
    """Gives the values their final name and writes the rest, names.json last."""
    matrix = FeatureMatrix(client_ids, load_array(_temporary(directory), memory_map=True), names, units)
    os.replace(_temporary(directory), directory / "values.npy")
    write_array(directory / "client_ids.npy", client_ids)
    write_json(directory / NAMES_FILE, {"names": names, "units": units})
    return matrix


def _temporary(directory: Path, name: str = "values") -> Path:
    return directory / f".{name}.npy.writing"
