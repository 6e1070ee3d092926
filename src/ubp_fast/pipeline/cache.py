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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ubp_fast import __version__
from ubp_fast.files import clear_directory, complete_directory, file_digest, writable_directory, writing_to

KEY_LENGTH = 16


def digest(value: object) -> str:
    """Hex digest of a JSON-able value; equal values give equal digests whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=KEY_LENGTH // 2).hexdigest()


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
            with writing_to(target, f"output of stage '{name}'", partial):
                clear_directory(partial, keep=frozenset(keep))
                make(partial)
                complete_directory(partial, target)
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
