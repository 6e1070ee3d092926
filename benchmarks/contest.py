"""A fair race: contender and rivals take turns inside one process, on the same inputs, after their results agreed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import peaks
import torch

CONTENDER = "ubp_fast"


@dataclass(frozen=True)
class Timing:
    """What one competitor needed, in milliseconds per call and bytes above the start of the call.

    Attributes:
        median_ms: wall clock.
        low_ms: 20 % quantile of the wall clock.
        high_ms: 80 % quantile of the wall clock.
        cpu_ms: median CPU time of the process, all threads.
        peak_bytes: largest growth of the resident set during one call.
        rounds: how often it was timed.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    cpu_ms: float
    peak_bytes: int
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """One figure against one rival: how many times as fast the contender is, and what it must reach."""

    figure: str
    rival: str
    ratio: float
    cpu_ratio: float
    bar: float | None

    @property
    def is_ok(self) -> bool:
        """No bar, or reached."""
        return self.bar is None or self.ratio >= self.bar


class Contest:
    """Times a contender against rivals, round by round; `benchmarks/conftest.py` hands one to each case."""

    def __init__(self, benchmark: Any, ratios: list[Ratio]) -> None:
        self._benchmark, self._ratios = benchmark, ratios
        self._paused = (0.0, 0.0)

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What a call of `once` does inside is not timed, neither by wall clock nor by CPU time."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self._paused = (self._paused[0] + time.perf_counter() - wall, self._paused[1] + time.process_time() - cpu)

    def run(
        self,
        figure: str,
        contender: Callable[[], Any],
        rivals: dict[str, tuple[Callable[[], Any], float | None]],
        check: Callable[[str, Any, Any], None],
        seconds: float = 6.0,
        min_rounds: int = 7,
        threads: dict[str, int] | None = None,
        facts: dict[str, Any] | None = None,
        share: tuple[torch.dtype, float | None] | None = None,
    ) -> None:
        """Checks that all results agree, then times all competitors in turns.

        Args:
            figure: what is measured.
            contender: the call under test; its inputs exist before.
            rivals: name -> (call, bar): the contender must be `bar` times as fast, None sets no bar.
            check: called with the rival's name and both results; raises when they differ. Runs before any timing.
            seconds: the rounds go on for about this long.
            min_rounds: but there are at least so many.
            threads: torch threads of a competitor, 1 when absent.
            facts: inputs and sizes, stored with the result.
            share: of the peak of this dtype on one core, and its bar: a bare loop of facts["flop"] operations becomes a
                rival without a result, whose ratio is the share. Nothing where no such loop can be made.
        """
        checked = tuple(rivals)
        if share is not None:
            loop = peaks.bare_loop((facts or {})["flop"], share[0])
            rivals = rivals if loop is None else {**rivals, loop[0]: (loop[1], share[1])}
        competitors = {CONTENDER: contender, **{name: call for name, (call, _) in rivals.items()}}
        threads = {name: (threads or {}).get(name, 1) for name in competitors}
        results = {}
        for name, call in competitors.items():  # warm-up, too
            with torch_threads(threads[name]):
                results[name] = call()
        for name in checked:
            check(name, results[CONTENDER], results[name])
        del results
        samples = self._rounds(competitors, threads, seconds, min_rounds)
        timings = {name: self._timing(samples[name], call, threads[name]) for name, call in competitors.items()}
        ratios = [
            Ratio(
                figure,
                name,
                float(
                    np.median([rival / mine for (mine, _), (rival, _) in zip(samples[CONTENDER], times, strict=True)])
                ),
                timings[name].cpu_ms / timings[CONTENDER].cpu_ms,
                rivals[name][1],
            )
            for name, times in samples.items()
            if name != CONTENDER
        ]
        self._ratios.extend(ratios)
        self._benchmark.extra_info.update(
            figure=figure,
            timings={name: asdict(timing) for name, timing in timings.items()},
            ratios=[{**asdict(ratio), "is_ok": ratio.is_ok} for ratio in ratios],
            threads=threads,
            facts=facts or {},
        )

    def once(
        self,
        figure: str,
        contenders: dict[str, Callable[[], Any]],
        rival: tuple[str, Callable[[], Any]],
        bars: dict[str, float],
        check: Callable[[str, Any, Any], None],
        most_bytes: int | None = None,
        facts: dict[str, Any] | None = None,
        before_rival: Callable[[], None] | None = None,
    ) -> None:
        """One call of each, for work of minutes: bars are about CPU time, results are checked before they count.

        Args:
            figure: what is measured.
            contenders: name -> call.
            rival: name and call.
            bars: name of a contender -> how many times less CPU time it must need.
            check: called with a contender's name, its result and the rival's; raises when they differ.
            most_bytes: each contender's growth of the resident set must stay below.
            facts: inputs and sizes, stored with the result; `before_rival` may add to them.
            before_rival: called between the contenders and the rival, where they do not fit into memory together.
        """
        samples, results, peaks = {}, {}, {}

        def timed(name: str, call: Callable[[], Any]) -> None:
            def measured() -> None:
                self._paused = (0.0, 0.0)
                cpu, wall = time.process_time(), time.perf_counter()
                results[name] = call()
                elapsed = (time.perf_counter() - wall, time.process_time() - cpu)
                samples[name] = (elapsed[0] - self._paused[0], elapsed[1] - self._paused[1])

            with torch_threads(1):
                peaks[name] = peak_extra_bytes(measured)

        for name, call in contenders.items():
            timed(name, call)
        if before_rival is not None:
            before_rival()
        self._benchmark.pedantic(timed, args=rival, rounds=1, iterations=1)
        rival_name = rival[0]
        ratios = []
        for name in contenders:
            check(name, results[name], results[rival_name])
            cpu_ratio = samples[rival_name][1] / samples[name][1]
            ratios.append(Ratio(f"{figure}, {name} (by CPU time)", rival_name, cpu_ratio, cpu_ratio, bars[name]))
            if most_bytes is not None:
                room = most_bytes / max(peaks[name], 1)
                ratios.append(Ratio(f"{figure}, {name}: memory", f"{most_bytes / 1e9:g} GB", room, room, 1.0))
        self._ratios.extend(ratios)
        timings = {
            name: asdict(Timing(wall * 1e3, wall * 1e3, wall * 1e3, cpu * 1e3, peaks[name], 1))
            for name, (wall, cpu) in samples.items()
        }
        self._benchmark.extra_info.update(
            figure=figure,
            timings=timings,
            ratios=[{**asdict(ratio), "is_ok": ratio.is_ok} for ratio in ratios],
            threads=dict.fromkeys(samples, 1),
            facts=facts or {},
        )

    def limits(
        self,
        figure: str,
        call: Callable[[], Any],
        most_cpu_s: float,
        most_bytes: int | None = None,
        rounds: int = 3,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Work without a rival: the median CPU time and the memory must stay below a bound.

        Memory is what the process itself holds (anonymous pages) beyond the start of the call: pages of mapped files
        are the system's to take back.

        Args:
            figure: what is measured.
            call: the work; what it returns is given back before the next round.
            most_cpu_s: seconds of CPU time, all threads.
            most_bytes: of memory.
            rounds: how often it is timed, after one round to warm up.
            facts: inputs and sizes, stored with the result.
        """
        samples = []

        def timed() -> None:
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            samples.append((time.perf_counter() - wall, time.process_time() - cpu))

        with torch_threads(1):
            if "timings" in self._benchmark.extra_info:  # pytest-benchmark times one call per case
                for _ in range(rounds + 1):
                    timed()
            else:
                self._benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1, iterations=1)
            timing = self._timing(samples[1:], call, 1)
            own_bytes = 0 if most_bytes is None else peak_extra_bytes(call, own_bytes_of)
        self.at_most(f"{figure}: CPU time", "s", timing.cpu_ms / 1e3, most_cpu_s, facts)
        if most_bytes is not None:
            self.at_most(f"{figure}: memory", "GB", own_bytes / 1e9, most_bytes / 1e9)
        name = CONTENDER if self._benchmark.extra_info["timings"] == {} else figure
        self._benchmark.extra_info["timings"][name] = asdict(timing)

    def alone(self, call: Callable[[], Any]) -> Any:
        """One call without rivals, whose result `at_most` judges."""
        return self._benchmark.pedantic(call, rounds=1, iterations=1)

    def at_most(self, figure: str, unit: str, value: float, most: float, facts: dict[str, Any] | None = None) -> None:
        """A figure that must not exceed a bound, such as memory; its ratio is bound / value.

        Args:
            figure: what is measured.
            unit: of the figure.
            value: what was measured.
            most: the bound.
            facts: inputs and sizes, stored with the result.
        """
        room = most / max(value, 1e-12)
        ratio = Ratio(f"{figure} {value:.3g} {unit}", f"{most:g} {unit}", room, room, 1.0)
        self._ratios.append(ratio)
        info = self._benchmark.extra_info
        info.setdefault("figure", figure)
        info.setdefault("timings", {})
        info.setdefault("threads", {CONTENDER: 1})
        info.setdefault("facts", {}).update(facts or {})
        info.setdefault("ratios", []).append({**asdict(ratio), "is_ok": ratio.is_ok})

    def _rounds(
        self, competitors: dict[str, Callable[[], Any]], threads: dict[str, int], seconds: float, min_rounds: int
    ) -> dict[str, list[tuple[float, float]]]:
        """(wall, CPU) seconds of each call. pytest-benchmark times the contender's calls, the rivals run in between."""
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in competitors}

        def timed(name: str) -> None:
            samples[name].append(self._seconds(competitors[name]))

        def between() -> None:
            torch.set_num_threads(1)
            for name in competitors:
                if name != CONTENDER:
                    with torch_threads(threads[name]):
                        timed(name)
            torch.set_num_threads(threads[CONTENDER])

        with quiet_collector():
            start = time.perf_counter()
            between()
            timed(CONTENDER)
            one_round_s = time.perf_counter() - start
            for times in samples.values():
                times.clear()
            rounds = max(min_rounds, min(200, int(seconds / one_round_s)))
            self._benchmark.pedantic(timed, args=(CONTENDER,), setup=between, rounds=rounds, iterations=1)
        torch.set_num_threads(1)
        return samples

    def _seconds(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Wall clock and CPU time of one call."""
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        return time.perf_counter() - wall, time.process_time() - cpu

    def _peak_bytes(self, call: Callable[[], Any]) -> int:
        return peak_extra_bytes(call)

    def _timing(self, samples: list[tuple[float, float]], call: Callable[[], Any], threads: int) -> Timing:
        wall_ms = np.array([wall for wall, _ in samples]) * 1e3
        low, median, high = np.quantile(wall_ms, (0.2, 0.5, 0.8))
        cpu_ms = float(np.median([cpu for _, cpu in samples])) * 1e3
        with torch_threads(threads):
            peak = self._peak_bytes(call)
        return Timing(float(median), float(low), float(high), cpu_ms, peak, len(samples))


class GpuContest(Contest):
    """The same race on a CUDA device: events around each call, memory as the allocator counts it, rates beside times.

    An event is recorded before the call's first launch: a call that keeps the device waiting pays for it.
    """

    def run(
        self,
        figure: str,
        contender: Callable[[], Any],
        rivals: dict[str, tuple[Callable[[], Any], float | None]],
        *arguments: Any,
        **options: Any,
    ) -> None:
        """As on a CPU; a rival that does not run on this card or with this PyTorch is named, and the others race."""
        missing = {name: reason for name, (call, _) in rivals.items() if (reason := _failure(call)) is not None}
        present = {name: rival for name, rival in rivals.items() if name not in missing}
        super().run(figure, contender, present, *arguments, **options)
        facts, timings = self._benchmark.extra_info["facts"], self._benchmark.extra_info["timings"]
        if missing:
            facts["missing_rivals"] = missing
        facts["matmul_peak_tflops"] = matmul_tflops(facts["dtype"])
        for timing in timings.values():
            timing["tflops"] = facts["flop"] / timing["median_ms"] / 1e9

    def _seconds(self, call: Callable[[], Any]) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        call()
        end.record()
        cpu = time.process_time() - cpu
        end.synchronize()
        return start.elapsed_time(end) / 1e3, cpu

    def _peak_bytes(self, call: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _failure(call: Callable[[], Any]) -> str | None:
    """The first line of what a rival's call raises, or None."""
    try:
        call()
    except (RuntimeError, ImportError, NotImplementedError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


@functools.cache
def matmul_tflops(dtype: str) -> float:
    """What the card's own matrix product of 8192^3 random numbers reaches: the peak that rates are held against."""
    left, right = (torch.randn(8192, 8192, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    contest = GpuContest(None, [])
    seconds = sorted(contest._seconds(lambda: left @ right)[0] for _ in range(20))
    return 2 * 8192**3 / seconds[10] / 1e12


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs the block with that many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flushing_denormals(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call with denormal numbers taken for zero."""

    def flushed() -> Any:
        torch.set_flush_denormal(True)
        try:
            return call()
        finally:
            torch.set_flush_denormal(False)

    return flushed


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection inside a timed call."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def resident_bytes() -> int:
    """Resident set of this process."""
    import psutil  # not on every machine with a GPU, whose memory the allocator counts

    return int(psutil.Process().memory_info().rss)


def own_bytes_of() -> int:
    """Resident set without the pages of files."""
    import psutil

    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def give_memory_back() -> None:
    """Frees what nobody refers to and returns free heap to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_extra_bytes(call: Callable[[], Any], measure: Callable[[], int] = resident_bytes) -> int:
    """Largest growth of memory while `call` runs once, from heap that was given back to the system."""
    give_memory_back()
    stop = threading.Event()
    start = peak = measure()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.0005):
            peak = max(peak, measure())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        peak = max(peak, measure())
        del result
    finally:
        stop.set()
        watcher.join()
    return peak - start


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory (no trim, no mmap), for all competitors; False where that is not possible.

    Otherwise every large tensor is returned to the system and page faults are timed instead of kernels, mostly for
    the rivals, which allocate more.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


# Instructions for vectors and matrices, as Linux names them.
VECTORS = ("avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")


def machine() -> dict[str, Any]:
    """CPU model, instructions, clock, cores, versions: what a number depends on, nothing that names the computer."""
    model, flags, clock = platform.machine(), "", {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        parts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        # Names such as "AMD EPYC" stand for chips of several generations, which family and model tell apart.
        if "model name" in parts:
            model = f"{parts['model name']} (family {parts.get('cpu family')} model {parts.get('model')})"
        every = parts.get("flags", parts.get("Features", "")).split()
        flags = " ".join(sorted(flag for flag in every if flag.startswith(VECTORS)))
        clock = {"MHz now": parts["cpu MHz"]} if "cpu MHz" in parts else {}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": model,
        "instructions": flags,
        **clock,
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "numpy": np.__version__,
    }


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
