"""Feature matrices of any size: made block by block of clients, straight into their file when there is one."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ubp_fast.features.matrix import NAMES_FILE, FeatureMatrix
from ubp_fast.files import load_array, write_array, write_json

# A block of 320 columns per thread stays in the cache of a large CPU while all kinds of events are added to it.
BLOCK_CLIENTS = 1 << 13
DTYPES = ("float32", "float16")
LARGEST_FLOAT16 = 65_504.0
SMALLEST_MAPPING = 1 << 22


def in_client_blocks(
    client_ids: np.ndarray,
    names: tuple[str, ...],
    units: tuple[str, ...],
    fill: Callable[[np.ndarray, int, int], None],
    directory: Path | None = None,
    dtype: str = "float32",
    block_clients: int = BLOCK_CLIENTS,
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
        block_clients: clients at a time.
    """
    check_dtype(dtype)
    shape = (len(client_ids), len(names))
    values = _zeros(shape, dtype) if directory is None else None
    file = None if directory is None else _new_file(directory, shape, dtype)
    free: list[np.ndarray] = []

    def make(first: int) -> None:
        last = min(first + block_clients, shape[0])
        if values is not None and dtype == "float32":
            fill(values[first:last], first, last)
            return
        buffer = free.pop() if free else np.empty((block_clients, shape[1]), np.float32)
        block = buffer[: last - first]
        block[:] = 0
        fill(block, first, last)
        stored = block if dtype == "float32" else block.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16)
        if values is not None:
            values[first:last] = stored
        else:
            assert file is not None
            _write_at(file[0], stored, file[1] + first * shape[1] * stored.itemsize)
        free.append(buffer)

    starts = range(0, shape[0], block_clients)
    try:
        threads = min(torch.get_num_threads(), max(len(starts), 1))
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(make, first) for first in starts]:
                done.result()
    finally:
        if file is not None:
            os.close(file[0])
    if directory is None:
        assert values is not None
        return FeatureMatrix(client_ids, values, names, units)
    return _finished(directory, client_ids, names, units)


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


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless it is one that features can be stored in."""
    if dtype not in DTYPES:
        raise ValueError(f"features: dtype must be one of {list(DTYPES)}, got '{dtype}'")


def _new_file(directory: Path, shape: tuple[int, int], dtype: str) -> tuple[int, int]:
    """Descriptor of an npy file under a temporary name with its header, and where its values begin."""
    directory.mkdir(parents=True, exist_ok=True)
    with _temporary(directory).open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
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


def _temporary(directory: Path) -> Path:
    return directory / ".values.npy.writing"
