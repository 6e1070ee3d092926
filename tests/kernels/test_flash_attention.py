"""flash_attention: every backend, dtype and instruction set against the reference at float64, and its invariants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.cases import ATTENTION_CASES, PackedCase, cumulative, packed_inputs
from support.closeness import assert_matches_reference
from torch import Tensor
from torch.nn import functional

from ubp_fast import _core
from ubp_fast.kernels import BackendUnavailable, flash_attention
from ubp_fast.kernels.flash_attention.api import _backward_op, _forward_op
from ubp_fast.kernels.flash_attention.reference import Problem, attention

OP = "flash_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = tuple(_core.usable_isas())
MIXED = PackedCase("mixed", (5, 0, 49, 26, 130), width=32, heads=3)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same values and strides, as leaves that want gradients."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


def with_gradients(case: PackedCase, tensors: list[Tensor], backend: str, **options: Any) -> list[Tensor]:
    """Output and the gradients of query, key and value for a fixed gradient of the output."""
    query, key, value = leaves(*tensors[:3])
    output = flash_attention(query, key, value, *tensors[3:], causal=case.is_causal, backend=backend, **options)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, (query, key, value), noise.to(output.dtype))]


def truth_of(case: PackedCase, tensors: list[Tensor]) -> list[Tensor]:
    """Output and gradients by autograd through the reference at float64, on the values the kernel saw."""
    query, key, value = leaves(*(tensor.double() for tensor in tensors[:3]))
    output, _ = attention(Problem(query, key, value, tensors[3], tensors[4], case.is_causal, case.width**-0.5))
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = noise.to(tensors[0].dtype).double()
    return [output, *torch.autograd.grad(output, (query, key, value), noise, materialize_grads=True)]


EXPECTED: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}


def expected(case: PackedCase, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Reference and truth, computed once for all backends and instruction sets."""
    if (case, dtype) not in EXPECTED:
        tensors = list(packed_inputs(case, dtype))
        EXPECTED[case, dtype] = with_gradients(case, tensors, "reference"), truth_of(case, tensors)
    return EXPECTED[case, dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_native_matches_reference(case: PackedCase, dtype: torch.dtype, isa: str) -> None:
    reference, truth = expected(case, dtype)
    found = with_gradients(case, list(packed_inputs(case, dtype)), "native")
    for name, *parts in zip(("output", "grad_query", "grad_key", "grad_value"), found, reference, truth, strict=True):
        assert_matches_reference(*parts, f"{OP} {name}", f"{case}, {isa}")


@pytest.mark.parametrize("is_causal", [False, True])
def test_reference_matches_pytorch(is_causal: bool) -> None:
    query, key, value, cu_seqlens, _ = packed_inputs(MIXED, torch.float64)
    found = flash_attention(query, key, value, cu_seqlens, causal=is_causal, backend="reference", scale=0.3)
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        parts = (part[start:end].transpose(0, 1) for part in (query, key, value))
        wanted = functional.scaled_dot_product_attention(*parts, is_causal=is_causal, scale=0.3)
        torch.testing.assert_close(found[start:end], wanted.transpose(0, 1))


@pytest.mark.parametrize("case", [PackedCase("self", (3, 0, 4)), PackedCase("cross", (4, 2, 1), (3, 4, 0))], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(case: PackedCase, is_causal: bool) -> None:
    query, key, value, *offsets = packed_inputs(case, torch.float64)

    def call(*tensors: Tensor) -> Tensor:
        return flash_attention(*tensors, *offsets, causal=is_causal, backend="reference")

    assert torch.autograd.gradcheck(call, leaves(query, key, value))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_without_keys_is_zero(backend: str, dtype: torch.dtype) -> None:
    case = PackedCase("late-keys", (60, 3, 4), (20, 0, 4), is_causal=True)
    output, *gradients = with_gradients(case, list(packed_inputs(case, dtype)), backend)
    blind = [*range(40), 60, 61, 62]  # the ends are aligned: 60 queries, 20 keys
    assert not output[blind].any() and not gradients[0][blind].any()
    assert output[40:60].any(dim=2).all() and not any(part.isnan().any() for part in (output, *gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_each_alone(dtype: torch.dtype, isa: str) -> None:
    query, key, value, cu_seqlens, _ = packed_inputs(MIXED, dtype)
    together = with_gradients(MIXED, [query, key, value, cu_seqlens, cu_seqlens], "native")
    start = 0
    for length in MIXED.lengths:
        rows = slice(start, start + length)
        alone = flash_attention(query[rows], key[rows], value[rows], cumulative((length,)), backend="native")
        assert torch.equal(alone, together[0][rows])
        start += length


def test_permuted_batch_permutes_the_result() -> None:
    tensors = packed_inputs(MIXED, torch.float32)
    order = [3, 0, 4, 2, 1]
    rows = torch.cat([torch.arange(tensors[3][b], tensors[3][b + 1]) for b in order])
    moved = [part[rows] for part in tensors[:3]]
    offsets = cumulative(tuple(MIXED.lengths[b] for b in order))
    found = flash_attention(*moved, offsets)
    assert torch.equal(found, flash_attention(*tensors[:4])[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    tensors = list(packed_inputs(MIXED, dtype))
    torch.set_num_threads(1)
    alone = with_gradients(MIXED, tensors, "native")
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, with_gradients(MIXED, tensors, "native"), alone))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_only_some_inputs_want_gradients(wanted: tuple[int, ...], backend: str) -> None:
    tensors = list(packed_inputs(MIXED, torch.float32))
    everything = with_gradients(MIXED, tensors, backend)[1:]
    some = [part.clone().requires_grad_(at in wanted) for at, part in enumerate(tensors[:3])]
    output = flash_attention(*some, tensors[3], backend=backend)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).float()
    output.backward(noise)
    for at, part in enumerate(some):
        assert (part.grad is None) == (at not in wanted)
        assert part.grad is None or torch.equal(part.grad, everything[at])


def test_int64_offsets_and_float64_are_taken() -> None:
    query, key, value, cu_seqlens, _ = packed_inputs(MIXED, torch.float64)
    assert torch.equal(
        flash_attention(query, key, value, cu_seqlens.long()), flash_attention(query, key, value, cu_seqlens)
    )


def test_nan_stays_in_its_sequence_and_head(isa: str) -> None:
    case = PackedCase("nan", (30, 30, 4), width=32)
    for causal, poisoned in ((False, range(30, 60)), (True, range(45, 60))):
        query, key, value, cu_seqlens, _ = packed_inputs(case, torch.float32)
        key[45, 1, 3] = float("nan")
        found = flash_attention(query, key, value, cu_seqlens, causal=causal, backend="native")
        is_nan = found.isnan()
        assert is_nan[list(poisoned), 1].all()
        assert int(is_nan.sum()) == len(poisoned) * 32


def test_infinite_scores_do_not_crash(isa: str) -> None:
    query, key, value, cu_seqlens, _ = packed_inputs(MIXED, torch.float32)
    query[3], key[4] = float("inf"), float("-inf")
    output = flash_attention(query, key, value, cu_seqlens, backend="native")
    assert output[3].isnan().any() and not output[5:].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    case = PackedCase("small", (5, 0, 9), width=8)
    query, key, value, *offsets = packed_inputs(case, dtype)
    torch.library.opcheck(_forward_op, (*leaves(query, key, value), *offsets, True, 0.3, "native"))
    output, lse = _forward_op(query, key, value, *offsets, True, 0.3, "native")
    arguments = (torch.randn_like(output), query, key, value, output, lse, *offsets, True, 0.3, "native")
    torch.library.opcheck(_backward_op, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile itself imports
def test_compiles_as_one_graph() -> None:
    tensors = list(packed_inputs(MIXED, torch.float32))

    def loss(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        return flash_attention(query * 2, key, value, cu_seqlens, causal=True).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        inputs = leaves(*tensors[:3])
        results.append(torch.autograd.grad(function(*inputs, tensors[3]), inputs))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile itself imports
def test_other_batch_sizes_do_not_compile_again() -> None:
    """A message that formatted the number of sequences once made every batch size a graph of its own."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=True, backend=count)
    for lengths in ((3, 5), (4, 0, 9), (30, 2, 1, 7), (5, 6, 7, 8, 9)):
        tensors = packed_inputs(PackedCase("batch", lengths), torch.float32)[:4]
        torch.testing.assert_close(compiled(*tensors), flash_attention(*tensors))
    assert len(graphs) == 1


def arguments(**change: Any) -> dict[str, Any]:
    tensors = {name: torch.randn(6, 2, 4) for name in ("query", "key", "value")}
    return {**tensors, "cu_seqlens": torch.tensor([0, 2, 6]), **change}


BAD_INPUT = {
    "query-ndim": ({"query": torch.randn(6, 8)}, ValueError, r"query must have shape \[T, H, D\], got \[6, 8\]"),
    "too-wide": (
        {name: torch.randn(6, 2, 257) for name in ("query", "key", "value")},
        ValueError,
        r"query must have a width D in 1\.\.256, got 257",
    ),
    "no-width": ({"query": torch.randn(6, 2, 0)}, ValueError, r"query must have a width D in 1\.\.256, got 0"),
    "integers": ({"query": torch.ones(6, 2, 4).long()}, TypeError, r"query must have dtype .*, got torch\.int64"),
    "key-heads": ({"key": torch.randn(6, 3, 4)}, ValueError, r"key must have shape \[S, H, D\] = \[S, 2, 4\] like"),
    "key-ndim": ({"key": torch.randn(6, 4)}, ValueError, r"key must have shape .*, got \[6, 4\]"),
    "value-rows": ({"value": torch.randn(5, 2, 4)}, ValueError, r"value must have shape \[6, 2, 4\] like key, got \[5"),
    "dtype-mix": ({"key": torch.randn(6, 2, 4).bfloat16()}, TypeError, r"key must have the dtype of query"),
    "device-mix": ({"value": torch.randn(6, 2, 4, device="meta")}, ValueError, r"value must be on the device of query"),
    "float-offsets": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, r"cu_seqlens must have dtype .*float32"),
    "offsets-ndim": ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"cu_seqlens must have shape \[B \+ 1\]"),
    "no-offsets": ({"cu_seqlens": torch.zeros(0).long()}, ValueError, r"cu_seqlens must have shape \[B \+ 1\], got"),
    "late-start": ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, r"cu_seqlens must start at 0, got 1"),
    "negative": ({"cu_seqlens": torch.tensor([0, -1, 6])}, ValueError, r"must not decrease, got 0 then -1 at entry 1"),
    "decreasing": ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, ValueError, r"not decrease, got 4 then 3 at entry 2"),
    "short": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"must end at the number of rows 6, got 5"),
    "long": ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, r"must end at the number of rows 6, got 7"),
    "wrapping": (
        {"cu_seqlens": torch.tensor([0, 6 + 2**32])},
        ValueError,
        r"must end at the number of rows 6, got 4294967302",
    ),
    "key-offsets": ({"cu_seqlens_key": torch.tensor([0, 6])}, ValueError, r"cu_seqlens_key must have 3 entries like"),
    "key-end": ({"cu_seqlens_key": torch.tensor([0, 2, 5])}, ValueError, r"cu_seqlens_key must end at .* 6, got 5"),
    "nan-scale": ({"scale": float("nan")}, ValueError, r"scale must be finite in float32, got nan"),
    "wide-scale": ({"scale": 1e300}, ValueError, r"scale must be finite in float32, got 1e\+300"),
    "no-backend": ({"backend": "fast"}, ValueError, r"backend must be one of \['auto', .*\], got 'fast'"),
    "triton": ({"backend": "triton"}, BackendUnavailable, r"backend 'triton' does not exist in this version"),
    "cuda": ({"backend": "cuda"}, BackendUnavailable, r"backend 'cuda' does not exist in this version"),
    "native-float64": (
        {"backend": "native", **{name: torch.randn(6, 2, 4).double() for name in ("query", "key", "value")}},
        BackendUnavailable,
        r"backend 'native' is unavailable: it computes float32, bfloat16 and float16, the tensors are torch\.float64",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name: str) -> None:
    change, error, message = BAD_INPUT[name]
    with pytest.raises(error, match="^flash_attention: .*" + message):
        flash_attention(**arguments(**change))
