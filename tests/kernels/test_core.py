"""The compiled module: instruction sets, threads, fork, and no symbol of one instruction set that another could use."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch
from support.cases import PackedCase, packed_inputs
from support.closeness import assert_matches_reference

from ubp_fast import _core
from ubp_fast.kernels import flash_attention

CASE = PackedCase("mixed", (40, 0, 7, 65), width=32)


@pytest.fixture(autouse=True)
def same_isa() -> Iterator[None]:
    before = _core.isa()
    yield
    _core.set_isa(before)


def result() -> torch.Tensor:
    return flash_attention(*packed_inputs(CASE, torch.float32), backend="native")


def test_best_isa_is_chosen() -> None:
    assert _core.usable_isas()[0] == "base"
    assert _core.isa() == _core.usable_isas()[-1]


def test_the_fuzz_of_the_sanitizers_speaks_the_language_of_the_module() -> None:
    """`make sanitize` is rare: its script had used what the module no longer offered, and nobody saw."""
    script, folder = Path(__file__).with_name("fuzz_core.py"), Path(str(_core.__file__)).parent
    rounds = 40
    printed = subprocess.run([sys.executable, script, folder, str(rounds)], check=True, capture_output=True, text=True)
    found = re.findall(rf"^(\w+): {rounds} problems, (\d+) accepted", printed.stdout, re.MULTILINE)
    assert [name for name, _ in found] == ["flash_attention", "nt_xent", "row_product", "row_sparse"]
    assert all(0 < int(accepted) < rounds for _, accepted in found), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 59, 256])
def test_every_isa_agrees(width: int, dtype: torch.dtype) -> None:
    *inputs, cu_query, cu_key = packed_inputs(PackedCase("mixed", (40, 0, 7, 65, 300), width=width), dtype)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def results(kind: torch.dtype, backend: str) -> list[torch.Tensor]:
        leaves = [part.to(kind, copy=True).requires_grad_() for part in inputs]
        output = flash_attention(*leaves, cu_query, cu_key, backend=backend)
        return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(dtype).to(kind))]

    reference, truth = results(dtype, "reference"), results(torch.float64, "reference")
    for isa in _core.usable_isas():
        _core.set_isa(isa)
        assert _core.isa() == isa
        for name, mine, same, exact in zip(("output", *"qkv"), results(dtype, "native"), reference, truth, strict=True):
            assert_matches_reference(mine, same, exact, f"flash_attention {name}", f"{isa} D={width}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [32, 59, 256])
def test_a_single_key_leaves_nothing_for_its_score(width: int, dtype: torch.dtype) -> None:
    """<dO, V> - <dO, O> is of equal rows there: 0 on every instruction set, in whatever order it sums."""
    query, key, value = torch.randn(3, 40, 2, width).to(dtype).requires_grad_().unbind()
    for isa in _core.usable_isas():
        _core.set_isa(isa)
        output = flash_attention(query, key, value, torch.arange(41), backend="native")
        found = torch.autograd.grad(output, (query, key), torch.randn(output.shape).to(dtype), retain_graph=True)
        assert not any(part.any() for part in found), isa


def test_amx_is_emulated_where_it_does_not_run() -> None:
    """What `make .venv/installed` builds. The emulation is never chosen by itself."""
    if "avx512_bf16" not in _core.usable_isas():
        pytest.skip("this processor lacks AVX-512 with bfloat16, which AMX is used beside")
    assert "amx_emulated" in _core.usable_isas()[:-1]


@pytest.mark.parametrize("name", ["", "sse9", "AVX2"])
def test_unknown_isa(name: str) -> None:
    before = _core.isa()
    with pytest.raises(ValueError, match=f"^set_isa: name must be an instruction set of this build, got '{name}'"):
        _core.set_isa(name)
    assert _core.isa() == before


def test_unusable_isa() -> None:
    unusable = {"avx2", "avx512", "avx512_bf16", "amx_bf16"} - set(_core.usable_isas())
    if not unusable:
        pytest.skip("this processor has every instruction set of the build")
    for name in unusable:
        with pytest.raises(ValueError, match=f"got '{name}'"):
            _core.set_isa(name)


def _send_result(sender: Connection) -> None:
    sender.send_bytes(result().numpy().tobytes())
    sender.close()
    os._exit(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process that has threads is what is tested
def test_fork_after_the_pool_was_used() -> None:
    torch.set_num_threads(3)
    before = result().numpy().tobytes()
    for _ in range(3):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_send_result, args=(sender,))
        child.start()
        assert receiver.poll(60), "the forked child does not answer"
        assert receiver.recv_bytes() == before
        child.join()
    assert result().numpy().tobytes() == before


def test_many_threads_call_at_once() -> None:
    torch.set_num_threads(2)
    wanted = result()
    barrier = threading.Barrier(6)

    def call(_: int) -> bool:
        barrier.wait()
        return all(torch.equal(result(), wanted) for _ in range(20))

    with ThreadPoolExecutor(6) as executor:
        assert all(executor.map(call, range(6)))


@pytest.mark.parametrize("threads", [1, 3])
def test_helpers_flush_denormals_where_the_caller_does(threads: int) -> None:
    """Else a result would depend on who computed it. Means of numbers near 1e-40 are such numbers, or 0."""
    query, tiny = torch.randn(300 * 64, 4, 16), torch.full((300 * 64, 4, 16), 1e-40)
    torch.set_num_threads(threads)

    def mean() -> torch.Tensor:
        return flash_attention(query, query, tiny, torch.arange(0, 300 * 64 + 1, 64), backend="native")

    assert (mean() > 0).all()
    assert torch.set_flush_denormal(True)
    try:
        assert (mean() == 0).all()
        assert (tiny[0] * 0.5 == 0).all(), "the caller's mode must stay"
    finally:
        torch.set_flush_denormal(False)
    assert (mean() > 0).all()
    assert (tiny[0] * 0.5 > 0).all()


def test_thread_count_follows_torch() -> None:
    code = """
