"""The counted model of the GPU kernels against what is launched, and what it says of the histories of shops."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import cumulative
from support.gpu import DEVICE, require_triton_device
from torch.utils._python_dispatch import TorchDispatchMode

from ubp_fast.kernels.flash_attention import _triton, _triton_kernels
from ubp_fast.kernels.flash_attention.reference import Problem
from ubp_fast.kernels.nt_xent.reference import Problem as ContrastiveProblem
from ubp_fast.kernels.row_sparse import (
    Adam,
    AdamStep,
    RowTable,
    ScheduleFree,
    ScheduleFreeStep,
    gather,
    reduce_padded,
    update,
)
from ubp_fast.kernels.row_sparse import _triton as row_sparse

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import count_gpu

require_triton_device()


def problem(lengths: list[int], width: int = 16) -> Problem:
    offsets = cumulative(tuple(lengths)).to(DEVICE)
    rows = torch.randn(sum(lengths), 1, width, device=DEVICE, dtype=torch.float16)
    return Problem(rows, rows, rows, offsets, offsets, -1, -1, 0.25)


@pytest.mark.parametrize("block", [32, 128])
def test_counted_packs_are_those_of_the_kernel(block: int) -> None:
    lengths = count_gpu.mix(300)
    made = _triton.packs(problem(lengths), block).table.tolist()
    assert [lengths[first:end] for first, end in made if first >= 0] == count_gpu.packs_of(lengths, block)


@pytest.mark.parametrize("lengths", [[20, 3, 7], [20, 3, 200, 7, 9], [300, 150]], ids=str)
def test_counted_launches_are_those_of_a_step(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Counted:
        def __init__(self, kernels: Any) -> None:
            self.kernels = kernels

        def __getattr__(self, name: str) -> Any:
            if name != "pack_kernel":
                launched.append(name.removesuffix("_kernel").removeprefix("backward_"))
            return getattr(self.kernels, name)

    for which in ("_kernels", "_short_kernels"):
        made = Counted(getattr(_triton, which)())
        monkeypatch.setattr(_triton, which, lambda made=made: made)
    given = problem(lengths)
    monkeypatch.setattr(_triton.tile_table, "device_names", lambda device: count_gpu.SM_90)
    output, lse = _triton.forward(given)
    _triton.backward(given, output, lse, output)
    assert launched == list(count_gpu.attention_work(lengths, 1, 16))


@pytest.mark.parametrize("width", [64, 128])
def test_short_histories_move_few_more_bytes_than_they_must(width: int) -> None:
    lengths = count_gpu.mix(4096)
    found = count_gpu.total(count_gpu.attention_work(lengths, 4, width).values())
    assert 1.0 < found.bytes / count_gpu.attention_least(lengths, 4, width).bytes < 1.25


@pytest.mark.parametrize(("rows", "width", "products"), [(65_536, 512, 4), (65_536, 256, 5), (1024, 512, 5)])
def test_wide_rows_of_nt_xent_take_four_products(rows: int, width: int, products: int) -> None:
    assert count_gpu.total(count_gpu.nt_xent_work(rows, width).values()).flop == products * 2 * rows**2 * width


def test_wide_rows_of_nt_xent_take_less_than_50_ms() -> None:
    """65,536 pairs of 512 columns, forward and backward, with the tensor cores at half of their peak."""
    found, device = count_gpu.nt_xent_work(65_536, 512).values(), count_gpu.Device()
    at_half = sum(work.at_half(device) for work in found)
    assert 2 * count_gpu.total(found).flop / device.flop_per_s < at_half <= 0.050


@pytest.mark.parametrize("width", [64, 128])
def test_a_time_bias_costs_short_histories_little(width: int) -> None:
    lengths, device = [length for length in count_gpu.mix(4096) if length <= 64], count_gpu.Device()
    without, with_bias = (count_gpu.attention_work(lengths, 4, width, kind) for kind in ("plain", "options"))
    for at in (0, 1):
        times = [sum(work.seconds(device)[at] for work in found.values()) for found in (without, with_bias)]
        assert times[1] < 1.3 * times[0]
    assert all(with_bias[name].flop == 0 for name in ("forward", "dq", "dkv"))


@pytest.mark.parametrize(
    ("case", "width", "best", "apart"),
    [("the mix", 128, 1.3, 1.3), ("the mix", 64, 1.3, 1.5), ("128", 64, 1.3, 1.7)],
)
def test_what_a_time_bias_costs_longer_ones(case: str, width: int, best: float, apart: float) -> None:
    """At best 1.3 for the mix; apart, and for some longer ones, more: the page says so."""
    ratios = count_gpu.time_bias_ratios(count_gpu.time_bias_cases()[case], width, count_gpu.Device())
    assert 1.0 < ratios[0] < best and 1.0 < ratios[1] < apart


def test_what_a_time_bias_takes_for_512_events() -> None:
    """In microseconds: without it tiles of 256 rows became faster, which is no fault of the others."""
    device, lengths = count_gpu.Device(), count_gpu.time_bias_cases()["512"]
    found = count_gpu.attention_work(lengths, 4, 128, "options").values()
    best, apart = (1e6 * sum(work.seconds(device)[at] for work in found) for at in (0, 1))
    assert best < 343 and apart < 894


@pytest.mark.parametrize("width", [64, 128])
def test_long_sequences_load_less_in_larger_tiles(width: int) -> None:
    """Than in tiles of 128 rows: those of 300 events, whose loads took longer than the products of forward."""
    device, lengths = count_gpu.Device(), [2048] * 16
    found = count_gpu.attention_work(lengths, 4, width)
    for name in ("forward", "dq") if width == 128 else ("forward", "dq", "dkv"):
        (small_m, small_n, _), (m, n, _) = (count_gpu.long_tiles(name, width, at, "plain") for at in (300, 2048))
        assert (m, small_m) == (256, 128) if name != "dkv" else (n, small_n) == (256, 128)
        best, _ = found[name].seconds(device)
        assert best == pytest.approx(found[name].flop / device.flop_per_s)  # nothing waits for the L2 cache


def test_kinds_of_tiles_are_counted_as_the_kernels_tell_them_apart() -> None:
    assert _triton_kernels.FEW.value == count_gpu.FEW_BUCKETS
    assert _triton_kernels.FAR.value == count_gpu.FAR_S


def test_tiles_of_one_bucket_cost_a_fraction() -> None:
    """Of 8,192 events most tiles lie in one bucket, of 128 none."""
    far, near = (count_gpu.instructions_of_pair([length], 64, 32, 4, True) for length in (8192, 128))
    assert 4 * far < near


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [512, 2048, 16_384])
def test_five_products_of_long_sequences_are_no_faster(length: int, width: int) -> None:
    """At best: what they spare the tensor cores, sums that pass through the L2 cache cost."""
    found, device = count_gpu.attention_work([length] * 16, 4, width), count_gpu.Device()
    seven = sum(found[name].seconds(device)[0] for name in ("dq", "dkv"))
    five = count_gpu.five_products([length] * 16, 4, width)
    assert five.flop * 7 == sum(found[name].flop for name in ("dq", "dkv")) * 5
    assert five.seconds(device)[0] > 1.1 * seven


@pytest.mark.filterwarnings("ignore")  # of the rival's layers
def test_launches_of_a_training_step_do_not_follow_from_clients() -> None:
    few, more = count_gpu.multitask_launches(6), count_gpu.multitask_launches(20)
    assert few == more
    assert 3 * few["ubp_fast"] < few["padded PyTorch"]


def test_programs_of_a_multiprocessor() -> None:
    device = count_gpu.Device()
    for registers, shared, warps, held in (
        (254, 65_536, 8, 1),
        (168, 32_768, 4, 3),
        (38, 0, 1, 32),
        (32, 80_000, 4, 2),
    ):
        assert count_gpu.blocks_per_multiprocessor(registers, shared, warps, device) == held


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors that were made inside and lived at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in self.known:
                self.add(part.untyped_storage())
        return made

    def add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        self.known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, place, size)

    def remove(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def test_memory_of_nt_xent_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million pairs of 512 columns below 16 GB; the same count for small chunks is what the backend holds.

    Its kernels do nothing here: they allocate nothing either.
    """

    class Idle:
        def __getattr__(self, name: str) -> Any:
            return defaultdict(lambda: lambda *arguments, **constants: None)

    assert count_gpu.nt_xent_bytes(2**20, 512) < 16e9
    monkeypatch.setattr(count_gpu.contrastive, "_kernels", Idle)
    monkeypatch.setattr(count_gpu.contrastive, "CHUNK", (64, 64))
    monkeypatch.setattr(count_gpu.contrastive, "LEAST_CHUNKED", (1, 1))
    rows, width = 1024, 512
    sides = [torch.randn(rows, width, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    weight, tau = (torch.full(shape, 0.1, device=DEVICE, dtype=torch.float64) for shape in ((rows,), ()))
    problem = ContrastiveProblem(*sides, None, tau, "cross", *[None] * 7, True)
    with PeakBytes() as peak:
        losses = count_gpu.contrastive.forward(problem)
        gradients = count_gpu.contrastive.backward(problem, weight, tau, losses, losses)
    assert gradients[0].shape == sides[0].shape
    held = peak.peak + sum(side.nbytes for side in sides)
    assert 1.0 <= held / count_gpu.nt_xent_bytes(rows, width) < 1.1  # numbers of a row, and a CPU's float32 copies


@pytest.mark.parametrize(("entries", "is_adam"), [(300, False), (300, True), (9, False)])
def test_counted_launches_of_row_sparse(entries: int, is_adam: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a lookup, sums and an update, which a small table shows as well as a large one."""
    launched: list[str] = []
    launch = row_sparse._launch

    def counted(name: str, *arguments: Any, **constants: Any) -> None:
        launched.append(name.removesuffix("_kernel"))
        launch(name, *arguments, **constants)

    monkeypatch.setattr(row_sparse, "_launch", counted)
    ids = torch.arange(entries, device=DEVICE) % 50
    gradient, weight = torch.ones(entries, 16, device=DEVICE), torch.zeros(50, 16, device=DEVICE)
    facts = RowTable(
        weight=weight,
        state=torch.zeros(50, 2, 16, device=DEVICE),
        slot=torch.full((50,), -1, dtype=torch.int32, device=DEVICE),
        used=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        last_step=torch.full((50,), -1, dtype=torch.int32, device=DEVICE),
        history=torch.ones((1, 3) if is_adam else (1,), dtype=torch.float64, device=DEVICE),
    )
    rule = Adam(0.9, 0.999, 1e-8) if is_adam else ScheduleFree(0.999, 1e-8)
    step = AdamStep(0.01, 1.5, 0.99) if is_adam else ScheduleFreeStep(0.01, 0.1, 0.05, 0.1, True)
    gather(facts, rule, ids, backend="triton")
    distinct, sums, count = reduce_padded(ids, gradient, backend="triton")
    update(facts, rule, distinct, sums, step, count=count, backend="triton")
    found = count_gpu.row_sparse_work(entries, 50, 16, is_adam)
    assert len(launched) == sum(work.launches for work in found.values())
    assert launched.count("part") + launched.count("reduce") == found["sums"].launches


def test_an_update_moves_what_its_kernel_reads_and_writes() -> None:
    """Of a row the weights and both states twice, and its gradient once; places and steps beside them."""
    found = count_gpu.row_sparse_work(8192, 1000, 384, False)
    assert found["update"].bytes == pytest.approx(1000 * 7 * 384 * 4, rel=0.01)
    assert found["gather"].bytes < count_gpu.row_sparse_work(8192, 1000, 384, True)["gather"].bytes
    assert count_gpu.distinct_ids(1_260_000, 8192) < 8192
