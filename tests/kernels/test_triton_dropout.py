"""Dropout's Triton kernel: bit for bit the operator of a CPU, wherever its seed lies, and no question to the device."""

from __future__ import annotations

import pytest
import torch
from support.gpu import DEVICE, DTYPES, HAS_GPU, require_triton_device

from ubp_fast.models.layers.dropout import _by_triton, _draws

require_triton_device()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_held", [False, True], ids=["told", "held"])
def test_kernel_draws_what_a_cpu_draws(dtype: torch.dtype, is_held: bool) -> None:
    """Around a block, from inside of a word of four draws, far into a step, with seeds of all bits."""
    for seed, first, count in ((0, 0, 1), (5, 7, 1023), (2**63 - 2, 2**33 + 1, 1024), (3, 2, 1025), (3, 0, 5000)):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
        wanted = torch.ops.ubp_fast.dropout(values, torch.tensor(seed), first, 2**14)
        place: int | torch.Tensor = torch.tensor(seed, device=DEVICE) if is_held else seed
        found = _by_triton(values.to(DEVICE), place, first, 2**14 - 2**15, 2**16 / (2**16 - 2**14))
        assert found.dtype == dtype and torch.equal(found.cpu(), wanted)


def test_kernel_is_the_definition_in_float64() -> None:
    values = torch.linspace(-3, 3, 4099)
    kept = _draws(4099, 11, 3) >= 2**15 - 2**15
    truth = torch.where(kept, values.double() * 2, 0)
    found = _by_triton(values.to(DEVICE), 11, 3, 0, 2.0)
    assert torch.equal(found.cpu().double(), truth)


def test_the_least_draw_is_kept() -> None:
    draws, least = _draws(70_000, 1, 0), 2**14 - 2**15
    assert (draws == least).any() and (draws == least - 1).any()
    found = _by_triton(torch.ones(70_000, device=DEVICE), 1, 0, least, 1.0)
    assert torch.equal(found.cpu() != 0, draws >= least)


def test_rows_that_are_no_block_of_memory() -> None:
    values = torch.randn(33, 20)
    found = _by_triton(values.to(DEVICE).t(), 4, 0, -100, 1.5)
    assert torch.equal(found, _by_triton(values.to(DEVICE).t().contiguous(), 4, 0, -100, 1.5))
    assert found.shape == (20, 33) and _by_triton(values[:0].to(DEVICE), 4, 0, 0, 2.0).shape == (0, 20)


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_operator_takes_it_on_a_device() -> None:
    values = torch.randn(50, 8)
    for seed in (torch.tensor(5), torch.tensor(5, device=DEVICE)):
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = torch.ops.ubp_fast.dropout(values.to(DEVICE), seed, 3, 2**14)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found.cpu(), torch.ops.ubp_fast.dropout(values, torch.tensor(5), 3, 2**14))
