"""Dropout: shares, mean, gradients, seeds, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch._library.custom_ops import OPDEFS

from ubp_fast.models.layers.dropout import _draws, _hashed, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.95])
def test_share_scale_and_gradient(share: float, dtype: torch.dtype) -> None:
    values = torch.ones(401, 251, dtype=dtype, requires_grad=True)
    found = dropout(values, share, True)
    assert found.dtype == dtype
    is_kept = found != 0
    assert abs(is_kept.float().mean().item() - (1 - share)) < 5e-3
    torch.testing.assert_close(found[is_kept].float(), torch.full_like(found[is_kept].float(), 1 / (1 - share)),
                               rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)  # fmt: skip
    (gradient,) = torch.autograd.grad(found, values, torch.ones_like(found))
    assert torch.equal(gradient, found.detach())
    rows, columns = is_kept.float().mean(dim=1), is_kept.float().mean(dim=0)
    assert rows.std() < 0.04 and columns.std() < 0.04


def test_seed_and_threads() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        results.append((dropout(torch.ones(99, 7), 0.3, True), dropout(torch.ones(99, 7), 0.3, True)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(*results[0])


def test_rows_draw_the_same_wherever_they_are() -> None:
    """Parts that begin inside of a word of four values, an empty one, and integers of torch instead of the kernel."""
    values = torch.ones(11, 3, 7)
    torch.manual_seed(5)
    whole = dropout(values, 0.4, True)
    following = torch.randint(2**62, ())
    for begin, end in ((0, 5), (5, 5), (5, 11)):
        torch.manual_seed(5)
        assert torch.equal(dropout(values[begin:end], 0.4, True, begin), whole[begin:end])
        assert torch.randint(2**62, ()) == following
    for seed, count in ((0, 50), (2**63 - 2, 2), (3, 5000)):
        kept = torch.ops.ubp_fast.dropout(torch.ones(count), torch.tensor(seed), 7, 2**14) != 0
        assert torch.equal(kept, _draws(count, seed, 7) >= 2**14 - 2**15)


def test_a_seed_on_the_device_is_not_asked_for() -> None:
    """As in a captured step: on the meta device a look at it would raise."""
    values, seed = torch.ones(9, 5, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    found = OPDEFS["ubp_fast::dropout"]._init_fn(values, seed, 3, 2**14)
    assert found.is_meta and found.shape == (9, 5)
    assert torch.equal(_draws(50, 2**63 - 2, 7), _draws(50, torch.tensor(2**63 - 2), 7))


def test_numbers_are_those_of_splitmix64() -> None:
    """The first ones of java.util.SplittableRandom and of the published C code, from state 0 and 1234567."""
    assert [hex(int(word) % 2**64) for word in _hashed(0, 1, 2)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
    assert [int(word) % 2**64 for word in _hashed(1234567, 1, 2)] == [6457827717110365317, 3203168211198807973]


def test_nothing_to_do() -> None:
    values = torch.randn(5, 3)
    assert dropout(values, 0.5, False) is values
    assert dropout(values, 0.0, True) is values
    assert dropout(values[:0], 0.5, True).shape == (0, 3)
    assert dropout(values.t(), 0.5, True).shape == (3, 5)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_wrong_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got"):
        dropout(torch.ones(2), share, True)


def test_operator_is_sound() -> None:
    """Schema, what is known of results before they are computed, autograd, and PyTorch's compiler with any shape."""
    values = torch.randn(40, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.ubp_fast.dropout.default, (values, torch.tensor(5), 3, 2**14))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler looks at it
def test_compiled_callers_draw_the_same() -> None:
    values = torch.randn(40, 8, requires_grad=True)

    def call(rows: torch.Tensor) -> torch.Tensor:
        return dropout(rows * 2, 0.5, True) + dropout(rows * 2, 0.5, True)

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        found = function(values)
        results.append((found.detach(), *torch.autograd.grad(found.sum(), values)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert set((results[0][1]).unique().tolist()) == {0, 4, 8}, "two calls draw for themselves"
