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
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch

from ubp_fast.features.matrix import NAMES_FILE, FeatureMatrix, SparseFeatureMatrix
from ubp_fast.features.scaling import Rows
from ubp_fast.files import load_array, write_array, write_json

# A block of 320 columns per thread stays in the cache of a large CPU while all kinds of events are added to it.
BLOCK_CLIENTS = 1 << 13
BLOCK_VALUES = 1 << 22
SMALLEST_BLOCK = 1 << 8
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
    missing: Callable[[Rows], np.ndarray] | None = None,
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
        missing: gives what stands for NaN, where a client lacks what a column measures, float [F]; it is called with
            the matrix. None: there is no NaN.
    """
    shape = (len(client_ids), len(names))
    step = clients_at_once(shape[1])
    values: Any = _zeros(shape, dtype) if directory is None else None
    file = None if directory is None else _ArrayFile(directory, "values", np.dtype(dtype), shape[1:])
    free: list[Any] = []

    def make(first: int) -> np.ndarray:
        last = min(first + step, shape[0])
        if values is not None and dtype == "float32":
            fill(values[first:last], first, last)
            return values[first:last]
        try:
            block = free.pop()[: last - first]
        except IndexError:
            block = np.empty((step, shape[1]), np.float32)[: last - first]
        block[:] = 0
        fill(block, first, last)
        return block

    for first, block in zip(range(0, shape[0], step), _in_order(make, range(0, shape[0], step)), strict=True):
        if values is None or dtype != "float32":
            stored = block if dtype == "float32" else block.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16)
            if file is not None:
                file.append(stored)
            elif values is not None:
                values[first : first + len(block)] = stored
            free.append(block.base)
    path = None if file is None else file.complete()
    if missing is not None and names:
        whole = values if path is None else np.load(path, mmap_mode="r+", allow_pickle=False)
        means = missing(whole).astype(whole.dtype)
        for first in range(0, len(whole), step):
            rows, columns = np.nonzero(np.isnan(whole[first : first + step]))
            whole[first + rows, columns] = means[columns]
    made = values if path is None else load_array(path, memory_map=True)
    matrix = FeatureMatrix(client_ids, made, names, units)
    if file is not None and directory is not None:
        file.publish()
        _write_names(directory, client_ids, names, units)
    return matrix


def in_sparse_blocks(
    client_ids: np.ndarray, names: tuple[str, ...], units: tuple[str, ...], fill: Fill, directory: Path | None = None
) -> SparseFeatureMatrix:
    """`in_client_blocks` without the zeros, for float32 columns that are mostly zero."""
    writer, step = SparseWriter(directory), clients_at_once(len(names))

    def make(first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        last = min(first + step, len(client_ids))
        block = np.zeros((last - first, len(names)), np.float32)
        fill(block, first, last)
        FeatureMatrix(client_ids[first:last], block, names, units)  # raises what it must not hold
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
        nothing = (np.zeros(0, np.int32), np.zeros(0, np.float32))
        self._parts: Any = tuple([array] for array in nothing)
        named = zip(("indices", "values"), nothing, strict=True)
        self._files = [] if directory is None else [_ArrayFile(directory, name, array.dtype) for name, array in named]

    def append(self, lengths: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
        """Adds rows: number of entries of each one, int32 columns and float32 values of all entries."""
        self._lengths.append(lengths)
        for target, array in zip(self._files or self._parts, (indices, values), strict=True):
            target.append(array)

    def finish(self, client_ids: np.ndarray, names: tuple[str, ...], units: tuple[str, ...]) -> SparseFeatureMatrix:
        """The matrix; its files get their names, names.json last."""
        indptr = np.cumsum(np.concatenate(self._lengths))
        if self._directory is None:
            indices, values = (np.concatenate(parts) for parts in self._parts)
            return SparseFeatureMatrix(client_ids, indptr, indices, values, names, units)
        for file in self._files:
            file.complete()
            file.publish()
        write_array(self._directory / "indptr.npy", indptr)
        _write_names(self._directory, client_ids, names, units)
        return SparseFeatureMatrix.load(self._directory, memory_map=True)


class _ArrayFile:
    """An npy file that grows by its first dimension, under a temporary name until it is published.

    Writing costs a third of filling a new memory map, whose every page is a fault of its own.
    """

    def __init__(self, directory: Path, name: str, dtype: np.dtype, row: tuple[int, ...] = ()) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._final = directory / f".{name}.npy.writing", directory / f"{name}.npy"
        self._dtype, self._row, self._length = dtype, row, 0
        with self._path.open("wb") as file:
            self._start = self._write_header(file)

    def _write_header(self, file: BinaryIO) -> int:
        shape, descr = (self._length, *self._row), np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        return file.tell()

    def append(self, array: np.ndarray) -> None:
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(array).data)
        self._length += len(array)

    def complete(self) -> Path:
        """Ends the file; its path so far."""
        with self._path.open("r+b") as file:
            end = self._write_header(file)
        # A header keeps room for the digits of a longer first dimension.
        assert end == self._start
        return self._path

    def publish(self) -> None:
        os.replace(self._path, self._final)


def _write_names(directory: Path, client_ids: np.ndarray, names: tuple[str, ...], units: tuple[str, ...]) -> None:
    write_array(directory / "client_ids.npy", client_ids)
    write_json(directory / NAMES_FILE, {"names": names, "units": units})


def clients_at_once(num_columns: int) -> int:
    """Clients of a block, fewer when the columns are many."""
    return max(SMALLEST_BLOCK, min(BLOCK_CLIENTS, BLOCK_VALUES // max(num_columns, 1)))


def _in_order(make: Callable[[int], T], starts: Sequence[int]) -> Iterator[T]:
    """make(start) of every start by as many threads as torch uses; few results wait for their turn."""
    threads = max(1, min(torch.get_num_threads(), len(starts)))
    if threads == 1:
        yield from map(make, starts)
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for start in starts:
            waiting.append(pool.submit(make, start))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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
