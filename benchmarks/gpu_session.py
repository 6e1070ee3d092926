"""The steps of `gpu_session.sh`: each a process of its own with a limit of time, a log and a line in the summary."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu-session"
CORES = os.cpu_count() or 1
COMPILE_S = 1.43  # one Triton kernel, one core
START_S = 8.0  # a process that imports PyTorch and opens the device
COMMAND_S, LEAST_S = 585, 20  # all steps of a command together; what no step starts with less than
REHEARSAL = 8  # times as long without a device: the interpreter is slow
RATE = 150e12  # FLOP/s of bfloat16 that forward + backward should reach at least, ours and rivals', on an H100
# Kernels that Triton compiles for a case at most: forward, dq, dkv; prepare, statistics, three gradients, finish; one.
KERNELS_OF_A_CASE = {"attention": 3, "nt_xent": 6, "row_sparse": 1, "waits": 3, "dropout": 1, "graphs": 3}
# Cases that compile a single kernel, or none.
ONE_KERNEL = re.compile(
    "::test_(every_level|search_takes|packs_hold|sums_of_a_tile|buckets_at|every_kind_of_tile|memory_of|float64)"
)
FILES = {
    "attention": "tests/kernels/test_triton_flash_attention.py",
    "nt_xent": "tests/kernels/test_triton_nt_xent.py",
    "row_sparse": "tests/kernels/test_triton_row_sparse.py",
    "waits": "tests/kernels/test_triton_waits.py",
    "dropout": "tests/kernels/test_triton_dropout.py",
    "graphs": "tests/kernels/test_graphs.py",
}
# The chosen cases of the first command: every kernel, every flag, edges of tiles, the numbers that fail first.
CHOSEN = {
    "attention": "(matches_reference and not float32 and (tile-edges-causal or heads3 or long-causal or wide-long"
    " or cross-causal or peaked or everything or time-cross or packs-and-long or packs-options or shared-heads))"
    " or every_level or changed or that_change or log_sum_exp or long_sequences or turned",
    "nt_xent": "(matches_reference and not float32 and (65-64 or 20-300)) or small_prob or near_zero or chunks_match",
    "row_sparse": "same or refuse or matches or popular",
    "waits": "everything or contrastive or later or captured",
}


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: also of its log.
        part: "first" or "second".
        limit_s: after which it is ended.
        command: what runs; a function that makes it from the session.
        cases: test files and what is chosen of them: what they compile is counted, and compiled on all cores.
        flop: of all products that are timed, ours and the rivals'.
        fixed_s: everything else: start, rounds of a fixed length, other compilers.
    """

    name: str
    part: str
    limit_s: int
    command: Callable[[Session], list[str]]
    cases: dict[str, str] = field(default_factory=dict)
    flop: float = 0.0
    fixed_s: float = START_S


