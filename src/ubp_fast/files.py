"""Files and directories that appear complete or not at all, and reading without running what a file holds.

Contents reach the disk before the name does, and the name changes in one step: a process that is killed, a full disk or
a power cut leaves the old file or the new one, never a half. Every format here is data: npy without objects, JSON,
safetensors. Objects in buckets are read as copies and put whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from polars import DataFrame
    from torch import Tensor

NO_REASON = "a write that failed, of which is said no more than"
# What a file is called while it is written.
_HALF = ".*.tmp"
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ELOOP)
# What tells versions of an object apart, by the names that stores give it.
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "created")


class OutputDirectoryError(RuntimeError):
    """A directory cannot be written, or belongs to something else."""


class ObjectError(RuntimeError):
    """Objects of a bucket cannot be listed, read or written."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, flushes it to disk and gives it the name.

    When `write` fails, the temporary file is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writes do not tell of which file they are
        raise
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def write_json(path: Path, value: object) -> None:
    """Writes strict JSON: a NaN is a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def load_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def why(error: Exception) -> str:
    """What is wrong, in the system's words where a file is: without its number and name, which messages have before."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def file_digest(path: Path) -> str:
    """Hex digest of a file's content."""
    state = hashlib.blake2b(digest_size=8)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an npy file; an array of objects is a ValueError."""
    write_atomically(path, lambda file: save_array(file, array))


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an npy file under its name at once, for directories that are published as a whole.

    `np.save` hands large buffers to C, which does not tell when the last of them meets a full disk.
    """
    whole = np.ascontiguousarray(array).reshape(np.shape(array))
    if whole.dtype.hasobject:
        raise ValueError(f"{path}: arrays of objects are not written, as allow_pickle=False has it")
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(whole)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(whole.reshape(-1).view(np.uint8).data if whole.size else b"")


def create_array(path: Path, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """A new npy file, mapped for writing, whose space is taken at once: a full disk is an OSError here.

    Without that, the first touch of a page for which there is no room ends the process without a word.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def write_table(path: Path, frame: DataFrame) -> None:
    """Writes a Parquet file."""
    write_atomically(path, lambda file: save_table(file, frame))


def save_table(path: Path, frame: DataFrame, **options: Any) -> None:
    """Writes a Parquet file under its name at once, for directories that are published as a whole."""
    import polars as pl

    try:
        frame.write_parquet(path, **options)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _of_disk(error, path) from error


def _of_disk(error: Exception, path: Path) -> OSError:
    """What a library written in Rust says of the disk, with the number that it mentions; else a second try finds it."""
    number = re.search(r"(?:code: |os error )(\d+)", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    try:
        with path.open("ab") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        return OSError(reason.errno, reason.strerror, str(path))
    return OSError(errno.EIO, f"{NO_REASON} '{error}'", str(path))


def load_array(path: Path, memory_map: bool = False) -> np.ndarray:
    """An npy file in memory or, with `memory_map` and if it holds anything, mapped read-only.

    Raises:
        ValueError: the file holds objects, or is no complete npy file.
    """
    if memory_map:
        with suppress(ValueError):  # an array without values cannot be mapped
            return np.load(path, mmap_mode="r", allow_pickle=False)
    return np.load(path, allow_pickle=False)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of any device as safetensors."""
    from safetensors.torch import save_file  # torch takes seconds to import, and readers of events need none

    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda file: _save_tensors(save_file, stored, file))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file on the CPU, mapped into memory: what is written to a tensor does not reach the file."""
    from safetensors.torch import load_file

    return load_file(path)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as safetensors."""
    from safetensors.numpy import save_file

    stored = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(path, lambda file: _save_tensors(save_file, stored, file))


def _save_tensors(save_file: Callable[..., None], stored: Mapping[str, Any], file: Path) -> None:
    from safetensors import SafetensorError

    try:
        save_file(stored, file)
    except SafetensorError as error:
        raise _of_disk(error, file) from error


