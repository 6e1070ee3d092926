"""What a bug report needs: versions, the machine, and every kernel here against its plain reference in some seconds."""

from __future__ import annotations

import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubp_fast import __version__, _core
from ubp_fast.kernels import BackendUnavailable, flash_attention, nt_xent, row_sparse, windowed_aggregate
from ubp_fast.kernels.row_product import row_product

Results = list[Tensor]
Problem = Callable[[torch.device, torch.dtype, str], Results]


class Check(NamedTuple):
    """One backend of one operator: it erred by so much where so much is allowed, or could not run."""

    operator: str
    backend: str
    detail: str
    is_fault: bool


def run() -> int:
    """Prints what is found; 0, or 1 where a kernel gives wrong results or breaks."""
    for topic, text in facts():
        print(f"{topic:13} {text}", flush=True)
    print("self-test     results and gradients against the plain references")
    faults = 0
    for check in checks():
        faults += check.is_fault
        print(f"  {check.operator:19} {check.backend:28} {check.detail}", flush=True)
    print(f"{faults} of the checks failed: please report all of the above" if faults else "all is well")
    return min(faults, 1)


def facts() -> Iterator[tuple[str, str]]:
    """Versions and the machine, by topic."""
    yield "ubp_fast", f"{__version__} in {Path(__file__).parent}"
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    versions, missing = _packages()
    yield "packages", ", ".join(versions)
    if missing:
        yield "not installed", ", ".join(missing)
    yield "processor", f"{_processor()}, {len(os.sched_getaffinity(0))} cores for this process"
    yield "instructions", f"{_core.isa()} in use; usable here: {', '.join(_core.usable_isas())}"
    yield "threads", f"{torch.get_num_threads()} of PyTorch, which the kernels use as well"
    yield "memory", _memory()
    if not torch.cuda.is_available():
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        yield "GPU", f"none that PyTorch sees, which is built {built}"
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        yield "GPU", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"


def checks() -> Iterator[Check]:
    """Every backend on every device and instruction set that is here."""
    first = _core.isa()
    try:
        for isa in _core.usable_isas():
            _core.set_isa(isa)
            for operator in PROBLEMS:
                if operator != "windowed_aggregate":
                    yield _check(operator, "native", torch.device("cpu"), isa)
    finally:
        _core.set_isa(first)
    yield _check("windowed_aggregate", "numba", torch.device("cpu"))
    if torch.cuda.is_available():
        for operator in ("flash_attention", "nt_xent", "row_sparse"):
            yield _check(operator, "triton", torch.device("cuda"))


def _check(operator: str, backend: str, device: torch.device, isa: str = "") -> Check:
    name, (problem, dtypes) = " ".join((backend, isa)).strip(), PROBLEMS[operator]
    started, worst = time.perf_counter(), 0.0
    try:
        for dtype in dtypes:
            worst = max(worst, _error_share(problem, device, dtype, backend))
    except BackendUnavailable as error:
        return Check(operator, name, f"not here: {error}", False)
    except Exception as error:  # whatever it is belongs into the report, beside the other checks
        return Check(operator, name, f"FAILED: {type(error).__name__}: {error}", True)
    spent_ms = 1000 * (time.perf_counter() - started)
    verdict = "ok" if worst <= 1 else "FAILED:"
    return Check(operator, name, f"{verdict} {worst:.0%} of the allowed error, {spent_ms:.0f} ms", not worst <= 1)


