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
def row_sparse_gather(
    table: Sequence[int], sizes: Sequence[int], ids: int, count: int, output: int, threads: int
) -> None: ...
def row_sparse_group(ids: int, count: int, order: int, distinct: int, start: int) -> int: ...
def row_sparse_reduce(start: int, order: int, sizes: Sequence[int], gradient: int, sums: int, threads: int) -> None: ...
def row_sparse_update(
    table: Sequence[int],
    sizes: Sequence[int],
    ids: int,
    count: int,
    gradient: int,
    step: Sequence[float],
    is_adaptive: bool,
    used: int,
    threads: int,
) -> None: ...
def row_sparse_catch_up(
    table: Sequence[int], sizes: Sequence[int], beta2: float, toward_z: float, threads: int
) -> None: ...
def row_sparse_adam_gather(
    table: Sequence[int],
    sizes: Sequence[int],
    numbers: Sequence[float],
    ids: int,
    count: int,
    output: int,
    threads: int,
) -> None: ...
def row_sparse_adam_update(
    table: Sequence[int],
    sizes: Sequence[int],
    numbers: Sequence[float],
    ids: int,
    count: int,
    gradient: int,
    step: Sequence[float],
    used: int,
    threads: int,
) -> None: ...
def row_sparse_adam_catch_up(
    table: Sequence[int], sizes: Sequence[int], numbers: Sequence[float], threads: int
) -> None: ...
