"""flash_attention on random problems, sound and broken: right or refused, never a crash.

The command for the address and undefined-behaviour sanitizers runs this file; see `make sanitize`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from support.cases import PackedCase, case_options, cumulative, packed_inputs

from ubp_fast import _core
from ubp_fast.kernels import flash_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRONG_ENTRIES = (-(2**62), -(2**31), -1, 0, 1, 7, 2**31 - 1, 2**31, 2**32, 2**62)


@pytest.fixture(autouse=True)
def same_isa() -> Iterator[None]:
    before = _core.isa()
    yield
    _core.set_isa(before)


def random_case(generator: random.Random) -> PackedCase:
    """Any lengths (many short, some beyond a block), any width, self or cross attention."""

    def lengths(count: int) -> tuple[int, ...]:
        return tuple(
            generator.choice((0, 1, generator.randint(0, 60), generator.randint(0, 300))) for _ in range(count)
        )

    sequences = generator.randint(0, 5)
    return PackedCase(
        "fuzz",
        lengths(sequences),
        lengths(sequences) if generator.random() < 0.4 else None,
        heads=generator.randint(0, 4),
        width=generator.choice((1, 7, 16, 32, 33, 64, generator.randint(1, 256), 256)),
        is_causal=generator.random() < 0.5,
        kind=generator.choice(("normal", "normal", "large", "strided")),
        window=generator.choice((None, None, (generator.randint(0, 300), None), (generator.randint(0, 50), 0))),
        buckets=generator.choice((0, 0, 1, generator.randint(1, 106))),
        dropout_p=generator.choice((0.0, 0.0, 0.1, 0.9)),
    )


@pytest.mark.parametrize("seed", range(40))
def test_sound_problems(seed: int) -> None:
    generator = random.Random(seed)
    case, dtype = random_case(generator), generator.choice(DTYPES)
    _core.set_isa(generator.choice(_core.usable_isas()))
    torch.set_num_threads(generator.randint(1, 3))
    query, key, value, *offsets = packed_inputs(case, dtype, seed)
    if generator.random() < 0.2 and key.numel():
        key.flatten()[generator.randrange(key.numel())] = generator.choice((float("nan"), float("inf"), -float("inf")))
    leaves, options = [part.detach().requires_grad_() for part in (query, key, value)], case_options(case, seed)
    if case.buckets:
        leaves.append(options["time_bias"].requires_grad_())
    output = flash_attention(*leaves[:3], *offsets, backend="native", **options)
    gradients = torch.autograd.grad(output, leaves, torch.randn_like(output))
    assert output.shape == query.shape
    assert [part.shape for part in gradients] == [part.shape for part in leaves]
    if torch.isfinite(key).all() and case.kind != "large":
        assert torch.isfinite(output).all() and all(torch.isfinite(part).all() for part in gradients)


def is_sound(offsets: torch.Tensor, tokens: int) -> bool:
    values = offsets.tolist()
    return values[0] == 0 and values[-1] == tokens and values == sorted(values)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("argument", ["cu_seqlens", "cu_seqlens_key"])
def test_broken_offsets_are_refused(seed: int, argument: str) -> None:
    generator = random.Random(seed)
    lengths = tuple(generator.randint(0, 9) for _ in range(generator.randint(1, 5)))
    tensors = torch.randn(3, sum(lengths), 2, 8)
    offsets = {name: cumulative(lengths).long() for name in ("cu_seqlens", "cu_seqlens_key")}
    broken = offsets[argument]
    while is_sound(broken, sum(lengths)):
        broken[generator.randrange(len(broken))] = generator.choice(WRONG_ENTRIES)
    with pytest.raises(ValueError, match=f"^flash_attention: {argument} must "):
        flash_attention(*tensors, **offsets, causal=generator.random() < 0.5)
