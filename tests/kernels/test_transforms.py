"""What other code does with the kernels: right, or refused in one sentence of ours.

The names of the operations are the rows of the second table in docs/kernels.md, section 8.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.operations import Operations
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from ubp_fast.kernels import BackendUnavailable, flash_attention, nt_xent, row_sparse, windowed_aggregate
from ubp_fast.kernels.row_sparse import Adam, AdamStep, RowTable
from ubp_fast.kernels.transforms import direct

KERNELS = ("flash_attention", "nt_xent", "row_sparse", "windowed_aggregate")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what PyTorch itself imports
operations = Operations("operation on tensors", *KERNELS)
right, refused = operations.is_right, operations.is_refused
OFFSETS = torch.tensor([0, 2, 2, 5])
LIMITS = {"anchor_s": 10, "windows_s": (3, None)}
EVENTS = (torch.tensor([0, 2, 3]), torch.tensor([1, 9, 8]))
RULE = Adam(0.9, 0.999, 1e-8)
# Rows that see no key, a mask, a bias with a gradient of its own, dropped weights; rows of zeros, of no weight, alike.
ATTENTION: list[dict[str, Any]] = [
    {"causal": True, "cu_seqlens_key": [0, 0, 2, 5]},
    {"window": (1, 2), "dropout_p": 0.3, "seed": 3},
    {"time_bias": torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5), "timestamp_s": torch.arange(5) * 3},
]
LOSSES: list[dict[str, Any]] = [
    {"negatives": "symmetric", "temperature": 0.3},
    {"negatives": "simclr", "normalize": False},
    {"weight": torch.arange(6.0), "valid": torch.arange(6) != 2, "ids": torch.tensor([0, 0, 1, 2, 3, 3])},
]


def attended(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return torch.randn(3, 5, 2, 3, dtype=dtype).unbind()


def matched(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return torch.randn(2, 6, 4, dtype=dtype).unbind()


def rows(weight: Tensor | None = None) -> RowTable:
    weight = torch.randn(5, 3) if weight is None else weight
    numbers = (torch.zeros(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), -torch.ones(5, dtype=torch.int32))
    return RowTable(weight, torch.zeros(5, 2, 3), *numbers, torch.ones(1, 3, dtype=torch.float64))


def problems(kernel: str) -> list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Functions of tensors that need derivatives, and the tensors."""
    if kernel == "nt_xent":
        return [(lambda a, b, chosen=chosen: nt_xent(a, b, **chosen), matched()) for chosen in LOSSES]
    found: list[Any] = [
        (lambda *inputs, chosen=chosen: flash_attention(*inputs, OFFSETS, **chosen), attended())
        for chosen in ATTENTION[:2]
    ]
    times = ATTENTION[2]["timestamp_s"]
    biased = lambda *inputs: flash_attention(*inputs[:3], OFFSETS, time_bias=inputs[3], timestamp_s=times)  # noqa: E731
    return [*found, (biased, (*attended(), ATTENTION[2]["time_bias"]))]


@right("second derivatives, forward mode, batched gradients", "flash_attention", "nt_xent")
def differentiates(kernel: str) -> None:
    for function, inputs in problems(kernel):
        own = [part.clone().requires_grad_() for part in inputs]
        assert gradcheck(function, own, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, own, fast_mode=True)


@right("`torch.func`: grad, jvp, jacrev, jacfwd, hessian, vmap", "flash_attention", "nt_xent")
def transforms(kernel: str) -> None:
    for function, (first, *others) in problems(kernel):
        loss = lambda part: function(part, *others).square().sum()  # noqa: B023, E731
        own = first.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(own), own)
        for found in (grad(loss)(first), jacrev(loss)(first), jacfwd(loss)(first)):
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(jvp(loss, (first,), (wanted,))[1], wanted.square().sum())
        assert hessian(loss)(first).isfinite().all()
        torch.testing.assert_close(vmap(loss)(torch.stack([first, 2 * first]))[1], loss(2 * first))


@right("the same tensor as several inputs, twice differentiated", "flash_attention")
def differentiates_shared(kernel: str) -> None:
    rows = attended()[0].requires_grad_()
    assert gradgradcheck(lambda x: flash_attention(x, x, x, OFFSETS), rows)


@right("`torch.func.vmap` over ids and times", "row_sparse", "windowed_aggregate")
def maps(kernel: str) -> None:
    if kernel == "row_sparse":
        table = rows()
        found = vmap(lambda ids: row_sparse.gather(table, RULE, ids))(torch.tensor([[1, 2], [4, 0]]))
        assert torch.equal(found, table.weight[torch.tensor([[1, 2], [4, 0]])])
    else:
        found = vmap(lambda times: windowed_aggregate(EVENTS[0], times, **LIMITS).totals)(EVENTS[1].expand(2, -1))
        assert torch.equal(found[1], windowed_aggregate(*EVENTS, **LIMITS).totals)


