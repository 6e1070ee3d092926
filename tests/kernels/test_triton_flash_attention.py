"""flash_attention's Triton backend against the reference: the whole grid on a GPU, a small one in the interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.attention import NAMES, attention_of_pytorch, expected, leaves, with_gradients, with_lse_gradients
from support.cases import ATTENTION_CASES, PackedCase, case_options, cumulative, packed_inputs
from support.closeness import assert_matches_reference
from support.gpu import DEVICE, DTYPES, HAS_GPU, require_triton_device
from torch import Tensor
from torch.nn import functional

from ubp_fast.kernels import BackendUnavailable, flash_attention
from ubp_fast.kernels.flash_attention import _native, _triton, _triton_kernels
from ubp_fast.kernels.flash_attention.api import _backward_op, _bounds, _forward_op
from ubp_fast.kernels.flash_attention.reference import Problem, time_buckets

require_triton_device()

import triton  # noqa: E402
from triton import language as tl  # noqa: E402
from triton.runtime import _allocation  # noqa: E402

# Around packs of 32, 64 and 128 rows (16-bit types; the mean length chooses), with sequences that fit in none, and
# inside of long ones.
SMALL_CASES = (
    PackedCase("no-sequence", ()),
    PackedCase("all-empty", (0, 0, 0), buckets=5),
    PackedCase("one-token", (1,), width=1),
    PackedCase("tile-edges", (0, 1, 15, 16, 17), heads=1),
    PackedCase("tile-edges-causal", (0, 31, 32, 33, 1), heads=1, is_causal=True, width=59),
    PackedCase("heads3", (7, 20), heads=3, width=20, is_causal=True),
    PackedCase("middle", (63, 64, 65), heads=1, is_causal=True),
    PackedCase("long", (300,), heads=1, width=17),
    PackedCase("long-causal", (130, 270), heads=1, is_causal=True),
    PackedCase("long-window", (400,), heads=1, window=(150, 70)),
    PackedCase("wide-long", (200,), heads=1, width=256, is_causal=True),
    PackedCase("width100", (3, 40), heads=1, width=100),
    PackedCase("cross", (5, 19, 0, 3), (9, 30, 4, 0), heads=1, width=33),
    PackedCase("cross-causal", (5, 49, 0, 3, 25), (9, 30, 4, 0, 70), heads=1, is_causal=True),
    PackedCase("cross-long-causal", (200, 90), (70, 330), heads=1, is_causal=True),
    PackedCase("no-keys", (4, 3), (0, 0), buckets=3),
    PackedCase("no-queries", (0, 0), (4, 3), buckets=3),
    PackedCase("peaked", (40,), kind="peaked", heads=1, width=64),
    PackedCase("large-scores", (40, 70), kind="large", heads=1, width=64),
    PackedCase("strided", (9, 20), kind="strided", width=24),
    PackedCase("window", (23, 40), window=(7, 3), heads=1),
    PackedCase("window-a-block-and-one", (40,), window=(1, 1), heads=1),
    PackedCase("window-0", (5, 40, 1), window=(0, 0), heads=1),
    PackedCase("window-left", (70, 0, 31), window=(40, None), heads=1, width=17),
    PackedCase("window-right", (70, 0, 31), window=(None, 20), heads=1),
    PackedCase("window-cross", (5, 49, 30), (9, 30, 4), window=(12, 8), heads=1),
    PackedCase("time", (1, 17, 40), buckets=64, heads=1),
    PackedCase("time-2-buckets", (5, 0, 40), buckets=2, width=33, heads=1),
    PackedCase("time-cross", (5, 20, 0, 3), (9, 30, 4, 0), buckets=20, heads=1, is_causal=True),
    PackedCase("dropout", (1, 17, 20), dropout_p=0.2),
    PackedCase("dropout-cross-causal", (5, 20, 0), (9, 30, 4), dropout_p=0.5, is_causal=True, width=59, heads=1),
    PackedCase("packs-and-long", (3, 0, 70, 130, 5, 64, 1, 129, 20), heads=2, is_causal=True),
    PackedCase("packs-full", (64, 64, 0, 32, 32, 1), heads=1, width=33),
    PackedCase("packs-cross-long", (4, 4, 4, 0, 130), (40, 70, 3, 9, 10), heads=1, window=(30, 5)),
    PackedCase("packs-of-many", (*126 * (1,), 0, 3, 2, *30 * (0,), 20), heads=1),
    PackedCase("packs-options", (3, 40, 0, 9, 20, 5, 2), heads=1, buckets=64, dropout_p=0.2, window=(30, 3)),
    PackedCase("packs-cross-options", (3, 0, 20, 5, 2), (9, 4, 33, 0, 2), heads=1, buckets=20, dropout_p=0.2),
    PackedCase("packs-shared-heads", (3, 20, 0, 9), heads=6, key_heads=2, is_causal=True),
    PackedCase("long-shared-heads", (140, 60), heads=4, key_heads=1, buckets=9, dropout_p=0.2),
    PackedCase("long-options", (140, 90), heads=1, buckets=40, dropout_p=0.2, window=(60, 5)),
    PackedCase("everything", (9, 20), (30, 23), kind="strided", window=(10, 1), buckets=64, dropout_p=0.3, width=32),
)
# float32 has one size of tiles: in the interpreter, where every tile costs milliseconds, it meets no long sequence.
CASES = [
    (case, dtype)
    for case in ((*SMALL_CASES, *ATTENTION_CASES) if HAS_GPU else SMALL_CASES)
    for dtype in DTYPES
    if HAS_GPU or dtype == torch.float16 or sum(case.lengths) < 50
]
MIXED = PackedCase("mixed", (5, 0, 20, 17), width=16, heads=1)
TIMED = replace(MIXED, name="timed", buckets=30, window=(20, 2))
EVERYTHING = PackedCase("everything", (3, 0, 5), heads=1, width=8, window=(4, 1), buckets=20, dropout_p=0.3)
PLAIN = PackedCase("plain", (3, 0, 5), heads=1, width=8, is_causal=True)


def assert_close_in_other_tiles(mine: Tensor, theirs: Tensor) -> None:
    """A time_bias or another mean length changes the tiles, and with them the order of sums."""
    eps = torch.finfo(mine.dtype).eps
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(mine, theirs, rtol=4 * eps, atol=4 * eps * largest)


def inputs(case: PackedCase, dtype: torch.dtype) -> list[Tensor]:
    return [part.to(DEVICE) for part in packed_inputs(case, dtype)]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_matches_reference(case: PackedCase, dtype: torch.dtype) -> None:
    reference, truth = expected(case, dtype)
    found = with_gradients(case, inputs(case, dtype), "triton")
    for name, mine, *parts in zip(NAMES[: len(truth)], found, reference, truth, strict=True):
        assert_matches_reference(mine.cpu(), *parts, f"flash_attention {name}", f"{case}, triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        PackedCase("packs", (5, 0, 30), heads=4, key_heads=2, buckets=9, is_causal=True),
        PackedCase("late-keys", (40, 3, 4), (20, 0, 4), heads=1, is_causal=True, dropout_p=0.2),
    ],
    ids=str,
)
def test_log_sum_exp_and_its_gradient(case: PackedCase, dtype: torch.dtype) -> None:
    """In natural logarithms, though the kernels keep those of 2."""
    tensors = list(packed_inputs(case, dtype))
    reference = with_lse_gradients(case, tensors, "reference")
    truth = with_lse_gradients(case, [*(part.double() for part in tensors[:3]), *tensors[3:]], "reference")
    found = [part.cpu() for part in with_lse_gradients(case, inputs(case, dtype), "triton")]
    blind = truth[0] == -torch.inf
    found[0], reference[0], truth[0] = (part[0].masked_fill(blind, 0) for part in (found, reference, truth))
    for name, *parts in zip(("lse", *NAMES[1:]), found, reference, truth, strict=False):
        assert_matches_reference(*parts, f"flash_attention {name}", f"{case}, triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bucket_shifts_nothing(dtype: torch.dtype) -> None:
    """Softmax does not see a constant; the gradient of the table is 0, so that no bound of closeness applies."""
    case = PackedCase("one-bucket", (5, 0, 20), buckets=1, heads=1)
    *found, grad_bias = with_gradients(case, inputs(case, dtype), "triton")
    plain = with_gradients(replace(case, buckets=0), inputs(case, dtype), "triton")
    for mine, theirs in zip(map(Tensor.detach, found), map(Tensor.detach, plain), strict=True):
        assert_close_in_other_tiles(mine, theirs)
    assert grad_bias.abs().max() < (1e-5 if dtype == torch.float32 else 0.3)


def test_times_far_apart_are_the_last_bucket() -> None:
    query, bias = torch.randn(4, 1, 16), torch.zeros(1, 64)
    bias[0, 63] = -torch.inf
    times = torch.tensor([0, 2**31 - 3, 2**31, 2**62])
    same = {"cu_seqlens": torch.tensor([0, 4]), "time_bias": bias, "timestamp_s": times}
    wanted = flash_attention(query, query, query, **same, backend="reference")
    moved = {name: part.to(DEVICE) for name, part in same.items()}
    found = flash_attention(*3 * [query.to(DEVICE)], **moved, backend="triton").cpu()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found[3], query[3])  # it sees nobody else


@pytest.mark.parametrize(
    ("width", "lengths", "buckets"), [(64, (90, 70), 64), (64, (190, 135), 6), (100, (70, 100), 6)], ids=str
)
def test_tiles_of_a_time_bias_alone(
    width: int, lengths: tuple[int, ...], buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of sm_90, larger than with dropout, on whatever device this runs."""
    monkeypatch.setattr(_triton.tile_table, "device_names", lambda device: ("sm_90",))
    case = PackedCase("time-alone", lengths, heads=1, width=width, is_causal=True, buckets=buckets)
    reference, truth = expected(case, torch.float16)
    found = with_gradients(case, inputs(case, torch.float16), "triton")
    for name, mine, plain, wanted in zip(NAMES, found, reference, truth, strict=True):
        assert_matches_reference(mine.cpu(), plain, wanted, f"flash_attention {name}", f"{case}, tiles of sm_90")


