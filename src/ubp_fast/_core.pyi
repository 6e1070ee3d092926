"""Compiled kernels; use them through `ubp_fast.kernels`."""

from collections.abc import Sequence

def isa() -> str: ...
def usable_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def flash_attention_forward(
    tensors: Sequence[int],
    sizes: Sequence[int],
    dtype: int,
    left: int,
    right: int,
    scale: float,
    dropout_p: float,
    seed: int,
    threads: int,
    results: Sequence[int],
) -> None: ...
def flash_attention_backward(
    tensors: Sequence[int],
    sizes: Sequence[int],
    dtype: int,
    left: int,
    right: int,
    scale: float,
    dropout_p: float,
    seed: int,
    threads: int,
    results: Sequence[int],
) -> None: ...
def nt_xent_forward(
    left: int,
    right: int,
    kept: int,
    ids: int,
    sizes: Sequence[int],
    dtype: int,
    form: int,
    has_ids: bool,
    is_normalized: bool,
    temperature: float,
    threads: int,
    losses: int,
) -> None: ...
def nt_xent_backward(
    left: int,
    right: int,
    kept: int,
    ids: int,
    sizes: Sequence[int],
    dtype: int,
    form: int,
    has_ids: bool,
    is_normalized: bool,
    temperature: float,
    threads: int,
    losses: int,
    weight: int,
    factor: float,
    grad_left: int,
    grad_right: int,
) -> float: ...
