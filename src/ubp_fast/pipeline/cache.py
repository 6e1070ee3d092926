"""Outputs of the stages on disk: found again by what they were made from, complete or not there at all.

A stage's key is a hash of its name, its configuration, the keys of its inputs and the package's own source. A stage
writes into `<name>-<key>.partial`; when it returns, the folder is flushed to disk and renamed to `<name>-<key>`. A
process killed at any moment therefore leaves either a complete output or a partial folder that the next run clears (or
resumes from, for training stages, which keep their checkpoints there).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ubp_fast import __version__

KEY_LENGTH = 16


class OutputDirectoryError(RuntimeError):
    """The output directory cannot be written, or belongs to something else."""


def writable_directory(path: Path, purpose: str) -> Path:
    """Creates `path` when needed and proves that files can be written there.

    Raises:
        OutputDirectoryError: read-only, full, or a file stands in the way; names the directory and the remedy.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        with probe.open("wb") as handle:
            handle.write(b"\0" * 4096)
            handle.flush()
            os.fsync(handle.fileno())
        probe.unlink()
    except OSError as error:
        raise OutputDirectoryError(
            f"{path}: {purpose} must be a writable directory with free space, got {error.strerror or error};"
            " free some space, change its permissions, or choose another place"
        ) from error
    return path


def digest(value: object) -> str:
    """Hex digest of a JSON-able value; equal values give equal digests whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=KEY_LENGTH // 2).hexdigest()


def file_digest(path: Path) -> str:
    """Hex digest of a file's content."""
    state = hashlib.blake2b(digest_size=KEY_LENGTH // 2)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


@cache
def source_digest() -> str:
    """Digest of the package's Python files and compiled module: a changed program never reuses an old output."""
    package = Path(__file__).resolve().parent.parent
    parts = {str(path.relative_to(package)): file_digest(path) for path in sorted(package.rglob("*.py"))}
    return digest({"version": __version__, "files": parts})


class StageCache:
    """Stage outputs below one directory, shared by all runs that use it."""

    def __init__(self, directory: Path) -> None:
        self.directory = writable_directory(directory, "the cache directory")

    def path(self, name: str, key: str) -> Path:
        """Where the complete output of a stage lies, or will lie."""
        return self.directory / f"{name}-{key}"

    def has(self, name: str, key: str) -> bool:
        """True when the output is complete."""
        return self.path(name, key).is_dir()

    def build(self, name: str, key: str, make: Callable[[Path], None], keep: Iterable[str] = ()) -> Path:
        """Returns the output of a stage, made by `make(directory)` unless it is there already.

        Args:
            name: stage name.
            key: its key, see `stage_key`.
            make: fills an empty directory (but for `keep`).
            keep: names inside a partial output that survive an interrupted run, such as a folder of checkpoints;
                they stay in the complete output.
        """
        target = self.path(name, key)
        with self._locked(target):
            if target.is_dir():
                return target
            partial = target.with_name(target.name + ".partial")
            _clear(partial, keep=frozenset(keep))
            try:
                make(partial)
            except OSError as error:
                if error.errno in (28, 30, 122):  # no space, read-only, quota
                    raise OutputDirectoryError(
                        f"{partial}: stage '{name}' must be able to write its output, got {error.strerror};"
                        " free some space and run the same command again, finished stages are kept"
                    ) from error
                raise
            _flush(partial)
            os.replace(partial, target)
            _flush_directory(target.parent)
        return target

    @contextmanager
    def _locked(self, target: Path) -> Iterator[None]:
        """Two processes with the same configuration wait for each other instead of writing the same folder."""
        lock = target.with_name(f".{target.name}.lock")
        with lock.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        # The lock file stays: removing it while another process waits on it would let a third one in.


def stage_key(name: str, config: Mapping[str, object], inputs: Mapping[str, str]) -> str:
    """Key of a stage's output.

    Args:
        name: stage name.
        config: everything from the configuration that can change the output.
        inputs: key of every input, by name.
    """
    return digest({"stage": name, "config": dict(config), "inputs": dict(inputs), "source": source_digest()})


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it when complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def copy_directory(source: Path, target: Path) -> None:
    """Copies the files of `source` to `target`, each renamed into place when complete."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        temporary = target / f".{file.name}.{os.getpid()}.tmp"
        shutil.copyfile(file, temporary)
        os.replace(temporary, target / file.name)


def _clear(directory: Path, keep: frozenset[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for child in directory.iterdir():
        if child.name not in keep:
            _remove(child)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