LONG_CASES = (  # tiles of 256 rows; the ends of sequences lie inside of them
    PackedCase("causal", (300, 480), heads=1, width=40, is_causal=True),
    PackedCase("cross-window", (20, 790), (290, 400), heads=2, key_heads=1, window=(150, 30)),
    PackedCase("no-keys", (400, 390), (0, 70), heads=1),
    PackedCase("wide", (390,), heads=1, width=72),
    PackedCase("peaked", (390,), kind="peaked", heads=1, width=64),
    PackedCase("unaligned", (390,), heads=1, width=20),
)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The tiles of sm_90, and an entry for each launch whose rows come through descriptors."""
    if HAS_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors need sm_90")
    launched: list[bool] = []
    with_memory = _triton._with_memory

    def counted(*arguments: Any) -> None:
        launched.append(True)
        with_memory(*arguments)

    monkeypatch.setattr(_triton, "_with_memory", counted)
    monkeypatch.setattr(_triton.tile_table, "device_names", lambda device: ("sm_90",))
    return launched


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_tiles_of_long_sequences(case: PackedCase, described: list[bool]) -> None:
    reference, truth = expected(case, torch.float16)
    found = with_gradients(case, inputs(case, torch.float16), "triton")
    assert described == ([] if case.name == "unaligned" else [True])
    for name, mine, plain, wanted in zip(NAMES, found, reference, truth, strict=False):
        assert_matches_reference(mine.cpu(), plain, wanted, f"flash_attention {name}", f"{case}, tiles of sm_90")


@pytest.mark.parametrize("first", [0, 1], ids=["aligned", "at-an-odd-address"])
def test_long_sequences_see_nothing_of_the_next(first: int, described: list[bool]) -> None:
    """NaN behind a sequence's end, in the same tile of keys: times a weight of 0 it would still be there."""
    made = torch.randn(2, first + 800 * 16, dtype=torch.float16)
    key, value = (part.to(DEVICE)[first:].view(800, 1, 16) for part in made)
    query, offsets = key.clone(), torch.tensor([0, 410, 800], dtype=torch.int32, device=DEVICE)
    alone = flash_attention(query[:410], key[:410], value[:410], offsets[:2].contiguous(), backend="triton")
    key[411], value[410:] = torch.nan, torch.nan
    together = flash_attention(query, key, value, offsets, backend="triton")
    assert torch.equal(together[:410], alone)
    assert len(described) == 2 * (1 - first)


