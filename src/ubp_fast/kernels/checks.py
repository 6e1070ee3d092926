"""Argument checks that several operators share; messages read `<op>: <argument> must <rule>, got <value>`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, dtype


def require(condition: bool, op: str, argument: str, rule: str, value: object, remedy: str = "") -> None:
    """Raises ValueError in the project's form when `condition` does not hold."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {rule}, got {value}" + (f"; {remedy}" if remedy else ""))


def require_dtype(op: str, argument: str, tensor: Tensor, allowed: tuple[dtype, ...]) -> None:
    """Raises TypeError when it is no tensor, or one of none of the allowed dtypes."""
    if not isinstance(tensor, Tensor):
        require_tensors(op, **{argument: tensor})
    if tensor.dtype not in allowed:
        names = ", ".join(str(item) for item in allowed)
        raise TypeError(f"{op}: {argument} must have dtype {names}, got {tensor.dtype}")


def require_tensors(op: str, **tensors: Any) -> None:
    """Raises TypeError for what is no tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")


def require_same(op: str, reference: str, first: Tensor, **others: Tensor) -> None:
    """Raises when another tensor differs from the first in dtype (TypeError) or device (ValueError)."""
    for name, tensor in others.items():
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {reference}, {first.dtype}, got {tensor.dtype};"
                f" cast it with .to({first.dtype}) or call under torch.autocast"
            )
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on the device of {reference}, {first.device}, got {tensor.device}")


def integer(op: str, argument: str, value: Any) -> int:
    """The value as an int, NumPy's integers included; TypeError when it is none."""
    if isinstance(value, int):
        return value
    if torch.compiler.is_compiling():  # what is no int there is a tensor to it
        raise TypeError(f"{op}: {argument} must be an int of Python inside of torch.compile")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {argument} must be an integer, got {value!r}") from None


def number(op: str, argument: str, value: Any) -> float:
    """The value as a float; TypeError when it is none, or would lose its gradient."""
    if isinstance(value, float):
        return value
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{op}: {argument} must be a number, got a tensor that requires a gradient; use .detach()")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {argument} must be a number, got {value!r}") from None


def to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that autocast asks for; by its rule float64 and what is not floating stay."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which knows no such device
        return tensors
    wanted = torch.get_autocast_dtype(device)
    kept = (wanted, torch.float64)
    return tuple(x if x.dtype in kept or not x.is_floating_point() else x.to(wanted) for x in tensors)