import psutil, torch
from ubp_fast.kernels import flash_attention
query = torch.randn(64, 4, 16)
counts = []
for threads in (1, 3, 2, 5):
    torch.set_num_threads(threads)
    before = psutil.Process().num_threads()
    flash_attention(query, query, query, torch.arange(0, 65, 8), backend="native")
    counts.append(psutil.Process().num_threads() - before)
print(counts)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[0] == "[0, 2, 0, 2]"  # the pool grows to threads - 1 helpers and keeps them


def test_no_memory_is_an_error_not_a_crash() -> None:
    code = """
import resource, torch
from pathlib import Path
from ubp_fast.kernels import flash_attention
torch.set_num_threads(1)
query = torch.ones(40000, 1, 256, dtype=torch.bfloat16)
flash_attention(query[:8], query[:8], query[:8], torch.tensor([0, 8]))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, -1))
try:
    flash_attention(query, query, query, torch.tensor([0, 40000]))
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print("refused", flash_attention(query[:8], query[:8], query[:8], torch.tensor([0, 8])).sum().item())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.split()) == (0, ["refused", "2048.0"]), found.stderr[-2000:]


def test_wrong_problems_never_reach_the_kernel() -> None:
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    sizes = {"query_tokens": 4, "key_tokens": 4, "sequences": 1, "heads": 2, "width": 8, "buckets": 64}
    good = {"cu_query": offsets, "cu_key": offsets, "time_bias": torch.zeros(2, 64), **sizes, "threads": 1}
    for wrong, rule in (
        ({"sequences": -1}, "sizes must not be negative"),
        ({"width": 0}, "width must be in 1..256, got 0"),
        ({"width": 257}, "width must be in 1..256, got 257"),
        ({"buckets": 0}, "buckets must be in 1..106, got 0"),
        ({"buckets": 107}, "buckets must be in 1..106, got 107"),
        ({"query_tokens": 5}, "cu_seqlens must end at the number of tokens 5, got 4"),
        ({"key_tokens": 3}, "cu_seqlens_key must end at the number of tokens 3, got 4"),
        ({"cu_key": None}, "cu_seqlens_key must be given"),
        ({"dtype": 3}, "dtype must be 0, 1 or 2, got 3"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
    ):
        problem = _core.FlashAttentionProblem(**{**good, **wrong})
        for function in (_core.flash_attention_forward, _core.flash_attention_backward):
            with pytest.raises(ValueError, match=f"flash_attention: {rule}"):
                function(problem)
    with pytest.raises(AttributeError, match="head"):
        _core.FlashAttentionProblem(head=2)


def test_module_needs_no_torch() -> None:
    """The module links to the C++ runtime only, and imports without Python packages."""
    libraries = {Path(item.path).name for item in psutil.Process().memory_maps() if ".so" in item.path}
    assert any(name.startswith("_core") for name in libraries)
    code = f"import importlib.util as u; s = u.spec_from_file_location('_core', {_core.__file__!r}); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); import sys; "
    code += "print(m.isa(), 'torch' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [_core.isa(), "False", "False"]
