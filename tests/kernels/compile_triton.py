"""Compiles the Triton kernels with all tiles of the tables, for GPUs that need not be there.

Run as a script, in a process of its own without TRITON_INTERPRET: prints a table of registers, spills, shared memory
and instructions of the tensor cores; exits 1 where a kernel spills or misses them. `test_triton.py` runs it for sm_80,
sm_86 and sm_90; "sm_100" as an argument adds what these GPUs take.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ubp_fast.kernels import tiles as tile_table
from ubp_fast.kernels.flash_attention import _triton as attention
from ubp_fast.kernels.flash_attention import _triton_kernels as attention_kernels
from ubp_fast.kernels.flash_attention import _triton_short_kernels as short_kernels
from ubp_fast.kernels.flash_attention.reference import Problem as AttentionProblem
from ubp_fast.kernels.nt_xent import _triton as contrastive
from ubp_fast.kernels.nt_xent import _triton_kernels as contrastive_kernels
from ubp_fast.kernels.nt_xent.reference import Problem as ContrastiveProblem
from ubp_fast.kernels.row_sparse import Adam, ScheduleFree
from ubp_fast.kernels.row_sparse import _triton as row_sparse
from ubp_fast.kernels.row_sparse import _triton_kernels as row_sparse_kernels
from ubp_fast.models.layers import dropout_kernel

CAPABILITY = {"sm_80": 80, "sm_86": 86, "sm_90": 90, "sm_100": 100}
# Names of the tables of tiles, those of older GPUs without their rows for what is in nobody's table.
NAMES = {"sm_80": ("sm_80",), "sm_86": ("sm_86",), "sm_90": ("sm_90",), "sm_100": tile_table.SM_100}
DEVICES = ("sm_80", "sm_86", "sm_90")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MOST_SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # that a block may have
UNITS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}


class Build(NamedTuple):
    """One kernel and everything that decides its code."""

    name: str
    capability: int
    function: Any
    types: dict[str, str]  # of tensors and of the numbers that are no i32
    constants: dict[str, Any]
    options: dict[str, int]
    uses_tensor_cores: bool


class Result(NamedTuple):
    """What ptxas said."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core: str


def kernel_of(build: Build) -> Any:
    """What Triton makes of it, with its `asm`."""
    names, capability = build.function.arg_names, build.capability
    missing = [name for name in names if name.endswith("_ptr") and name not in {**build.types, **build.constants}]
    assert not missing, f"{build.name}: no type for {missing}"
    signature = {name: "constexpr" if name in build.constants else build.types.get(name, "i32") for name in names}
    aligned = [at for at, name in enumerate(names) if signature[name].startswith("*") or "stride" in name]
    source = ASTSource(
        fn=build.function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at in aligned if signature[names[at]] != "constexpr"},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build.options)


def compiled(build: Build) -> Result:
    kernel, capability = kernel_of(build), build.capability
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = f"sm_{capability}{'a' * (capability >= 90)}"
        call = [
            str(PTXAS / ("ptxas-blackwell" if capability >= 100 else "ptxas")),
            "-v",
            f"-arch={arch}",
            file.name,
            "-o",
            "/dev/null",
        ]
        said = subprocess.run(call, capture_output=True, text=True, check=True).stderr
    registers, *_ = re.findall(r"Used (\d+) registers", said)
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    unit = next((name for instruction, name in UNITS.items() if instruction in ptx), "-")
    return Result(int(registers), spilled, kernel.metadata.shared, unit)


def all_rows(table: Path, devices: Sequence[str]) -> Iterator[tuple[str, str, str, int, int | None]]:
    """(device, kernel, kind, width, length) of a table; cards that were tuned have run theirs."""
    known = json.loads(table.read_text(encoding="utf-8"))
    for device in devices:
        for kernel, kind in sorted({tuple(name.split()) for part in NAMES[device] for name in known.get(part, ())}):
            for width, length, _ in tile_table.rows(table, NAMES[device], kernel, kind):
                yield device, kernel, kind, int(width), None if math.isinf(length) else int(length)


