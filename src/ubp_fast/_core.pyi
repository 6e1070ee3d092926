"""Compiled kernels; use them through `ubp_fast.kernels`."""

from collections.abc import Sequence

def isa() -> str: ...
def usable_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def flash_attention_forward(
    query: int,
    key: int,
    value: int,
    cu_query: int,
    cu_key: int,
    sizes: Sequence[int],
    dtype: int,
    is_causal: bool,
    scale: float,
    threads: int,
    output: int,
    lse: int,
) -> None: ...
def flash_attention_backward(
    query: int,
    key: int,
    value: int,
    cu_query: int,
    cu_key: int,
    sizes: Sequence[int],
    dtype: int,
    is_causal: bool,
    scale: float,
    threads: int,
    output: int,
    lse: int,
    grad_output: int,
    grad_query: int,
    grad_key: int,
    grad_value: int,
) -> None: ...