def _error_share(problem: Problem, device: torch.device, dtype: torch.dtype, backend: str) -> float:
    """Largest error over what is allowed: twice the reference's in this dtype, and four roundings of the largest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cache that cannot be written, which runs say themselves
        found = problem(device, dtype, backend)
        plain = problem(device, dtype, "reference")
        truth = problem(device, torch.float64, "reference")
    worst = 0.0
    for one, other, exact in zip(found, plain, truth, strict=True):
        eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        distance, own = ((part.double() - exact.double()).abs().max().item() for part in (one, other))
        allowed = 2 * own + 4 * eps * exact.double().abs().max().item()
        if distance != 0:
            worst = max(worst, distance / allowed) if distance <= torch.inf and allowed else torch.inf  # NaN is worst
    return worst


def _attention(device: torch.device, dtype: torch.dtype, backend: str) -> Results:
    inputs = [part.to(device, dtype).requires_grad_() for part in _random(3, 67, 2, 40)]
    bias = _random(1, 2, 20)[0].to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    offsets = torch.tensor([0, 20, 20, 21, 67], dtype=torch.int32, device=device)
    times = torch.arange(67, device=device) * 100
    query, key, value = inputs
    output = flash_attention(
        query, key, value, offsets, causal=True, time_bias=bias, timestamp_s=times, backend=backend
    )
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), [*inputs, bias])]


def _contrast(device: torch.device, dtype: torch.dtype, backend: str) -> Results:
    sides = [part.to(device, dtype).requires_grad_() for part in _random(2, 67, 40)]
    loss = nt_xent(*sides, temperature=0.2, negatives="symmetric", backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, sides)]


def _rows(device: torch.device, dtype: torch.dtype, backend: str) -> Results:
    rows, width = 50, 24
    state = torch.zeros(rows, 2, width, device=device, dtype=dtype)
    slot, last_step = (torch.full((rows,), fill, dtype=torch.int32, device=device) for fill in (0, -1))
    used = torch.zeros(1, dtype=torch.int64, device=device)
    weight, rule = _random(1, rows, width)[0].to(device, dtype), row_sparse.Adam(0.9, 0.999, 1e-8)
    step = row_sparse.AdamStep(0.01, 1.0, 0.99)
    ids = torch.tensor([3, 9, 3, 49], device=device)
    for number in range(3):
        history = torch.tensor([step] * (number + 1), dtype=torch.float64, device=device)
        table = row_sparse.RowTable(weight, state, slot, used, last_step, history)
        distinct, sums = row_sparse.reduce(ids + number % 2 * -1, _random(1, 4, width)[0].to(weight), backend=backend)
        row_sparse.update(table, rule, distinct, sums, step, backend=backend)
    history = torch.tensor([step] * 4, dtype=torch.float64, device=device)
    table = table._replace(history=history)
    found = row_sparse.gather(table, rule, torch.arange(rows, device=device), backend=backend)
    row_sparse.catch_up(table, rule, backend=backend)
    return [found, weight]


def _aggregates(device: torch.device, dtype: torch.dtype, backend: str) -> Results:
    generator = torch.Generator().manual_seed(0)
    draw = lambda high: torch.randint(high, (500,), generator=generator)  # noqa: E731
    offsets = torch.tensor([0, 100, 100, 500])
    times = torch.cat([part.sort().values for part in draw(10**6).split([100, 400])])
    slots = torch.arange(20) % 7 - 1
    options: dict[str, Any] = {
        "anchor_s": 10**6,
        "windows_s": (10**5, None),
        "slots": slots,
        "num_slots": 6,
        "groups": torch.arange(20),
    }
    found = windowed_aggregate(offsets, times, draw(20), half_lives_s=(10**5,), backend=backend, **options)
    return [found.totals, found.counts, found.distinct, found.decayed_counts, found.entropy, found.last_age_s]


def _products(device: torch.device, dtype: torch.dtype, backend: str) -> Results:
    rows, other = (part.to(dtype) for part in _random(2, 67, 67))
    product = row_product(rows[:, :40].numpy(), other[:40].numpy(), other[40].numpy(), backend=backend)
    return [torch.from_numpy(product)]


_HALF = (torch.float32, torch.bfloat16)
PROBLEMS: dict[str, tuple[Problem, tuple[torch.dtype, ...]]] = {
    "flash_attention": (_attention, _HALF),
    "nt_xent": (_contrast, _HALF),
    "row_product": (_products, (torch.float32, torch.float64)),
    "row_sparse": (_rows, (torch.float32,)),
    "windowed_aggregate": (_aggregates, (torch.float64,)),
}


def _random(*shape: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).unbind()


def _packages() -> tuple[list[str], list[str]]:
    """Versions of what the package can use, and what of it is not here."""
    used = [
        line for line in metadata.requires("ubp_fast") or () if not re.search(r"extra == .(test|bench|lint|docs)", line)
    ]
    names = {"triton", *(re.split(r"[^\w-]", line, maxsplit=1)[0] for line in used)}
    versions, missing = [], []
    for name in sorted(names, key=str.lower):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    return versions, missing


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        available = 1024 * int(found[1]) if found else available
    except OSError:
        pass
    return f"{total / 2**30:.1f} GiB, {available / 2**30:.1f} of them free"
