"""flash_attention on a CUDA device, forward and backward through autograd, against PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contest import Contest
from support.cases import cumulative
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from ubp_fast.kernels import flash_attention

DTYPE, DEVICE = torch.bfloat16, "cuda"
# What PyTorch itself says about nested tensors and about compiling is no error of ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
DENSE_TOKENS, DENSE_HEADS = 16384, 16
PACKED_HEADS = 4
Call = Callable[[], tuple[Tensor, ...]]


def packed(tokens: int, heads: int, width: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output: [T, H, D]."""
    return [torch.randn(tokens, heads, width, device=DEVICE, dtype=DTYPE) for _ in range(4)]


def trained(attention: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    """Forward and backward of `attention(query, key, value)`."""
    query, key, value = (part.detach().clone().requires_grad_() for part in tensors[:3])

    def call() -> tuple[Tensor, ...]:
        output = attention(query, key, value)
        return output.detach(), *torch.autograd.grad(output, (query, key, value), tensors[3])

    return call


def assert_alike(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """The tests hold the strict bound; here: 16 roundings of the largest number."""
    for one, other in zip(mine, theirs, strict=True):
        error, scale = (one.float() - other.float()).abs().max(), other.float().abs().max()
        assert error <= 16 * torch.finfo(DTYPE).eps * scale, f"{error:.2e} of {scale:.2e}"


def needed_flop(lengths: tuple[int, ...], heads: int, width: int, is_causal: bool) -> float:
    """Forward (2 products) and backward (5); half of them where later keys are hidden."""
    return 7 * 2 * sum(length**2 for length in lengths) * heads * width / (2 if is_causal else 1)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [128, 512, 1024, 2048, 4096, 8192, 16384])
def bench_dense_gpu(gpu_contest: Contest, length: int, width: int, is_causal: bool) -> None:
    batch = DENSE_TOKENS // length
    lengths, tensors = (length,) * batch, packed(DENSE_TOKENS, DENSE_HEADS, width)
    offsets = cumulative(lengths).to(DEVICE)

    def ours(*sides: Tensor) -> Tensor:
        return flash_attention(*sides, offsets, causal=is_causal, backend="triton")

    def sdpa(kind: SDPBackend) -> Callable[..., Tensor]:
        def attention(*sides: Tensor) -> Tensor:
            rows = (side.view(batch, length, DENSE_HEADS, width).transpose(1, 2) for side in sides)
            with sdpa_kernel(kind):
                output = scaled_dot_product_attention(*rows, is_causal=is_causal)
            return output.transpose(1, 2).reshape(DENSE_TOKENS, DENSE_HEADS, width)

        return attention

    name = f"flash_attention triton dense bfloat16 L={length} D={width} {'causal' if is_causal else 'full'} f+b"
    gpu_contest.run(
        name,
        trained(ours, tensors),
        {
            "SDPA flash": (trained(sdpa(SDPBackend.FLASH_ATTENTION), tensors), 1.0),
            "SDPA cuDNN": (trained(sdpa(SDPBackend.CUDNN_ATTENTION), tensors), None),
        },
        lambda _, mine, theirs: assert_alike(mine, theirs),
        seconds=1,
        facts={
            "dtype": "bfloat16",
            "batch": batch,
            "length": length,
            "heads": DENSE_HEADS,
            "width": width,
            "flop": needed_flop(lengths, DENSE_HEADS, width, is_causal),
        },
    )


def padded_sdpa(tensors: list[Tensor], lengths: tuple[int, ...]) -> tuple[Call, Tensor]:
    """One call on [B, H, L, D] with a mask of the keys; padding happens outside the timing."""

    def padded(part: Tensor) -> Tensor:
        rows = [pad(piece, (0, 0, 0, 0, 0, max(lengths) - len(piece))) for piece in part.split(lengths)]
        return torch.stack(rows).transpose(1, 2).contiguous()

    is_real = (torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]).to(DEVICE)
    mask = is_real[:, None, None, :]
    call = trained(lambda *sides: scaled_dot_product_attention(*sides, attn_mask=mask), [padded(p) for p in tensors])
    return call, is_real


def nested_sdpa(offsets: Tensor, longest: int) -> Callable[..., Tensor]:
    """Jagged nested tensors, made of the packed rows without a copy."""

    def attention(*sides: Tensor) -> Tensor:
        rows = (torch.nested.nested_tensor_from_jagged(side, offsets.long(), max_seqlen=longest) for side in sides)
        return scaled_dot_product_attention(*(side.transpose(1, 2) for side in rows)).transpose(1, 2).values()

    return attention


