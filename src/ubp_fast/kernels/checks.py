"""Argument checks that several operators share; messages read `<op>: <argument> must <rule>, got <value>`."""

from __future__ import annotations

from torch import Tensor, dtype


def require(condition: bool, op: str, argument: str, rule: str, value: object, remedy: str = "") -> None:
    """Raises ValueError in the project's form when `condition` does not hold."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {rule}, got {value}" + (f"; {remedy}" if remedy else ""))


def require_dtype(op: str, argument: str, tensor: Tensor, allowed: tuple[dtype, ...]) -> None:
    """Raises TypeError when the tensor has none of the allowed dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(item) for item in allowed)
        raise TypeError(f"{op}: {argument} must have dtype {names}, got {tensor.dtype}")


def require_same(op: str, reference: str, first: Tensor, **others: Tensor) -> None:
    """Raises when another tensor differs from the first in dtype (TypeError) or device (ValueError)."""
    for name, tensor in others.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {reference}, {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on the device of {reference}, {first.device}, got {tensor.device}")
