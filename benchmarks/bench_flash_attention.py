"""flash_attention on the CPU, forward and backward through autograd, against PyTorch's own attention."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
from contest import Contest, flushing_denormals
from support.cases import cumulative
from support.closeness import assert_matches_reference
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ubp_fast import _core
from ubp_fast.kernels import flash_attention
from ubp_fast.kernels.flash_attention import _native
from ubp_fast.kernels.flash_attention.reference import UNBOUNDED, Problem, attention

HEADS, USERS, LONGEST = 4, 256, 256
NAMES = ("output", "grad_query", "grad_key", "grad_value")
Call = Callable[[], tuple[Tensor, ...]]


def history_lengths() -> tuple[int, ...]:
    """Lengths of 256 users: log-normal, median 26, mean about 40, at most 256."""
    normal = torch.randn(USERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return tuple(int(length) for length in (26 * torch.exp(0.95 * normal)).round().clamp(1, LONGEST))


def packed(lengths: tuple[int, ...], width: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output: [T, H, D]."""
    return [torch.randn(sum(lengths), HEADS, width).to(dtype) for _ in range(4)]


def ours(tensors: list[Tensor], lengths: tuple[int, ...]) -> Call:
    query, key, value = (part.clone().requires_grad_() for part in tensors[:3])
    offsets = cumulative(lengths)

    def call() -> tuple[Tensor, ...]:
        output = flash_attention(query, key, value, offsets)
        return output, *torch.autograd.grad(output, (query, key, value), tensors[3])

    return call


def one_sdpa_per_sequence(tensors: list[Tensor], lengths: tuple[int, ...]) -> Call:
    """The fastest way that PyTorch offers for packed histories: leaves per sequence, split outside the timing."""
    leaves = []
    for part in tensors[:3]:
        sequences = (piece.transpose(0, 1)[None].contiguous() for piece in part.split(lengths))
        leaves.append([sequence.requires_grad_() for sequence in sequences])
    noise = [piece.transpose(0, 1)[None].contiguous() for piece in tensors[3].split(lengths)]
    flat = [*leaves[0], *leaves[1], *leaves[2]]

    def call() -> tuple[Tensor, ...]:
        outputs = [scaled_dot_product_attention(*parts) for parts in zip(*leaves, strict=True)]
        return *outputs, *torch.autograd.grad(outputs, flat, noise)

    return call