@refused("offsets that `vmap` maps over", "cu_seqlens must be the same for all that vmap maps over", "flash_attention")
def maps_offsets(kernel: str) -> None:
    inputs = attended()
    vmap(lambda offsets: flash_attention(*inputs, offsets))(OFFSETS.expand(2, -1))


@refused("a named backend in a transform", "backend 'native' is unavailable", "flash_attention", "nt_xent")
def names_a_backend(kernel: str) -> None:
    function, inputs = {"flash_attention": (flash_attention, attended), "nt_xent": (nt_xent, matched)}[kernel]
    more = (OFFSETS,) if kernel == "flash_attention" else ()
    first, *others = inputs(torch.float32)
    own = first.clone().requires_grad_()
    with pytest.raises(BackendUnavailable, match="no second or forward-mode derivatives"):
        torch.autograd.grad(function(own, *others, *more, backend="native").sum(), own, create_graph=True)
    grad(lambda part: function(part, *others, *more, backend="native").sum())(first)


@refused("derivatives, of any kind", "must need no derivative", "row_sparse", "windowed_aggregate")
def differentiates_constants(kernel: str) -> None:
    if kernel == "windowed_aggregate":
        codes, values = torch.zeros(3, dtype=torch.int32), torch.rand(1, 1, dtype=torch.float64)
        sums = lambda values: windowed_aggregate(*EVENTS, codes, values=values, **LIMITS).sums  # noqa: E731
    else:
        values = torch.randn(5, 3)
        sums = lambda weight: row_sparse.gather(rows(weight), RULE, torch.tensor([1]))  # noqa: E731
        gradient = torch.ones(1, 3, requires_grad=True)
        with pytest.raises(ValueError, match=r"^row_sparse: gradient must need no derivative"):
            row_sparse.reduce(torch.tensor([1]), gradient)
        with pytest.raises(ValueError, match=r"^row_sparse: gradient must need no derivative"):
            row_sparse.update(rows(), RULE, torch.tensor([1]), gradient, AdamStep(0.1, 1.0, 1.0))
    with pytest.raises(ValueError, match="must need no derivative"):
        jvp(sums, (values,), (values,))
    sums(values.requires_grad_())


