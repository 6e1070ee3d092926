"""Work dealt out to several processes of one machine, each with a part of the threads or a GPU of its own."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple, Protocol

import torch
import torch.multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ubp_fast.events.schema import UserError
from ubp_fast.progress import Progress
from ubp_fast.ranks.company import gpu_of


class Processes(NamedTuple):
    """How many processes share some work, and what of the machine is theirs.

    Attributes:
        world: processes.
        device: "cpu" or "cuda".
        threads: of all of them together on a CPU.
    """

    world: int
    device: str
    threads: int


class Work(Protocol):
    """What a process does; goes to it by pickle: a function of a module, or `partial` of one."""

    def __call__(self, rank: int, world: int, progress: Progress) -> None: ...


def deal_out(work: Work, processes: Processes, progress: Progress, name: str, goes_on: str) -> None:
    """Lets every process do its part: work(rank, world, progress).

    Args:
        work: what is to be done.
        processes: by whom.
        progress: called as progress(steps done, steps in all), those of all processes together.
        name: of the work, in errors.
        goes_on: where the same command continues after an error.

    Raises:
        UserError: fewer GPUs than processes, or a process that ended; the others are ended, too.
    """
    world = processes.world
    if processes.device == "cuda" and torch.cuda.device_count() < world:
        raise UserError(f"run: compute.devices must be at most the GPUs here, {torch.cuda.device_count()}, got {world}")
    done = torch.multiprocessing.get_context("spawn").Array("q", 2 * world)
    context = torch.multiprocessing.start_processes(
        _do_part, (os.getpid(), work, processes, done), world, join=False, start_method="spawn"
    )
    try:
        while not context.join(timeout=0.5):
            steps, totals = done[:world], done[world:]
            if any(totals):
                progress(sum(steps), sum(totals))
    except (ProcessRaisedException, ProcessExitedException) as error:
        last = str(error).strip().splitlines()[-1].removeprefix("ubp_fast.events.schema.UserError: ")
        raise UserError(
            f"{name}: process {error.error_index + 1} of {world} ended: {last}; the same command continues {goes_on}"
        ) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _do_part(rank: int, parent: int, work: Work, processes: Processes, done: Any) -> None:
    if os.getppid() != parent:  # it was killed while this process started; later torch passes its end on
        return
    world = processes.world
    if processes.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(rank, world)
    else:
        torch.set_num_threads(max(1, processes.threads // world))

    def told(steps: int, total: int) -> None:
        done[rank], done[world + rank] = steps, total

    work(rank, world, told)
    # What still holds a group keeps its threads, and one of those that lets go of a tensor while the interpreter ends
    # aborts the process. All is written, so nothing is left to end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
