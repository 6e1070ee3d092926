"""Measures candidates for the tiles of the Triton kernels on the card at hand.

    python benchmarks/tune_tiles.py [--tune] [--output FOLDER]

Prints every candidate that compiles without spills and agrees with the tiles in use. With --tune the best ones, where
they lead by more than 3 %, are written to the operators' `tiles.json` under the card's name; FOLDER gets copies.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ubp_fast.kernels import tiles as tile_table
from ubp_fast.kernels.flash_attention import _triton as attention
from ubp_fast.kernels.flash_attention.reference import UNBOUNDED
from ubp_fast.kernels.flash_attention.reference import Problem as AttentionProblem
from ubp_fast.kernels.nt_xent import _triton as contrastive
from ubp_fast.kernels.nt_xent.reference import Problem as ContrastiveProblem

LEAD, ROUNDS = 1.03, 15
LENGTHS = {24: 16, 48: 32, 96: 40, 160: 128, None: 2048}  # of the table -> of the sequences that are timed
TOKENS, HEADS = 32768, 8
# Beside those of 64 and 128 rows, for long sequences; the fifth number says that rows come through descriptors.
BY_DESCRIPTORS = [(256, 64, 8, 2, 1), (256, 64, 16, 2, 1), (128, 128, 8, 2, 1), (128, 64, 8, 2, 1)]
OF_256_ROWS = {"dq": [(256, 64, 8, 2), (256, 32, 8, 2)], "dkv": [(32, 256, 8, 2)]}


class Place(NamedTuple):
    """An entry that is tuned, and the candidates beside what the table holds."""

    kernel: str
    width: int
    length: int | None
    candidates: tuple[tuple[int | None, ...], ...]


def attention_places() -> Iterator[Place]:
    """Blocks about as long as the sequences, or as several short ones; warps for their size."""
    for kernel, width, length in itertools.product(("short_forward", "short_backward"), (64, 128, 256), (24, 48, 96)):
        packs = itertools.product((32, 64, 128), (2, 4, 8, 16))
        found = [(rows, rows, warps, 1) for rows, warps in packs if 256 <= rows * rows / warps <= 2048]
        yield Place(kernel, width, length, tuple(found))
    for kernel, width, length in itertools.product(("forward", "dq", "dkv"), (64, 128, 256), (160, None)):
        if length == 160 and width > 128:
            continue
        rows = (32, 64, 128) if length == 160 else (64, 128)
        found: list[tuple[int | None, ...]] = [
            tiles
            for tiles in itertools.product(rows, rows, (1, 2, 4, 8), (2, 3) if length is None else (2,))
            if 512 <= tiles[0] * tiles[1] / tiles[2] <= 1024 and max(tiles[:2]) * width <= 128 * 128
        ]
        if length is None and width <= 128:
            found += BY_DESCRIPTORS if kernel == "forward" else OF_256_ROWS[kernel]
        yield Place(kernel, width, length, tuple(found))


def contrastive_places() -> Iterator[Place]:
    """Blocks of 64 and 128 rows, columns in smaller ones."""
    for kernel, width in itertools.product(("statistics", "gradient"), (128, 256, 2048)):
        sizes = itertools.product((64, 128), (32, 64, 128), (8,), (2, 3))
        part = (64, 512 if kernel == "gradient" else 0) if width > 256 else (None, None)
        yield Place(kernel, width, None, tuple((m, n, *part, warps, stages) for m, n, warps, stages in sizes))


def attention_call(place: Place) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One launch of the kernel on sequences of one length, bfloat16; packs are made before."""
    length = LENGTHS[place.length]
    query, key, value, grad = (
        torch.randn(TOKENS, HEADS, place.width, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    offsets = torch.arange(0, TOKENS + 1, length, device="cuda", dtype=torch.int32)
    problem = AttentionProblem(query, key, value, offsets, offsets, UNBOUNDED, UNBOUNDED, place.width**-0.5)
    output, lse = attention.forward(problem)
    if place.kernel in ("forward", "short_forward"):
        return lambda: attention.forward(problem)
    if place.kernel == "short_backward":
        return lambda: attention.backward(problem, output, lse, grad)[:3]  # type: ignore[return-value]
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty_like(part) for part in (query, key, value))
    attention._launch("dq", problem, None, output, lse, grad, delta, dq)

    def call() -> tuple[torch.Tensor, ...]:
        if place.kernel == "dq":
            attention._launch("dq", problem, None, output, lse, grad, delta, dq)
            return (dq,)
        attention._launch("dkv", problem, None, lse, grad, delta, dk, dv)
        return dk, dv

    return call


def contrastive_call(place: Place) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward, or backward, of 8,192 rows, bfloat16."""
    rows = [torch.randn(8192, min(place.width, 512), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    weight, tau = (torch.full(shape, 0.1, device="cuda", dtype=torch.float64) for shape in ((8192,), ()))
    problem = ContrastiveProblem(*rows, None, tau, "cross", *[None] * 7, True)
    losses = contrastive.forward(problem)
    if place.kernel == "statistics":
        return lambda: contrastive.forward(problem)
    return lambda: contrastive.backward(problem, weight, tau, losses, losses)[:2]


OPERATORS: dict[str, tuple[ModuleType, Callable[[], Iterator[Place]], Callable[[Place], Any], str]] = {
    "flash_attention": (attention, attention_places, attention_call, "plain"),
    "nt_xent": (contrastive, contrastive_places, contrastive_call, "half"),
}


@contextmanager
def forced(operator: str, place: Place, candidate: tuple[int | None, ...]) -> Iterator[None]:
    """The operator's kernel `place.kernel` takes this candidate; its other kernels stay."""
    module = OPERATORS[operator][0]
    name = "short_tiles" if place.kernel.startswith("short") else "tiles"
    chosen = getattr(module, name)

    def tiles(kernel: str, *arguments: Any) -> Any:
        if kernel != place.kernel:
            return chosen(kernel, *arguments)
        whole = max(16, 1 << (min(place.width, 512) - 1).bit_length())
        return module.Tiles(*(whole if number is None else number for number in candidate))

    setattr(module, name, tiles)
    try:
        yield
    finally:
        setattr(module, name, chosen)


def compile_one(job: tuple[str, Place, tuple[int | None, ...]]) -> str | None:
    """Compiles a candidate into Triton's cache, or says why it cannot run."""
    operator, place, candidate = job
    try:
        call = OPERATORS[operator][2](place)
        with forced(operator, place, candidate):
            call()
        torch.cuda.synchronize()
    except Exception as error:  # a candidate may be too large for the card in several ways; it is left out by name
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of some rounds, by the device's clock."""
    call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[ROUNDS // 2]


def measure(operator: str, place: Place, runnable: list[tuple[int | None, ...]]) -> tuple[Any, float, float] | None:
    """The best candidate with its time and that of the tiles in use; None where these are the best."""
    _, _, make, _ = OPERATORS[operator]
    call = make(place)
    wanted, today = [part.clone() for part in call()], milliseconds(call)
    best: tuple[tuple[int | None, ...] | None, float] = (None, today)
    for candidate in runnable:
        with forced(operator, place, candidate):
            found = [part.clone() for part in call()]
            pairs = zip(found, wanted, strict=True)
            is_close = all((a.double() - b.double()).norm() <= 0.01 * b.double().norm() for a, b in pairs)
            time = milliseconds(call) if is_close else math.inf
        if time < best[1]:
            best = candidate, time
    print(
        f"{operator} {place.kernel} {place.width} {place.length}: {today:.3f} ms -> {best[1]:.3f} ms {best[0]}",
        flush=True,
    )
    return (best[0], best[1], today) if best[0] is not None and today > LEAD * best[1] else None


def write_row(path: Path, device: str, name: str, row: list[Any]) -> None:
    """Puts [width, length, tiles] into a table, in place of the row for the same device, name, width and length."""
    table = json.loads(path.read_text(encoding="utf-8"))
    others = [other for other in table.setdefault(device, {}).get(name, []) if other[:2] != row[:2]]
    table[device][name] = sorted([*others, row], key=lambda row: (row[0], math.inf if row[1] is None else row[1]))
    parts = []
    for card in sorted(table):
        lines = [f"  {json.dumps(name)}: {json.dumps(table[card][name])}" for name in sorted(table[card])]
        parts.append(f" {json.dumps(card)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    tile_table.rows.cache_clear()


def main() -> int:
    parser = argparse.ArgumentParser(description="Tunes the tiles of the Triton kernels.")
    parser.add_argument("--tune", action="store_true", help="write what leads to the operators' tiles.json")
    parser.add_argument("--output", type=Path, help="folder for copies of the tables")
    parser.add_argument("--processes", type=int, default=14)
    options = parser.parse_args()
    jobs = [
        (operator, place, candidate)
        for operator, (_, places, _, _) in OPERATORS.items()
        for place in places()
        for candidate in place.candidates
    ]
    if not torch.cuda.is_available():
        print(f"skipped: tuning needs a CUDA device; {len(jobs)} candidates")
        return 0
    name = torch.cuda.get_device_name()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        reasons = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    print(f"{sum(reason is None for reason in reasons.values())} of {len(jobs)} candidates run", flush=True)
    for operator, (module, places, _, kind) in OPERATORS.items():
        for place in places():
            runnable = [job[2] for job, reason in reasons.items() if job[:2] == (operator, place) and reason is None]
            found = measure(operator, place, runnable)
            if found is not None and options.tune:
                row = [place.width, place.length, list(found[0])]
                # What is timed begins at multiples of 16 bytes, and forward looks for tiles of such rows first.
                of_row = "aligned" if place.kernel == "forward" else kind
                write_row(module.TABLE, name, f"{place.kernel} {of_row}", row)
        if options.output is not None:
            shutil.copy2(module.TABLE, options.output / f"tiles-{operator}.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
