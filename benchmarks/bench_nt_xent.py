"""nt_xent on the CPU, forward and backward through autograd, against the plain loss and a chunked one in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contest import CONTENDER, Contest, flushing_denormals, peak_extra_bytes
from reference_pytorch.nt_xent import chunked_symmetric, plain
from torch import Tensor

from ubp_fast.kernels import nt_xent

TEMPERATURE = 0.1
NAMES = ("loss", "left", "right")
Call = Callable[[], tuple[Tensor, ...]]


def views(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Two views of each client; half of the clients are easy."""
    left, right = torch.randn(rows, width), torch.randn(rows, width)
    right[::2] = left[::2] + 0.5 * right[::2]
    return left, right


def forward_backward(
    loss: Callable[[Tensor, Tensor], Tensor], sides: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Call:
    left, right = (side.to(dtype, copy=True).requires_grad_() for side in sides)

    def call() -> tuple[Tensor, ...]:
        value = loss(left, right)
        return value.detach(), *torch.autograd.grad(value, (left, right))

    return call


def competitors(sides: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Call, Call, Call]:
    """Ours in `dtype`, the plain loss and the chunked one in float32."""
    return (
        forward_backward(lambda a, b: nt_xent(a, b, temperature=TEMPERATURE, negatives="simclr"), sides, dtype),
        forward_backward(lambda a, b: plain(a, b, TEMPERATURE), sides, torch.float32),
        forward_backward(lambda a, b: chunked_symmetric(a, b, TEMPERATURE), sides, torch.float32),
    )


def same(dtype: torch.dtype) -> Callable[[str, tuple[Tensor, ...], tuple[Tensor, ...]], None]:
    """Differences of at most 32 roundings in `dtype` of the largest number; the tests hold the strict bound."""

    def check(rival: str, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        for name, one, other in zip(NAMES, mine, theirs, strict=True):
            error, scale = (one.float() - other.float()).abs().max(), other.abs().max()
            assert error <= 32 * torch.finfo(dtype).eps * scale, f"{name} against {rival}: {error:.2e} of {scale:.2e}"

    return check


@pytest.mark.parametrize(
    ("dtype", "width", "plain_bar", "chunked_bar"),
    [
        (torch.float32, 128, 2.5, 1.3),
        (torch.float32, 256, 2.0, 1.3),
        (torch.bfloat16, 128, 4.0, None),
        (torch.bfloat16, 256, 4.0, None),
    ],
    ids=["fp32-E128", "fp32-E256", "bf16-E128", "bf16-E256"],
)
def bench_simclr(contest: Contest, dtype: torch.dtype, width: int, plain_bar: float, chunked_bar: float | None) -> None:
    count = 4096
    ours, whole, chunked = competitors(views(count, width), dtype)
    contest.run(
        f"nt_xent simclr {str(dtype).removeprefix('torch.')} N={count} E={width} f+b",
        ours,
        {"plain loss, fp32": (whole, plain_bar), "chunked symmetric, fp32": (chunked, chunked_bar)},
        same(dtype),
        seconds=20,
        facts={
            "rows": 2 * count,
            "width": width,
            "temperature": TEMPERATURE,
            "flop": 4 * (2 * count) ** 2 * width,
            "flop_plain": 6 * (2 * count) ** 2 * width,
        },
        share=(dtype, None),
    )


def bench_two_threads(contest: Contest) -> None:
    """Few rows, which a schedule by phases could not divide evenly. Needs two cores for itself."""
    ours = competitors(views(1024, 128), torch.float32)[0]

    def check(_: str, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        assert all(map(torch.equal, mine, theirs)), "results depend on the number of threads"

    contest.run(
        "nt_xent simclr float32 N=1024 E=128 f+b, 2 threads",
        ours,
        {"one thread": (ours, 1.85)},
        check,
        facts={"rows": 2048, "width": 128, "temperature": TEMPERATURE},
        threads={CONTENDER: 2},
    )


def bench_memory(contest: Contest) -> None:
    """The plain loss takes more than 5 GB here, ours must stay below a thirtieth of that."""
    for warm_up in competitors(views(64, 128), torch.float32):
        warm_up()
    ours, whole, _ = competitors(views(8192, 128), torch.float32)
    most_bytes = peak_extra_bytes(whole) // 30

    def check(_: str, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        same(torch.float32)("plain loss, fp32", mine, theirs)

    contest.once(
        "nt_xent simclr float32 N=8192 E=128 f+b",
        {"ubp_fast": ours},
        ("plain loss, fp32", whole),
        {"ubp_fast": 2.5},
        check,
        most_bytes=most_bytes,
        facts={"rows": 16384, "width": 128, "most_bytes": "a thirtieth of the plain loss's peak"},
    )


def bench_denormals(contest: Contest) -> None:
    left, right = views(2048, 128)
    contest.run(
        "nt_xent simclr float32 N=2048 E=128 f+b, denormal inputs, flushed",
        flushing_denormals(competitors((left * 1e-39, right * 1e-39), torch.float32)[0]),
        {"normal inputs": (competitors((left, right), torch.float32)[0], 1 / 1.5)},
        lambda *_: None,  # other numbers
        facts={"rows": 4096, "width": 128},
    )
