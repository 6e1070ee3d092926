"""Files that the first process of a group has and all read, on disks that they share or not."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Fetch = Callable[[Iterable[str]], Path]
_AT_ONCE = 64 << 20


def sending_device(group: ProcessGroup) -> torch.device:
    """Where tensors lie that a group sends: on the GPU where it knows nothing but NCCL."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


@contextmanager
def seen_by_all(directory: Path, group: ProcessGroup | None) -> Iterator[Fetch]:
    """A function of all processes, fetch(names), that gives a folder in which each can read these files of the first.

    The folder is `directory` where it is the one that the first process writes. Elsewhere it is one of this process's
    own, to which the files travel and which is gone afterwards. A file that the first does not have, nobody has.

    Args:
        directory: exists in the first process.
        group: the processes, all of which call this; None: this one is alone.
    """
    if group is None:
        yield lambda names: directory
        return
    rank, device = dist.get_rank(group), sending_device(group)
    secret = torch.tensor([secrets.randbits(62) if rank == 0 else 0], device=device)
    dist.broadcast(secret, dist.get_global_rank(group, 0), group=group)
    mark = directory / f".{int(secret):x}.mark"
    if rank == 0:
        for left in directory.glob(".*.mark"):  # by a process that was killed
            left.unlink()
        mark.touch()
    dist.barrier(group=group)
    is_seen = mark.exists()
    by_all = torch.tensor([int(is_seen)], device=device)
    dist.all_reduce(by_all, op=dist.ReduceOp.MIN, group=group)
    if rank == 0:
        mark.unlink()
    with TemporaryDirectory(prefix="ubp_fast-") as own:
        here = directory if is_seen else Path(own)

        def fetch(names: Iterable[str]) -> Path:
            if not bool(by_all):
                for name in names:
                    _travel(directory / name if rank == 0 else here / name, group, is_kept=not is_seen)
            dist.barrier(group=group)
            return here

        yield fetch


def _travel(path: Path, group: ProcessGroup, is_kept: bool) -> None:
    first, is_first, device = dist.get_global_rank(group, 0), dist.get_rank(group) == 0, sending_device(group)
    size = torch.tensor([path.stat().st_size if is_first and path.exists() else -1], device=device)
    dist.broadcast(size, first, group=group)
    left = int(size)
    if left < 0:
        return
    with path.open("rb") if is_first else (path if is_kept else Path("/dev/null")).open("wb") as file:
        while left:
            count = min(left, _AT_ONCE)
            read = np.fromfile(file, np.uint8, count) if is_first else np.empty(count, np.uint8)
            part = torch.from_numpy(read).to(device)
            dist.broadcast(part, first, group=group)
            if is_kept:
                file.write(part.cpu().numpy().data)
            left -= count
