"""Functions run by several processes of one group, over gloo, for tests of what ranks share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def run_ranks(function: Callable[..., Any], world: int, directory: Path, *arguments: Any) -> list[Any]:
    """What function(rank, *arguments) gives on each rank, tensors and plain values; one thread for each process.

    Raises:
        ProcessRaisedException: one of them failed; the others are ended.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(_run, (world, directory, function, arguments), nprocs=world)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _run(rank: int, world: int, directory: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(function(rank, *arguments), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
    end_at_once()


def end_at_once() -> None:
    """Ends a process that has done its work; see `ubp_fast.ranks.processes` for what an interpreter's end may bring."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
