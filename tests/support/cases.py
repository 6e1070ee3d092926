"""Shapes at which kernels break: the one grid, used by the tests and by the benchmarks' check of equality.

The CPU kernels work on blocks of 24 and 48 queries and of 256 keys, and on vectors of 4, 8 or 16 numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (1, 59, 64, 100)
BLOCK_EDGES = (0, 1, 23, 24, 25, 47, 48, 49, 97, 0, 255, 256, 257, 515)


@dataclass(frozen=True)
class PackedCase:
    """One packed problem.

    Attributes:
        name: readable id.
        lengths: queries of each sequence.
        key_lengths: keys of each sequence; None is self attention.
        heads: H.
        width: D.
        is_causal: hide later keys.
        kind: "normal"; "peaked" plants keys equal to queries; "large" makes scores of size 1e4; "duplicates" repeats
            rows; "strided" gives non-contiguous tensors.
    """

    name: str
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] | None = None
    heads: int = 2
    width: int = 16
    is_causal: bool = False
    kind: str = "normal"

    def __str__(self) -> str:
        return self.name


ATTENTION_CASES = (
    PackedCase("no-sequence", ()),
    PackedCase("all-empty", (0, 0, 0)),
    PackedCase("one-token", (1,), width=1),
    PackedCase("block-edges", BLOCK_EDGES),
    PackedCase("block-edges-causal", BLOCK_EDGES, is_causal=True),
    *(
        PackedCase(f"width{width}{'-causal' * is_causal}", (3, 0, 31, 50), width=width, is_causal=is_causal)
        for width, is_causal in itertools.product((*WIDTHS, 8, 15, 17, 32, 33, 128, 256), (False, True))
    ),
    PackedCase("heads5", (7, 60), heads=5, width=20),
    PackedCase("cross", (5, 49, 0, 3, 25), (9, 30, 4, 0, 300)),
    PackedCase("cross-causal", (5, 49, 0, 3, 25, 2), (9, 30, 4, 0, 300, 2), is_causal=True, width=59),
    PackedCase("no-keys", (4, 30), (0, 0)),
    PackedCase("no-queries", (0, 0), (4, 30)),
    PackedCase("duplicates", (40, 13), kind="duplicates", width=32),
    PackedCase("peaked", (40, 70), kind="peaked", width=64),
    PackedCase("large-scores", (40, 70, 270), kind="large", width=64),
    PackedCase("large-scores-causal", (40, 300), kind="large", width=64, is_causal=True),
    PackedCase("strided", (9, 33), kind="strided", width=24),
    PackedCase("strided-causal", (9, 33), (30, 33), kind="strided", width=32, is_causal=True),
)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    """Lengths -> int32 [B + 1] offsets."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed_inputs(case: PackedCase, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and both offsets of a case: the same numbers for every dtype, up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    cu_query, cu_key = cumulative(case.lengths), cumulative(case.key_lengths or case.lengths)
    if case.key_lengths is None:
        cu_key = cu_query
    tokens, keys = int(cu_query[-1]), int(cu_key[-1])

    def rows(count: int) -> Tensor:
        return torch.randn(count, case.heads, case.width, generator=generator, dtype=torch.float64)

    query, key, value = rows(tokens), rows(keys), rows(keys)
    if case.kind == "peaked":
        key[::3] = 3 * query[::3]
    if case.kind == "large":
        factor = 30 if dtype == torch.float16 else 100  # the reference's unscaled scores must not overflow
        query, key = factor * query, factor * key
    if case.kind == "duplicates":
        query, key, value = (part[: len(part) // 4].repeat(4, 1, 1).clone() for part in (query, key, value))
        query, key, value = (torch.cat((part, part[: tokens - len(part)])) for part in (query, key, value))
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if case.kind == "strided":
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
        key, value = torch.cat((key, value), dim=2).split(case.width, dim=2)
    return query, key, value, cu_query, cu_key