class Session:
    """The folder of results, and what runs in it."""

    def __init__(self, output: Path) -> None:
        self.output, self.python = output.resolve(), sys.executable
        self.logs = self.output / "logs"
        self.has_device = self._ask("import torch; print(torch.cuda.is_available())") == "True"
        self.slowness = 1 if self.has_device else REHEARSAL
        self.lines: list[str] = []
        self.failures: list[str] = []

    def _ask(self, code: str) -> str:
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else ""

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        found["TRITON_CACHE_DIR"] = str(BUILD / "triton")
        found.pop("TRITON_INTERPRET", None)
        found.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores
        if not self.has_device:
            found["TRITON_INTERPRET"] = "1"
        return found

    def pytest(self, *arguments: str, workers: int = 0, seconds_per_test: int = 90) -> list[str]:
        """Warnings do not fail a test here: they differ from version to version, and time is short."""
        plugins = ["-p", "support.session_plugin", "-p", "no:cacheprovider", "-W", "default"]
        record = ["--record", str(self.output / "tests.jsonl"), "--seconds-per-test", str(seconds_per_test)]
        has_workers = workers > 1 and importlib.util.find_spec("xdist") is not None
        parallel = ["-n", str(workers), "--dist", "worksteal"] if has_workers else []
        return [self.python, "-m", "pytest", "-q", "--tb=short", *plugins, *record, *parallel, *arguments]

    def tests(self, chosen: dict[str, str], *arguments: str, workers: int = CORES) -> list[str]:
        """Cases of one or several files."""
        selected = ["-k", selection(chosen)]
        marks = [] if "-m" in arguments else ["-m", "not slow" if self.has_device else "not gpu and not slow"]
        return self.pytest(*(FILES[name] for name in chosen), *marks, *selected, *arguments, workers=workers)

    def bench(self, *arguments: str) -> list[str]:
        return self.pytest("--results", str(self.output / "results"), *arguments, seconds_per_test=150)

    def run(self, step: Step, left_s: float) -> None:
        """Ends with the step's own lines on the screen and its results on disk, whatever happens in it."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log, start = self.logs / f"{step.name}.log", time.monotonic()
        limit_s = min(step.limit_s * self.slowness, left_s)
        print(f"\n== {step.name} (at most {limit_s:.0f} s)", flush=True)
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                step.command(self),
                cwd=ROOT,
                env=self.environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = "time-out"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.monotonic() - start
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(text[-15:]), flush=True)
        outcome = "ok" if code == 0 else f"FAILED ({code})"
        if code != 0:
            self.failures.append(step.name)
        told = next((line for line in reversed(text) if re.search(r"\d+ (passed|failed|skipped|error)", line)), "")
        self.lines.append(f"{step.name:18} {outcome:18} {seconds:6.1f} s  {told.strip('= ')}")
        self.write()

    def write(self) -> None:
        """Summary, figures and one archive of logs, each whole at any time."""
        figures, results = self.figures()
        _write(self.output / "summary.txt", "\n".join(self.summary(figures)) + "\n")
        _write(self.output / "results.json", json.dumps(results, indent=1) + "\n")
        unfinished = self.output / "logs.part"
        with tarfile.open(unfinished, "w:gz") as archive:
            archive.add(self.logs, "logs")
            for name in ("tests.jsonl", "results"):
                if (self.output / name).exists():
                    archive.add(self.output / name, name)
        unfinished.replace(self.output / "logs.tar.gz")

    def figures(self) -> tuple[list[str], dict[str, Any]]:
        """A line for each benchmark, and everything that was measured."""
        lines, everything = [], {}
        for path in sorted((self.output / "results").glob("*/*.json")):
            stored = json.loads(path.read_text(encoding="utf-8"))
            everything[f"{path.parent.name}/{path.name}"] = stored
            for case in stored["cases"].values():
                ours, peak = case["timings"].get("ubp_fast"), case["facts"].get("matmul_peak_tflops")
                if ours is None:
                    continue
                rate = (
                    f" {ours['tflops']:5.0f} TFLOP/s {ours['tflops'] / peak:4.0%}" if "tflops" in ours and peak else ""
                )
                rivals = ", ".join(f"{item['ratio']:.2f}x {item['rival']}" for item in case["ratios"])
                lines.append(f"{case['figure'].removesuffix(' f+b')}: {ours['median_ms']:.3f} ms{rate}; {rivals}")
        return lines, everything

    def summary(self, figures: list[str]) -> list[str]:
        """At most forty lines."""
        outcomes: Counter[str] = Counter()
        failed = []
        path = self.output / "tests.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            test = json.loads(line)
            outcomes[test["outcome"]] += 1
            if test["outcome"] == "failed":
                failed.append(test["test"])
        head = [f"device: {'yes' if self.has_device else 'none, a rehearsal'}; tests: {dict(outcomes)}", *self.lines]
        room = 40 - len(head)
        shown = [f"FAILED {name}" for name in failed[: max(3, room // 3)]]
        if len(failed) > len(shown):
            shown.append(f"... and {len(failed) - len(shown)} more failures in logs.tar.gz")
        left = max(0, room - len(shown))
        cut = (
            figures
            if len(figures) <= left
            else [*figures[: left - 1], f"... and {len(figures) - left + 1} more figures"]
        )
        return [*head, *shown, *(cut if left else [])]


def selection(chosen: dict[str, str]) -> str:
    """An expression of pytest for some cases of some files, each with its own."""
    parts = [f"({Path(FILES[name]).stem} and ({text or 'test'}))" for name, text in chosen.items()]
    return " or ".join(parts)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def build_command(session: Session) -> list[str]:
    return [session.python, str(Path(__file__)), "--build"]


def build() -> int:
    """The compiled module into src/ubp_fast, by CMake alone: no pip, no virtual environment, no index."""
    pybind = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    if pybind.returncode:
        print(f"pybind11 is missing: {pybind.stderr}")
        return 1
    cmake = shutil.which("cmake") or str(Path(sysconfig.get_path("scripts")) / "cmake")
    options = [f"-Dpybind11_DIR={pybind.stdout.strip()}", f"-DPython_EXECUTABLE={sys.executable}"]
    options += ["-DCMAKE_BUILD_TYPE=Release", "-GNinja"] if shutil.which("ninja") else ["-DCMAKE_BUILD_TYPE=Release"]
    folder = BUILD / "cmake"
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *options],
        [cmake, "--build", str(folder), f"-j{CORES}"],
    ):
        print(" ".join(command), flush=True)
        if code := subprocess.run(command).returncode:
            return code
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for made in folder.glob(f"_core*{suffix}"):
        shutil.copy2(made, ROOT / "src" / "ubp_fast" / made.name)
        print(f"built {made.name}", flush=True)
    return 0


def smoke() -> int:
    """Every kernel forward and backward against its reference; one that fails is named."""
    import torch
    from support.closeness import assert_matches_reference

    from ubp_fast.kernels import check_deferred, flash_attention, nt_xent, row_sparse

    is_device = torch.cuda.is_available()
    device = torch.device("cuda" if is_device else "cpu")
    dtype = torch.bfloat16 if is_device else torch.float16  # the interpreter is wrong about bfloat16
    if is_device:
        print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
    torch.manual_seed(0)
    offsets = torch.tensor([0, 4, 4, 37, 60], device=device, dtype=torch.int32)
    stamps = torch.randint(0, 10**6, (60,), device=device)
    rows = torch.randn(60, 2, 32, device=device, dtype=dtype)
    bias = torch.randn(2, 20, device=device)
    sides = [torch.randn(70, 48, device=device, dtype=dtype) for _ in range(2)]

    def attention(backend: str, kind: torch.dtype, key_heads: int = 2, **options: Any) -> list[torch.Tensor]:
        leaves = [rows[:, :heads].to(kind, copy=True).requires_grad_() for heads in (2, key_heads, key_heads)]
        output, lse = flash_attention(*leaves, offsets, backend=backend, return_lse=True, **options)
        upstream = (rows.flip(0).to(kind), torch.ones_like(lse))
        return [output.detach(), lse.detach(), *torch.autograd.grad((output, lse), leaves, upstream)]

    def contrastive(backend: str, kind: torch.dtype, negatives: str) -> list[torch.Tensor]:
        leaves = [side.to(kind, copy=True).requires_grad_() for side in sides]
        loss = nt_xent(*leaves, negatives=negatives, backend=backend) * 70
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def table(backend: str, kind: torch.dtype, rule: row_sparse.ScheduleFree | row_sparse.Adam) -> list[torch.Tensor]:
        kind = torch.promote_types(kind, torch.float32)
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(40, 16, generator=generator).to(device, kind)
        history = torch.ones(2, dtype=torch.float64, device=device)
        step = row_sparse.ScheduleFreeStep(0.01, 0.1, 0.05, 0.1, True)
        if isinstance(rule, row_sparse.Adam):
            history, step = history[:, None].expand(2, 3).contiguous(), row_sparse.AdamStep(0.01, 1.5, 0.99)
        facts = row_sparse.RowTable(
            weight=weight,
            state=torch.zeros(40, 2, 16, dtype=kind, device=device),
            slot=torch.full((40,), -1, dtype=torch.int32, device=device),
            used=torch.zeros(1, dtype=torch.int64, device=device),
            last_step=torch.full((40,), -1, dtype=torch.int32, device=device),
            history=history[:1],
        )
        ids = torch.randint(0, 40, (25,), generator=generator).to(device)
        gradient = torch.randn(25, 16, generator=generator).to(device, kind)
        distinct, sums, count = row_sparse.reduce_padded(ids, gradient, backend=backend)
        row_sparse.update(facts, rule, distinct, sums, step, count=count, backend=backend)
        facts = facts._replace(history=0.9 * history)
        return [sums, facts.weight, row_sparse.gather(facts, rule, ids, backend=backend)]

    timed = {"time_bias": bias, "timestamp_s": stamps}
    calls: dict[str, tuple[Callable[..., list[torch.Tensor]], dict[str, Any]]] = {
        "flash_attention": (attention, {}),
        "flash_attention causal": (attention, {"causal": True}),
        "flash_attention window, time_bias": (attention, {"window": 9, **timed}),
        "flash_attention, one head of keys": (attention, {"key_heads": 1}),
        "flash_attention dropout": (attention, {"dropout_p": 0.2, "seed": 5}),
        "nt_xent cross": (contrastive, {"negatives": "cross"}),
        "nt_xent simclr": (contrastive, {"negatives": "simclr"}),
        "row_sparse schedule-free": (table, {"rule": row_sparse.ScheduleFree(0.999, 1e-8)}),
        "row_sparse adam": (table, {"rule": row_sparse.Adam(0.9, 0.999, 1e-8)}),
    }
    failures = 0
    for name, (call, options) in calls.items():
        plain, truth = (call("reference", kind, **options) for kind in (dtype, torch.float64))
        try:
            found = call("triton", dtype, **options)
            check_deferred()
            for place, parts in enumerate(zip(found, plain, truth, strict=True)):
                assert_matches_reference(*parts, name, f"result {place}")
            print(f"ok     {name}", flush=True)
        except Exception as error:  # every other kernel is still to be tried, whatever this one raised
            failures += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    return int(failures > 0)


def _own(flag: str) -> Callable[[Session], list[str]]:
    return lambda session: [session.python, str(Path(__file__)), flag]


def _profile(session: Session) -> list[str]:
    ncu = shutil.which("ncu") or next(map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu")), "ncu")
    kernels = "regex:forward_kernel|dq_kernel|dkv_kernel|statistics_kernel|gradient_kernel"
    kernels += "|backward_kernel|update_kernel|gather_kernel|reduce_kernel"
    options = ["--clock-control", "none", "--set", "basic", "--kernel-name", kernels, "--launch-count", "24"]
    if not session.has_device or not (shutil.which(ncu) or Path(ncu).exists()):
        return [session.python, "-c", "print('skipped: ncu needs a device and the profiler')"]
    return [ncu, *options, session.python, str(Path(__file__)), "--smoke"]


def _tune(session: Session) -> list[str]:
    return [session.python, str(ROOT / "benchmarks" / "tune_tiles.py"), "--tune", "--output", str(session.output)]


def _tests(chosen: dict[str, str], *arguments: str, workers: int = CORES) -> Callable[[Session], list[str]]:
    return lambda session: session.tests(chosen, *arguments, workers=workers)


def _bench(*arguments: str) -> Callable[[Session], list[str]]:
    return lambda session: session.bench(*arguments)


ATTENTION, CONTRASTIVE = "benchmarks/bench_flash_attention_gpu.py", "benchmarks/bench_nt_xent_gpu.py"
TRAINING = "benchmarks/bench_training_gpu.py"
MOST_DENSE = "dense and causal and (512 or 2048 or 8192)"
REST = {"row_sparse": "", "waits": "", "dropout": "", "graphs": ""}
REST_DENSE = "dense and not (causal and (512 or 2048 or 8192))"


def _dense_flop(lengths: tuple[int, ...], forms: int) -> float:
    """Of one call of each, ours once and two rivals once, widths 64 and 128; see `bench_dense_gpu`."""
    return sum(14 * 16384 * length * 16 * (64 + 128) * 3 * forms for length in lengths)


def _serial(count: int) -> float:
    """Seconds for kernels that one process compiles."""
    return count * COMPILE_S


# Rounds last one second (nt_xent: three, training: two) for each case; the rest of `fixed_s` is inputs and what the
# rivals' own compilers take.
STEPS = (
    Step("build", "first", 150, build_command, fixed_s=60),
    Step("smoke", "first", 90, _own("--smoke"), fixed_s=START_S + _serial(20)),
    Step(
        "bench-packed",
        "first",
        110,
        _bench(ATTENTION, "-k", "packed"),
        fixed_s=START_S + _serial(26) + 9 * 2,
    ),
    Step(
        "bench-contrastive",
        "first",
        130,
        _bench(CONTRASTIVE, "-k", "not million"),
        flop=72 * 6 * 65536**2 * 512,  # about a dozen calls of each of six
        fixed_s=START_S + _serial(15) + 6 * 3 + 6 * 6,
    ),
    Step("bench-rows", "first", 70, _bench(TRAINING), fixed_s=START_S + _serial(12) + 4 * 4),
    Step(
        "bench-dense",
        "first",
        90,
        _bench(ATTENTION, "-k", MOST_DENSE),
        flop=20 * _dense_flop((512, 2048, 8192), 1),
        fixed_s=START_S + _serial(12) + 12 * 1.5,
    ),
    Step("test-chosen", "first", 120, _tests(CHOSEN), CHOSEN, fixed_s=START_S + 12),
    Step("test-attention", "second", 120, _tests({"attention": ""}), {"attention": ""}, fixed_s=START_S + 8),
    Step("test-contrastive", "second", 150, _tests({"nt_xent": ""}), {"nt_xent": ""}, fixed_s=START_S + 8),
    Step("test-rest", "first", 90, _tests(REST), REST, fixed_s=START_S + 8),
    Step(
        "test-large",
        "first",
        75,
        _tests({"attention": "beyond", "nt_xent": "beyond"}, "--slow", "-m", "gpu and slow", workers=1),
        fixed_s=START_S + _serial(8) + 12,
    ),
    Step("tune", "second", 100, _tune, {"tune": ""}, fixed_s=START_S + 21),
    Step(
        "bench-million",
        "second",
        75,
        _bench(CONTRASTIVE, "-k", "million"),
        flop=6 * 2**40 * 512,
        fixed_s=START_S + _serial(5),
    ),
    Step("profile", "second", 60, _profile, fixed_s=20),
    Step(
        "bench-rest",
        "second",
        150,
        _bench(ATTENTION, "-k", REST_DENSE),
        flop=20 * _dense_flop((128, 1024, 4096, 16384), 2),
        fixed_s=START_S + _serial(60) + 48,
    ),
)
UNPLANNED = ("bench-rest",)  # runs in what time is left


def expected_s(step: Step, compilations: dict[str, int]) -> float:
    """Seconds on a GPU machine of sixteen cores: compilations over the cores, FLOP over the rate, and the rest."""
    counted = sum(count for place, count in compilations.items() if place.startswith(f"{step.name}/"))
    return _serial(counted) / 16 + step.flop / RATE + step.fixed_s


def counted_compilations(session: Session) -> dict[str, int]:
    """Kernels that each step compiles on a device; its cases are collected here, not run."""
    jobs = {}
    for step in STEPS:
        for name, text in step.cases.items():
            command = _tune(session)
            if name in FILES:
                chosen = ["-m", "not slow", "-k", selection({name: text})]
                command = session.pytest("--collect-only", FILES[name], *chosen)
            environment = {**session.environment(), "UBP_PLAN": "1", "CUDA_VISIBLE_DEVICES": ""}
            jobs[step.name, name] = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
    found = {}
    for (step_name, name), job in jobs.items():
        said, _ = job.communicate()
        if name == "tune":
            found[f"{step_name}/{name}"] = int(re.findall(r"(\d+) candidates", said)[-1])
            continue
        cases = [line for line in said.splitlines() if "::" in line]
        if not cases:
            print(f"{step_name}: no cases of {FILES[name]} were collected\n{said}")
        kinds = {_code(case) for case in cases}
        found[f"{step_name}/{name}"] = sum(1 if ONE_KERNEL.search(kind) else KERNELS_OF_A_CASE[name] for kind in kinds)
    return found


def _code(case: str) -> str:
    """A case's name without what decides nothing of its code: rows, temperature and form in the grid of nt_xent, times,
    seeds, who wants gradients.

    (The form decides which gradients there are; KERNELS_OF_A_CASE counts all of them.)
    """
    same = "every_kind_of_tile_finds_its_buckets|dropout_mask_is_that_of_the_reference|only_some_inputs_want_gradients"
    case = re.sub(rf"(::test_(?:{same}))\[.*", r"\1", case)
    return re.sub(r"(test_triton_nt_xent.py::test_matches_reference)\[\d+-(\d+)-[\d.]+-\w+-", r"\1[\2-", case)


def plan(session: Session) -> list[str]:
    """A line per step and the sums of both commands."""
    compilations, lines = counted_compilations(session), []
    sums: Counter[str] = Counter()
    for step in STEPS:
        seconds = expected_s(step, compilations)
        counted = sum(count for place, count in compilations.items() if place.startswith(f"{step.name}/"))
        is_planned = step.name not in UNPLANNED
        sums[step.part] += round(seconds) if is_planned else 0
        note = f"; {counted} compilations at most" if counted else ""
        note += "" if is_planned else "; in what time is left"
        lines.append(f"{step.part:7} {step.name:18} expected {seconds:4.0f} s, ended after {step.limit_s:3} s{note}")
    return lines + [f"{part} command: {seconds} s expected" for part, seconds in sums.items()]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--build"]:
        return build()
    if arguments[:1] == ["--smoke"]:
        return smoke()
    if len(arguments) < 2:
        print(f"usage: gpu_session.sh OUTPUT_FOLDER first|second|plan|STEP...; steps: {[step.name for step in STEPS]}")
        return 2
    names = {step.name for step in STEPS}
    unknown = [name for name in arguments[1:] if name not in names | {"first", "second", "plan"}]
    if unknown:
        print(f"unknown steps {unknown}; there are {sorted(names)}, first, second and plan")
        return 2
    session = Session(Path(arguments[0]))
    if "plan" in arguments[1:]:
        print("\n".join(plan(session)))
        return 0
    session.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for step in STEPS:
        if step.name not in arguments[1:] and step.part not in arguments[1:]:
            continue
        # Whoever lends the machine ends a command after ten minutes, and what is not on disk by then is lost.
        left = COMMAND_S * session.slowness - (time.monotonic() - began)
        if left < (60 if step.name in UNPLANNED else LEAST_S):
            session.lines.append(f"{step.name:18} not run: {left:.0f} s were left")
            if step.name not in UNPLANNED:
                session.failures.append(step.name)
            continue
        session.run(step, left)
    session.write()
    print("\n" + (session.output / "summary.txt").read_text(encoding="utf-8"), flush=True)
    return int(bool(session.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