@right("`torch.autocast`")
def casts(kernel: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        if kernel == "flash_attention":
            query, key, value = attended(torch.float32)
            bias = torch.zeros(2, 7, dtype=torch.bfloat16)
            found = flash_attention(query, key.bfloat16(), value, OFFSETS, time_bias=bias, timestamp_s=torch.arange(5))
            assert found.dtype == nn.functional.scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16
            assert flash_attention(*attended(), OFFSETS).dtype == torch.float64
        elif kernel == "nt_xent":
            left, right = matched(torch.float32)
            found = nt_xent(left, right.bfloat16())
            assert found.dtype == torch.float32 and found == nt_xent(left.bfloat16(), right.bfloat16())
        elif kernel == "row_sparse":
            assert row_sparse.gather(rows(), RULE, torch.tensor([1])).dtype == torch.float32
        else:
            assert windowed_aggregate(*EVENTS, **LIMITS).totals.dtype == torch.int32


@refused("several dtypes without autocast", "dtype of", "flash_attention", "nt_xent", "row_sparse")
def mixes_dtypes(kernel: str) -> None:
    if kernel == "flash_attention":
        query, key, value = attended()
        flash_attention(query, key, value.float(), OFFSETS)
    elif kernel == "nt_xent":
        nt_xent(matched()[0], matched(torch.float32)[1])
    else:
        row_sparse.update(rows(), RULE, torch.tensor([1]), torch.ones(1, 3).double(), AdamStep(0.1, 1.0, 1.0))


@right("a tensor as `scale` or `temperature`, with its gradient", "flash_attention", "nt_xent")
def learns_a_number(kernel: str) -> None:
    number = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    if kernel == "nt_xent":
        assert gradcheck(lambda tau: nt_xent(*matched_once, temperature=tau), number)
        return
    inputs = attended()
    assert gradcheck(lambda scale: flash_attention(*inputs, OFFSETS, scale=scale), number)
    wanted = flash_attention(*inputs, OFFSETS, scale=0.3)
    torch.testing.assert_close(flash_attention(*inputs, OFFSETS, scale=number[None]), wanted)


matched_once = matched()


@right("lists, arrays and integers of any width as offsets", "flash_attention", "windowed_aggregate")
def takes_offsets(kernel: str) -> None:
    if kernel == "windowed_aggregate":
        found = windowed_aggregate([0, 2, 3], np.array([1, 9, 8], np.int16), **LIMITS)
        assert found.totals.tolist() == windowed_aggregate(*EVENTS, **LIMITS).totals.tolist()
        return
    inputs = attended()
    wanted = flash_attention(*inputs, OFFSETS)
    array = OFFSETS.numpy()
    for offsets in ([0, 2, 2, 5], (0, 2, 2, 5), array, array.astype(np.uint16), list(array), OFFSETS.short()):
        assert torch.equal(flash_attention(*inputs, offsets), wanted)
        assert torch.equal(flash_attention(*inputs, OFFSETS, offsets), wanted)


@right("integers of NumPy as arguments", "flash_attention", "windowed_aggregate")
def takes_integers(kernel: str) -> None:
    if kernel == "windowed_aggregate":
        found = windowed_aggregate(*EVENTS, anchor_s=np.int64(10), windows_s=np.array([3, 20]))
        assert torch.equal(found.totals, windowed_aggregate(*EVENTS, **LIMITS).totals)
        return
    inputs, chosen = attended(), {"window": (np.int64(1), np.uint8(2)), "seed": np.int32(3), "dropout_p": 0.3}
    assert torch.equal(flash_attention(*inputs, OFFSETS, **chosen), flash_attention(*inputs, OFFSETS, **ATTENTION[1]))


@refused("floats as integers", "must be an integer, got 2.5", "flash_attention", "windowed_aggregate")
def takes_floats(kernel: str) -> None:
    if kernel == "windowed_aggregate":
        windowed_aggregate(*EVENTS, anchor_s=10, windows_s=(2.5,))
    flash_attention(*attended(), OFFSETS, window=2.5)


@refused("what is no tensor", "must be a tensor, got list", "flash_attention", "nt_xent", "row_sparse")
def takes_lists(kernel: str) -> None:
    if kernel == "flash_attention":
        flash_attention([[1.0]], *attended()[1:], OFFSETS)
    elif kernel == "nt_xent":
        with pytest.raises(TypeError, match=r"^nt_xent: ids must be a tensor"):
            nt_xent(*matched(), ids=[1] * 6)
        nt_xent(matched()[0], [[1.0]])
    else:
        row_sparse.gather(rows(), RULE, [1])


@right("fewer heads for keys than for queries", "flash_attention")
def groups_heads(kernel: str) -> None:
    query, key, value = attended()
    repeated = (part[:, :1].expand_as(query) for part in (key, value))
    torch.testing.assert_close(
        flash_attention(query, key[:, :1], value[:, :1], OFFSETS), flash_attention(query, *repeated, OFFSETS)
    )


class Module(nn.Module):
    """A kernel as a module of tensors."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel, self.table = kernel, rows()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if self.kernel == "flash_attention":
            return flash_attention(first, first, first, second, causal=True)
        if self.kernel == "nt_xent":
            return nt_xent(first, second)
        if self.kernel == "row_sparse":
            return row_sparse.gather(self.table, RULE, second)
        return windowed_aggregate(first, second, **LIMITS).totals


def small_and_large(kernel: str) -> list[tuple[Tensor, Tensor]]:
    if kernel == "flash_attention":
        return [(torch.randn(5, 2, 4), OFFSETS), (torch.randn(20, 2, 4), torch.tensor([0, 5, 5, 7, 20]))]
    if kernel == "nt_xent":
        return [matched(torch.float32), torch.randn(2, 11, 4).unbind()]
    if kernel == "row_sparse":
        return [(torch.zeros(2), torch.tensor([1, 2])), (torch.zeros(3), torch.tensor([0, 4, 4]))]
    return [(torch.tensor([0, 2, 3, 3]), EVENTS[1]), (torch.tensor([0, 1, 1, 2, 5]), torch.tensor([1, 2, 3, 4, 9]))]


@right("`torch.compile(fullgraph=True)`")
def compiles(kernel: str) -> None:
    torch._dynamo.reset()
    module = Module(kernel)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for inputs in small_and_large(kernel):
        torch.testing.assert_close(compiled(*inputs), module(*inputs))


@right("`torch.compile` around a transform", "flash_attention", "nt_xent")
def compiles_transforms(kernel: str) -> None:
    function, (first, *others) = problems(kernel)[0]
    loss = lambda part: function(part, *others).square().sum()  # noqa: E731
    stack = torch.stack([first, 2 * first])
    for transformed, part in ((grad(loss), first), (hessian(loss), first), (vmap(grad(loss)), stack)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=f"{kernel} in a transform of torch.func .* leave fullgraph out"):
            torch.compile(transformed, backend="aot_eager", fullgraph=True)(part)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(transformed, backend="aot_eager")(part), transformed(part))


@right("`torch.export` with any number of rows and sequences")
def exports(kernel: str) -> None:
    module, (small, large) = Module(kernel), small_and_large(kernel)
    names = {"flash_attention": "TB", "nt_xent": "NN", "row_sparse": "RI", "windowed_aggregate": "UE"}[kernel]
    sizes = {name: torch.export.Dim(name) for name in names}
    shapes = tuple({0: sizes[name]} for name in names)
    # Without dynamo PyTorch itself tells one client from several.
    for is_strict in (True,) if kernel == "windowed_aggregate" else (True, False):
        program = torch.export.export(module, small, dynamic_shapes=shapes, strict=is_strict).module()
        torch.testing.assert_close(program(*large), module(*large))


@right("meta and fake tensors")
def fakes(kernel: str) -> None:
    inputs = small_and_large(kernel)[0]
    wanted = Module(kernel)(*inputs).shape
    with FakeTensorMode() as mode:
        module = Module(kernel)
        module.table = RowTable(*map(mode.from_tensor, module.table))
        assert module(*map(mode.from_tensor, inputs)).shape == wanted


@pytest.mark.parametrize(("name", "kernel"), list(operations.right))
def test_right(name: str, kernel: str) -> None:
    operations.right[name, kernel](kernel)


@pytest.mark.parametrize(("name", "kernel"), list(operations.refused))
def test_refused_by_name(name: str, kernel: str) -> None:
    operation, message = operations.refused[name, kernel]
    with pytest.raises(
        (ValueError, TypeError, BackendUnavailable), match=rf"^{kernel}: .*{re.escape(message)}"
    ) as found:
        operation(kernel)
    assert "\n" not in str(found.value)


def test_rows_of_zeros_have_no_derivatives() -> None:
    left, right = matched()
    left[1] = 0
    found = hessian(lambda part: nt_xent(part, right))(left)
    assert found.isfinite().all() and found.any()
    assert not found[1].any() and not found[:, :, 1].any()


def test_values_in_a_transform_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^flash_attention: cu_seqlens must end at the number of rows 5, got 4"):
        grad(lambda part: flash_attention(part, part, part, [0, 4]).sum())(attended()[0])
    with pytest.raises(ValueError, match=r"^flash_attention: seed must be given to dropout inside of a transform"):
        grad(lambda part: flash_attention(part, part, part, OFFSETS, dropout_p=0.5).sum())(attended()[0])
    left, right = matched()
    with pytest.raises(ValueError, match=r"^nt_xent: left must be finite in every valid row"):
        grad(lambda part: nt_xent(part / 0, right))(left)


def test_the_document_lists_these_operations() -> None:
    operations.assert_documented()


class _Watched:
    """Stands for an operator: says whether it or its function was called."""

    @staticmethod
    def _init_fn(*_: Any) -> str:
        return "function"

    def __call__(self, *_: Any) -> str:
        return "operator"


WATCHED = {
    "gradient": lambda call: call(torch.ones(2, requires_grad=True)),
    "negative view": lambda call: call(torch._neg_view(torch.ones(2))),
    "subclass": lambda call: call(torch.nn.Parameter(torch.ones(2), requires_grad=False)),
    "vmap": lambda call: _mapped(call),
    "forward mode": lambda call: _within(forward_ad.dual_level(), call),
    "dispatch mode": lambda call: _within(FlopCounterMode(display=False), call),
    "function mode": lambda call: _within(torch.device("cpu"), call),
    "profiler": lambda call: _within(torch.profiler.profile(), call),
}


def _within(context: Any, call: Callable[[Tensor], str]) -> str:
    with context:
        return call(torch.ones(2))


def _mapped(call: Callable[[Tensor], str]) -> str:
    found: list[str] = []
    vmap(lambda x: found.append(call(x)) or x)(torch.ones(2))
    return found[0]


@pytest.mark.parametrize("case", WATCHED)
def test_operators_are_called_where_somebody_watches(case: str) -> None:
    call = direct(_Watched())
    assert WATCHED[case](call) == "operator"
    assert call(torch.ones(2), None, 3) == "function"
    with torch.no_grad():
        assert call(torch.ones(2, requires_grad=True)) == "function"
    with torch.inference_mode():
        assert call(torch.ones(2)) == "function"


def test_negative_views_keep_their_sign() -> None:
    query = torch.randn(6, 2, 8)
    wanted = flash_attention(-query, query, query, [0, 2, 6], backend="native")
    found = flash_attention(torch._neg_view(query), query, query, [0, 2, 6], backend="native")
    assert torch.equal(found, wanted)