def history_lengths(users: int, longest: int) -> tuple[int, ...]:
    """Log-normal, median 26 up to 256, or median 260 up to 2048."""
    normal = torch.randn(users, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    median = 26 if longest == 256 else 260
    return tuple(int(length) for length in (median * torch.exp(0.95 * normal)).round().clamp(1, longest))


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize(("users", "longest"), [(256, 256), (4096, 256), (512, 2048)])
def bench_packed_gpu(gpu_contest: Contest, users: int, longest: int, width: int) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="varlen_attn came with torch 2.10")
    lengths = history_lengths(users, longest)
    tensors, offsets = packed(sum(lengths), PACKED_HEADS, width), cumulative(lengths).to(DEVICE)
    padded, is_real = padded_sdpa(tensors, lengths)

    def ours(*sides: Tensor) -> Tensor:
        return flash_attention(*sides, offsets, backend="triton")

    def flash_varlen(*sides: Tensor) -> Tensor:
        return varlen.varlen_attn(*sides, offsets, offsets, max(lengths), max(lengths))

    def check(rival: str, mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
        if rival == "padded SDPA":
            theirs = tuple(part.transpose(1, 2)[is_real] for part in theirs)
        assert_alike(mine, theirs)

    gpu_contest.run(
        f"flash_attention triton packed bfloat16 {users} users, at most {longest}, D={width} f+b",
        trained(ours, tensors),
        {
            "varlen_attn": (trained(flash_varlen, tensors), 1.3 if longest == 256 else 1.0),
            "padded SDPA": (padded, 3.0),
            "nested tensors": (trained(nested_sdpa(offsets, max(lengths)), tensors), None),
        },
        check,
        seconds=1,
        facts={
            "dtype": "bfloat16",
            "users": users,
            "tokens": sum(lengths),
            "heads": PACKED_HEADS,
            "width": width,
            "useful_share_of_padded": sum(length**2 for length in lengths) / (users * max(lengths) ** 2),
            "flop": needed_flop(lengths, PACKED_HEADS, width, False),
        },
    )


EXTRAS = {
    "time_bias": {"buckets": 64},
    "causal": {"causal": True},
    "one head of keys": {"key_heads": 1},
}


@pytest.mark.parametrize("extra", EXTRAS)
def bench_packed_extras_gpu(gpu_contest: Contest, extra: str) -> None:
    """What an option costs or spares: the rival is the same call without it, by the same kernels."""
    width, chosen = 64, dict(EXTRAS[extra])
    lengths = history_lengths(4096, 256)
    tensors, offsets = packed(sum(lengths), PACKED_HEADS, width), cumulative(lengths).to(DEVICE)
    key_heads, buckets = chosen.pop("key_heads", PACKED_HEADS), chosen.pop("buckets", 0)
    if buckets:
        chosen["time_bias"] = torch.randn(PACKED_HEADS, buckets, device=DEVICE, requires_grad=True)
        # A year's events, those of each client in their order.
        client = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        ordered = (client * 2**25 + torch.randint(0, 365 * 86_400, (sum(lengths),))).sort().values
        chosen["timestamp_s"] = (ordered % 2**25).to(DEVICE)
    query, key, value = (part.detach().clone().requires_grad_() for part in tensors[:3])
    leaves = [query, *(part[:, :key_heads].detach().clone().requires_grad_() for part in (key, value))]

    def with_option() -> tuple[Tensor, ...]:
        output = flash_attention(*leaves, offsets, backend="triton", **chosen)
        wanted = [*leaves, chosen["time_bias"]] if buckets else leaves
        return output.detach(), *torch.autograd.grad(output, wanted, tensors[3])

    without = trained(lambda *sides: flash_attention(*sides, offsets, backend="triton"), tensors)
    gpu_contest.run(
        f"flash_attention triton packed bfloat16 4096 users, at most 256, D={width} f+b, {extra}",
        with_option,
        {"without": (without, None)},
        lambda *_: None,  # another result; the tests compare it with the reference
        seconds=1,
        facts={
            "dtype": "bfloat16",
            "users": len(lengths),
            "tokens": sum(lengths),
            "heads": PACKED_HEADS,
            "width": width,
            "flop": needed_flop(lengths, PACKED_HEADS, width, False),
        },
    )
