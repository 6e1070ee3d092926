from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ubp_fast.events.publish import published_directory
from ubp_fast.events.schema import DataError


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
        pytest.raises(DataError, match="out: output must be a new or empty directory"),
        published_directory(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out" / "file").exists()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from ubp_fast.events.publish import published_directory\n"
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
        pytest.raises(DataError, match=r"out: output must be a writable directory .* free some space"),
        published_directory(tmp_path / "out"),
    ):
        raise OSError(code, os.strerror(code))  # as a write to a full disk does, which names no file
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_of_the_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="must be a writable directory"), published_directory(tmp_path / "file" / "out"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DataError, match="must be a writable directory"), published_directory(tmp_path / "out"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_errors_about_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), published_directory(tmp_path / "out"):
        (Path(tmp_path.anchor) / "no" / "such" / "input").read_text()
