"""Files and directories: complete or not at all, and nothing in them is run."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from support.runs import contents

from ubp_fast import files
from ubp_fast.files import (
    OutputDirectoryError,
    clear_directory,
    complete_directory,
    copy_directory,
    load_array,
    load_arrays,
    load_json,
    load_tensors,
    published_directory,
    writable_directory,
    write_array,
    write_arrays,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
    writing_to,
)


def test_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with published_directory(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert os.listdir(target.parent) == ["out"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with published_directory(tmp_path / "out") as partial:
            (partial / "file").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert os.listdir(tmp_path) == []


def test_an_empty_directory_may_be_there_a_used_one_may_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with published_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    with (
        pytest.raises(OutputDirectoryError, match="out: output must be a new or empty directory"),
        published_directory(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / "file").exists()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from ubp_fast.files import published_directory\n"
        "with published_directory(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'old').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with published_directory(tmp_path / "out") as partial:
        (partial / "new").write_text("y")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_full_and_read_only_disks(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(OutputDirectoryError, match=r"out: output must be a writable directory .* free some space"),
        published_directory(tmp_path / "out"),
    ):
        raise OSError(code, os.strerror(code))  # as a write to a full disk does, which names no file
    assert os.listdir(tmp_path) == []


def test_a_link_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputDirectoryError, match="must be a writable directory"), writing_to(tmp_path, "the run"):
        raise OSError(errno.ENOSPC, "No space left on device", "../elsewhere", None, str(tmp_path / "stages" / "link"))


def test_a_file_in_the_way_of_the_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputDirectoryError, match="must be a writable directory"),
        published_directory(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with (
            pytest.raises(OutputDirectoryError, match="must be a writable directory"),
            published_directory(tmp_path / "out"),
        ):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_mistakes_inside_the_directory_stay_what_they_are(tmp_path: Path) -> None:
    def make_it_twice() -> None:
        with published_directory(tmp_path / "out") as partial:
            (partial / "twice").mkdir()
            (partial / "twice").mkdir()

    with pytest.raises(FileExistsError):
        make_it_twice()
    assert os.listdir(tmp_path) == []


def test_errors_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), published_directory(tmp_path / "out"):
        (Path(tmp_path.anchor) / "no" / "such" / "input").read_text()


def test_a_broken_link_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(OutputDirectoryError, match=r"remove the file or the broken link that stands at .*/link\b"):
            writable_directory(path, "the run directory")


def test_a_place_where_nothing_can_be_made_is_named() -> None:
    with pytest.raises(OutputDirectoryError, match=r"No such file.*; make the directory above it, or choose"):
        writable_directory(Path("/proc/run"), "the run directory")


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="must be a writable directory"):
        writable_directory(tmp_path / "file" / "below", "the run directory")


def test_read_only_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)  # permissions do not stop root, so the refusal is played
    with pytest.raises(OutputDirectoryError, match="must be a writable directory with free space, got Read-only"):
        writable_directory(tmp_path, "the run directory")


def test_copy_directory_replaces_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "a").write_text("new")
    target.mkdir()
    (target / "a").write_text("old")
    copy_directory(source, target)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("a", "new")]


@pytest.mark.parametrize("moment", ["write", "flush", "rename"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    write_text(tmp_path / "file", "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(path: Path) -> None:
        path.write_text("half")
        if moment == "write":
            refuse()

    if moment != "write":
        monkeypatch.setattr(os, "fsync" if moment == "flush" else "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("moment", ["before the flush", "before the name", "after the name"])
def test_a_kill_leaves_the_old_file_or_the_new(tmp_path: Path, moment: str) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from ubp_fast.files import write_text\n"
        "def kill(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "moment, real = sys.argv[2], os.replace\n"
        "if moment == 'before the flush': os.fsync = kill\n"
        "if moment == 'before the name': os.replace = kill\n"
        "if moment == 'after the name': os.replace = lambda *names: (real(*names), kill())\n"
        "write_text(Path(sys.argv[1]), 'new' * 1000)"
    )
    (tmp_path / "file").write_text("old")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", program, str(tmp_path / "file"), moment]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == ("new" * 1000 if moment == "after the name" else "old")


def test_contents_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (calls.append(name), real(*given))[1])
    write_text(tmp_path / "file", "x")
    assert calls == ["fsync", "replace", "fsync"], "the last one is of the directory, where the name is"


def test_halves_are_not_published(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    (partial / "inside").mkdir(parents=True)
    for name in ("whole.json", ".whole.json.7.tmp", "inside/.part.npy.7.tmp"):
        (partial / name).write_text("x")
    complete_directory(partial, tmp_path / "done")
    assert [str(path.relative_to(tmp_path / "done")) for path in (tmp_path / "done").rglob("*")] == [
        "inside",
        "whole.json",
    ]


def test_halves_in_a_kept_folder_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("checkpoint.pt", ".checkpoint.pt.17.tmp"):
        (tmp_path / "kept" / name).write_text("x")
    (tmp_path / "rest").mkdir()
    clear_directory(tmp_path, frozenset({"kept"}))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["kept", "kept/checkpoint.pt"]


def test_values_come_back(tmp_path: Path) -> None:
    array = np.arange(1200, dtype=np.float32).reshape(3, 400)
    for name, part in (("whole", array), ("empty", array[:0]), ("columns", np.asfortranarray(array))):
        write_array(tmp_path / name, part)
        for memory_map in (False, True):
            np.testing.assert_array_equal(load_array(tmp_path / name, memory_map), part)
    assert isinstance(load_array(tmp_path / "whole", memory_map=True), np.memmap)
    write_json(tmp_path / "json", {"a": [1, None, "\u00e4"]})
    assert load_json(tmp_path / "json") == {"a": [1, None, "\u00e4"]}
    tensors = {"half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(), "steps": torch.tensor(3)}
    write_tensors(tmp_path / "tensors", tensors)
    torch.testing.assert_close(load_tensors(tmp_path / "tensors"), tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel which files are mapped")
def test_named_arrays_are_copied_or_mapped(tmp_path: Path) -> None:
    """Weights of items are hundreds of MB: mapped pages are the system's, a copy is the process's own."""
    path = tmp_path / "arrays.safetensors"
    arrays = {"a/items": np.arange(7, dtype=np.int32), "b": np.arange(24.0).reshape(4, 6), "none": np.zeros((0, 3))}
    write_arrays(path, arrays)

    def is_mapped() -> bool:
        return str(path) in {one.path for one in psutil.Process().memory_maps()}

    for memory_map in (False, True):
        found = load_arrays(path, memory_map)
        assert is_mapped() == memory_map
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    found["b"][:] = 0  # of this process alone
    np.testing.assert_array_equal(load_arrays(path)["b"], arrays["b"])


@pytest.mark.parametrize(
    "form", ["save_array", "create_array", "save_table", "write_arrays", "write_tensors", "write_text"]
)
def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path: Path, form: str) -> None:
    """No form ends without a word, as `np.save` does when its last buffer does not fit, or by a signal."""
    program = (
        "import resource, signal, sys; from pathlib import Path; import numpy as np; from ubp_fast import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "values, form, path = np.arange(200.0), sys.argv[1], Path(sys.argv[2])\n"
        "if form == 'write_tensors': import torch; values = torch.arange(200.0)\n"
        "given = {'write_text': 'x' * 1700, 'create_array': np.float64}.get(form, {'a': values})\n"
        "if form == 'save_array': given = values\n"
        "if form == 'save_table': import polars; given = polars.DataFrame({'a': np.random.rand(200)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
        "try: getattr(files, form)(path, given, *([(200,)] if form == 'create_array' else []))\n"
        "except OSError as error: print(error.errno)"
    )
    search = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-c", program, form, str(tmp_path / "file")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search}, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{errno.EFBIG}\n"), done.stderr


def test_arrays_are_written_here_alone() -> None:
    source = Path(files.__file__).parent
    ways = ("np.save(", "open_memmap(", "save_file(", ".tofile(")
    texts = {str(path.relative_to(source)): path.read_text() for path in source.rglob("*.py")}
    assert {name for name, text in texts.items() if any(way in text for way in ways)} == {"files.py"}


def test_what_is_no_plain_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "json", float("nan"))
    with pytest.raises(ValueError, match="allow_pickle"):
        write_array(tmp_path / "array", np.array([{}]))
    assert not list(tmp_path.iterdir())
    np.save(tmp_path / "array.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_array(tmp_path / "array.npy")


@pytest.mark.parametrize("kinds", ["file file", "file directory", "directory file", "directory directory"])
@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_what_is_replaced_is_there_until_the_other_is(
    kinds: str, dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, kind: str, text: str) -> Path:
        path = tmp_path / name
        if kind == "directory":
            path.mkdir()
        (path / "inside" if kind == "directory" else path).write_text(text)
        return path

    def seen(path: Path) -> str:
        return (path / "inside" if path.is_dir() else path).read_text()

    old, new = kinds.split()
    path, complete = make("shown", old, "old"), make("complete", new, "new")
    calls: list[object] = []
    replace = os.replace

    def dies(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > dies_at:  # a killed process gives nothing back
            raise KeyboardInterrupt
        replace(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", dies)
        files.put_in_place(complete, path)
    files.restore(path)
    assert seen(path) == ("new" if not complete.exists() else "old")
    if complete.exists():
        files.put_in_place(complete, path)
    assert seen(path) == "new"
    assert [child.name for child in tmp_path.iterdir()] == ["shown"]

    with monkeypatch.context() as patch:
        patch.setattr(files, "_delete", lambda path: path.exists() and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.remove_at_once(path)
    assert not path.exists(), "not even half of it"
    files.remove_at_once(path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_takes_the_place_of_all_that_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target / "inner"):
        folder.mkdir(parents=True)
    (source / "new").write_text("new")
    (target / "inner" / "old").write_text("old")
    files.replace_by_copy(source, target)
    assert contents(target) == {"new": b"new"}
    files.replace_by_copy(source / "new", target)
    assert target.read_text() == "new"
    files.replace_by_copy(source, target)
    assert contents(target) == {"new": b"new"}
    assert sorted(child.name for child in tmp_path.iterdir()) == ["source", "target"]


def test_a_scratch_directory_begins_empty_and_goes(tmp_path: Path) -> None:
    place = tmp_path / ".scratch"
    place.mkdir()
    (place / "left by a kill").touch()
    with files.scratch_directory(place) as folder:
        assert list(folder.iterdir()) == []
        (folder / "something").touch()
    assert not place.exists()
