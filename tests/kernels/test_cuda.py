"""The CUDA kernels, on a device where there is one, and everywhere compiled for the host against an emulation.

The emulation runs the real kernel code, block after block, with the fragments of the PTX ISA; what it cannot show is
whether a device agrees, and speed.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import cuda_emulation
from support.cases import ATTENTION_CASES, PackedCase, case_options, packed_inputs
from support.closeness import assert_matches_reference
from support.contrastive_cases import (
    RECTANGULAR,
    RESULTS,
    Rectangular,
    assert_rectangular_is_close,
    assert_small_probabilities_count,
    facts,
    options,
    pair,
    results,
)
from support.waits import nothing_waits
from torch import Tensor

from ubp_fast.kernels import BackendUnavailable, cuda, flash_attention, nt_xent
from ubp_fast.kernels.nt_xent.api import NEGATIVES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE_EDGES = (1, 7, 8, 9, 15, 16, 17, 0, 31, 32, 33, 63, 64, 65)
SLOW_TO_EMULATE = {case.name for case in ATTENTION_CASES if max(case.lengths, default=0) > 250}
EMULATED_CASES = (
    PackedCase("tile-edges", TILE_EDGES, width=32),
    PackedCase("tile-edges-causal", TILE_EDGES, width=8, is_causal=True, heads=1),
    PackedCase("everything", (70, 0, 5, 33), (40, 3, 0, 90), width=40, window=(30, 9), buckets=64, dropout_p=0.3),
    PackedCase("everything-wide", (35, 3), width=160, is_causal=True, buckets=31, dropout_p=0.1, heads=1),
    *(case for case in ATTENTION_CASES if case.name not in SLOW_TO_EMULATE),
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if cuda_emulation.compiler() is None:
        pytest.skip("no C++ compiler for the emulation of the CUDA kernels")
    return cuda_emulation.build(tmp_path_factory.mktemp("cuda"), os.environ.get("UBP_EMULATION_SANITIZE", ""))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors live so that backend "cuda" takes them."""
    if request.param == "cuda":
        return "cuda"
    emulate(request.getfixturevalue("library"), monkeypatch)
    return "cpu"


def emulate(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "module", cuda_emulation.load(library))
    monkeypatch.setattr(cuda, "unsupported", lambda tensor: None)


def moved(tensors: Any, device: str) -> list[Any]:
    return [part.to(device) if isinstance(part, Tensor) else part for part in tensors]


def attention_results(
    case: PackedCase, dtype: torch.dtype, backend: str, device: str = "cpu", compute: torch.dtype | None = None
) -> list[Tensor]:
    """Output and all gradients, on the CPU; `compute` converts the numbers of `dtype` first."""
    *rows, cu_query, cu_key = packed_inputs(case, dtype)
    options = dict(zip(case_options(case), moved(case_options(case).values(), device), strict=True))
    compute = dtype if compute is None else compute
    inputs = [part.to(device, compute).detach().requires_grad_() for part in rows]
    if case.buckets:
        options["time_bias"] = options["time_bias"].to(torch.promote_types(compute, torch.float32)).requires_grad_()
        inputs.append(options["time_bias"])
    output = flash_attention(*inputs[:3], cu_query.to(device), cu_key.to(device), backend=backend, **options)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = torch.autograd.grad(output, inputs, noise.to(dtype).to(output))
    return [part.detach().cpu() for part in (output, *grads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EMULATED_CASES, ids=str)
def test_attention_matches_reference(case: PackedCase, dtype: torch.dtype, device: str) -> None:
    found = attention_results(case, dtype, "cuda", device)
    plain = attention_results(case, dtype, "reference")
    truth = attention_results(case, dtype, "reference", compute=torch.float64)
    for name, *parts in zip(("output", "query", "key", "value", "time_bias"), found, plain, truth, strict=False):
        assert_matches_reference(*parts, f"flash_attention {name}", case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if case.name in SLOW_TO_EMULATE], ids=str)
