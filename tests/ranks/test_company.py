"""What processes are told by whoever started them; `tests/pipeline/test_hosts.py` lets them work."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch.multiprocessing

from ubp_fast.events.schema import UserError
from ubp_fast.ranks.company import Launch, gpu_of, joined

TOLD = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "5"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {**TOLD, "MASTER_ADDR": "host"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_launch(told: pytest.MonkeyPatch) -> None:
    assert Launch.of_environment() == Launch(3, 4, 1, 2, "host:5")
    told.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match=r"WORLD_SIZE must come with RANK, .* got KeyError\('LOCAL_RANK'\); start with"):
        Launch.of_environment()
    told.setenv("WORLD_SIZE", "1")
    assert Launch.of_environment() is None
    with joined(1.0) as company:
        assert company is None


def test_others_that_do_not_come(told: pytest.MonkeyPatch) -> None:
    told.setenv("MASTER_ADDR", "127.0.0.1")
    said = r"all 4 processes must meet at 127\.0\.0\.1:5 within 1 s, got .*; start the same command"
    with pytest.raises(UserError, match=said), joined(1.0):
        pass


def test_every_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_of(1, 2) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert gpu_of(1, 2) == "7"


def meet_and_leave(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def threads() -> str:
        return " ".join(
            file.read_text() for file in Path("/proc/self/task").glob("*/comm") if "gloo" in file.read_text()
        )

    with joined(60.0) as company:
        assert company is not None and threads()
    (folder / str(rank)).write_text(threads(), encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="names of threads are known on Linux")
def test_who_left_has_no_thread_of_the_connection(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(meet_and_leave, (port, tmp_path), nprocs=2)
    assert [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(2)] == ["", ""]
