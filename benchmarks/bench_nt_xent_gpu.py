"""nt_xent on a CUDA device, forward and backward, against the plain and the chunked loss under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contest import Contest
from reference_pytorch.nt_xent import chunk_loss, chunked, plain
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ubp_fast.kernels import nt_xent

DTYPE, DEVICE, WIDTH, TEMPERATURE = torch.bfloat16, "cuda", 512, 0.1
# What PyTorch itself says about nested tensors and about compiling is no error of ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


def views(rows: int) -> list[Tensor]:
    """Two views of each client; half of the clients are easy."""
    left, right = (torch.randn(rows, WIDTH, device=DEVICE, dtype=DTYPE) for _ in range(2))
    right[::2] = left[::2] + 0.5 * right[::2]
    return [left.requires_grad_(), right.requires_grad_()]


def trained(loss: Callable[..., Tensor], sides: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        value = loss(*sides)
        return value.detach(), *torch.autograd.grad(value, sides)

    return call


def plain_cross(left: Tensor, right: Tensor) -> Tensor:
    """0-d loss over the whole [N, N] matrix, one direction."""
    similarity = normalize(left) @ normalize(right).T / TEMPERATURE
    return cross_entropy(similarity.float(), torch.arange(len(left), device=left.device))


@pytest.mark.parametrize(("count", "form"), [(16384, "simclr"), (16384, "cross"), (65536, "cross")])
def bench_nt_xent_gpu(gpu_contest: Contest, count: int, form: str) -> None:
    sides = views(count)
    loss = plain_cross if form == "cross" else lambda left, right: plain(left, right, TEMPERATURE)

    def ours(left: Tensor, right: Tensor) -> Tensor:
        return nt_xent(left, right, temperature=TEMPERATURE, negatives=form, backend="triton")

    def check(_: str, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        """The plain loss rounds similarities to bfloat16: a band of 32 roundings; the tests hold the strict bound."""
        for one, other in zip(mine, theirs, strict=True):
            error, scale = (one.float() - other.float()).abs().max(), other.float().abs().max()
            assert error <= 32 * torch.finfo(DTYPE).eps * scale, f"{error:.2e} of {scale:.2e}"

    compiled_part = torch.compile(chunk_loss)

    def in_chunks(left: Tensor, right: Tensor) -> Tensor:
        return chunked(left, right, TEMPERATURE, form, compiled_part)

    rows = count if form == "cross" else 2 * count
    gpu_contest.run(
        f"nt_xent triton {form} bfloat16 N={count} E={WIDTH} f+b",
        trained(ours, sides),
        {
            "compiled plain loss": (trained(torch.compile(loss), sides), 1.0),
            "compiled chunks": (trained(in_chunks, sides), 1.0),
            "plain loss": (trained(loss, sides), None),
        },
        check,
        seconds=3,
        facts={"dtype": "bfloat16", "rows": rows, "width": WIDTH, "flop": 6 * rows**2 * WIDTH},
    )


def bench_nt_xent_million_gpu(gpu_contest: Contest) -> None:
    """Once: no rival can hold these similarities (2 TB in bfloat16); the bar is 16 GB."""
    count = 2**20
    sides = views(count)
    call = trained(lambda *pair: nt_xent(*pair, temperature=TEMPERATURE, backend="triton"), sides)
    torch.cuda.reset_peak_memory_stats()
    milliseconds, results = gpu_contest.alone(lambda: device_ms(call))
    peak = torch.cuda.max_memory_allocated()
    assert all(torch.isfinite(part).all() for part in results)
    flop = 6 * count**2 * WIDTH
    facts = {"milliseconds": milliseconds, "tflops": flop / milliseconds / 1e9, "rows": count, "width": WIDTH}
    name = f"nt_xent triton cross bfloat16 N={count} E={WIDTH} f+b, {milliseconds / 1e3:.1f} s"
    gpu_contest.at_most(f"{name}, peak memory", "GB", peak / 1e9, 16.0, facts)


def device_ms(call: Callable[[], tuple[Tensor, ...]]) -> tuple[float, tuple[Tensor, ...]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    results = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), results
