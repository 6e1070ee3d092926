"""Outputs of the stages on disk: found again by what they were made from, complete or not there at all.

A stage's key is a hash of its name, its configuration, the keys of its inputs, the source that it reaches and the
versions of the libraries that it uses (`identity`). What a key stands for is kept in `records`, so that a run can say
why a stage is made again; `users` knows which runs show which outputs. A stage writes into `<name>-<key>.partial`; when
it returns, the folder is flushed to disk and renamed to `<name>-<key>`. A process killed at any moment therefore leaves
either a complete output or a partial folder that the next run clears (or resumes from, for training stages, which keep
their checkpoints there). Runs that need the same output at once wait for the one that makes it; where that one is
killed, the next goes on from what it has left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ubp_fast.events.schema import UserError
from ubp_fast.files import (
    clear_directory,
    complete_directory,
    flatten,
    load_json,
    remove_at_once,
    remove_halves,
    writable_directory,
    write_json,
    writing_to,
)

KEY_LENGTH = 16
RECORDS, USERS = "records", "users"
# Names in a message at most.
SHOWN = 3
# A folder of any other name was put there by somebody else, or the directory is no cache.
_OUTPUT = re.compile(rf"\.?[\w-]+-[0-9a-f]{{{KEY_LENGTH}}}(\.\w+)?")


def digest(value: object) -> str:
    """Hex digest of a JSON-able value; equal values give equal digests whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=KEY_LENGTH // 2).hexdigest()


class Output(NamedTuple):
    """What a stage has left in the cache.

    Attributes:
        path: its folder; ".partial" at the end where the stage did not finish.
        size: bytes.
        used_s: when it was last written, seconds since 1970.
        runs: directories of the runs that show it, or have begun it and may go on from there.
    """

    path: Path
    size: int
    used_s: float
    runs: tuple[Path, ...]


