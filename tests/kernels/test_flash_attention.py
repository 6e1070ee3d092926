"""flash_attention: every backend, dtype and instruction set against the reference at float64, and its invariants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.attention import (
    NAMES,
    attention_of_pytorch,
    expected,
    leaves,
    with_gradients,
    with_lse_gradients,
)
from support.cases import ATTENTION_CASES, PackedCase, case_options, cumulative, packed_inputs
from support.closeness import assert_matches_reference
from torch import Tensor
from torch.nn import functional

from ubp_fast import _core
from ubp_fast.kernels import BackendUnavailable, flash_attention
from ubp_fast.kernels.flash_attention.api import _backward_op, _bounds, _forward_op
from ubp_fast.kernels.flash_attention.reference import philox, time_buckets

OP = "flash_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = tuple(_core.usable_isas())
MIXED = PackedCase("mixed", (5, 0, 49, 26, 130), width=32, heads=3)
TIMED = replace(MIXED, name="timed", buckets=64, window=(60, 2))
DROPPED = replace(TIMED, name="dropped", dropout_p=0.3)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_native_matches_reference(case: PackedCase, dtype: torch.dtype, isa: str) -> None:
    reference, truth = expected(case, dtype)
    found = with_gradients(case, list(packed_inputs(case, dtype)), "native")
    for name, *parts in zip(NAMES[: len(truth)], found, reference, truth, strict=True):
        assert_matches_reference(*parts, f"{OP} {name}", f"{case}, {isa}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_one_key_gives_it_no_gradient(dtype: torch.dtype, isa: str) -> None:
    """Exactly none: its weight is 1 whatever the score. A scale that is no power of two rounds the scores."""
    lengths, width = torch.tensor([1, 1, 9, 256, 300]), 24
    query, key, value = torch.randn(3, int(lengths.sum()), 2, width).to(dtype).requires_grad_().unbind()
    offsets = functional.pad(lengths.cumsum(0), (1, 0))
    output = flash_attention(query, key, value, offsets, window=0, backend="native")
    gradients = torch.autograd.grad(output, (query, key, value), torch.randn(output.shape).to(dtype))
    assert not gradients[0].any() and not gradients[1].any(), isa
    assert gradients[2].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_reference_matches_pytorch(is_causal: bool) -> None:
    query, key, value, cu_seqlens, _ = packed_inputs(MIXED, torch.float64)
    found = flash_attention(query, key, value, cu_seqlens, causal=is_causal, backend="reference", scale=0.3)
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        parts = (part[start:end].transpose(0, 1) for part in (query, key, value))
        wanted = functional.scaled_dot_product_attention(*parts, is_causal=is_causal, scale=0.3)
        torch.testing.assert_close(found[start:end], wanted.transpose(0, 1))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_auto_never_hands_over_to_pytorch(dtype: torch.dtype) -> None:
    """Whose attention gives other bits in every run of a GPU: not for long sequences, nor where no kernel computes."""
    case = PackedCase("long", (700, 3), heads=1, is_causal=True)
    tensors = list(packed_inputs(case, dtype))
    assert not attention_of_pytorch(lambda: with_gradients(case, tensors, "auto"))
    rows = tensors[0][None].transpose(1, 2)
    assert attention_of_pytorch(lambda: functional.scaled_dot_product_attention(rows, rows, rows))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_shared_heads_match_pytorch(backend: str) -> None:
    """Query head h sees key head h // (H / K), as with `enable_gqa`."""
    case = replace(MIXED, heads=6, key_heads=2)
    query, key, value, cu_seqlens, _ = packed_inputs(case, torch.float32)
    found = flash_attention(query, key, value, cu_seqlens, backend=backend)
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        parts = (part[start:end].transpose(0, 1) for part in (query, key, value))
        wanted = functional.scaled_dot_product_attention(*parts, enable_gqa=True)
        torch.testing.assert_close(found[start:end], wanted.transpose(0, 1))


LSE_CASES = (
    MIXED,
    DROPPED,
    PackedCase("late-keys", (40, 3, 4), (20, 0, 4), is_causal=True),
    PackedCase("one-column", (3, 9), width=1),
    PackedCase("shared", (7, 0, 30), heads=4, key_heads=2, buckets=9),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LSE_CASES, ids=str)
