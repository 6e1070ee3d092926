"""Directories that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ubp_fast.events.schema import DataError


@contextmanager
def published_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary directory beside `path` that takes its name when the block ends without an error.

    After an error the temporary directory is removed; after a kill it stays as `.<name>.partial` and the next attempt
    clears it. Two processes must not make the same directory at once.

    Raises:
        DataError: `path` holds something already, or cannot be written (read-only, full, no such parent).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise DataError(
                f"{path}: output must be a new or empty directory, got one in use; remove it or name another"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush_file(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.filename is not None and not _inside(Path(os.fsdecode(error.filename)), path, partial):
            raise  # about some other file, such as an input
        raise DataError(
            f"{path}: output must be a writable directory on a disk with space left, got {error.strerror or error};"
            " free some space, change its permissions, or choose another place"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _inside(file: Path, path: Path, partial: Path) -> bool:
    return file in (path, partial, *path.parents) or path in file.parents or partial in file.parents


def _flush(directory: Path) -> None:
    """Contents reach the disk before the name does, so that a power cut cannot leave a complete name on empty files."""
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            _flush_file(file)
    _flush_file(directory)


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
