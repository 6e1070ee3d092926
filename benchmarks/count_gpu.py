"""What the Triton kernels cost a GPU, counted: products, bytes, launches, and what the compiler makes of them.

    python benchmarks/count_gpu.py

Prints the tables of docs/gpu_model.md. Nothing is measured and no device is needed: bytes and products follow from
shapes and tiles, registers and shared memory are those that ptxas reports. A measured time should lie between "at
best", where copies and products overlap completely at their peaks, and "apart", where nothing hides anything and the
tensor cores reach half of their peak; what is slower than that is a fault to look for.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from reference_pytorch.multitask_step import PaddedMultitask, pad_views, random_batch
from reference_pytorch.padded import random_lengths, without_initialisation
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_steps import FEATURES, OUTPUTS, in_precision, sizes_of

from ubp_fast.kernels import tiles as tile_table
from ubp_fast.kernels.flash_attention import _triton as attention
from ubp_fast.kernels.flash_attention.reference import time_buckets
from ubp_fast.kernels.nt_xent import _triton as contrastive
from ubp_fast.kernels.row_sparse import _triton as row_sparse
from ubp_fast.models.multitask import MultitaskConfig, MultitaskModel

ITEM = 2  # bytes of a 16-bit number
SM_90 = ("sm_90",)
# Tensors [T, H, D] that a kernel of attention reads or writes, numbers per row (lse and delta), and its products.
TENSORS = {"short_forward": 4, "short_backward": 8, "forward": 4, "dq": 6, "dkv": 6}
NUMBERS = {"short_forward": 1, "short_backward": 1, "forward": 1, "dq": 2, "dkv": 2}
PRODUCTS = {"short_forward": 2, "short_backward": 5, "forward": 2, "dq": 3, "dkv": 4}
# Bytes and instructions for each pair of a pack with a time_bias: its bucket, the number that belongs to it; in
# backward also its place in the order of the buckets, to change places and to add up (ptxas, sm_90).
PAIRS = {"short_forward": (1, 4), "short_backward": (3, 13)}
# Without packs: instructions of a thread for a tile, (per pair, others), read from what ptxas makes for sm_90. In every
# kernel which buckets there may be, and then for one bucket, each further one of few, or any number of them; in "dq"
# sums as well, with many buckets a round for each that the tile has.
SPAN, ONE, FURTHER, MANY = (0, 60), (0, 8), (3, 15), (15, 0)
SUM_OF_ONE, SUM_OF_FURTHER, SUMS_OF_MANY, ROUND = (2, 25), (4, 37), (17, 40), (3, 38)
FEW_BUCKETS, FAR_S = 5, 2**30  # as in the kernels


# Operations that launch nothing: they make room, look at memory in another way, or happen on the host.
LAUNCH_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach"}
LAUNCH_NOTHING |= {"alias", "lift_fresh", "_local_scalar_dense", "randint"}


class Device(NamedTuple):
    """Peaks of a device, and what a multiprocessor holds: an H100 SXM, of whose L2 cache no data sheet speaks."""

    flop_per_s: float = 989e12  # bfloat16, dense
    bytes_per_s: float = 3.35e12
    l2_bytes_per_s: float = 5.5e12
    instructions_per_s: float = 132 * 128 * 1.755e9  # of single lanes
    registers: int = 65_536
    shared_bytes: int = 233_472
    warps: int = 64


class Work(NamedTuple):
    """What launches of one kernel do.

    Attributes:
        flop: of the products that are computed, masked places included.
        bytes: from and to memory, each tensor once per launch.
        tile_bytes: what tiles load and store, most of it again and again, from the L2 cache.
        launches: kernels launched.
        instructions: of single lanes for the buckets of a time_bias; others are not counted.
    """

    flop: float
    bytes: float
    tile_bytes: float
    launches: int = 1
    instructions: float = 0.0

    def at_half(self, device: Device) -> float:
        """Seconds where the tensor cores reach half of their peak and hide copies, or are hidden by them."""
        copies = max(self.bytes / device.bytes_per_s, self.tile_bytes / device.l2_bytes_per_s)
        return max(2 * self.flop / device.flop_per_s, copies)

    def seconds(self, device: Device) -> tuple[float, float]:
        """At best, and apart."""
        products, copies = self.flop / device.flop_per_s, self.bytes / device.bytes_per_s
        copies = max(copies, self.tile_bytes / device.l2_bytes_per_s)
        sums = self.instructions / device.instructions_per_s
        return max(products, copies, sums), 2 * products + copies + sums


def total(parts: Iterable[Work]) -> Work:
    """Of several kernels, one after the other."""
    flop, moved, loaded, launches, instructions = (sum(numbers) for numbers in zip(*parts, strict=True))
    return Work(flop, moved, loaded, int(launches), instructions)


def packs_of(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Lengths of the sequences that share a tile, as the kernels choose them; longer ones are in none."""
    found: list[list[int]] = []
    for first in range(0, len(lengths), attention.GROUP):
        open_pack: list[int] = []
        for length in lengths[first : first + attention.GROUP]:
            if sum(open_pack) + length > block:
                found, open_pack = [*found, open_pack], []
            if length <= block:
                open_pack.append(length)
        found.append(open_pack)
    return [pack for pack in found if pack]