def load_arrays(path: Path, memory_map: bool = False) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote, in memory or, with `memory_map`, mapped: pages are read when they are looked at."""
    if memory_map:  # torch maps where numpy copies
        return {name: tensor.numpy() for name, tensor in load_tensors(path).items()}
    from safetensors.numpy import load_file

    return load_file(path)


def copy_directory(source: Path, target: Path) -> None:
    """Copies the files of `source` and of its folders to `target`, each complete or not there."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_dir():
            copy_directory(file, target / file.name)
        else:
            copy_file(file, target / file.name)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, complete or not at all."""
    write_atomically(target, lambda copy: shutil.copyfile(source, copy))


def replace_by_copy(source: Path, target: Path) -> None:
    """Puts a copy of a file or directory in the place of what is there: never some files of these, some of those."""
    partial = target.with_name(f".{target.name}.partial")
    _delete(partial)
    try:
        (copy_directory if source.is_dir() else copy_file)(source, partial)
        put_in_place(partial, target)
    except BaseException:
        with suppress(OSError):
            _delete(partial)
        raise


@contextmanager
def published_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary directory beside `path` that takes its name when the block ends without an error.

    After an error the temporary directory is removed; after a kill it stays as `.<name>.partial` and the next attempt
    clears it. Two processes must not make the same directory at once.

    Raises:
        OutputDirectoryError: `path` holds something already, or cannot be written (read-only, full, no such parent).
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing_to(path, "output", partial):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputDirectoryError(
                f"{path}: output must be a new or empty directory, got one in use; remove it or name another"
            )
        try:
            clear_directory(partial)
            yield partial
            complete_directory(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def complete_directory(partial: Path, path: Path) -> None:
    """Flushes all files below `partial` to disk and puts it in the place of `path`; halves that a kill left go."""
    remove_halves(partial)
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            _flush(file)
    _flush(partial)
    put_in_place(partial, path)


def publish_first(partial: Path, path: Path) -> None:
    """Flushes all files below `partial` to disk and gives it the name, unless another one was faster."""
    for file in sorted(partial.rglob("*")):
        if file.is_file():
            _flush(file)
    _flush(partial)
    try:
        os.rename(partial, path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _flush(path.parent)


def complete_file(partial: Path, path: Path) -> None:
    """Flushes a file to disk and puts it in the place of `path`."""
    _flush(partial)
    put_in_place(partial, path)


def put_in_place(complete: Path, path: Path) -> None:
    """Gives a complete file or directory the name of another one beside it, which stays whole until then.

    Only between two files that is one step. Else a kill in the middle leaves the earlier one as `.<name>.before`, and
    `restore` gives it back.
    """
    restore(path)
    before = _before(path)
    if path.exists() and (path.is_dir() or complete.is_dir()):
        os.replace(path, before)
        try:
            os.replace(complete, path)
        except BaseException:
            os.replace(before, path)
            raise
    else:
        os.replace(complete, path)
    _flush(path.parent)
    remove_at_once(before)


def restore(path: Path) -> None:
    """Clears up what a kill in the middle of `put_in_place` or `remove_at_once` has left beside `path`."""
    if _before(path).exists() and not path.exists():
        os.replace(_before(path), path)
    remove_at_once(_before(path))
    _delete(_doomed(path))


def remove_at_once(path: Path) -> None:
    """Deletes a file or directory, if it is there; nobody finds half of it."""
    doomed = _doomed(path)
    _delete(doomed)
    if path.exists():
        os.replace(path, doomed)
        _delete(doomed)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def _doomed(path: Path) -> Path:
    return path.with_name(f".{path.name}.doomed")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """A directory of that name, empty, while the block runs; one that a kill has left is emptied by the next."""
    clear_directory(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_halves(directory: Path) -> None:
    """Deletes what killed processes have left half written below a directory; nobody may be writing there."""
    for half in list(directory.rglob(_HALF)):
        half.unlink()


def clear_directory(directory: Path, keep: frozenset[str] = frozenset()) -> None:
    """Creates a directory or empties it, but for what `keep` names; half files that a kill left there go, too.

    Args:
        directory: created with its parents.
        keep: names, with `*` and `[!.]` as in a shell.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for child in directory.iterdir():
        if any(fnmatchcase(child.name, pattern) for pattern in keep):
            remove_halves(child)
        elif child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def writable_directory(path: Path, purpose: str) -> Path:
    """Creates `path` when needed and proves that files can be written there.

    Raises:
        OutputDirectoryError: read-only, full, or a file stands in the way; names the directory and the remedy.
    """
    with writing_to(path, purpose):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test.{os.getpid()}.tmp"
        with probe.open("wb") as handle:
            handle.write(b"\0" * 4096)
            handle.flush()
            os.fsync(handle.fileno())
        probe.unlink(missing_ok=True)
    return path


