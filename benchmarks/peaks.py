"""What a core can reach: bare loops of multiply-adds and of dot products of bfloat16, and the products of libraries.

A bare loop that does as many operations as a kernel is one of the kernel's rivals: the ratio against it is the share of
the peak that the kernel reaches, taken in turns with everything else.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ubp_fast import _core

HERE = Path(__file__).parent
OF_LOOP = {torch.float32: "multiply-adds", torch.bfloat16: "dot products"}
SIZE = 1024  # of the libraries' products
ROUNDS, LOOP_FLOP = 9, 2e9


def bare_loop(flop: float, dtype: torch.dtype) -> tuple[str, Callable[[], float]] | None:
    """Name and call of a loop of `flop` operations on one core; None where there is no compiler or no instruction."""
    library = _library()
    if library is None:
        return None
    function, of_step = library[dtype]
    if of_step == 0:
        return None
    steps = max(1, round(flop / of_step))
    return f"bare {OF_LOOP[dtype]}", lambda: float(function(steps, 1.0))


@functools.cache
def measured() -> dict[str, float]:
    """GFLOP/s on one core by name: median of a few rounds in which all take turns."""
    calls: dict[str, tuple[float, Callable[[], object]]] = {}
    for dtype in OF_LOOP:
        loop = bare_loop(LOOP_FLOP, dtype)
        if loop is not None:
            calls[loop[0]] = (LOOP_FLOP, loop[1])
        left, right = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        calls[f"torch.matmul {name}"] = (2 * SIZE**3, functools.partial(torch.matmul, left, right))
    of_onednn = onednn_linear(torch.randn(SIZE, SIZE))
    if of_onednn is not None:
        rows = torch.randn(SIZE, SIZE)
        calls["oneDNN float32"] = (2 * SIZE**3, lambda: of_onednn(rows))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(ROUNDS):
        for name, (_, call) in calls.items():
            start = time.thread_time()  # others may have the core meanwhile
            call()
            seconds[name].append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return {name: round(flop / sorted(seconds[name])[ROUNDS // 2] / 1e9, 1) for name, (flop, _) in calls.items()}


def onednn_linear(weight: Tensor) -> Callable[[Tensor], Tensor] | None:
    """rows -> rows @ weight.T in float32 by oneDNN, which torch.matmul does not take; None without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return None
    packed = weight.to_mkldnn()
    return lambda rows: torch._C._nn.mkldnn_linear(rows.to_mkldnn(), packed, None).to_dense()


@functools.cache
def _library() -> dict[torch.dtype, tuple[Callable[[int, float], float], int]] | None:
    """The compiled loops with their operations per step."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        return None
    machine = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    flags = ["-std=c++17", "-O3", machine, "-mprefer-vector-width=512", "-ffp-contract=fast", "-w", "-shared", "-fPIC"]
    if platform.machine() != "x86_64":
        flags.remove("-mprefer-vector-width=512")
    elif _core.isa() != "amx_bf16":
        flags.append("-mno-amx-bf16")  # tile registers belong to who has asked for them, as the kernels then have
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peaks.so"
        command = [compiler, *flags, f"-I{HERE.parent / 'csrc'}", str(HERE / "peaks.cpp"), "-o", str(target)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target))
    found = {}
    for dtype, name in ((torch.float32, "multiply_add"), (torch.bfloat16, "dot_product")):
        function = getattr(library, f"{name}s")
        function.argtypes, function.restype = (ctypes.c_int64, ctypes.c_float), ctypes.c_float
        found[dtype] = (function, int(getattr(library, f"{name}_flop")()))
    return found
