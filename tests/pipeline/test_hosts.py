"""Several hosts, played by network namespaces: same bytes as one host; a link that is cut, a process that is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.runs import TINY

from ubp_fast.files import load_json
from ubp_fast.models.training import LOSSES_FILE, MODEL_FILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
HOSTS = ("10.26.0.1", "10.26.0.2")
EPOCHS = 30
SHOP = (
    *TINY,
    *("data=synthetic", "data.clients=150", "data.skus=60", "data.urls=80", "stages=contrastive"),
    "stacking.blocks=[contrastive,decayed]",
    "contrastive.config.history={heads: 2, feed_forward: 64}",
    "contrastive.config.future={heads: 2, feed_forward: 64}",
    "contrastive.config.events={sku_width: 16, url_width: 16, code_width: 16, age_width: 16, age_bins: 16}",
    f"contrastive.training={{checkpoint_every_s: 0, batch_size: 16, epochs: {EPOCHS}}}",
)
Started = subprocess.Popen[str]


def started(*arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> Started:
    command = [*prefix, sys.executable, *arguments]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=everything, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(root: Path, *more: str) -> Started:
    """A run by processes of this host."""
    return started("-m", "ubp_fast.run", *SHOP, f"root={root}", *more)


def said(process: Started, wait_s: float = 600) -> str:
    """What a process printed until it ended."""
    text, _ = process.communicate(timeout=wait_s)
    return text


def training(root: Path) -> dict[str, bytes]:
    (folder,) = root.glob("cache/contrastive-*/training")
    return {name: (folder / name).read_bytes() for name in (MODEL_FILE, LOSSES_FILE)}


def checkpoints(root: Path) -> list[Path]:
    return [*root.glob("cache/contrastive-*.partial/training/checkpoint.pt")]


def wait_until(is_so: Callable[[], object], processes: list[Started]) -> None:
    while not is_so():
        assert all(one.poll() is None for one in processes), [said(one) for one in processes]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of one host make."""
    root = tmp_path_factory.mktemp("one-host")
    process = run(root, "compute.devices=2")
    text = said(process)
    assert process.returncode == 0, text
    return root


class Link:
    """Two hosts with a cable between them."""

    def __init__(self) -> None:
        self.names = tuple(f"ubp{os.getpid()}{side}" for side in "ab")
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", f"{first}v", "netns", first, "type", "veth", "peer", "name", f"{second}v", "netns", second)
        for name, address in zip(self.names, HOSTS, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"{name}v")
            ip("-n", name, "link", "set", "lo", "up")
        self.connect(True)

    def connect(self, is_up: bool) -> None:
        for name in self.names[: 2 if is_up else 1]:
            ip("-n", name, "link", "set", f"{name}v", "up" if is_up else "down")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def runs(self, roots: tuple[Path, Path], *more: str) -> list[Started]:
        """The run of every host under torchrun."""
        return [
            started(
                *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"),
                *(f"--master-addr={HOSTS[0]}", "--master-port=29500", "-m", "ubp_fast.run"),
                *(*SHOP, f"root={root}", *more),
                prefix=("ip", "netns", "exec", name),
                GLOO_SOCKET_IFNAME=f"{name}v",
            )
            for rank, (name, root) in enumerate(zip(self.names, roots, strict=True))
        ]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def link() -> Iterator[Link]:
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("needs network namespaces and the command ip")
    found = Link.__new__(Link)
    try:
        found.__init__()  # type: ignore[misc]
    except subprocess.CalledProcessError as error:
        found.remove()
        pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
    yield found
    found.remove()


def test_two_hosts_train_what_one_trains(link: Link, undisturbed: Path, tmp_path: Path) -> None:
    """Each has a disk of its own."""
    roots = (tmp_path / "first", tmp_path / "second")
    processes = link.runs(roots)
    texts = [said(one) for one in processes]
    assert [one.returncode for one in processes] == [0, 0], texts
    assert training(roots[0]) == training(undisturbed)
    assert not [*roots[1].glob("cache/contrastive-*")]


def test_a_link_is_cut(link: Link, undisturbed: Path, tmp_path: Path) -> None:
    """Both hosts say so in one sentence; the same command goes on from the checkpoint, which travels to the second."""
    roots = (tmp_path / "first", tmp_path / "second")
    processes = link.runs(roots, "compute.wait_s=10")
    wait_until(lambda: checkpoints(roots[0]), processes)
    link.connect(False)
    cut_s = time.monotonic()
    for one in processes:
        sentences = []
        assert one.stdout is not None
        for line in one.stdout:
            if line.startswith("error: "):
                sentences.append(line)
                break
        assert len(sentences) == 1 and "has not answered for 10 s" in sentences[0], sentences
        assert "the same command continues from the last checkpoint" in sentences[0]
    assert time.monotonic() - cut_s < 30
    for one in processes:
        one.kill()  # torchrun itself waits longer
        one.communicate()
    assert checkpoints(roots[0])
    link.connect(True)
    processes = link.runs(roots, "compute.wait_s=60")
    texts = [said(one) for one in processes]
    assert [one.returncode for one in processes] == [0, 0], texts
    assert training(roots[0]) == training(undisturbed)


def test_processes_killed_at_random_are_continued(undisturbed: Path, tmp_path: Path) -> None:
    """Ten times one of two processes that train, at any step; then with the other number of processes."""
    draw, root = random.Random(), tmp_path / "killed"
    for _ in range(10):
        process = run(root, "compute.devices=2")
        before = [path.stat().st_mtime_ns for path in checkpoints(root)]
        wait_until(lambda: [p.stat().st_mtime_ns for p in checkpoints(root)] not in (before, []), [process])  # noqa: B023
        time.sleep(draw.uniform(0, 0.5))
        victim = draw.choice(trainers(process.pid))
        os.kill(victim, signal.SIGKILL)
        text = said(process)
        assert process.returncode == 2, text
        (sentence,) = (line for line in text.splitlines() if line.startswith("error: "))
        assert "of 2 ended" in sentence and "the same command continues from the last checkpoint" in sentence
    last = run(root, "compute.devices=2")
    text = said(last)
    assert last.returncode == 0, text
    assert training(root) == training(undisturbed)
    assert len(load_json(next(root.glob(f"cache/contrastive-*/training/{LOSSES_FILE}")))["epochs"]) == EPOCHS


def trainers(parent: int) -> list[int]:
    """The processes that a run has started to train."""
    children = [int(one) for one in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [one for one in children if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]
