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