def attention_builds(devices: Sequence[str] = DEVICES) -> Iterator[Build]:
    """Every row of the table, with the options that take the most registers."""
    everything = {"left": 70, "right": 0, "buckets": 64, "dropout_p": 0.1}
    for device, kernel, kind, width, length in all_rows(attention.TABLE, devices):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        extras = {"right": 0} if kind in ("plain", "aligned") else everything
        if kind == "timed":
            extras = {name: value for name, value in everything.items() if name != "dropout_p"}
        if kind == "dropout":
            extras = {name: value for name, value in everything.items() if name != "buckets"}
        width = 64 if dtype == torch.float32 else width  # wider float32 spills in dq
        yield attention_build(device, kernel, dtype, width, length or 1000, extras, kind == "aligned")
    offsets = {"cu_ptr": "*i32", "cu_key_ptr": "*i32", "pack_ptr": "*i32"}
    for capability in _capabilities(devices):
        constants, options = {"IS_SELF": False, "BLOCK": 128}, {"num_warps": 1}
        yield Build("attention packs", capability, short_kernels.pack_kernel, offsets, constants, options, False)
        tensors = offsets | dict.fromkeys(("sequence_ptr", "key_sequence_ptr"), "*i32") | {"bucket_ptr": "*u8"}
        tensors |= dict.fromkeys(("time_ptr", "key_time_ptr"), "*i64")
        constants, options = {"HAS_LEFT": True, "HAS_RIGHT": True, "BUCKETS": 64, "BLOCK": 64}, {"num_warps": 4}
        yield Build("attention pairs", capability, short_kernels.pair_kernel, tensors, constants, options, False)


