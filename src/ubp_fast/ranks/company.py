"""The processes that torchrun has started for one run.

The first one runs the run. The others wait until it trains a network, make what that needs where it is missing, and
take part. Twice a second each tells all others which training it is ready for. So nobody waits for a process that is
gone: the next word does not come, and all end with a sentence within `wait_s`.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from ubp_fast.events.schema import UserError

PULSE_S = 0.5
CONTINUES = "the same command continues from the last checkpoint"
BACKENDS = "cpu:gloo,cuda:nccl"
_END = 0


class Launch(NamedTuple):
    """What torchrun tells a process: its number, their number, the same on this host, and where they meet."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    meeting: str

    @classmethod
    def of_environment(cls) -> Launch | None:
        """None in a process that is alone.

        Raises:
            UserError: an environment that names some of it only.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
            meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        except (KeyError, ValueError) as error:
            raise UserError(
                f"run: WORLD_SIZE must come with RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, got"
                f" {error!r}; start with torchrun, or unset WORLD_SIZE"
            ) from error
        return cls(rank, world, *local, meeting)


class Company:
    """All processes of a launch; the default group of `torch.distributed` is theirs.

    Attributes:
        launch: this process among them.
        wait_s: seconds that one waits for the others.
    """

    def __init__(self, launch: Launch, wait_s: float) -> None:
        """Waits until all are here.

        Raises:
            UserError: some did not come.
        """
        self.launch, self.wait_s = launch, wait_s
        try:
            dist.init_process_group(
                BACKENDS if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=wait_s)
            )
            self._pulses = dist.new_group(backend="gloo", timeout=timedelta(seconds=wait_s))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"run: all {launch.world} processes must meet at {launch.meeting} within {wait_s:g} s, got"
                f" {_last_line(error)}; start the same command on every host, and look at its firewall"
            ) from error
        # Of each process: how many trainings it has come to, and the key of this one.
        self._said = (0, 0)
        self._heard = [(0, 0)] * launch.world
        self._error: RuntimeError | None = None
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._beat, name="company", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        try:
            while True:
                mine = torch.tensor(self._said)
                found = [torch.empty_like(mine) for _ in range(self.launch.world)]
                dist.all_gather(found, mine, group=self._pulses)
                heard = [(count, what) for count, what in torch.stack(found).tolist()]
                with self._news:
                    self._heard = heard
                    self._news.notify_all()
                if all(count and what == _END for count, what in heard):
                    return
                time.sleep(PULSE_S)
        except RuntimeError as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def _until(self, count: int, everybody: bool) -> int:
        """Waits for the first process, or for all of them, to come to training `count`; which one the first is at."""
        with self._news:
            while True:
                heard = self._heard if everybody else self._heard[:1]
                if all(one >= count for one, _ in heard):
                    return heard[0][1]
                if self._error is not None:
                    raise self.gone("run", self._error)
                self._news.wait()

    def begin(self, key: str) -> None:
        """This process is ready for the training with this key, 16 hex digits; waits until all are.

        Raises:
            UserError: one of them is gone.
        """
        self._said = (self._said[0] + 1, int(key, 16) - 2**63)
        self._until(self._said[0], everybody=True)

    def following(self) -> str | None:
        """The key of the next training that the first process begins; None: there is no more.

        Raises:
            UserError: one of them is gone.
        """
        found = self._until(self._said[0] + 1, everybody=False)
        return None if found == _END else f"{found + 2**63:016x}"

    def leave(self) -> None:
        """The last word; waits for that of the others."""
        self._said = (self._said[0] + 1, _END)
        self._thread.join(self.wait_s)
        if self._error is None and not self._thread.is_alive():
            # Who still holds a group keeps its threads, which abort a process whose interpreter ends meanwhile.
            del self._pulses
            gc.collect()
            dist.destroy_process_group()

    def gone(self, what: str, error: RuntimeError) -> UserError:
        """What to say where the others do not answer."""
        return UserError(
            f"{what}: another of {self.launch.world} processes is gone, or has not answered for {self.wait_s:g} s"
            f" ({_last_line(error)}); {CONTINUES}"
        )

    @contextmanager
    def training(self, name: str) -> Iterator[dist.ProcessGroup]:
        """The group that trains; errors of the connection are one sentence."""
        group = dist.group.WORLD
        assert group is not None
        try:
            yield group
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error) or self._error is not None:
                raise self.gone(name, error) from error
            raise


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].rpartition("] ")[2] if lines else type(error).__name__


def _take_gpu(launch: Launch) -> None:
    """Of the GPUs of this host the one of this process is the only one that it sees."""
    if torch.cuda.device_count() >= launch.local_world:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(launch.local_rank, launch.local_world)


def gpu_of(local_rank: int, local_world: int) -> str:
    """What `CUDA_VISIBLE_DEVICES` is for one of several processes of a host."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return visible[local_rank] if len(visible) >= local_world else str(local_rank)


_here: list[Company] = []


@contextmanager
def joined(wait_s: float) -> Iterator[Company | None]:
    """The company of this process, for as long as it runs; None where it is alone."""
    launch = Launch.of_environment()
    if launch is None or dist.is_initialized():
        yield None
        return
    _take_gpu(launch)
    company = Company(launch, wait_s)
    _here.append(company)
    try:
        yield company
        company.leave()
    finally:  # after an error without a last word: the others see the end of the connection
        _here.clear()


def company_here() -> Company | None:
    """The company inside of `joined`."""
    return _here[0] if _here else None