def joined(parts: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """[1, H, L, D] of each sequence, for output and three gradients -> four times [T, H, D]."""
    return [torch.cat([one[0].transpose(0, 1) for one in parts[at : at + count]]) for at in range(0, 4 * count, count)]


def padded_sdpa(tensors: list[Tensor], lengths: tuple[int, ...]) -> tuple[Call, Tensor]:
    """One call on [B, H, L, D] with a mask of the keys; padding happens outside the timing."""

    def padded(part: Tensor) -> Tensor:
        rows = [pad(piece, (0, 0, 0, 0, 0, max(lengths) - len(piece))) for piece in part.split(lengths)]
        return torch.stack(rows).transpose(1, 2).contiguous()

    query, key, value, noise = (padded(part) for part in tensors)
    query, key, value = (part.requires_grad_() for part in (query, key, value))
    is_real = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    mask = is_real[:, None, None, :]

    def call() -> tuple[Tensor, ...]:
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return output, *torch.autograd.grad(output, (query, key, value), noise)

    return call, is_real


def same_as(tensors: list[Tensor], lengths: tuple[int, ...], case: str) -> Callable[[tuple[Tensor, ...]], None]:
    """The tests' rule: against the reference at float64, at most twice its error in this dtype."""
    results = []
    for dtype in (tensors[0].dtype, torch.float64):
        query, key, value = (part.to(dtype).requires_grad_() for part in tensors[:3])
        offsets = cumulative(lengths)
        problem = Problem(query, key, value, offsets, offsets, UNBOUNDED, UNBOUNDED, query.shape[2] ** -0.5)
        output, _ = attention(problem)
        results.append((output, *torch.autograd.grad(output, (query, key, value), tensors[3].to(dtype))))

    def check(found: tuple[Tensor, ...]) -> None:
        for name, mine, reference, truth in zip(NAMES, found, *results, strict=True):
            assert_matches_reference(mine, reference, truth, f"flash_attention {name}", case)

    return check


def flop(lengths: tuple[int, ...], width: int) -> float:
    """Needed floating-point operations of forward (2 products) and backward (5)."""
    return 7 * 2 * sum(length**2 for length in lengths) * HEADS * width


@pytest.mark.parametrize(
    ("width", "dtype", "bar"),
    [(32, torch.float32, 2.3), (64, torch.float32, 1.9), (32, torch.bfloat16, 2.5), (64, torch.bfloat16, 2.5)],
    ids=["fp32-D32", "fp32-D64", "bf16-D32", "bf16-D64"],
)
def bench_packed_histories(contest: Contest, width: int, dtype: torch.dtype, bar: float) -> None:
    lengths = history_lengths()
    tensors = packed(lengths, width, dtype)
    name = f"flash_attention packed {str(dtype).removeprefix('torch.')} D={width} f+b"
    padded, is_real = padded_sdpa(tensors, lengths)
    is_close = same_as(tensors, lengths, name)

    def check(rival: str, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        is_close(mine)
        if rival == "padded SDPA":
            found = [part.transpose(1, 2)[is_real] for part in theirs]
        else:
            found = joined(theirs, len(lengths))
        for one, other in zip(mine, found, strict=True):
            torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2 if dtype == torch.bfloat16 else 1e-4)

    contest.run(
        name,
        ours(tensors, lengths),
        {
            "SDPA per sequence": (one_sdpa_per_sequence(tensors, lengths), bar),
            "padded SDPA": (padded, 15.0),
        },
        check,
        seconds=20,
        facts={
            "users": len(lengths),
            "tokens": sum(lengths),
            "heads": HEADS,
            "width": width,
            "useful_share_of_padded": sum(length**2 for length in lengths) / (len(lengths) * max(lengths) ** 2),
            "flop": flop(lengths, width),
        },
        share=(dtype, None),
    )


@pytest.mark.parametrize(
    ("length", "batch", "dtype", "bar", "share"),
    [
        (128, 64, torch.float32, 1.2, None),
        (512, 8, torch.float32, 1.15, None),
        (512, 8, torch.bfloat16, None, 0.6),
        (2048, 1, torch.float32, 1.0, None),
    ],
    ids=["fp32-L128", "fp32-L512", "bf16-L512", "fp32-L2048"],
)
def bench_dense(
    contest: Contest, length: int, batch: int, dtype: torch.dtype, bar: float | None, share: float | None
) -> None:
    lengths, width = (length,) * batch, 64
    tensors = packed(lengths, width, dtype)
    name = f"flash_attention dense {str(dtype).removeprefix('torch.')} B={batch} L={length} D={width} f+b"
    is_close = same_as(tensors, lengths, name)
    rows = [part.view(batch, length, HEADS, width).transpose(1, 2).contiguous() for part in tensors]
    query, key, value = (part.requires_grad_() for part in rows[:3])

    def sdpa() -> tuple[Tensor, ...]:
        output = scaled_dot_product_attention(query, key, value)
        return output, *torch.autograd.grad(output, (query, key, value), rows[3])

    def check(_: str, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        is_close(mine)
        for one, other in zip(mine, theirs, strict=True):
            near = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
            torch.testing.assert_close(one, other.transpose(1, 2).reshape(one.shape), **near)

    facts = {"batch": batch, "length": length, "heads": HEADS, "width": width, "flop": flop(lengths, width)}
    contest.run(name, ours(tensors, lengths), {"SDPA": (sdpa, bar)}, check, facts=facts, share=(dtype, share))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def bench_two_threads(contest: Contest) -> None:
    lengths = history_lengths()
    tensors = packed(lengths, 64, torch.float32)
    call = ours(tensors, lengths)

    def check(_: str, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        assert all(map(torch.equal, mine, theirs))

    contest.run(
        "flash_attention packed float32 D=64 f+b, 2 threads",
        call,
        {"1 thread": (call, 1.8)},
        check,
        threads={"ubp_fast": 2, "1 thread": 1},
        facts={"tokens": sum(lengths), "heads": HEADS, "width": 64},
    )


def bench_small_call(contest: Contest) -> None:
    """What checks, PyTorch and Python add to the compiled kernel where there is little to compute; by CPU time."""
    lengths = (5, 17, 26, 40, 12, 3, 60, 33)
    query, key, value, _ = packed(lengths, 32, torch.float32)
    offsets = cumulative(lengths).int()
    problem = Problem(query, key, value, offsets, offsets, UNBOUNDED, UNBOUNDED, 32**-0.5)
    found = {"output": torch.empty_like(query), "lse": torch.empty(query.shape[:2])}
    compiled = _native._compiled(problem, **_native._inputs(problem), **found)

    def microseconds(call: Callable[[], object], calls: int = 100) -> float:
        start = time.thread_time()
        for _ in range(calls):
            call()
        return (time.thread_time() - start) * 1e6 / calls

    def over() -> float:
        rounds = [
            (
                microseconds(lambda: flash_attention(query, key, value, offsets)),
                microseconds(lambda: _core.flash_attention_forward(compiled)),
            )
            for _ in range(51)
        ]
        public, kernel = zip(*rounds, strict=True)
        return min(public) - min(kernel)  # what is more is other people's work

    over()
    over_us = contest.alone(over)
    facts = {"sequences": len(lengths), "tokens": sum(lengths), "heads": HEADS, "width": 32}
    contest.at_most("flash_attention forward, 8 sequences: time over the kernel's", "us", over_us, 20.0, facts)


def bench_denormals(contest: Contest) -> None:
    lengths = (64,) * 64
    tensors = packed(lengths, 64, torch.float32)
    contest.run(
        "flash_attention float32 B=64 L=64 D=64 f+b, denormal inputs, flushed",
        flushing_denormals(ours([part * 1e-39 for part in tensors], lengths)),
        {"normal inputs": (ours(tensors, lengths), 1 / 1.5)},
        lambda *_: None,  # other numbers
        facts={"tokens": sum(lengths), "heads": HEADS, "width": 64},
    )