def attention_work(lengths: Sequence[int], heads: int, width: int, kind: str = "plain") -> dict[str, Work]:
    """Each kernel of forward and backward, self attention without a mask, 16 bits, on a device like sm_90.

    "options": with a time_bias, of 64 buckets and the times of a history.
    """
    mean, rows = sum(lengths) / len(lengths), sum(lengths)
    found: dict[str, Work] = {}
    for short, longs in (("short_forward", ("forward",)), ("short_backward", ("dq", "dkv"))):
        chosen = tile_table.find(attention.TABLE, SM_90, short, kind, width, mean)
        block = 0 if chosen is None else chosen[0]
        packs = packs_of(lengths, block) if block else []
        long = [length for length in lengths if length > block]
        if block:
            packed = sum(map(sum, packs))
            moved = heads * packed * (TENSORS[short] * width * ITEM + 4 * NUMBERS[short]) + 4 * packed
            places = heads * len(packs) * block**2
            of_pairs, instructions = PAIRS[short] if kind == "options" else (0, 0)
            loaded = moved + places * of_pairs
            moved += places / heads * of_pairs
            found[short] = Work(places * PRODUCTS[short] * 2 * width, moved, loaded, 1, places * instructions)
        if rows > block:  # launched wherever shapes do not rule long ones out
            for name in longs:
                m, n, warps = long_tiles(name, width, max(mean, block + 1), kind)
                each = 0.0
                if kind == "options" and long:
                    each = instructions_of_pair(long, m, n, warps, name == "dq")
                work = long_work(name, long, heads, width, m, n)
                found[name] = work._replace(instructions=each * work.instructions)
    return found


def long_work(kernel: str, lengths: Sequence[int], heads: int, width: int, m: int, n: int) -> Work:
    """One kernel without packs, in tiles of m queries and n keys; its instructions are the pairs of all tiles."""
    places = heads * sum(math.ceil(length / m) * m * math.ceil(length / n) * n for length in lengths)
    moved = heads * sum(lengths) * (TENSORS[kernel] * width * ITEM + 4 * NUMBERS[kernel])
    own = n if kernel == "dkv" else m  # rows that a tile keeps, while two tensors of the others pass by
    passing = places / own * 2 * width * ITEM
    return Work(PRODUCTS[kernel] * 2 * places * width, moved, moved + passing, 1, places)


def long_tiles(kernel: str, width: int, mean_length: float, kind: str) -> tuple[int, int, int]:
    """Queries, keys and warps of a tile without packs: of a time_bias alone, or of rows that a descriptor can cover."""
    special = "timed" if kind == "options" else "aligned"
    found = tile_table.find(attention.TABLE, SM_90, kernel, special, width, mean_length)
    m, n, warps, *_ = found or tile_table.choose(attention.TABLE, SM_90, kernel, "plain", width, mean_length)
    return m, n, warps


