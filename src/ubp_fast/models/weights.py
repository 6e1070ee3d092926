"""Initial weights from a seed, and weights on disk: safetensors only, complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def initialise(factory: Callable[[], ModuleT], seed: int) -> ModuleT:
    """Builds a module whose initial weights depend on `seed` only; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def save_model(model: nn.Module, path: Path) -> None:
    """Writes parameters and buffers as safetensors."""
    save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, path)


def load_model(model: nn.Module, path: Path) -> None:
    """Reads what `save_model` wrote into a model of the same shape."""
    model.load_state_dict(load_file(path))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file and renames it, so that the file is complete or absent."""
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
