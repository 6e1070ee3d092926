"""Block sizes of the Triton kernels: a table per operator, `tiles.json` beside its kernels, that a sweep rewrites.

An entry holds for a device ("sm_90", or a card by its name), a kernel, a kind of problem, widths up to `width` and mean
lengths up to `length` (null: any). A card's entries take the place of its architecture's for the same width and length;
of those that hold the narrowest, then the shortest, is taken. `benchmarks/tune_tiles.py` measures candidates on a card
and writes entries under its name.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

# Cards whose blocks have 100 KB of shared memory instead of 163 KB or more share a table; so do all with the products
# of warp groups (compute capability 9 and 10).
SHARED_TABLES = {(8, 6): "sm_86", (8, 7): "sm_80", (8, 9): "sm_86"}
FAMILIES = {8: "sm_80", 9: "sm_90", 10: "sm_90"}
OTHERS = "sm_86"


def device_names(device: torch.device) -> tuple[str, ...]:
    """Names under which the tables may know a device, the closest first; where there is none, a card of 163 KB."""
    if device.type != "cuda":
        return ("sm_80",)
    return _names_of_card(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _names_of_card(index: int) -> tuple[str, ...]:
    capability = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), architecture(capability)


def architecture(capability: tuple[int, int]) -> str:
    """The table for devices of a compute capability."""
    return SHARED_TABLES.get(capability, FAMILIES.get(capability[0], OTHERS))


@functools.cache
def load(path: Path) -> tuple[dict[str, Any], ...]:
    """The entries of a table."""
    return tuple(json.loads(path.read_text(encoding="utf-8")))


@functools.cache
def _entries(path: Path, names: tuple[str, ...], kernel: str, kind: str) -> list[tuple[float, float, list[Any]]]:
    """(width, length, tiles) of what holds for a device, narrow before wide and short before long."""
    found = {}
    for name in reversed(names):  # the closest name last
        for entry in load(path):
            if (entry["device"], entry["kernel"], entry["kind"]) == (name, kernel, kind):
                length = math.inf if entry["length"] is None else entry["length"]
                found[entry["width"], length] = entry["tiles"]
    return [(*place, found[place]) for place in sorted(found)]


def choose(path: Path, names: tuple[str, ...], kernel: str, kind: str, width: int, length: float = 0.0) -> list[Any]:
    """Block sizes, warps and stages of a kernel for a problem, as the operator's table writes them.

    Args:
        path: the table.
        names: of the device, see `device_names`.
        kernel: as the table calls it.
        kind: likewise.
        width: numbers in a row.
        length: mean rows of a sequence.

    Raises:
        KeyError: the table has no entry.
    """
    for most_width, most_length, chosen in _entries(path, names, kernel, kind):
        if width <= most_width and length <= most_length:
            return chosen
    raise KeyError(f"{path}: no tiles of {kernel}, {kind}, width {width}, length {length} for any of {list(names)}")


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    """Adds entries to a table, in place of those for the same device, kernel, kind, width and length."""

    def place(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[name] for name in ("device", "kernel", "kind", "width", "length"))

    merged = {place(entry): entry for entry in [*load(path), *entries]}
    lines = [json.dumps(merged[key]) for key in sorted(merged, key=lambda key: [str(part).rjust(40) for part in key])]
    path.write_text("[\n " + ",\n ".join(lines) + "\n]\n", encoding="utf-8")
    load.cache_clear()
    _entries.cache_clear()