def test_long_attention_matches_reference(case: PackedCase, dtype: torch.dtype) -> None:
    test_attention_matches_reference(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_does_not_depend_on_the_order_of_threads(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated: threads in the opposite order, which a missing barrier would show. On a device: a second run."""
    case = EMULATED_CASES[2]
    first = attention_results(case, dtype, "cuda", device)
    monkeypatch.setenv("UBP_EMULATION_REVERSED", "1")
    assert all(map(torch.equal, first, attention_results(case, dtype, "cuda", device)))


def test_misaligned_rows_are_copied(device: str) -> None:
    """Tensors that start between two multiples of 16 bytes, and an output whose gradient is not contiguous."""
    cu_seqlens = torch.tensor([0, 3, 20], device=device)
    query = torch.randn(20 * 2 * 8 + 1, device=device)[1:].view(20, 2, 8).requires_grad_()
    results = []
    for backend in ("cuda", "reference"):
        output = flash_attention(query, query, query, cu_seqlens, backend=backend)
        results.append(torch.autograd.grad(output.transpose(0, 1).sum(dim=0)[0].sum(), query)[0])
    torch.testing.assert_close(*results)


REGISTERED_CASES = (
    PackedCase("plain", (5, 0, 9), width=8, is_causal=True),
    PackedCase("everything", (5, 0, 9), width=8, window=(4, 1), buckets=20, dropout_p=0.3),
)


@pytest.mark.parametrize("case", REGISTERED_CASES, ids=str)
def test_attention_is_a_registered_op(case: PackedCase, device: str) -> None:
    *rows, cu_query, cu_key = moved(packed_inputs(case, torch.float32), device)
    options = dict(zip(case_options(case), moved(case_options(case).values(), device), strict=True))
    times: tuple[Any, ...] = (None, None, None, None)
    if case.buckets:
        times = (options["time_bias"], *2 * [options["timestamp_s"]], torch.tensor([5, 70, 3], device=device))
    low, high = case.window or (-1, 0 if case.is_causal else -1)
    numbers = (low, high, 0.3, case.dropout_p, "cuda")
    tensors = (*(part.requires_grad_() for part in rows), cu_query, cu_key, *times)
    torch.library.opcheck(torch.ops.ubp_fast.flash_attention.default, (*tensors, *numbers))


@pytest.mark.parametrize("case", REGISTERED_CASES, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile itself imports
def test_attention_compiles_as_one_graph(case: PackedCase, device: str) -> None:
    *rows, cu_seqlens, _ = moved(packed_inputs(case, torch.float32), device)
    options = dict(zip(case_options(case), moved(case_options(case).values(), device), strict=True))
    if case.dropout_p:
        options["seed"] = torch.tensor([2**60 + 3], device=device)

    def loss(*rows: Tensor) -> Tensor:
        return flash_attention(*rows, cu_seqlens, backend="cuda", **options).square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [part.detach().requires_grad_() for part in rows]
        found.append(torch.autograd.grad(function(*inputs), inputs))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("case", REGISTERED_CASES, ids=str)
def test_attention_waits_for_nothing(case: PackedCase, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(library, monkeypatch)
    *rows, cu_seqlens, _ = packed_inputs(case, torch.bfloat16)
    leaves = [part.detach().requires_grad_() for part in rows]
    with nothing_waits(monkeypatch):
        output = flash_attention(*leaves, cu_seqlens, backend="cuda", **case_options(case))
        torch.autograd.grad(output, leaves, output.detach())


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_nt_xent_waits_for_nothing(negatives: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(library, monkeypatch)
    sides = [side.requires_grad_() for side in pair(9, 8, torch.bfloat16)]
    tau = torch.tensor(0.1, requires_grad=True)
    with nothing_waits(monkeypatch):
        loss = nt_xent(*sides, temperature=tau, negatives=negatives, backend="cuda", **options(9))
        torch.autograd.grad(loss, [*sides, tau])


# Rows, width, temperature, whether weight, valid and ids are given, whether rows are normalised.
CONTRASTIVE_CASES = (
    (1, 1, 0.1, False, True),
    (2, 59, 0.1, False, True),
    (3, 64, 1.0, True, True),
    (63, 5, 0.1, True, False),
    (64, 100, 0.02, False, True),
    (65, 128, 0.005, True, True),
    (131, 64, 0.01, True, True),
    (40, 300, 0.1, False, True),
    (20, 520, 0.05, True, True),
)


def contrastive_results(case: tuple, negatives: str, dtype: torch.dtype, backend: str, device: str = "cpu") -> Any:
    """Loss and all gradients, on the CPU; "truth" is the reference at float64 on the same numbers."""
    count, width, temperature, has_options, is_normalized = case
    left, right = (rows if is_normalized else rows / 4 for rows in pair(count, width, dtype))
    chosen = dict(zip(options(count), moved(options(count).values(), device), strict=True)) if has_options else {}
    compute, backend = (torch.float64, "reference") if backend == "truth" else (dtype, backend)
    arguments = {"negatives": negatives, "normalize": is_normalized, "backend": backend, **chosen}
    return [part.cpu() for part in results(left.to(device), right.to(device), temperature, compute, **arguments)]


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONTRASTIVE_CASES, ids=str)
def test_nt_xent_matches_reference(case: tuple, dtype: torch.dtype, negatives: str, device: str) -> None:
    found = contrastive_results(case, negatives, dtype, "cuda", device)
    plain, truth = (contrastive_results(case, negatives, dtype, backend) for backend in ("reference", "truth"))
    for name, *parts in zip(RESULTS, found, plain, truth, strict=True):
        assert_matches_reference(*parts, f"nt_xent {name}", case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in RECTANGULAR if case.is_small], ids=str)
def test_rectangular_nt_xent_matches_reference(case: Rectangular, dtype: torch.dtype, device: str) -> None:
    assert_rectangular_is_close(case, dtype, "cuda", device)


@pytest.mark.gpu
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [127, 1000, 1031])
def test_nt_xent_of_many_rows_matches_reference(count: int, dtype: torch.dtype, negatives: str) -> None:
    test_nt_xent_matches_reference((count, 256, 0.02, True, True), dtype, negatives, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nt_xent_does_not_depend_on_the_order_of_threads(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = (70, 140, 0.05, True, True)
    first = contrastive_results(case, "simclr", dtype, "cuda", device)
    monkeypatch.setenv("UBP_EMULATION_REVERSED", "1")
    assert all(map(torch.equal, first, contrastive_results(case, "simclr", dtype, "cuda", device)))


def test_nt_xent_gradient_is_accurate_when_the_loss_is_near_zero(device: str) -> None:
    """Orthogonal clients, left = right: the loss is exp(-1 / temperature) (N - 1), which 1 - p cannot represent."""
    rows = torch.eye(8, device=device, requires_grad=True)
    loss = nt_xent(rows, rows.detach(), temperature=0.02, backend="cuda")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(7 * math.exp(-50), rel=1e-4)
    assert rows.grad is not None
    wanted = torch.full((7,), math.exp(-50) / 0.02 / 8)
    torch.testing.assert_close(rows.grad[0, 1:].cpu(), wanted, rtol=1e-4, atol=0)


def test_nt_xent_of_small_probabilities_in_float16(device: str) -> None:
    assert_small_probabilities_count(torch.float16, "cuda", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nt_xent_of_equal_rows_zero_rows_and_nothing(dtype: torch.dtype, device: str) -> None:
    rows = torch.randn(1, 40).expand(9, 40).to(device, dtype)
    equal = nt_xent(rows, rows, temperature=0.005, negatives="simclr", backend="cuda")
    assert float(equal) == pytest.approx(math.log(17), rel=torch.finfo(dtype).eps)
    left, right = (part.to(device) for part in pair(5, 8, dtype))
    left[1] = right[3] = 0
    nt_xent(left.requires_grad_(), right.requires_grad_(), backend="cuda").backward()
    assert left.grad is not None and right.grad is not None
    assert not left.grad[1].any() and not right.grad[3].any() and left.grad[0].any()
    nobody = torch.zeros(5, dtype=torch.bool, device=device)
    assert float(nt_xent(left.detach(), right.detach(), valid=nobody, backend="cuda")) == 0


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_nt_xent_is_a_registered_op(negatives: str, device: str) -> None:
    left, right = (part.to(device) for part in pair(5, 4, torch.float32))
    chosen = moved(options(5).values(), device)
    tau = torch.tensor(0.2, device=device, requires_grad=True)
    arguments = (left.requires_grad_(), right.requires_grad_(), None, tau, negatives, *facts(*chosen), True, "cuda")
    torch.library.opcheck(torch.ops.ubp_fast.nt_xent.default, arguments)

    def loss(left: Tensor, right: Tensor) -> Tensor:
        return nt_xent(left, right, temperature=tau, negatives=negatives, backend="cuda")

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found.append(torch.autograd.grad(function(left, right), (left, right, tau)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_absent_device_or_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(4, 1, 8)
    with pytest.raises(BackendUnavailable, match="backend 'cuda' is unavailable: it computes on CUDA devices, the ten"):
        flash_attention(rows, rows, rows, torch.tensor([0, 4]), backend="cuda")
    with pytest.raises(BackendUnavailable, match="nt_xent: backend 'cuda' is unavailable: it computes on CUDA devices"):
        nt_xent(rows[:, 0], rows[:, 0], backend="cuda")
    monkeypatch.setattr(cuda, "module", None)
    monkeypatch.setattr(cuda, "MISSING", "no module")

    class Elsewhere:
        device = torch.device("cuda:0")
        dtype = torch.float32

    assert "built without the CUDA kernels (no module)" in str(cuda.unsupported(Elsewhere()))  # type: ignore[arg-type]


def bits(numbers: np.ndarray) -> np.ndarray:
    """Integers below 256 as bfloat16."""
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def check(library: Path, name: str, *arguments: Any) -> str:
    function = getattr(ctypes.CDLL(str(library)), name)
    function.restype = ctypes.c_char_p
    return (function(*arguments) or b"").decode()


def test_emulated_product_has_the_layout_of_the_ptx_isa(library: Path) -> None:
    """Fragments are filled by the formulas of the section on mma.m16n8k16, in its own variables."""
    random = np.random.default_rng(0)
    a, b = random.integers(-9, 9, (16, 16)), random.integers(-9, 9, (16, 8))
    a_registers, b_registers = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    found, wanted = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    for lane in range(32):
        group_id, thread_in_group = lane >> 2, lane % 4
        for i in range(8):
            row = group_id if (0 <= i < 2) or (4 <= i < 6) else group_id + 8
            column = thread_in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
            a_registers[lane, i] = bits(a[row, column])
        for i in range(4):
            b_registers[lane, i] = bits(b[thread_in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group_id])
            row = group_id if i < 2 else group_id + 8
            wanted[lane, i] = (a @ b)[row, thread_in_group * 2 + (i & 1)]
    assert not check(library, "check_multiply", pointer(a_registers), pointer(b_registers), pointer(found))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_emulated_ldmatrix_has_the_layout_of_the_ptx_isa(library: Path, is_transposed: bool) -> None:
    numbers = np.zeros(256 + 8, np.uint16)
    numbers = numbers[(-numbers.ctypes.data % 16) // 2 :][:256].reshape(4, 8, 8)
    numbers[:] = np.arange(256).reshape(4, 8, 8)
    found = np.zeros((32, 8), np.uint16)
    assert not check(library, "check_load", pointer(numbers), pointer(found), is_transposed)
    for lane in range(32):
        for matrix in range(4):
            source = numbers[matrix].T if is_transposed else numbers[matrix]
            assert found[lane, 2 * matrix : 2 * matrix + 2].tolist() == source[lane // 4][2 * (lane % 4) :][:2].tolist()


@pytest.mark.parametrize(
    ("which", "message"),
    [(0, None), (1, None), (2, "lanes of a warp meet in different operations"), (3, "threads wait"), (4, "misaligned")],
)
def test_emulation_notices_mistakes(library: Path, which: int, message: str | None) -> None:
    source, found = torch.ones(64), np.zeros(64, np.float32)
    said = check(library, "check_mistake", which, ctypes.c_void_p(source.data_ptr()), pointer(found))
    assert (message in said) if message else np.isnan(found).any()


# What stands in place of the emulation on a device, as compiled: each instruction with the places that its operands are
# loaded from and stored to, in bytes. In the PTX ISA the first source of `cvt...x2` is the upper half.
INSTRUCTIONS = {
    "pack_bf16": "cvt.rn.bf16x2.f32 out+0, in+4, in+0",
    "pack_fp16": "cvt.rn.f16x2.f32 out+0, in+4, in+0",
    "multiply_bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {out+0, out+4, out+8, out+12}, "
    "{in+0, in+4, in+8, in+12}, {in+16, in+20}, {out+0, out+4, out+8, out+12}",
    "multiply_fp16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {out+0, out+4, out+8, out+12}, "
    "{in+0, in+4, in+8, in+12}, {in+16, in+20}, {out+0, out+4, out+8, out+12}",
    "load": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {out+0, out+4, out+8, out+12}",
    "load_transposed": "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {out+0, out+4, out+8, out+12}",
}
WRAPPED = """
#include "common/device.h"
using namespace ubp;
template <class T> __device__ void multiply(const uint32_t* in, float* out) {
  float sum[4] = {out[0], out[1], out[2], out[3]};
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  multiply_fragments<T>(sum, a, in[4], in[5]);
  for (int at = 0; at < 4; ++at) out[at] = sum[at];
}
#define ENTRY extern "C" __global__ void
ENTRY pack_bf16(const float* in, uint32_t* out) { out[0] = pack<BFloat16>(in[0], in[1]); }
ENTRY pack_fp16(const float* in, uint32_t* out) { out[0] = pack<Float16>(in[0], in[1]); }
ENTRY multiply_bf16(const uint32_t* in, float* out) { multiply<BFloat16>(in, out); }
ENTRY multiply_fp16(const uint32_t* in, float* out) { multiply<Float16>(in, out); }
ENTRY load(const uint32_t* in, uint32_t* out) {
  uint32_t found[4];
  load_matrices(found, shared_memory() + in[0]);
  for (int at = 0; at < 4; ++at) out[at] = found[at];
}
ENTRY load_transposed(const uint32_t* in, uint32_t* out) {
  uint32_t found[4];
  load_matrices_transposed(found, shared_memory() + in[0]);
  for (int at = 0; at < 4; ++at) out[at] = found[at];
}
"""


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc: the emulation replaces these lines")
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "wrapped.cu").write_text(WRAPPED, encoding="utf-8")
    flags = ["-ptx", "-std=c++17", "-arch=sm_80", f"-I{cuda_emulation.ROOT / 'csrc'}"]
    cuda_emulation.run(["nvcc", *flags, str(folder / "wrapped.cu"), "-o", str(folder / "wrapped.ptx")])
    return (folder / "wrapped.ptx").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_device_instructions_take_their_operands_in_the_order_of_the_ptx_isa(name: str, instructions: str) -> None:
    body = instructions.split(f".entry {name}(")[1].split("\n}")[0]
    places: dict[str, str] = {}
    for register, parameter in re.findall(r"ld\.param\.u64\s+(%\w+), \[\w+_param_(\d)\]", body):
        places[register] = ("in", "out")[int(parameter)]
    for register, source in re.findall(r"cvta\.to\.global\.u64\s+(%\w+), (%\w+)", body):
        places[register] = places[source]

    def place(address: str) -> str:
        base, _, offset = address.partition("+")
        return f"{places[base]}+{offset or 0}"

    for register, address in re.findall(r"ld\.global\.\w+\s+(%\w+), \[([^\]]+)\]", body):
        places[register] = place(address)
    for address, register in re.findall(r"st\.global\.\w+\s+\[([^\]]+)\], (%\w+)", body):
        places.setdefault(register, place(address))
    wanted = INSTRUCTIONS[name]
    (line,) = (line.strip() for line in body.splitlines() if line.strip().startswith(wanted.split()[0] + " "))
    found = re.sub(r"%\w+", lambda match: places.get(match[0], match[0]), line.rstrip(";"))
    assert found.startswith(wanted)