def instructions_of_pair(
    lengths: Sequence[int], m: int, n: int, warps: int, has_sums: bool, sequences: int = 12
) -> float:
    """Instructions for the time_bias of a pair in tiles of m x n, on average over some of these sequences.

    Three of four events follow the one before after a minute, the others after two days, at random.
    """
    generator = torch.Generator().manual_seed(0)
    of_thread, of_tiles, tiles = m * n / (32 * warps), 0.0, 0

    def number(parts: Iterable[tuple[float, tuple[int, int]]]) -> float:
        return sum(times * (of_pair * of_thread + others) for times, (of_pair, others) in parts)

    for length in lengths[:: -(-len(lengths) // sequences)]:
        is_same_visit = torch.rand(length, generator=generator) < 0.75
        soon = torch.empty(length).exponential_(1 / 60, generator=generator)
        late = 172_800 * torch.randn(length, generator=generator).mul(1.2).exp()
        times = torch.where(is_same_visit, soon, late).double().cumsum(0).long()
        gap = (times[:, None] - times[None, :]).abs()
        bucket = time_buckets(gap, 64)
        for row, column in itertools.product(range(0, length, m), range(0, length, n)):
            tile = bucket[row : row + m, column : column + n]
            further, has = int(tile.max() - tile.min()), len(tile.unique())
            is_far = int(gap[row : row + m, column : column + n].max()) >= FAR_S
            if is_far or further >= FEW_BUCKETS:
                parts, sums = [(1.0, MANY)], [(1.0, SUMS_OF_MANY), (has, ROUND)]
            else:
                # Where there are two and more, a copy of the scores and the times in their places, once.
                parts = [(1.0, ONE), (further, FURTHER), (further > 0, (2, 50))]
                sums = [(1.0, SUM_OF_ONE), (further, SUM_OF_FURTHER)]
            of_tiles += number([(1.0, SPAN), *parts, *(sums if has_sums else [])])
            tiles += 1
    return of_tiles / tiles / of_thread


# Tiles of long sequences that were weighed, those in use first: queries, keys, warps, stages, by descriptors.
LARGE = ((128, 128, 8, 2, 1), (128, 128, 8, 2, 0), (128, 64, 8, 3, 0))
LONG_CANDIDATES = {
    ("forward", 64): ((256, 64, 8, 2, 1), (256, 64, 8, 2, 0), *LARGE),
    ("forward", 128): ((256, 64, 16, 2, 1), (256, 64, 16, 2, 0), *LARGE),
    ("dq", 64): ((256, 64, 8, 2, 0), (128, 128, 8, 2, 0), (128, 64, 8, 2, 0)),
    ("dq", 128): ((256, 32, 8, 2, 0), (128, 128, 8, 2, 0), (128, 64, 8, 2, 0)),
    ("dkv", 64): ((32, 256, 8, 2, 0), (64, 128, 8, 2, 0)),
    ("dkv", 128): ((32, 128, 8, 2, 0),),
}


def turn(assembly: str) -> int:
    """Instructions of a thread for a turn of the loop over tiles, where all rows see all columns.

    Args:
        assembly: what nvdisasm prints. The loop is the shortest that multiplies and has exponentials; of its pieces
            between labels and branches those that mask, comparisons and selections almost alone, are left out.
    """
    lines = re.findall(r"^(?:(\.L_\w+):|\s+/\*[0-9a-f]+\*/\s+(.*?);)", assembly, re.MULTILINE)
    places = {label: at for at, (label, _) in enumerate(lines) if label}
    found = []
    for at, (_, text) in enumerate(lines):
        goal = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)
        if goal is None or places[goal[1]] > at:
            continue
        pieces: list[list[str]] = [[]]
        for label, instruction in lines[places[goal[1]] : at + 1]:
            if instruction:
                pieces[-1].append(re.sub(r"^@\S+\s+", "", instruction).split(".")[0].split()[0])
            if label or pieces[-1][-1:] == ["BRA"]:
                pieces.append([])
        every = [name for piece in pieces for name in piece]
        masking = [
            piece
            for piece in pieces
            if len(piece) > 40 and sum(name in ("FSEL", "ISETP") for name in piece) > 0.7 * len(piece)
        ]
        if "HGMMA" in every and every.count("MUFU") >= 8:
            found.append(len(every) - sum(map(len, masking)))
    return min(found)


def order_of_long_pairs(length: int, heads: int, layers: int, device: Device) -> tuple[float, float]:
    """Seconds for the sums of a time_bias in "dq" of 32,768 rows, D=64: as they are, and by an order of pairs in tiles.

    Apart, products left out. The order, as packs have it: per pair a bucket and a place to load, 13 instructions, and
    what it costs to make once per batch, 21 bytes. Tiles become those without a time_bias.
    """
    lengths = [length] * (32_768 // length)
    m, n, warps = long_tiles("dq", 64, length, "options")
    own = long_work("dq", lengths, heads, 64, m, n)
    each = instructions_of_pair(lengths, m, n, warps, True)
    now = own.tile_bytes / device.l2_bytes_per_s + each * own.instructions / device.instructions_per_s
    m, n, _ = long_tiles("dq", 64, length, "plain")
    other = long_work("dq", lengths, heads, 64, m, n)
    of_pairs, instructions = PAIRS["short_backward"]
    by_order = (other.tile_bytes + of_pairs * other.instructions) / device.l2_bytes_per_s
    by_order += instructions * other.instructions / device.instructions_per_s
    once = 21 * other.instructions / heads / device.bytes_per_s
    return layers * now, layers * by_order + once


def five_products(lengths: Sequence[int], heads: int, width: int) -> Work:
    """What "dq" and "dkv" do, by one kernel in the tiles of "dkv": it computes scores once and passes dq on.

    Each tile of keys reads and writes the float32 dq of all queries that see it, one after the other: so sums keep
    their order, and the same bits come out of every run. Beside a fifth product registers hold no more than 128 keys.
    """
    rows = sum(lengths)
    m, n, _ = long_tiles("dkv", width, 384, "plain")
    places = sum(math.ceil(length / m) * m * math.ceil(length / n) * n for length in lengths)
    moved = heads * rows * (8 * width * ITEM + 4 * width + 4 * 2)
    passing = heads * places / n * (2 * width * ITEM + 2 * 4 * width)
    return Work(heads * 5 * 2 * places * width, moved, moved + passing)


def attention_least(lengths: Sequence[int], heads: int, width: int) -> Work:
    """Seven products of real pairs; every tensor read or written once by forward and once by backward."""
    pairs, rows = sum(length**2 for length in lengths), sum(lengths)
    moved = heads * rows * (12 * width * ITEM + 8)
    return Work(heads * 7 * 2 * pairs * width, moved, moved, 2)


def nt_xent_work(rows: int, width: int) -> dict[str, Work]:
    """Forward and backward of `rows` pairs, "cross", 16 bits: in chunks where the backend would take them."""
    product, matrix, pairs = 2.0 * rows * rows * width, rows * width * ITEM, float(rows) ** 2
    around = {"prepare": Work(0, 8 * matrix, 8 * matrix, 2), "finish": Work(0, 8 * matrix, 8 * matrix)}
    least_width, least_pairs = contrastive.LEAST_CHUNKED
    if width >= least_width and pairs >= least_pairs:
        high, wide = contrastive.CHUNK
        chunks = math.ceil(rows / high) * math.ceil(rows / wide)
        sides = chunks * (high + wide) * width  # elements of both sides of all chunks
        # Similarities are float32, pulls 16 bits for each side, gradients float32 that are read and written again.
        return around | {
            "products": Work(product, sides * ITEM, sides * ITEM + 4 * pairs, chunks),
            "statistics": Work(0, 0, 4 * pairs, chunks),
            "products again": Work(product, sides * ITEM, sides * ITEM + 4 * pairs, chunks),
            "pull": Work(0, 0, (4 + 2 * ITEM) * pairs, chunks),
            "sums": Work(2 * product, sides * (ITEM + 16), sides * (ITEM + 16) + 2 * ITEM * pairs, 4 * chunks),
        }
    statistics, gradient = (
        contrastive.tiles(kernel, torch.bfloat16, width, SM_90) for kernel in ("statistics", "gradient")
    )
    again = math.ceil(width / gradient.block_e)  # similarities, for each part of the elements

    def passing(tiles: contrastive.Tiles) -> float:
        """Rows that all tiles of similarities load: those of the columns, and their own where they do not fit whole."""
        loaded = tiles.block_n + (0 if tiles.block_k >= width else tiles.block_m)
        return product / (tiles.block_m * tiles.block_n) * loaded * ITEM / 2

    # The columns once more for the sum, where the tile does not have them whole.
    of_sum = 0.0 if gradient.block_k >= width else product / gradient.block_m * ITEM / 2
    return around | {
        "statistics": Work(product, 2 * matrix, passing(statistics)),
        "gradient": Work(
            2 * (1 + again) * product, 2 * (2 + again + 1) * matrix, 2 * (again * passing(gradient) + of_sum), 2
        ),
    }


def nt_xent_bytes(rows: int, width: int) -> int:
    """Memory of forward and backward in chunks, inputs included: 16 bits, and float32 sums of gradients.

    Inputs, their copy in one matrix, what adds up the gradients, the gradients; a chunk of similarities in float32 and
    its pulls for both sides, and what they give one side. Numbers of a row are not counted.
    """
    high, wide = contrastive.CHUNK
    return 2 * rows * width * (ITEM + ITEM + 4 + ITEM) + high * wide * (4 + 2 * ITEM) + 4 * max(high, wide) * width


def row_sparse_work(entries: int, distinct: int, width: int, is_adam: bool) -> dict[str, Work]:
    """Lookup, sums of equal ids and update of a float32 table; sorting the ids belongs to PyTorch and is not in it.

    Args:
        entries: ids of a batch.
        distinct: how many different ones. The sums have a row for each entry, 0 beyond them.
        width: columns of the table.
        is_adam: rows behind the present are read with both moments, else with one state.
    """
    row, parts = 4 * width, max(0, -(-entries // row_sparse.part_of(entries)) - 1)
    found = {
        "gather": Work(0, entries * (row * (4 if is_adam else 3) + 16), 0),
        "sums": Work(0, 2 * entries * row + 2 * parts * row + 16 * entries, 0, 2 if parts else 1),
        "mark and commit": Work(0, 32 * entries, 0, 2),
        "update": Work(0, distinct * (7 * row + 24), 0),
    }
    return {name: work._replace(tile_bytes=work.bytes) for name, work in found.items()}


def distinct_ids(rows: int, entries: int) -> int:
    """Of entries whose popularity falls with their rank, as in `bench_training_gpu.py`."""
    shares = torch.rand(entries, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return len((rows**shares).long().clamp(max=rows - 1).unique())


def dropout_work(values: int) -> Work:
    """One direction: 16-bit values are read and written once, their draws are nowhere in memory."""
    return Work(0, 2 * ITEM * values, 2 * ITEM * values)


class Launches(TorchDispatchMode):
    """Counts operations by name, those of a device that launch a kernel at least: many launch one, sorts several."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in LAUNCH_NOTHING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of(loss: Callable[[], Tensor]) -> Counter[str]:
    """Of forward and backward under autocast, by the operations of a CPU, with what a GPU does in other numbers."""
    with Launches() as counted:
        with in_precision("bf16"):
            value = loss()
        value.backward()
    found = counted.found
    # A GPU draws, masks and scales in one kernel, and keeps the mask for another one.
    draws = found.pop("bernoulli_", 0)
    found["native_dropout"] = draws
    found["div_"] -= draws
    # A sequence too long for a pack may be there: shapes do not rule it out.
    found["flash_attention"] *= 2
    found["flash_attention_backward"] *= 3
    return found


def multitask_launches(views: int = 16) -> dict[str, int]:
    """Launches of forward and backward of the winner's multi-task step, ours and padded; any number of clients."""
    sizes, config = sizes_of(0.001), MultitaskConfig()
    model = MultitaskModel(config, sizes, FEATURES, OUTPUTS)
    rival = without_initialisation(lambda: PaddedMultitask(config, sizes, FEATURES, OUTPUTS)).load_from(model)
    batch = random_batch(random_lengths(views, 0), sizes, FEATURES, OUTPUTS)
    padded = pad_views(batch, config.history_length)
    return {
        "padded PyTorch": launches_of(lambda: rival.loss(padded)).total(),
        "ubp_fast": launches_of(lambda: torch.stack(list(model.loss(batch).values())).sum()).total(),
        "ubp_fast, cuda_graph": 1,
    }


def blocks_per_multiprocessor(registers: int, shared_bytes: int, warps: int, device: Device) -> int:
    """How many programs a multiprocessor holds at a time."""
    by_registers = device.registers // (32 * warps * 8 * math.ceil(registers / 8))
    by_shared = device.shared_bytes // (shared_bytes + 1024)
    return min(by_registers, by_shared, device.warps // warps, 32)


def mix(sequences: int, seed: int = 0) -> list[int]:
    """Lengths of shop histories: median 26, mean 40, at most 256."""
    spread = torch.randn(sequences, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (26 * spread.exp()).round().clamp(1, 256).long().tolist()


def time_bias_cases() -> dict[str, list[int]]:
    """Lengths for which the cost of a time_bias is told."""
    lengths = mix(1024)
    found = {"of the mix at most 64": [length for length in lengths if length <= 64], "the mix": lengths}
    return found | {f"{length:,}": [length] * (32_768 // length) for length in (128, 256, 512, 2048, 8192)}


def time_bias_ratios(lengths: Sequence[int], width: int, device: Device) -> list[float]:
    """How many times as long forward and backward take with a time_bias as without, at best and apart."""
    without, with_bias = (attention_work(lengths, 4, width, kind).values() for kind in ("plain", "options"))
    return [
        sum(work.seconds(device)[at] for work in with_bias) / sum(work.seconds(device)[at] for work in without)
        for at in (0, 1)
    ]


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def _print_work(name: str, found: dict[str, Work], device: Device) -> None:
    times = {kernel: work.seconds(device) for kernel, work in found.items()}
    times["together"] = tuple(map(sum, zip(*times.values(), strict=True)))  # type: ignore[assignment]
    for kernel, work in {**found, "together": total(found.values())}.items():
        cells = (f"{number:,.0f}" for number in (work.flop / 1e9, work.bytes / 1e6, work.tile_bytes / 1e6))
        best, apart = times[kernel]
        share = "-"
        if work.flop:
            share = " to ".join(f"{100 * work.flop / device.flop_per_s / time:.0f}" for time in (apart, best))
        _row(name, kernel, *cells, work.launches, f"{best * 1e6:,.0f}", f"{apart * 1e6:,.0f}", share)


def _print_occupancy(device: Device) -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
    from compile_triton import attention_builds, compiled, contrastive_builds, dropout_builds, row_sparse_builds

    for build in (*attention_builds(), *contrastive_builds(), *row_sparse_builds(SM_90), *dropout_builds(SM_90)):
        if build.capability == 90 and "fp32" not in build.name:
            found, warps = compiled(build), build.options["num_warps"]
            held = blocks_per_multiprocessor(found.registers, found.shared_bytes, warps, device)
            _row(build.name, warps, found.registers, found.shared_bytes, held)


def _print_long(device: Device) -> None:
    """16 of 2,048, H=4, each candidate with its instructions beside products and copies."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
    from compile_triton import PTXAS, attention_build, compiled, kernel_of

    _row(
        "kernel", "tile", "by", "warps", "registers", "spilled bytes", "instructions of a pair", "at best, µs", "apart"
    )
    print("|---" * 9 + "|")
    for (kernel, width), candidates in LONG_CANDIDATES.items():
        for m, n, warps, stages, is_described in candidates:
            chosen = attention.Tiles(m, n, warps, stages, bool(is_described))
            build = attention_build("sm_90", kernel, torch.bfloat16, width, 2048, {"right": 0}, True, chosen)
            found = compiled(build)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel_of(build).asm["cubin"])
                file.flush()
                call = [str(PTXAS / "nvdisasm"), "-c", file.name]
                said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
            each = turn(said) * 32 * warps / (m * n)
            work = long_work(kernel, [2048] * 16, 4, width, m, n)
            best, apart = work._replace(instructions=each * work.instructions).seconds(device)
            by = "descriptors" if is_described else "pointers"
            cells = (found.registers, found.spilled_bytes, f"{each:.1f}", f"{best * 1e6:,.0f}", f"{apart * 1e6:,.0f}")
            _row(f"{kernel} D={width}", f"{m} x {n}", by, warps, *cells)


def main() -> int:
    device = Device()
    print("| case | kernel | GFLOP | MB | MB of tiles | launches | at best, µs | apart, µs | share of the peak, % |")
    print("|---|---|---|---|---|---|---|---|---|")
    lengths = mix(1024)
    cases = {f"mix of {sum(lengths):,} rows": lengths, "16 of 2,048": [2048] * 16}
    for (name, case), width in ((case, width) for case in cases.items() for width in (64, 128)):
        found = attention_work(case, 4, width)
        _print_work(f"{name}, H=4, D={width}", found, device)
        moved, least = total(found.values()).bytes, attention_least(case, 4, width)
        if min(case) > 512:
            _print_work(f"{name}, H=4, D={width}, five products", {"dq and dkv": five_products(case, 4, width)}, device)
        print(f"bytes: {moved / least.bytes:.2f} of the least; products of real pairs: {least.flop / 1e9:,.1f} GFLOP")
    for rows, width in ((65_536, 256), (65_536, 512), (1_048_576, 512)):
        found = nt_xent_work(rows, width)
        _print_work(f"nt_xent {rows:,} x {width}", found, device)
        print(f"at half of the peak: {1e3 * sum(work.at_half(device) for work in found.values()):,.1f} ms")
        if "pull" in found:
            print(f"memory: {nt_xent_bytes(rows, width) / 1e9:,.1f} GB")
    entries, table_rows = 8192, 1_260_000
    distinct = distinct_ids(table_rows, entries)
    for name, is_adam in (("schedule-free", False), ("Adam", True)):
        work = row_sparse_work(entries, distinct, 384, is_adam)
        _print_work(f"row_sparse {name}, {entries:,} ids, {distinct:,} distinct, 384 columns", work, device)
    _print_work(f"dropout of {sum(lengths):,} x 412", {"one direction": dropout_work(sum(lengths) * 412)}, device)
    print(
        "\n| with a time_bias, times as long | D=64, at best | apart | D=128, at best | apart |\n|---|---|---|---|---|"
    )
    for name, case in time_bias_cases().items():
        _row(name, *(f"{ratio:.2f}" for width in (64, 128) for ratio in time_bias_ratios(case, width, device)))
    print(
        "\n| sums of a time_bias in dq, 8 heads | layers | as they are, µs | by an order of pairs |\n|---|---|---|---|"
    )
    for length, layers in itertools.product((128, 256, 512), (1, 2, 4)):
        _row(length, layers, *(f"{1e6 * time:,.0f}" for time in order_of_long_pairs(length, 8, layers, device)))
    print("\n| forward and backward of the multi-task step | launches |\n|---|---|")
    for name, count in multitask_launches().items():
        _row(name, f"{count:,}")
    print()
    _print_long(device)
    print("\n| kernel | warps | registers | shared bytes | programs of a multiprocessor |\n|---|---|---|---|---|")
    _print_occupancy(device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
