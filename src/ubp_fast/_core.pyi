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

class RowTable:
    def __init__(
        self,
        *,
        weight: int,
        state: int,
        slot: int,
        last_step: int,
        history: int,
        used: int,
        rows: int,
        width: int,
        slots: int,
        steps: int,
    ) -> None: ...

class ScheduleFree:
    def __init__(self, *, beta2: float, eps: float, toward_z: float) -> None: ...

class ScheduleFreeStep:
    def __init__(
        self,
        *,
        learning_rate: float,
        average_weight: float,
        gradient_weight: float,
        bias_correction: float,
        is_adaptive: bool,
    ) -> None: ...

class Adam:
    def __init__(self, *, beta1: float, beta2: float, eps: float) -> None: ...

class AdamStep:
    def __init__(self, *, rate: float, root: float, keep: float) -> None: ...

Rule = ScheduleFree | Adam
Step = ScheduleFreeStep | AdamStep

def row_sparse_gather(table: RowTable, rule: Rule, ids: int, count: int, output: int, threads: int) -> None: ...
def row_sparse_group(ids: int, count: int, order: int, distinct: int, start: int) -> int: ...
def row_sparse_reduce(
    start: int, order: int, groups: int, width: int, stride: int, gradient: int, sums: int, threads: int
) -> None: ...
def row_sparse_update(
    table: RowTable, rule: Rule, step: Step, ids: int, count: int, gradient: int, threads: int
) -> None: ...
def row_sparse_catch_up(table: RowTable, rule: Rule, threads: int) -> None: ...