def attention_build(
    device: str,
    kernel: str,
    dtype: torch.dtype,
    width: int,
    length: int,
    extras: dict[str, Any],
    is_aligned: bool,
    chosen: attention.Tiles | None = None,
) -> Build:
    """Of the table's tiles, or of other ones."""
    # Rows that begin anywhere, and have their neighbours beside them all the same.
    query = torch.empty(8 * length, 4, width + (not is_aligned), dtype=dtype, device="meta")[..., :width]
    offsets = torch.empty(9, dtype=torch.int32, device="meta")
    bias = torch.empty(4, extras["buckets"], device="meta") if "buckets" in extras else None
    seed = torch.zeros(3, dtype=torch.int64, device="meta") if "dropout_p" in extras else None
    left, right, dropout_p = extras.get("left", -1), extras.get("right", -1), extras.get("dropout_p", 0.0)
    sides = (query, query, query, offsets, offsets, left, right, 0.125)
    problem = AttentionProblem(*sides, time_bias=bias, dropout_p=dropout_p, seed=seed)
    item = TYPES[dtype]
    tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr"), f"*{item}")
    tensors |= dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr"), f"*{item}")
    tensors |= dict.fromkeys(("lse_ptr", "delta_ptr", "bias_ptr", "dbias_ptr"), "*fp32")
    tensors |= dict.fromkeys(("time_ptr", "key_time_ptr", "seed_ptr"), "*i64")
    tensors |= dict.fromkeys(("cu_ptr", "cu_key_ptr", "pack_ptr", "sequence_ptr", "key_sequence_ptr"), "*i32")
    tensors |= {"bucket_ptr": "*u8", "order_ptr": "*i16", "end_ptr": "*i16"}
    tensors |= {"scale": "fp32", "keep_scale": "fp32", "threshold": "i64"}
    if kernel.startswith("short"):
        function = getattr(short_kernels, f"{kernel}_kernel")
        chosen = chosen or attention.short_tiles(kernel, problem, length, NAMES[device])
        assert chosen is not None
    else:
        function = getattr(attention_kernels, f"{'backward_' * (kernel != 'forward')}{kernel}_kernel")
        chosen = chosen or attention.tiles(kernel, problem, length, NAMES[device])
    constants = attention.constants(kernel, problem, chosen)
    options = {name: constants[name] for name in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")}
    constants = {name: value for name, value in constants.items() if name.isupper()}
    absent = (
        []
        if bias is not None
        else ["bias_ptr", "time_ptr", "key_time_ptr", "dbias_ptr", "bucket_ptr", "order_ptr", "end_ptr"]
    )
    absent += [] if seed is not None else ["seed_ptr"]
    constants |= {name: None for name in absent if name in function.arg_names}
    name = f"attention {kernel} {item} D={width} {chosen.block_m}x{chosen.block_n} {'+'.join(extras)}"
    name += " described" * chosen.is_described
    return Build(name, CAPABILITY[device], function, tensors, constants, options, dtype != torch.float32)


def contrastive_builds(devices: Sequence[str] = DEVICES) -> Iterator[Build]:
    """Every row of the table."""
    for device, kernel, kind, width, _ in all_rows(contrastive.TABLE, devices):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        yield contrastive_build(device, kernel, dtype, min(width, 512))


def contrastive_build(device: str, kernel: str, dtype: torch.dtype, width: int) -> Build:
    item = TYPES[dtype]
    rows, row = torch.empty(64, width, dtype=dtype, device="meta"), torch.empty(64, device="meta")
    facts = (row.bool(), row.bool(), row.long(), row.long(), row.long(), row.double(), row.double())
    problem = ContrastiveProblem(rows, rows, rows, row, "cross", *facts, True)
    tensors = dict.fromkeys(("inverse_ptr", "positive_ptr", "temperature_ptr", "loss_ptr", "bias_ptr"), "*fp64")
    tensors |= dict.fromkeys(("maximum_ptr", "sum_ptr", "moment_ptr"), "*fp64")
    tensors |= {
        "rows_ptr": f"*{item}",
        "group_ptr": "*i32",
        "ids_ptr": "*i64",
        "valid_ptr": "*i1",
        "weight_ptr": "*fp32",
        "slope_ptr": "*fp32",
    }
    chosen = contrastive.tiles(kernel, dtype, width, NAMES[device])
    constants = contrastive.constants(f"{kernel}_kernel", problem, chosen)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
    if kernel == "gradient":
        constants |= {"HAS_ROW_LOSS": True, "HAS_COLUMN_LOSS": True}
    else:
        constants |= {"HAS_PRODUCTS": False, "product_ptr": None}
    name = f"nt_xent {kernel} {item} E={width} {chosen.block_m}x{chosen.block_n}x{chosen.block_k} all options"
    function = getattr(contrastive_kernels, f"{kernel}_kernel")
    return Build(name, CAPABILITY[device], function, tensors, constants, options, dtype != torch.float32)


def chunk_builds(devices: Sequence[str]) -> Iterator[Build]:
    """The kernels of nt_xent between the products of a BLAS."""
    rows, row = torch.empty(64, 512, dtype=torch.bfloat16, device="meta"), torch.empty(64, device="meta")
    facts = (row.bool(), row.bool(), row.long(), row.long(), row.long(), row.double(), row.double())
    problem = ContrastiveProblem(rows, rows, None, row, "symmetric", *facts, True)
    tensors = dict.fromkeys(("inverse_ptr", "positive_ptr", "temperature_ptr", "loss_ptr", "bias_ptr"), "*fp64")
    tensors |= dict.fromkeys(("maximum_ptr", "sum_ptr", "moment_ptr"), "*fp64")
    tensors |= dict.fromkeys(("product_ptr", "weight_ptr"), "*fp32")
    tensors |= dict.fromkeys(("rows_ptr", "to_row_ptr", "to_column_ptr"), "*bf16")
    tensors |= {"group_ptr": "*i32", "ids_ptr": "*i64", "valid_ptr": "*i1"}
    for capability in _capabilities(devices):
        names = NAMES[f"sm_{capability}"]
        chosen = contrastive.of_chunks(contrastive.tiles("statistics", torch.bfloat16, 512, names))
        statistics = contrastive.constants("statistics_kernel", problem, chosen) | {"HAS_PRODUCTS": True}
        for name, constants in (("statistics", statistics), ("pull", contrastive.pull_options(problem))):
            options = {
                name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants
            }
            function = getattr(contrastive_kernels, f"{name}_kernel")
            yield Build(f"nt_xent {name} of a chunk bf16", capability, function, tensors, constants, options, False)


def pair_builds(devices: Sequence[str]) -> Iterator[Build]:
    """The kernels of nt_xent that own a pair each; half of them of normalised rows."""
    item, row = torch.bfloat16, torch.empty(64, device="meta")
    rows = torch.empty(64, 512, dtype=item, device="meta")
    tensors = dict.fromkeys(("inverse_ptr", "positive_ptr", "pull_ptr", "factor_ptr"), "*fp64")
    tensors |= dict.fromkeys(
        ("left_ptr", "right_ptr", "rows_ptr", "grad_left_ptr", "grad_right_ptr"), f"*{TYPES[item]}"
    )
    tensors |= {"slope_ptr": "*fp32", "valid_ptr": "*i1"}
    for is_normalized, capability in zip(itertools.cycle((True, False)), _capabilities(devices), strict=False):
        problem = ContrastiveProblem(rows, rows, None, row, "simclr", *[None] * 7, is_normalized)
        for kernel in ("prepare", "finish"):
            constants = contrastive.row_options(problem, is_pair=True, has_valid=True)
            options = {"num_warps": constants.pop("num_warps")}
            function = getattr(contrastive_kernels, f"{kernel}_kernel")
            yield Build(f"nt_xent {kernel} bf16 E=512", capability, function, tensors, constants, options, False)


def row_sparse_builds(devices: Sequence[str]) -> Iterator[Build]:
    tensors = dict.fromkeys(("weight_ptr", "state_ptr", "gradient_ptr", "out_ptr", "part_ptr", "sum_ptr"), "*fp32")
    tensors |= dict.fromkeys(("slot_ptr", "last_ptr", "fault_ptr", "fresh_ptr"), "*i32")
    tensors |= dict.fromkeys(("kept_ptr", "history_ptr"), "*fp64")
    tensors |= dict.fromkeys(("ids_ptr", "order_ptr", "used_ptr", "start_ptr", "count_ptr"), "*i64")
    floats = [
        "log2_beta1",
        "log2_beta1_rest",
        "log2_beta2",
        "log2_beta2_rest",
        "eps",
        "beta2",
        "first_new",
        "second_new",
    ]
    floats += ["rate", "average_weight", "gradient_weight", "correction", "root", "keep", "toward_z"]
    tensors |= dict.fromkeys(floats, "fp32")
    table = torch.empty(9, 384, device="meta")
    rows = row_sparse._blocks(table)
    options = {"num_warps": rows["num_warps"]}
    sums = rows | {"ROWS": row_sparse.GROUP_ROWS, "BLOCK": row_sparse.BLOCK_SIZE // row_sparse.GROUP_ROWS, "PART": 128}
    entries = {"HAS_IDS": True, "HAS_COUNT": True, "BLOCK": row_sparse.MARK_BLOCK}
    kernels: list[tuple[str, str, dict[str, Any]]] = [
        ("part", "", sums),
        ("reduce", "", sums),
        ("mark", "", entries),
        ("commit", "", entries),
    ]
    for name, rule in (("schedule-free", ScheduleFree(0.99, 1e-8)), ("adam", Adam(0.9, 0.999, 1e-8))):
        steps = row_sparse._blocks(table, rule)
        kernels += [("gather", name, steps), ("catch_up", name, steps)]
        kernels += [("update", name, steps | {"IS_ADAPTIVE": True, "HAS_COUNT": True})]
    for (kernel, rule_name, constants), capability in itertools.product(kernels, _capabilities(devices)):
        function = getattr(row_sparse_kernels, f"{kernel}_kernel")
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        yield Build(f"row_sparse {kernel} {rule_name} D=384", capability, function, tensors, constants, options, False)


def dropout_builds(devices: Sequence[str]) -> Iterator[Build]:
    """With the seed on the device, as a captured step has it."""
    tensors = dict.fromkeys(("values_ptr", "out_ptr"), "*bf16") | {"held_ptr": "*i64", "first": "i64", "scale": "fp32"}
    for capability in _capabilities(devices):
        constants = {"IS_HELD": True, "BLOCK": dropout_kernel.VALUES}
        options = {"num_warps": 4}
        yield Build("dropout", capability, dropout_kernel.drop_kernel, tensors, constants, options, False)


def _capabilities(devices: Sequence[str]) -> list[int]:
    """For kernels without a table, which sm_86 takes as sm_80 has them."""
    return [CAPABILITY[device] for device in devices if device != "sm_86"]


COLUMNS = ("arch", "warps", "regs", "spill", "shared", "dot")


BUILDS = (attention_builds, contrastive_builds, chunk_builds, pair_builds, row_sparse_builds, dropout_builds)


def check(place: tuple[tuple[str, ...], int, int]) -> tuple[str, bool]:
    """The table's line of a build, by devices, its maker and its number, and whether it is as it should be."""
    devices, maker, number = place
    build = list(BUILDS[maker](devices))[number]
    found = compiled(build)
    is_wrong = found.spilled_bytes > 0 or found.shared_bytes > MOST_SHARED[build.capability]
    is_wrong |= build.uses_tensor_cores and found.tensor_core == "-"
    cells = (f"sm_{build.capability}", build.options["num_warps"], *found, "WRONG" if is_wrong else "")
    return " ".join([f"{build.name:75}", *(f"{cell!s:>7}" for cell in cells)]), not is_wrong


def main(more: Sequence[str]) -> int:
    devices = (*DEVICES, *more)
    print(f"triton {triton.__version__}\n{'kernel':75}", *(f"{name:>7}" for name in COLUMNS))
    places = [(devices, maker, at) for maker, made in enumerate(BUILDS) for at in range(len(list(made(devices))))]
    with ProcessPoolExecutor() as pool:
        is_right = []
        for line, is_ok in pool.map(check, places):
            print(line, flush=True)
            is_right.append(is_ok)
    return 0 if all(is_right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