@pytest.mark.parametrize(("scale", "dtype"), [(-0.4, torch.float16), (-0.4, torch.float32), (0.0, torch.float16)])
def test_scores_that_are_turned_round(scale: float, dtype: torch.dtype) -> None:
    """The kernel scales after it has found the largest score: a scale that is not positive goes into the queries."""
    case = PackedCase("turned", (7, 0, 130), heads=1, is_causal=True)
    tensors = packed_inputs(case, dtype)[:4]
    doubled = (*(part.double() for part in tensors[:3]), tensors[3])
    truth, reference = (
        flash_attention(*given, scale=scale, causal=True, backend="reference") for given in (doubled, tensors)
    )
    found = flash_attention(*(part.to(DEVICE) for part in tensors), scale=scale, causal=True, backend="triton")
    assert_matches_reference(found.cpu(), reference, truth, "flash_attention", f"scale {scale}, triton")


@triton.jit
def _sums_of_tile(grad_ptr, bucket_ptr, sums_ptr, M: tl.constexpr, N: tl.constexpr, BUCKETS: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    lanes = tl.arange(0, 128)
    sums = tl.load(sums_ptr + lanes)
    grad, bucket = tl.load(grad_ptr + at), tl.load(bucket_ptr + at)
    tl.store(sums_ptr + lanes, _triton_kernels._many_sums(sums, grad, bucket, lanes, BUCKETS))


@pytest.mark.parametrize("shape", [(16, 16), (64, 32)])
def test_sums_of_a_tile_in_any_buckets(shape: tuple[int, int]) -> None:
    """Beside pairs that see nothing; the first 64 buckets are found by their bits, then the others."""
    generator = torch.Generator().manual_seed(0)
    for used in ((), (0,), (3, 61), (62,), (62, 63, 105), (64,), (63, 64, 65), tuple(range(106))):
        bucket = torch.tensor([0, *used])[torch.randint(0, 1 + len(used), shape, generator=generator)]
        grad = torch.randn(shape, generator=generator)
        grad[torch.rand(shape, generator=generator) < 0.3] = 0.0
        before = torch.randn(128, generator=generator)
        found = before.clone().to(DEVICE)
        _sums_of_tile[(1,)](grad.to(DEVICE), bucket.int().to(DEVICE), found, M=shape[0], N=shape[1], BUCKETS=106)
        truth, seen = before.double(), grad != 0.0
        truth.index_add_(0, bucket[seen], grad[seen].double())
        torch.testing.assert_close(
            found.cpu().double(), truth, rtol=0, atol=2e-5, msg=lambda text, used=used: f"{used}: {text}"
        )
        untouched = [at for at in range(128) if at not in bucket[seen]]
        assert torch.equal(found.cpu()[untouched], before[untouched])


@triton.jit
def _buckets_of_gaps(gap_ptr, bucket_ptr, NUMBER: tl.constexpr, BUCKETS: tl.constexpr):
    at = tl.arange(0, NUMBER)
    tl.store(bucket_ptr + at, _triton_kernels._buckets(tl.load(gap_ptr + at), BUCKETS))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_buckets_at_the_edges_of_octaves(dtype: torch.dtype) -> None:
    """Where float32 would round up to the next octave, too, and what int64 holds no more."""
    octave = torch.arange(31 if dtype == torch.int32 else 63)
    edges = torch.cat([2**octave, 2**octave // 2 * 3]) - 1
    gap = torch.cat([edges, edges - 1, edges + 1, edges - 2**20]).clamp(0, 2**31 - 2 if dtype == torch.int32 else None)
    gap = functional.pad(gap, (0, 256 - len(gap)), value=int(gap.max())).to(dtype)
    found = torch.empty(256, dtype=torch.int32)
    if dtype == torch.int64:
        gap[-2:] = torch.tensor([2**63 - 1, -(2**63)])
    moved = found.to(DEVICE)
    _buckets_of_gaps[(1,)](gap.to(DEVICE), moved, NUMBER=256, BUCKETS=106)
    assert torch.equal(moved.cpu().long(), time_buckets(gap, 106))


@triton.jit
def _tile_of_times(
    time_ptr, other_ptr, s_ptr, grad_ptr, bias_ptr, out_ptr, sums_ptr, span_ptr, rows, others, BUCKETS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """One tile, as the kernels meet it."""
    lane = tl.arange(0, N)
    at = lane[:, None] * N + lane[None, :]
    own = _triton_kernels._times_of(time_ptr, 0, lane, rows)
    times = _triton_kernels._times_of_both(own, other_ptr, lane, others, BUCKETS)
    first, last, is_far, _, _, _, _, _, _, _, _ = times
    tl.store(span_ptr, first)
    tl.store(span_ptr + 1, last)
    tl.store(span_ptr + 2, is_far.to(tl.int32))
    tl.store(out_ptr + at, _triton_kernels._with_bias(tl.load(s_ptr + at), bias_ptr, times, BUCKETS, True))
    lanes = tl.arange(0, 128)
    sums = tl.zeros([128], tl.float32)
    sums = _triton_kernels._with_sums(sums, tl.load(grad_ptr + at), lanes, times, BUCKETS, True)
    tl.store(sums_ptr + lanes, sums)


DAY, YEAR = 86_400, 365 * 86_400
TIMES = {  # of the rows, of the others, buckets, and which kind of tile that is
    "one-bucket": (range(16), range(100 * DAY, 100 * DAY + 16), 64, "one"),
    "after-the-rows": (range(100 * DAY, 100 * DAY + 16), range(16), 64, "one"),
    "two-buckets": (range(0, 16 * DAY, DAY), range(85 * DAY, 101 * DAY, DAY), 64, "few"),
    "four-buckets": (range(0, 16 * DAY, DAY), range(40 * DAY, 56 * DAY, DAY), 64, "few"),
    "at-an-edge": (range(16), range(2**20 - 2, 2**20 + 14), 64, "few"),
    "seconds": ([0, 1], [0, 1], 64, "few"),
    "cut-at-the-last": (range(16), range(90, 106), 6, "one"),
    "many-buckets": (range(0, 16 * 3600, 3600), range(0, 16 * 3600, 3600), 64, "many"),
    "few-rows": (range(0, 5 * DAY, DAY), range(44 * DAY, 51 * DAY, DAY), 64, "few"),
    "in-no-order": ([3, 90, 4, 88, 0, 7] + 10 * [50], [*range(4000, 4008), *range(3000, 3008)], 64, "few"),
    "just-not-far": ([2**29, 0, 9], [2**29 + 2**30 - 1, 2**30 + 5], 64, "few"),
    "far": ([0, 5, 9], [2**30, 2**30 - 2], 64, "far"),
    "centuries": (range(0, 16 * 40 * YEAR, 40 * YEAR), range(-9 * YEAR, 7 * YEAR, YEAR), 106, "far"),
    "ends-of-int64": ([-(2**63), 0, 2**62], [2**63 - 1, -5], 106, "far"),
}


@pytest.mark.parametrize("name", TIMES)
def test_every_kind_of_tile_finds_its_buckets(name: str) -> None:
    """One bucket, some that follow each other, many, and times that int32 does not hold: biases and sums are exact."""
    *sides, buckets, kind = TIMES[name]
    time, other = (torch.tensor(list(side), dtype=torch.int64) for side in sides)
    bucket = time_buckets(time[:, None] - other[None, :], buckets)
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(buckets, generator=generator)
    bias[bucket[0, 0]] = -torch.inf
    s, grad = torch.randn(2, 16, 16, generator=generator)
    is_pair = torch.zeros(16, 16, dtype=torch.bool)
    is_pair[: len(time), : len(other)] = True
    grad[~is_pair] = 0.0
    given = [part.to(DEVICE) for part in (time, other, s, grad, bias)]
    out, sums, found = (torch.empty(shape, device=DEVICE) for shape in ((16, 16), 128, 3))
    found = found.int()
    _tile_of_times[(1,)](*given, out, sums, found, len(time), len(other), BUCKETS=buckets, N=16)
    first, last, is_far = found.tolist()
    assert kind == ("far" if is_far else "one" if last == first else "few" if last - first < 5 else "many")
    assert is_far or (first <= bucket.min() and bucket.max() <= last)
    wanted = s[: len(time), : len(other)] + bias[bucket] * 1.4426950408889634
    torch.testing.assert_close(out.cpu()[is_pair], wanted.flatten(), rtol=1e-6, atol=1e-6)
    truth = torch.zeros(128, dtype=torch.float64).index_add_(0, bucket.flatten(), grad[is_pair].double())
    torch.testing.assert_close(sums.cpu().double(), truth, rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1])
def test_dropout_mask_is_that_of_the_reference(seed: int) -> None:
    case = PackedCase("dropout", (30, 7), dropout_p=0.5)
    query, key, _, cu_seqlens, _ = packed_inputs(case, torch.float32)
    value = torch.zeros(37, 2, 37) + torch.eye(37)[:, None, :]  # the output is the matrix of weights
    tensors = [functional.pad(part, (0, 21)) for part in (query, key)] + [value, cu_seqlens]
    options: dict[str, Any] = {"dropout_p": 0.5, "seed": seed}
    wanted = flash_attention(*tensors, **options, backend="reference")
    found = flash_attention(*(part.to(DEVICE) for part in tensors), **options, backend="triton")
    assert torch.equal(found.cpu() > 0, wanted > 0)


def test_auto_never_hands_over_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "unsupported", lambda problem: "as on a GPU")
    case, launched = PackedCase("auto", (20, 400), heads=1), []
    launch = _triton._launch
    monkeypatch.setattr(_triton, "_launch", lambda *given: launched.append(given[0]) or launch(*given))
    assert not attention_of_pytorch(lambda: with_gradients(case, inputs(case, torch.float16), "auto"))
    assert launched == ["forward", "dq", "dkv"]


@triton.jit
def _add_one(out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.load(out_ptr + tl.arange(0, N)) + 1)


def test_memory_of_descriptors_is_given_for_one_launch() -> None:
    """Of the size that Triton asks for; an allocator that somebody else set is his again afterwards."""
    out, given = torch.zeros(16, device=DEVICE), []
    other = lambda size, alignment, stream: None  # noqa: E731
    before = _allocation._allocator.get()
    triton.set_allocator(other)
    try:

        def launch() -> None:
            given.append(_allocation._allocator.get()(384, 128, None))
            _add_one[(1,)](out, N=16)

        _triton._with_memory(out.device, launch)
        assert given[0].nbytes == 384 and given[0].device == out.device and out.eq(1).all()
        assert _allocation._allocator.get() is other
    finally:
        triton.set_allocator(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_without_keys_is_zero(dtype: torch.dtype) -> None:
    case = PackedCase("late-keys", (40, 3, 4), (20, 0, 4), is_causal=True)
    output, *gradients = with_gradients(case, inputs(case, dtype), "triton")
    blind = [*range(20), 40, 41, 42]  # the ends are aligned: 40 queries, 20 keys
    assert not output[blind].any() and not gradients[0][blind].any()
    assert output[20:40].any(dim=2).all() and not any(part.isnan().any() for part in (output, *gradients))


@pytest.mark.parametrize("case", [MIXED, TIMED], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_equals_each_alone(dtype: torch.dtype, case: PackedCase) -> None:
    query, key, value, cu_seqlens, _ = inputs(case, dtype)
    together = with_gradients(case, [query, key, value, cu_seqlens, cu_seqlens], "triton")[0]
    options = {name: part.to(DEVICE) if isinstance(part, Tensor) else part for name, part in case_options(case).items()}
    start = 0
    for length in case.lengths:
        rows = slice(start, start + length)
        times = {"timestamp_s": options["timestamp_s"][rows]} if case.buckets else {}
        parts = (query[rows], key[rows], value[rows], cumulative((length,)).to(DEVICE))
        alone = flash_attention(*parts, backend="triton", **{**options, **times})
        assert_close_in_other_tiles(alone, together[rows].detach())
        start += length


def test_permuted_batch_permutes_the_result() -> None:
    tensors = inputs(MIXED, torch.float32)
    order = [3, 0, 2, 1]
    rows = torch.cat([torch.arange(tensors[3][b], tensors[3][b + 1]) for b in order]).to(DEVICE)
    offsets = cumulative(tuple(MIXED.lengths[b] for b in order)).to(DEVICE)
    found = flash_attention(*(part[rows] for part in tensors[:3]), offsets, backend="triton")
    assert torch.equal(found, flash_attention(*tensors[:4], backend="triton")[rows])


def test_a_tile_finds_its_sequence_among_many() -> None:
    case = PackedCase("many-sequences", (*130 * (0,), 3, *20 * (0,), 20), heads=1)
    tensors = packed_inputs(case, torch.float32)[:4]
    found = flash_attention(*(part.to(DEVICE) for part in tensors), backend="triton")
    torch.testing.assert_close(found.cpu(), flash_attention(*tensors, backend="reference"))


def test_every_run_gives_the_same_bits() -> None:
    tensors = inputs(EVERYTHING, torch.float16)
    once, again = (with_gradients(EVERYTHING, tensors, "triton") for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("wanted", [(0,), (1, 2)], ids=str)
def test_only_some_inputs_want_gradients(wanted: tuple[int, ...]) -> None:
    tensors = inputs(PLAIN, torch.float32)
    some = [part.clone().requires_grad_(at in wanted) for at, part in enumerate(tensors[:3])]
    flash_attention(*some, tensors[3], backend="triton").square().sum().backward()
    assert [part.grad is not None for part in some] == [at in wanted for at in range(3)]


def test_nan_stays_in_its_sequence_and_head() -> None:
    case = PackedCase("nan", (30, 30, 4), width=32)
    for causal, poisoned in ((False, range(30, 60)), (True, range(45, 60))):
        query, key, value, cu_seqlens, _ = inputs(case, torch.float32)
        key[45, 1, 3] = float("nan")
        is_nan = flash_attention(query, key, value, cu_seqlens, causal=causal, backend="triton").isnan()
        assert is_nan[list(poisoned), 1].all()
        assert int(is_nan.sum()) == len(poisoned) * 32


@pytest.mark.parametrize("case", [PLAIN, EVERYTHING] if HAS_GPU else [EVERYTHING], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_opcheck(dtype: torch.dtype, case: PackedCase) -> None:
    query, key, value, *offsets = inputs(case, dtype)
    options = case_options(case)
    times: tuple[Any, ...] = (None, None, None, None)
    if case.buckets:
        stamps = options["timestamp_s"].to(DEVICE)
        times = (*leaves(options["time_bias"].to(DEVICE)), stamps, stamps, torch.tensor([5, 70, 3]))
    numbers = (*_bounds(case.window, case.is_causal), 0.3, case.dropout_p, "triton")
    tensors = (*leaves(query, key, value), *offsets, *times)
    torch.library.opcheck(_forward_op, (*tensors, *numbers))
    output, lse = _forward_op(*tensors, *numbers)
    saved = [part.detach() for part in (torch.randn_like(output), output, lse)]
    tensors = tuple(part.detach() if isinstance(part, Tensor) else None for part in tensors)
    torch.library.opcheck(_backward_op, (*saved, *tensors, *numbers))


@pytest.mark.filterwarnings("ignore")  # of what torch.compile itself imports and advises
def test_compiles_as_one_graph() -> None:
    query, key, value, cu_seqlens, _ = inputs(PLAIN, torch.float32)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attention(query * 2, key, value, cu_seqlens, causal=True, backend="triton").square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")):
        sides = leaves(query, key, value)
        results.append(torch.autograd.grad(function(*sides), sides))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_offsets_that_change_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's offsets are read once, not in every layer; until somebody writes to them."""
    query, key, value, cu_seqlens, _ = inputs(PLAIN, torch.float32)
    for _ in range(2):
        flash_attention(query, key, value, cu_seqlens, backend="triton")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")  # checks are immediate
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of rows 7, got 8"):
        flash_attention(*3 * [query[:7]], cu_seqlens, backend="triton")
    cu_seqlens[1] = 99
    with pytest.raises(ValueError, match="must not decrease, got 99 then 3 at entry 2"):
        flash_attention(query, key, value, cu_seqlens, backend="triton")


def test_float64_is_refused() -> None:
    tensors = inputs(PLAIN, torch.float64)[:4]
    with pytest.raises(BackendUnavailable, match=r"'triton' is unavailable: it computes float32, .* torch\.float64"):
        flash_attention(*tensors, backend="triton")


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("is_self", [True, False])
def test_packs_hold_every_short_sequence_once(block: int, is_self: bool) -> None:
    """In order, none larger than a tile, and no two neighbours that had fit together: those of a group at a time."""
    generator = torch.Generator().manual_seed(block)
    lengths = torch.randint(0, block + 9, (300,), generator=generator) // torch.randint(
        1, 9, (300,), generator=generator
    )
    lengths[20:60] = 0
    offsets = cumulative(tuple(lengths.tolist())).to(DEVICE)
    others = lengths if is_self else lengths.flip(0)
    offsets_key = offsets if is_self else cumulative(tuple(others.tolist())).to(DEVICE)
    rows = torch.empty(int(offsets[-1]), 1, 16, dtype=torch.float16, device=DEVICE)
    found = _triton.packs(Problem(rows, rows, rows, offsets, offsets_key, -1, -1, 1.0), block)
    made = [(first, end) for first, end in found.table.tolist() if first >= 0]
    inside = [sequence for first, end in made for sequence in range(first, end)]
    assert inside == [b for b in range(300) if max(lengths[b], others[b]) <= block]
    sizes = [max(int(side[first:end].sum()) for side in (lengths, others)) for first, end in made]
    assert max(sizes) <= block
    for (first, end), (_, further) in itertools.pairwise(made):
        if end % _triton.GROUP and further > end and max(lengths[end], others[end]) <= block:
            assert max(int(side[first : end + 1].sum()) for side in (lengths, others)) > block
    assert torch.equal(found.sequence.cpu(), torch.arange(300).repeat_interleave(lengths).int())
    assert torch.equal(found.key_sequence.cpu(), torch.arange(300).repeat_interleave(others).int())


def test_search_takes_as_many_rounds_as_sequences_need() -> None:
    assert [_triton._levels(count) for count in (0, 1, 128, 129, 128**2, 128**2 + 1)] == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("sequences", [5, 128, 129, 16_384, 16_385, 40_000])
def test_every_level_of_the_search_finds_the_tile(sequences: int) -> None:
    """Slots around the first and last tile of sequences that lie at the edges of the rounds."""
    lengths = torch.randint(0, 40, (sequences,), generator=torch.Generator().manual_seed(sequences))
    lengths[::3] = 0
    offsets, block = cumulative(tuple(lengths.tolist())), 16
    first = offsets[:-1] // block + torch.arange(sequences)
    edges = {0, 1, sequences // 2, sequences - 1, *(edge + by for edge in (128, 16_384, 32_768) for by in (-1, 0, 1))}
    chosen = sorted(edge for edge in edges if 0 <= edge < sequences)
    slots = torch.cat([first[chosen], (first[chosen] + (lengths[chosen] - 1).clamp(min=0) // block)]).int()
    found = torch.full((len(slots), 4), -1, dtype=torch.int32, device=DEVICE)
    _tile_of_slot[(len(slots),)](
        slots.to(DEVICE), offsets.int().to(DEVICE), found, sequences, BLOCK=block, LEVELS=_triton._levels(sequences)
    )
    sequence = torch.tensor(2 * chosen)
    rows = (slots - first[sequence]) * block
    wanted = torch.stack([sequence, offsets[sequence], lengths[sequence], rows], dim=1).int()
    assert torch.equal(found.cpu(), wanted)


@triton.jit
def _tile_of_slot(slots_ptr, cu_ptr, found_ptr, sequences, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    at = tl.program_id(0)
    sequence, start, rows, first = _triton_kernels._tile(tl.load(slots_ptr + at), cu_ptr, sequences, BLOCK, LEVELS)
    tl.store(found_ptr + at * 4, sequence)
    tl.store(found_ptr + at * 4 + 1, start)
    tl.store(found_ptr + at * 4 + 2, rows)
    tl.store(found_ptr + at * 4 + 3, first)


@pytest.mark.gpu
@pytest.mark.slow
def test_elements_beyond_int32() -> None:
    """2^24 + 2^13 rows of 2 x 64: 2^31 elements and more. The last sequence alone gives the same rows and gradients."""
    rows, length = 2**24 + 2**13, 2**13
    query = torch.randn(rows, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    assert query.numel() > 2**31
    offsets = torch.arange(0, rows + 1, length, device=DEVICE)
    grad = torch.randn(length, 2, 64, dtype=torch.bfloat16, device=DEVICE)

    def last_rows(part: Tensor, offsets: Tensor) -> list[Tensor]:
        leaf = part.detach().requires_grad_()
        output = flash_attention(leaf, leaf, leaf, offsets, causal=True, backend="triton")
        whole = torch.zeros_like(output)
        whole[-length:] = grad
        (found,) = torch.autograd.grad(output, leaf, whole)
        assert not found[:-length].any()
        return [output[-length:].detach(), found[-length:].clone()]

    found = last_rows(query, offsets)
    alone = last_rows(query[-length:].clone(), offsets[:2])
    assert all(map(torch.equal, found, alone)) and found[1].any()