@contextmanager
def writing_to(path: Path, purpose: str, partial: Path | None = None) -> Iterator[None]:
    """Turns a refusal to write below `path` (or below `partial`, which will become it) into an error with a remedy.

    Raises:
        OutputDirectoryError: read-only, full, no permission, or a file stands in the way of a directory.
    """
    try:
        yield
    except OSError as error:
        files = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name is not None]
        places = {place for one in (path, partial or path) for place in (one, *one.parents)}
        is_above = not files or bool(places & {*files})
        is_below = any({path, partial} & {*file.parents} for file in files)
        is_refused = error.errno in _REFUSALS and (is_above or is_below)
        if not is_refused and not (error.errno in _IN_THE_WAY and files and is_above):
            raise
        remedy = "free some space, change its permissions"
        if error.errno == errno.ENOENT:
            remedy = "make the directory above it"
        elif error.errno in _IN_THE_WAY:
            remedy = f"remove the file or the broken link that stands at {files[0] if files else path}"
        raise OutputDirectoryError(
            f"{path}: {purpose} must be a writable directory with free space, got {error.strerror or error};"
            f" {remedy}, or choose another place"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def is_url(place: object) -> bool:
    """Whether a place is the address of objects, such as s3://bucket/folder, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


@contextmanager
def bucket_of(url: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """The file system of a URL and the path in it; what the store refuses in the block names the URL.

    Raises:
        ObjectError: also where the library for such URLs is missing. A disk of this machine that is full or read-only,
            and mistakes of ours, stay what they are.
    """
    try:
        from fsspec.core import url_to_fs

        yield url_to_fs(url)
    except ImportError as error:
        raise ObjectError(
            f"{url}: such addresses need a library, got '{error}'; pip install 'ubp_fast[s3]' for s3://, gcsfs for gs://,"
            " adlfs for az://"
        ) from error
    except Exception as error:
        if not _is_of_store(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ObjectError(
            f"{url}: objects must be there and allowed, got '{reason}'; check the name, the credentials and, for"
            " stores other than Amazon's, AWS_ENDPOINT_URL"
        ) from error


def _is_of_store(error: Exception) -> bool:
    """Every store has errors of its own, most of them are those of files, some say that a name is no name of theirs."""
    if isinstance(error, OSError):
        return error.errno not in _OF_DISK
    return isinstance(error, ValueError) or type(error).__module__.partition(".")[0] not in ("builtins", "ubp_fast")


def find_objects(url: str) -> dict[str, str]:
    """URL of every object -> what tells its version from others, by URL.

    Args:
        url: of an object, of a folder, or a pattern, see `is_pattern`.

    Raises:
        ObjectError: the store says no.
    """
    with bucket_of(url) as (system, path):
        system.invalidate_cache()
        found = (system.glob if is_pattern(path) else system.find)(path, detail=True)
        facts = {system.unstrip_protocol(name): one for name, one in found.items() if one["type"] == "file"}
    return {name: _version(one) for name, one in sorted(facts.items())}


def is_pattern(url: str) -> bool:
    """Whether an address stands for several: `*`, `**`, `?` and `[ab]` as in a shell."""
    return any(sign in url for sign in "*?[")


def _in_bucket(url: str) -> str:
    from fsspec.core import strip_protocol

    path: str = strip_protocol(url)
    return path


def _version(facts: Mapping[str, Any]) -> str:
    version = next((facts[name] for name in _VERSIONS if facts.get(name)), "")
    return f"{facts['size']} {version}".replace('"', "")


@contextmanager
def copies_of(objects: Mapping[str, str]) -> Iterator[Path]:
    """A folder with copies of objects while the block runs, where temporary files lie (TMPDIR).

    Args:
        objects: relative name of the copy -> URL.

    Raises:
        ObjectError: an object cannot be read, or its name leads out of the folder.
        OutputDirectoryError: there is no space for the copies.
    """
    for name, url in objects.items():  # a key is any text, of whoever may write to the bucket
        if (place := Path(name)).is_absolute() or ".." in place.parts:
            raise ObjectError(f"{url}: objects must lie inside their folder, got '{name}'; rename or remove it")
    with TemporaryDirectory(prefix="ubp_fast-") as folder:
        copies = [str(Path(folder) / name) for name in objects]
        with writing_to(Path(folder), "the folder of temporary files (TMPDIR)"):
            for copy in copies:
                Path(copy).parent.mkdir(parents=True, exist_ok=True)
            if objects:
                with bucket_of(next(iter(objects.values()))) as (system, _):
                    system.get([_in_bucket(url) for url in objects.values()], copies)
        yield Path(folder)