class StageCache:
    """Stage outputs below one directory, shared by all runs that use it."""

    def __init__(self, directory: Path) -> None:
        self.directory = writable_directory(directory, "the cache directory")

    def path(self, name: str, key: str) -> Path:
        """Where the complete output of a stage lies, or will lie."""
        return self.directory / f"{name}-{key}"

    def claim(self, run: Path, made: Mapping[str, Mapping[str, object]]) -> list[str]:
        """Notes that a run uses outputs, which nobody prunes from now on, and what their keys stand for.

        Args:
            run: its directory.
            made: stage -> what its output follows from, see `made_of`.

        Returns:
            The stages whose outputs are not there.
        """
        outputs = {name: f"{name}-{digest(parts)}" for name, parts in made.items()}
        run = run.resolve()
        with self._locked(self.directory):
            for folder in (self.directory / RECORDS, self.directory / USERS):
                folder.mkdir(exist_ok=True)
                remove_halves(folder)
            user = {"run": str(run), "outputs": [*outputs.values()]}
            write_json(self.directory / USERS / f"{digest(str(run))}.json", user)
            missing = [name for name, output in outputs.items() if not (self.directory / output).is_dir()]
            for name in missing:
                write_json(self.directory / RECORDS / f"{outputs[name]}.json", dict(made[name]))
        return missing

    def recorded(self, folder: Path) -> dict[str, Any] | None:
        """What an output was made of; None where nobody knows."""
        path = self.directory / RECORDS / f"{folder.name}.json"
        return load_json(path) if path.is_file() else None

    def outputs(self) -> list[Output]:
        """All complete and partial outputs, the largest first."""
        users: dict[str, list[Path]] = {}
        for path in sorted((self.directory / USERS).glob("*.json")):
            user = load_json(path)
            run = Path(user["run"])
            shown = [link.resolve() for link in (run / "stages").glob("*") if link.is_symlink()]
            names = {place.name for place in shown if place.parent == self.directory.resolve()}
            for name in names | set(user["outputs"] if run.is_dir() else ()):
                users.setdefault(name, []).append(run)
        found = []
        for folder in self.directory.iterdir():
            if folder.is_dir() and _OUTPUT.fullmatch(folder.name):
                files = [path.lstat() for path in folder.rglob("*") if path.is_file()]
                used_s = max([folder.stat().st_mtime, *(one.st_mtime for one in files)])
                size = sum(one.st_size for one in files)
                runs = users.get(folder.name.removesuffix(".partial"), ())
                found.append(Output(folder, size, used_s, tuple(runs)))
        return sorted(found, key=lambda output: (-output.size, output.path.name))

    @property
    def is_used(self) -> bool:
        """Whether runs have left something here, be it only notes of what they have shown."""
        return any((self.directory / name).is_dir() for name in (RECORDS, USERS)) or bool(self.outputs())

    def prune(self, oldest_s: float) -> list[Output]:
        """Deletes the outputs that no run uses and that were last written before this time; gives them back.

        Raises:
            UserError: somebody is making one of them.
        """
        with writing_to(self.directory, "the cache directory"), self._locked(self.directory):
            doomed = [output for output in self.outputs() if not output.runs and output.used_s <= oldest_s]
            for output in doomed:
                self.remove(output)
        return doomed

    def remove(self, output: Output) -> None:
        """Deletes an output; a run that shows it makes it anew.

        Raises:
            UserError: somebody is making it.
        """
        name = output.path.name.removesuffix(".partial")
        lock = self.directory / f".{name}.lock"
        with lock.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"cache: {output.path} is being made by a run; wait for it, or stop it") from error
            remove_at_once(output.path)
            (self.directory / RECORDS / f"{output.path.name}.json").unlink(missing_ok=True)

    def has(self, name: str, key: str) -> bool:
        """True when the output is complete."""
        return self.path(name, key).is_dir()

    def build(
        self,
        name: str,
        key: str,
        make: Callable[[Path], None],
        keep: Iterable[str] = (),
        waiting: Callable[[], None] | None = None,
    ) -> Path:
        """Returns the output of a stage, made by `make(directory)` unless it is there already.

        Args:
            name: stage name.
            key: its key, the digest of `made_of`.
            make: fills an empty directory (but for `keep`).
            keep: what of a partial output survives an interrupted run, such as a folder of checkpoints, see
                `clear_directory`; it stays in the complete output.
            waiting: called when another process is making the output, before it is waited for.
        """
        target = self.path(name, key)
        with self._locked(target, waiting):
            if target.is_dir():
                return target
            partial = target.with_name(target.name + ".partial")
            with writing_to(target, f"output of stage '{name}'", partial):
                clear_directory(partial, keep=frozenset(keep))
                make(partial)
                complete_directory(partial, target)
        return target

    @contextmanager
    def _locked(self, target: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Two processes with the same configuration wait for each other instead of writing the same folder."""
        lock = self.directory / f".{target.name}.lock"
        with lock.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        # The lock file stays: removing it while another process waits on it would let a third one in.


def key_of(folder: Path) -> str:
    """The key of a stage's output, finished or not."""
    return folder.name.removesuffix(".partial").rpartition("-")[2]


def made_of(
    name: str, config: Mapping[str, object], inputs: Mapping[str, str], sources: Mapping[str, str]
) -> dict[str, object]:
    """What a stage's output follows from; its digest is the stage's key.

    Args:
        name: stage name.
        config: everything from the configuration that can change the output.
        inputs: key of every input, by name.
        sources: digests and versions, see `identity.made_by`.
    """
    return {"stage": name, "config": dict(config), "inputs": dict(inputs), "sources": dict(sources)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why an output is made again, one text each; inputs that are new are left to the stages that make them."""
    old, new = flatten(before["config"]), flatten(now["config"])
    found = [f"{key} is {new.get(key)!r}, was {old.get(key)!r}" for key in sorted(old.keys() | new.keys())
             if old.get(key) != new.get(key)]  # fmt: skip
    old, new = before["sources"], now["sources"]
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    for key in changed:
        kind, _, what = key.partition(" of ")
        if kind == "version":
            found.append(f"{what} is {new.get(key, 'gone')}, was {old.get(key, 'not used')}")
    modules = [key.partition(" of ")[2] for key in changed if key.startswith("source")]
    if modules:
        more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
        found.append(f"{', '.join(modules[:SHOWN])}{more} changed")
    old, new = before["inputs"], now["inputs"]
    again = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return found + ([f"made from {', '.join(again)}, which changed"] if again and not found else [])
