"""Shapes at which kernels break: the one grid, used by the tests and by the benchmarks' check of equality.

The CPU kernels work on blocks of 24 and 48 queries and of 256 keys, and on vectors of 4, 8 or 16 numbers.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

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
        key_heads: of keys and values; None is as many.
        width: D.
        is_causal: hide later keys.
        kind: "normal"; "peaked" plants keys equal to queries; "large" makes scores of size 1e4; "duplicates" repeats
            rows; "strided" gives non-contiguous tensors.
        window: (left, right) of what a query sees.
        buckets: of the time_bias; 0 has none.
        dropout_p: share of dropped weights.
    """

    name: str
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] | None = None
    heads: int = 2
    width: int = 16
    is_causal: bool = False
    kind: str = "normal"
    window: tuple[int | None, int | None] | None = None
    buckets: int = 0
    dropout_p: float = 0.0
    key_heads: int | None = None

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
    PackedCase("shared-heads", (7, 0, 60), heads=6, key_heads=2, width=20, is_causal=True),
    PackedCase(
        "shared-heads-everything",
        (9, 33),
        (30, 43),
        heads=4,
        key_heads=1,
        kind="strided",
        window=(10, 1),
        buckets=9,
        dropout_p=0.3,
    ),
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
    PackedCase("window", BLOCK_EDGES, window=(7, 3)),
    PackedCase("window-0", (5, 60, 1), window=(0, 0)),
    PackedCase("window-left", (300, 0, 31, 600), window=(40, None), width=17),
    PackedCase("window-right", (300, 0, 31), window=(None, 260)),
    PackedCase("window-causal", (300, 0, 31), window=(33, 5), is_causal=True, width=32),
    PackedCase("window-cross", (5, 49, 60, 3, 25, 300), (9, 30, 4, 0, 300, 20), window=(12, 8), width=59),
    PackedCase("window-large-scores", (40, 300), kind="large", width=64, window=(50, 0)),
    PackedCase("time", BLOCK_EDGES, buckets=64),
    PackedCase("time-2-buckets", (5, 0, 60), buckets=2, width=33),
    PackedCase("time-causal", (5, 0, 60, 270), buckets=106, width=32, heads=3, is_causal=True),
    PackedCase("time-cross", (5, 49, 0, 3, 25), (9, 30, 4, 0, 300), buckets=20, width=20),
    PackedCase("dropout", BLOCK_EDGES, dropout_p=0.2),
    PackedCase("dropout-cross-causal", (5, 49, 0, 3, 25), (9, 30, 4, 0, 300), dropout_p=0.5, is_causal=True, width=59),
    PackedCase("dropout-much", (40, 13), dropout_p=0.99, heads=5),
    PackedCase("window-time-dropout", (5, 0, 60, 270), window=(70, 9), buckets=31, dropout_p=0.1, width=64),
    PackedCase(
        "everything-strided", (9, 33), (30, 43), kind="strided", window=(10, 1), buckets=64, dropout_p=0.3, width=32
    ),
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

    def rows(count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, case.width, generator=generator, dtype=torch.float64)

    query, *sides = rows(tokens, case.heads), *(rows(keys, case.key_heads or case.heads) for _ in range(2))
    key, value = sides
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


def case_options(case: PackedCase, seed: int = 0) -> dict[str, Any]:
    """What a case asks for beside its tensors, as arguments of flash_attention; the time_bias is float32."""
    options: dict[str, Any] = {"causal": case.is_causal, "window": case.window}
    if case.dropout_p:
        options.update(dropout_p=case.dropout_p, seed=2**40 + seed, first_rows=(70, 3))
    if case.buckets:
        generator = torch.Generator().manual_seed(seed)
        options["time_bias"] = torch.randn(case.heads, case.buckets, generator=generator)
        options["timestamp_s"] = random_times(sum(case.lengths), generator)
        if case.key_lengths is not None:
            options["timestamp_key_s"] = random_times(sum(case.key_lengths), generator)
    return options


def random_times(count: int, generator: torch.Generator) -> Tensor:
    """Int64 seconds around the year 2024: anything from the same second to 100 years apart, in no order."""
    spread = torch.exp(torch.rand(count, generator=generator, dtype=torch.float64) * 22)
    return 1_700_000_000 + (spread * torch.randn(count, generator=generator)).long()
