"""Block sizes of the Triton kernels: a table per operator, `tiles.json` beside its kernels, that a sweep rewrites.

    {device: {"<kernel> <kind of problem>": [[width, length, tiles], ...]}}

A row holds for widths up to `width` and mean lengths up to `length` (null: any) on a device: an architecture such as
"sm_90", or a card by its name. A card's rows take the place of its architecture's for the same width and length; of
those that hold the narrowest, then the shortest, is taken. `benchmarks/tune_tiles.py` measures candidates on a card and
writes rows under its name.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

# Architectures whose blocks have 163 KB of shared memory, or products of warp groups; all others have 100 KB and take
# what they cannot run otherwise from "sm_86".
SM_100 = ("sm_100", "sm_90")
LARGE = {(8, 0): ("sm_80",), (8, 7): ("sm_80",), (9, 0): ("sm_90",), (10, 0): SM_100, (10, 3): SM_100}


@functools.cache
def device_names(device: torch.device) -> tuple[str, ...]:
    """Names under which the tables may know a device, the closest first."""
    if device.type != "cuda":
        return ("sm_80",)  # for the interpreter
    return (torch.cuda.get_device_name(device), *architecture(torch.cuda.get_device_capability(device)))


def architecture(capability: tuple[int, int]) -> tuple[str, ...]:
    """The tables' names for a compute capability, the closest first."""
    return LARGE.get(capability, ("sm_86", "sm_80"))


@functools.cache
def rows(path: Path, names: tuple[str, ...], kernel: str, kind: str) -> list[tuple[float, float, list[Any]]]:
    """(width, length, tiles) of all that holds for a device, narrow before wide and short before long."""
    table, found = json.loads(path.read_text(encoding="utf-8")), {}
    for name in reversed(names):  # the closest name last
        for width, length, chosen in table.get(name, {}).get(f"{kernel} {kind}", ()):
            found[width, math.inf if length is None else length] = chosen
    return [(*place, found[place]) for place in sorted(found)]


def find(
    path: Path, names: tuple[str, ...], kernel: str, kind: str, width: int, length: float = 0.0
) -> list[Any] | None:
    """Block sizes, warps and stages for rows of `width` numbers and a mean length, as the operator's table has them.

    None where the table has no row for the device, the kernel and the problem.
    """
    for most_width, most_length, chosen in rows(path, names, kernel, kind):
        if width <= most_width and length <= most_length:
            return chosen
    return None


def choose(path: Path, names: tuple[str, ...], kernel: str, kind: str, width: int, length: float = 0.0) -> list[Any]:
    """The same.

    Raises:
        KeyError: the table has no row for the device, the kernel and the problem.
    """
    found = find(path, names, kernel, kind, width, length)
    if found is None:
        raise KeyError(f"{path}: no tiles of {kernel}, {kind}, width {width}, length {length} for any of {list(names)}")
    return found