def test_log_sum_exp_and_its_gradient(case: PackedCase, dtype: torch.dtype) -> None:
    tensors = list(packed_inputs(case, dtype))
    found, reference = (with_lse_gradients(case, tensors, backend) for backend in ("native", "reference"))
    truth = with_lse_gradients(case, [*(part.double() for part in tensors[:3]), *tensors[3:]], "reference")
    blind = truth[0] == -torch.inf
    assert found[0].dtype == torch.float32 and torch.equal(found[0] == -torch.inf, blind)
    found[0], reference[0], truth[0] = (part[0].masked_fill(blind, 0) for part in (found, reference, truth))
    for name, *parts in zip(("lse", *NAMES[1:]), found, reference, truth, strict=False):
        assert_matches_reference(*parts, f"{OP} {name}", str(case))


def test_parts_of_the_keys_are_put_together_by_log_sum_exps() -> None:
    query, key, value, cu_seqlens, _ = packed_inputs(PackedCase("whole", (40,)), torch.float32)
    sides = leaves(query, key, value)
    halves = [
        flash_attention(sides[0], *(part[rows] for part in sides[1:]), cu_seqlens, [0, 20], return_lse=True)
        for rows in (slice(20), slice(20, 40))
    ]
    shares = torch.stack([lse for _, lse in halves]).softmax(dim=0)[..., None]
    together = shares[0] * halves[0][0] + shares[1] * halves[1][0]
    whole = flash_attention(*sides, cu_seqlens)
    torch.testing.assert_close(together, whole)
    noise = torch.randn_like(whole)
    for mine, theirs in zip(*(torch.autograd.grad(part, sides, noise) for part in (together, whole)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what PyTorch itself imports
def test_log_sum_exp_differentiates_twice() -> None:
    case = PackedCase("twice", (3, 2), heads=2, key_heads=1, width=3)
    query, key, value, *offsets = packed_inputs(case, torch.float64)

    def call(*sides: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention(*sides, *offsets, return_lse=True)

    sides = leaves(query, key, value)
    assert torch.autograd.gradcheck(call, sides) and torch.autograd.gradgradcheck(call, sides)
    wanted = torch.func.jvp(call, (query, key, value), (query, key, value))[1]
    step = 1e-6
    ahead, behind = (call(*(part * (1 + by) for part in (query, key, value))) for by in (step, -step))
    for tangent, up, down in zip(wanted, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)


GRADCHECK_CASES = (
    PackedCase("self", (3, 0, 4)),
    PackedCase("cross-causal", (4, 2, 1), (3, 4, 0), is_causal=True),
    PackedCase("window", (5, 2), (4, 3), window=(1, 1)),
    PackedCase("time", (4, 2, 1), (3, 4, 0), buckets=40),
    PackedCase("everything", (5, 2), window=(3, 1), buckets=6, dropout_p=0.4),
)


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(case: PackedCase) -> None:
    query, key, value, *offsets = packed_inputs(case, torch.float64)
    options = case_options(case)
    bias = options.pop("time_bias", torch.zeros(1)).double()

    def call(*tensors: Tensor) -> Tensor:
        table = {"time_bias": tensors[3]} if case.buckets else {}
        return flash_attention(*tensors[:3], *offsets, **options, **table, backend="reference")

    assert torch.autograd.gradcheck(call, leaves(query, key, value, bias)[: 4 if case.buckets else 3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bucket_shifts_nothing(dtype: torch.dtype, isa: str) -> None:
    """Softmax does not see a constant; the gradient of the table is 0, so that no bound of closeness applies."""
    case = PackedCase("one-bucket", (5, 0, 60), buckets=1, width=32)
    tensors = list(packed_inputs(case, dtype))
    *found, grad_bias = with_gradients(case, tensors, "native")
    plain = with_gradients(replace(case, buckets=0), tensors, "native")
    for mine, theirs in zip(found, plain, strict=True):
        atol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=torch.finfo(dtype).eps)
    assert grad_bias.abs().max() < (1e-5 if dtype == torch.float32 else 0.3)


def test_times_far_apart_are_the_last_bucket(isa: str) -> None:
    query = torch.randn(4, 1, 16)
    bias = torch.zeros(1, 64)
    bias[0, 63] = -torch.inf
    times = torch.tensor([0, 2**31 - 3, 2**31, 2**62])
    same = {"cu_seqlens": torch.tensor([0, 4]), "time_bias": bias, "timestamp_s": times}
    found = flash_attention(query, query, query, **same, backend="native")
    torch.testing.assert_close(found, flash_attention(query, query, query, **same, backend="reference"))
    torch.testing.assert_close(found[3], query[3])  # it sees nobody else


def test_dropout_repeats_and_is_unbiased(isa: str) -> None:
    case = PackedCase("dropout", (300, 0, 41), dropout_p=0.25, heads=3)
    query, key, value, cu_seqlens, _ = packed_inputs(case, torch.float32)
    call = partial(flash_attention, query, key, value, cu_seqlens, backend="native")
    assert torch.equal(call(dropout_p=0.25, seed=7), call(dropout_p=0.25, seed=torch.tensor(7)))
    assert not torch.equal(call(dropout_p=0.25, seed=7), call(dropout_p=0.25, seed=8))
    torch.manual_seed(3)
    drawn = call(dropout_p=0.25)
    assert not torch.equal(call(dropout_p=0.25), drawn)
    torch.manual_seed(3)
    assert torch.equal(call(dropout_p=0.25), drawn)
    # Over seeds the mean tends to the result without dropout: 400 draws, five standard errors.
    ones = partial(flash_attention, query, key, torch.ones_like(value), cu_seqlens)
    draws = torch.stack([ones(dropout_p=0.25, seed=seed, backend="native").mean() for seed in range(400)])
    assert abs(float(draws.mean()) - 1) < 5 * float(draws.std()) / 20 < 1e-2


def test_dropout_is_the_same_alone_and_with_any_isa(isa: str) -> None:
    """The counter is the packed row, so that the mask of the reference is that of every backend."""
    case = PackedCase("dropout", (30, 7), dropout_p=0.5)
    query, key, _, cu_seqlens, _ = packed_inputs(case, torch.float32)
    value = torch.zeros(37, 2, 37) + torch.eye(37)[:, None, :]  # the output is the matrix of weights
    query, key = (functional.pad(part, (0, 21)) for part in (query, key))
    found, wanted = (
        flash_attention(query, key, value, cu_seqlens, dropout_p=0.5, seed=-5, backend=backend)
        for backend in ("native", "reference")
    )
    assert torch.equal(found > 0, wanted > 0)
    assert 0.45 < float((found[:30, :, :30] > 0).float().mean()) < 0.55


def test_part_of_a_batch_drops_what_the_batch_drops(isa: str) -> None:
    case = PackedCase("dropout", (30, 7, 0, 12), dropout_p=0.5)
    query, key, value, cu_seqlens, _ = packed_inputs(case, torch.float32)
    whole = flash_attention(query, key, value, cu_seqlens, dropout_p=0.5, seed=5)
    parts = [part[30:].requires_grad_() for part in (query, key, value)]
    for backend in ("native", "reference"):
        drop = partial(flash_attention, *parts, cu_seqlens[1:] - 30, dropout_p=0.5, seed=5, backend=backend)
        found = drop(first_rows=(30, 30))
        torch.testing.assert_close(found, whole[30:])
        gradients = torch.autograd.grad(found.sum(), parts)
        wanted = torch.autograd.grad(whole_of(query, key, value, cu_seqlens), (query, key, value))
        for mine, all_rows in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(mine, all_rows[30:])
        assert not torch.allclose(drop(first_rows=(30, 31)), found)
        assert not torch.allclose(drop(first_rows=(31, 30)), found)


def whole_of(*inputs: Tensor) -> Tensor:
    for part in inputs[:3]:
        part.requires_grad_()
    return flash_attention(*inputs, dropout_p=0.5, seed=5)[30:].sum()


def test_time_buckets_are_two_per_octave() -> None:
    seconds = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 2**31 - 2, 2**31 - 1, 2**52 - 2, 2**53 - 2])
    wanted = [0, 2, 3, 4, 4, 5, 5, 6, 6, 6, 7, 61, 62, 103, 105]
    assert time_buckets(seconds, 106).tolist() == wanted
    assert time_buckets(-seconds, 64).tolist() == [min(bucket, 63) for bucket in wanted]


def test_philox_gives_the_published_numbers() -> None:
    """The known answer of Random123 (kat_vectors) for counter 0 and key 0."""
    seed, counter = torch.zeros(1, dtype=torch.int64), [torch.zeros(1, dtype=torch.int64)] * 3
    assert int(philox(seed, *counter)) == 0x6627E8D5


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_without_keys_is_zero(backend: str, dtype: torch.dtype) -> None:
    case = PackedCase("late-keys", (60, 3, 4), (20, 0, 4), is_causal=True)
    output, *gradients = with_gradients(case, list(packed_inputs(case, dtype)), backend)
    blind = [*range(40), 60, 61, 62]  # the ends are aligned: 60 queries, 20 keys
    assert not output[blind].any() and not gradients[0][blind].any()
    assert output[40:60].any(dim=2).all() and not any(part.isnan().any() for part in (output, *gradients))


@pytest.mark.parametrize("case", [MIXED, TIMED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_each_alone(dtype: torch.dtype, case: PackedCase, isa: str) -> None:
    query, key, value, cu_seqlens, _ = packed_inputs(case, dtype)
    together, options = with_gradients(case, [query, key, value, cu_seqlens, cu_seqlens], "native"), case_options(case)
    start = 0
    for length in case.lengths:
        rows = slice(start, start + length)
        times = {"timestamp_s": options["timestamp_s"][rows]} if case.buckets else {}
        parts = (query[rows], key[rows], value[rows], cumulative((length,)))
        assert torch.equal(flash_attention(*parts, backend="native", **{**options, **times}), together[0][rows])
        start += length


@pytest.mark.parametrize("case", [MIXED, TIMED], ids=str)
def test_permuted_batch_permutes_the_result(case: PackedCase) -> None:
    tensors, options = packed_inputs(case, torch.float32), case_options(case)
    order = [3, 0, 4, 2, 1]
    rows = torch.cat([torch.arange(tensors[3][b], tensors[3][b + 1]) for b in order])
    moved = [part[rows] for part in tensors[:3]]
    offsets = cumulative(tuple(case.lengths[b] for b in order))
    times = {"timestamp_s": options["timestamp_s"][rows]} if case.buckets else {}
    found = flash_attention(*moved, offsets, **{**options, **times})
    assert torch.equal(found, flash_attention(*tensors[:4], **options)[rows])


@pytest.mark.parametrize("case", [MIXED, DROPPED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, case: PackedCase) -> None:
    tensors = list(packed_inputs(case, dtype))
    torch.set_num_threads(1)
    alone = with_gradients(case, tensors, "native")
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, with_gradients(case, tensors, "native"), alone))


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


EVERYTHING = PackedCase("everything", (5, 0, 9), width=8, window=(4, 1), buckets=20, dropout_p=0.3)
PLAIN = PackedCase("plain", (5, 0, 9), width=8, is_causal=True)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, case: PackedCase, backend: str) -> None:
    query, key, value, *offsets = packed_inputs(case, dtype)
    options = case_options(case)
    times: tuple[Any, ...] = (None, None, None, None)
    if case.buckets:
        times = (*leaves(options["time_bias"]), *2 * [options["timestamp_s"]], torch.tensor([5, 70, 3]))
    numbers = (*_bounds(case.window, case.is_causal), 0.3, case.dropout_p, backend)
    tensors = (*leaves(query, key, value), *offsets, *times)
    torch.library.opcheck(_forward_op, (*tensors, *numbers))
    output, lse = _forward_op(*tensors, *numbers)
    saved = [part.detach() for part in (torch.randn_like(output), output, lse)]
    tensors = tuple(part.detach() if isinstance(part, Tensor) else None for part in tensors)
    torch.library.opcheck(_backward_op, (*saved, *tensors, *numbers))


@pytest.mark.parametrize("case", [PLAIN, EVERYTHING], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile itself imports
def test_compiles_as_one_graph(case: PackedCase) -> None:
    query, key, value, cu_seqlens, _ = packed_inputs(case, torch.float32)
    options = case_options(case)
    options.pop("seed", None)

    def loss(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **more: Any) -> Tensor:
        return flash_attention(query * 2, key, value, cu_seqlens, **options, **more).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        inputs, more = leaves(query, key, value), {}
        if case.dropout_p:
            more = {"seed": torch.tensor([2**60 + 3])}
        results.append(torch.autograd.grad(function(*inputs, cu_seqlens, **more), inputs))
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


def timed(**change: Any) -> dict[str, Any]:
    return {"time_bias": torch.zeros(2, 8), "timestamp_s": torch.arange(6), **change}


BAD_INPUT = {
    "query-ndim": ({"query": torch.randn(6, 8)}, ValueError, r"query must have shape \[T, H, D\], got \[6, 8\]"),
    "too-wide": (
        {name: torch.randn(6, 2, 257) for name in ("query", "key", "value")},
        ValueError,
        r"query must have a width D in 1\.\.256, got 257",
    ),
    "no-width": ({"query": torch.randn(6, 2, 0)}, ValueError, r"query must have a width D in 1\.\.256, got 0"),
    "integers": ({"query": torch.ones(6, 2, 4).long()}, TypeError, r"query must have dtype .*, got torch\.int64"),
    "key-heads": (
        {"key": torch.randn(6, 3, 4)},
        ValueError,
        r"key must have .* heads that divides those of query, 2, g",
    ),
    "no-key-heads": (
        {"key": torch.randn(6, 0, 4)},
        ValueError,
        r"key must have .* that divides those of query, 2, got 0",
    ),
    "key-width": (
        {"key": torch.randn(6, 2, 5)},
        ValueError,
        r"key must have shape \[S, K, D\] = \[S, 1\.\.2, 4\] like",
    ),
    "key-ndim": ({"key": torch.randn(6, 4)}, ValueError, r"key must have shape .*, got \[6, 4\]"),
    "value-rows": ({"value": torch.randn(5, 2, 4)}, ValueError, r"value must have shape \[6, 2, 4\] like key, got \[5"),
    "dtype-mix": ({"key": torch.randn(6, 2, 4).bfloat16()}, TypeError, r"key must have the dtype of query"),
    "device-mix": ({"value": torch.randn(6, 2, 4, device="meta")}, ValueError, r"value must be on the device of query"),
    "float-offsets": (
        {"cu_seqlens": torch.tensor([0.0, 6.0])},
        TypeError,
        "cu_seqlens must be integers, got torch.flo",
    ),
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
    "window-negative": ({"window": (-1, 0)}, ValueError, r"window must be \(left, right\), each .* got \(-1, 0\)"),
    "window-three": ({"window": (1, 2, 3)}, ValueError, r"window must be \(left, right\), each .*, got \(1, 2, 3\)"),
    "window-float": (
        {"window": 2.5},
        TypeError,
        "window must be an integer, got 2.5",
    ),
    "bias-heads": (timed(time_bias=torch.zeros(3, 8)), ValueError, r"time_bias must have shape \[H, .* got \[3, 8\]"),
    "bias-empty": (
        timed(time_bias=torch.zeros(2, 0)),
        ValueError,
        r"time_bias must have shape .*1\.\.106\], got \[2, 0",
    ),
    "bias-many": (timed(time_bias=torch.zeros(2, 107)), ValueError, r"time_bias must have shape .*, got \[2, 107\]"),
    "bias-half": (timed(time_bias=torch.zeros(2, 8).half()), TypeError, r"time_bias must have dtype .*torch\.float16"),
    "bias-device": (timed(time_bias=torch.zeros(2, 8, device="meta")), ValueError, r"time_bias must be on the device"),
    "no-times": (timed(timestamp_s=None), ValueError, r"timestamp_s must be given beside time_bias, got None"),
    "no-bias": (timed(time_bias=None), ValueError, r"time_bias must be given beside timestamps, got None; leave"),
    "times-rows": (
        timed(timestamp_s=torch.arange(5)),
        ValueError,
        r"timestamp_s must have one entry for each of 6 rows",
    ),
    "times-keys": (timed(timestamp_key_s=torch.arange(7)), ValueError, r"timestamp_key_s must have one entry .*\[7\]"),
    "times-int32": (timed(timestamp_s=torch.arange(6).int()), TypeError, r"timestamp_s must have dtype torch\.int64"),
    "dropout-1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1\.0"),
    "dropout-nan": ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    "seed-wide": ({"dropout_p": 0.1, "seed": 2**63}, ValueError, r"seed must be an integer of 64 bits, got 922337"),
    "seed-two": (
        {"dropout_p": 0.1, "seed": torch.tensor([1, 2])},
        ValueError,
        r"seed must have one element, got \[2\]",
    ),
    "rows-negative": ({"dropout_p": 0.1, "first_rows": (0, -1)}, ValueError, r"first_rows must be two numbers of rows"),
    "seed-float": ({"dropout_p": 0.1, "seed": torch.ones(1)}, TypeError, r"seed must have dtype torch\.int64, got"),
    "no-backend": ({"backend": "fast"}, ValueError, r"backend must be one of \['auto', .*\], got 'fast'"),
    "triton": (
        {"backend": "triton"},
        BackendUnavailable,
        r"backend 'triton' is unavailable: it computes on a CUDA device, the tensors are on cpu; use backend='auto'",
    ),
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
