"""Linear layers by oneDNN against torch's own: results, gradients, what is left to torch, threads."""

from __future__ import annotations

import pytest
import torch
from support.closeness import assert_matches_reference
from torch import Tensor, nn
from torch.nn import functional

from ubp_fast.models.layers import linear as module
from ubp_fast.models.layers.linear import Linear, linear, rows_alone

# rows, inputs, outputs: nothing, one, odd sizes, more than one product over the rows
CASES = [(0, 3, 5), (1, 1, 1), (7, 59, 64), (1024, 16, 3), (1025, 5, 17), (2051, 33, 100)]


def results(rows: Tensor, weight: Tensor, bias: Tensor | None, compute) -> list[Tensor]:
    """The output and the gradients of everything."""
    inputs = [part.detach().requires_grad_() for part in (rows, weight, bias) if part is not None]
    output = compute(*inputs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("layout", ["plain", "strided", "expanded"])
def test_equals_torch(case: tuple[int, int, int], has_bias: bool, layout: str) -> None:
    count, inputs, outputs = case
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, inputs, generator=generator)
    if layout == "strided":
        rows = torch.randn(inputs, 2 * count + 1, generator=generator)[:, : 2 * count : 2].t()
    elif layout == "expanded":
        rows = torch.randn(inputs, generator=generator).expand(count, -1)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    found, plain = (results(rows, weight, bias, compute) for compute in (linear, functional.linear))
    truth = results(*(None if part is None else part.double() for part in (rows, weight, bias)), functional.linear)
    for name, *three in zip(("output", "rows", "weight", "bias"), found, plain, truth, strict=False):
        assert_matches_reference(*three, "linear", (case, layout, name))


def test_only_needed_gradients() -> None:
    layer, rows = Linear(4, 3), torch.randn(6, 4, requires_grad=True)
    layer.requires_grad_(False)
    layer(rows).sum().backward()  # the gradient that comes has no memory of its own
    torch.testing.assert_close(rows.grad, layer.weight.sum(dim=0).expand(6, -1))
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("what", ["float64", "bfloat16", "three dimensions", "autocast", "without oneDNN"])
def test_the_rest_is_torch(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases that oneDNN does not get are torch's, bit by bit."""
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(what, torch.float32)
    rows = torch.randn(*([2] if what == "three dimensions" else []), 5, 8).to(dtype)
    layer = Linear(8, 3).to(dtype)
    if what == "without oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        torch.testing.assert_close(module.product_over_rows(rows, rows), rows.t() @ rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert torch.equal(layer(rows), functional.linear(rows, layer.weight, layer.bias))


def test_threads() -> None:
    rows, weight, bias = torch.randn(3000, 130), torch.randn(90, 130), torch.randn(90)
    outcomes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outcomes.append(results(rows, weight, bias, linear))
    for one, two in zip(*outcomes, strict=True):
        assert torch.equal(one, two)


def test_state_is_that_of_torch() -> None:
    layer, twin = Linear(3, 2), nn.Linear(3, 2)
    layer.load_state_dict(twin.state_dict())
    torch.testing.assert_close(layer(torch.eye(3)), twin(torch.eye(3)))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_rows_that_are_alone(case: tuple[int, int, int], has_bias: bool) -> None:
    count, inputs, outputs = case
    torch.manual_seed(3)
    rows, weight = torch.randn(count, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if has_bias else None
    with torch.inference_mode(), rows_alone():
        whole = linear(rows, weight, bias)
        for size in (1, 3, 130):
            parts = [linear(part, weight, bias) for part in rows.split(size)] if count else [whole]
            assert torch.equal(torch.cat(parts), whole)
    wanted = functional.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(whole.double(), wanted, rtol=1e-5, atol=1e-5 * inputs**0.5)


def test_each_weight_is_its_own_when_rows_are_alone() -> None:
    """Transposed weights are kept by their place in memory."""
    torch.manual_seed(4)
    rows, weight = torch.randn(5, 6), torch.randn(6, 6)
    with torch.inference_mode(), rows_alone():
        for one in (weight, weight.t(), weight[:3], *(torch.randn(6, 6) for _ in range(20))):
            torch.testing.assert_close(linear(rows, one), rows @ one.t())
    before = linear(rows, weight)
    weight.zero_()
    with torch.inference_mode(), rows_alone():
        assert not linear(rows, weight).any() and before.any(), "what another context has kept is gone"


def test_operators_are_sound() -> None:
    """Schema, what is known of results before they are computed, autograd, and PyTorch's compiler with any shape."""
    rows, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((6, 4), (3, 4), (3,)))
    for given in (None, bias):
        torch.library.opcheck(torch.ops.ubp_fast.linear.default, (rows, weight, given))
    torch.library.opcheck(torch.ops.ubp_fast.product_over_rows.default, (rows, torch.randn(6, 5, requires_grad=True)))


def test_further_derivatives_are_those_of_torch() -> None:
    given = [torch.randn(*size, requires_grad=True) for size in ((6, 4), (3, 4), (3,))]

    def gradients_of_a_penalty(compute) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(compute(*given).square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in gradients), given)

    torch.testing.assert_close(gradients_of_a_penalty(linear), gradients_of_a_penalty(functional.linear))
    each_row, plain = (
        torch.func.vmap(torch.func.grad(lambda row, compute=compute: compute(row[None], *given[1:]).square().sum()))
        for compute in (linear, functional.linear)
    )
    torch.testing.assert_close(each_row(given[0].detach()), plain(given[0].detach()))
