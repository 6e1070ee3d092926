"""The network's trainings dealt out to several processes of one machine: (task, row order) is work of its own.

Each process has its part of the threads, or a GPU of its own, and reads the vectors by itself. Every score lies in a
file when it is there: `evaluate(keep=)` takes them up, and a killed evaluation goes on with what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ubp_fast.evaluation.evaluator import keep_share
from ubp_fast.evaluation.readers import EvaluationConfig
from ubp_fast.evaluation.tasks import Targets
from ubp_fast.events.schema import UserError
from ubp_fast.profiles import Profiles
from ubp_fast.progress import Progress


@dataclass(frozen=True)
class Shares:
    """What all processes are told; goes to them by pickle.

    Attributes:
        load: gives profiles and labels, as `evaluate` takes them; a function of a module or `partial` of one.
        config, has_units, keep: as for `evaluate`.
        device: "cpu" or "cuda".
        world: processes.
        threads: of all processes together on a CPU.
    """

    load: Callable[[], tuple[Profiles, Targets]]
    config: EvaluationConfig
    device: str
    has_units: bool
    keep: Path
    world: int
    threads: int


def keep_in_processes(shares: Shares, progress: Progress) -> None:
    """Trains the network on every task in every row order and leaves the scores in `shares.keep`.

    The scores are those of one process with `threads // world` threads, bit by bit.

    Raises:
        UserError: fewer GPUs than processes, or a process that ended; what is finished is kept.
    """
    world = shares.world
    if shares.device == "cuda" and torch.cuda.device_count() < world:
        raise UserError(f"run: compute.devices must be at most the GPUs here, {torch.cuda.device_count()}, got {world}")
    done = torch.multiprocessing.get_context("spawn").Array("q", 2 * world)
    context = torch.multiprocessing.start_processes(_keep_one, (shares, done), world, join=False, start_method="spawn")
    try:
        while not context.join(timeout=0.5):
            steps, totals = done[:world], done[world:]
            if any(totals):
                progress(sum(steps), sum(totals))
    except (ProcessRaisedException, ProcessExitedException) as error:
        last = str(error).strip().splitlines()[-1].removeprefix("ubp_fast.events.schema.UserError: ")
        raise UserError(
            f"evaluate: process {error.error_index + 1} of {world} ended: {last}; the same command continues with the"
            " next task"
        ) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _keep_one(rank: int, shares: Shares, done: Any) -> None:
    """What each of the processes does."""
    if shares.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank] if len(visible) >= shares.world else str(rank)
    else:
        torch.set_num_threads(max(1, shares.threads // shares.world))

    def told(steps: int, total: int) -> None:
        done[rank], done[shares.world + rank] = steps, total

    profiles, targets = shares.load()
    keep_share(profiles, targets, shares.config, shares.device, told, shares.has_units, shares.keep, rank, shares.world)
