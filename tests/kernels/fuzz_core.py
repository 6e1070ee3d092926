"""Seeded fuzz of the compiled module without torch: `make sanitize` runs it in a build with sanitizers.

Usage: python tests/kernels/fuzz_core.py <folder of _core> [rounds] [seed]
"""

from __future__ import annotations

import importlib.util
import random
import sys
from array import array
from pathlib import Path
from typing import Any

ITEM_BYTES = (4, 2, 2)  # float32, bfloat16, float16
TYPECODES = ("f", "H", "H")


def load_core(folder: Path) -> Any:
    """The module file itself: the package around it would import torch."""
    path = next(folder.glob("_core*.so"))
    spec = importlib.util.spec_from_file_location("_core", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def offsets(generator: random.Random, lengths: list[int]) -> array[int]:
    """True offsets, or, one time in four, damaged ones."""
    values = [0]
    for length in lengths:
        values.append(values[-1] + length)
    if generator.random() < 0.25:
        values[generator.randrange(len(values))] += generator.choice((-(2**31) // 2, -7, -1, 1, 5, 2**30))
    return array("i", values)


def numbers(generator: random.Random, dtype: int, count: int) -> array[Any]:
    """Exactly `count` numbers, so that a read past the end is seen; any bit pattern for the 16-bit types."""
    if dtype == 0:
        special = (0.0, float("nan"), float("inf"), -1e38)
        values = (
            generator.choice(special) if generator.random() < 0.01 else generator.gauss(0, 3) for _ in range(count)
        )
        return array("f", values)
    return array("H", (generator.getrandbits(16) for _ in range(count)))


def addresses(tensors: dict[str, array[Any]]) -> dict[str, int]:
    """What the compiled module takes for tensors."""
    return {name: part.buffer_info()[0] for name, part in tensors.items()}


def flash_attention(core: Any, generator: random.Random) -> None:
    """One problem, forward and backward."""
    sequences, heads = generator.randrange(6), generator.randrange(1, 4)
    width = generator.choice((1, 3, 16, 17, 32, 59, 64, 100, 128, 256, 0, 257))
    longest = generator.choice((2, 30, 60, 300))
    lengths = [generator.randrange(longest) for _ in range(sequences)]
    key_lengths = lengths if generator.random() < 0.5 else [generator.randrange(longest) for _ in range(sequences)]
    dtype = generator.randrange(3)
    rows, keys = (sum(part) * heads * width for part in (lengths, key_lengths))
    cu_query, cu_key = offsets(generator, lengths), offsets(generator, key_lengths)
    inputs = [numbers(generator, dtype, count) for count in (rows, keys, keys)]
    output, grad_output = numbers(generator, dtype, rows), numbers(generator, dtype, rows)
    lse = array("f", bytes(4 * sum(lengths) * heads))
    gradients = [array(TYPECODES[dtype], bytes(ITEM_BYTES[dtype] * count)) for count in (rows, keys, keys)]
    buckets = generator.choice((0, 0, 1, 31, 106, 107))
    bias, grad_bias = numbers(generator, 0, heads * buckets), array("f", bytes(4 * heads * buckets))
    times = [
        array("q", (generator.getrandbits(64) - 2**63 for _ in range(sum(part)))) for part in (lengths, key_lengths)
    ]
    dropout_p = generator.choice((0.0, 0.0, 0.1, 0.999))
    fields = {
        "query_tokens": sum(lengths),
        "key_tokens": sum(key_lengths),
        "sequences": sequences,
        "heads": heads,
        "width": width,
        "buckets": buckets,
        "dtype": dtype,
        "left": generator.choice((-1, 0, 5, 2**31 - 1)),
        "right": generator.choice((-1, 0, 0, 9, 2**63 - 1)),
        "scale": generator.uniform(-2, 2),
        "threshold": int(dropout_p * 2**32),
        "keep_factor": 1 / (1 - dropout_p),
        "seed": generator.getrandbits(64),
        "first_query_row": generator.getrandbits(31),
        "first_key_row": generator.getrandbits(31),
        "threads": generator.randrange(5),
    }
    names = ("query", "key", "value", "grad_query", "grad_key", "grad_value")
    tensors = dict(zip(names, (*inputs, *gradients), strict=True))
    tensors |= {"cu_query": cu_query, "cu_key": cu_key, "output": output, "lse": lse, "grad_output": grad_output}
    if buckets:
        tensors |= {"time_bias": bias, "query_time_s": times[0], "key_time_s": times[1], "grad_time_bias": grad_bias}
    problem = core.FlashAttentionProblem(**fields, **addresses(tensors))
    core.flash_attention_forward(problem)
    core.flash_attention_backward(problem)


def nt_xent(core: Any, generator: random.Random) -> None:
    """One problem, forward and backward; one in eight large enough for float32 or bfloat16 tiles."""
    rows = generator.choice((1, 2, 3, 63, 65, 127, 193, generator.randrange(1, 260)))
    width = generator.choice((1, 2, 3, 15, 16, 17, 59, 64, 100, 0, 2049))
    if generator.random() < 0.15:
        rows, width = generator.choice(((193, 512), (300, 256), (385, 131), (97, 2048)))
    dtype, form = generator.randrange(3), generator.choice((0, 1, 2, 2, 3))
    is_rectangular, damage, tensors, sizes = generator.random() < 0.4, generator.random(), {}, {}
    columns = generator.choice((1, 70, 200, 400)) if is_rectangular else rows
    for side, count in (("left", rows), ("right", columns)):
        kept = [row for row in range(count) if generator.random() < 0.8] or [0]
        ids = [generator.randrange(1 + rows // 2) for _ in kept]
        if side == "right" and not is_rectangular:
            kept, ids = list(tensors["left_kept"]), list(tensors["left_ids"])
        if damage < 0.1:
            kept[generator.randrange(len(kept))] = generator.choice((-1, count, 0, 2**62, -(2**62)))
        if 0.1 < damage < 0.15:
            ids[-1] = -1
        tensors |= {f"{side}_kept": array("q", kept), f"{side}_ids": array("i", ids)}
        sizes |= {f"{side}_rows": count, f"{side}_count": len(kept)}
    counts = sizes["left_count"], sizes["right_count"]
    rows_of = {"left": rows, "right": columns}
    if is_rectangular:
        form, rows_of["positive"] = generator.choice((0, 0, 0, 1)), rows
        places = [generator.randrange(-1, counts[1]) for _ in range(counts[0])]
        if 0.15 < damage < 0.2:
            places[0] = generator.choice((-2, counts[1], 2**31 - 1))
        tensors["places"] = array("i", places)
        if generator.random() < 0.5:
            biases = [array("d", (4 * generator.random() for _ in range(count))) for count in counts]
            tensors |= dict(zip(("positive_bias", "right_bias"), biases, strict=True))
    for name, count in rows_of.items():
        tensors[name] = numbers(generator, dtype, count * width)
        tensors[f"grad_{name}"] = array(TYPECODES[dtype], bytes(ITEM_BYTES[dtype] * count * width))
    tensors |= {name: array("d", bytes(16 * max(counts))) for name in ("losses", "shares")}
    tensors["weight"] = array("f", (2 * generator.random() - 1 for _ in range(2 * max(counts))))
    problem = core.NTXentProblem(
        **addresses(tensors),
        **sizes,
        dtype=dtype,
        width=width,
        form=form,
        has_ids=generator.random() < 0.5,
        is_normalized=generator.random() < 0.7,
        temperature=generator.choice((1.0, 0.1, 0.02, 0.005, 1e-30, 1e30, 0.0, float("nan"))),
        threads=generator.randrange(5),
        factor=generator.choice((1.0, 0.0, float("inf"), 1e-300)),
    )
    core.nt_xent_forward(problem)
    core.nt_xent_backward(problem)


def row_sparse(core: Any, generator: random.Random) -> None:
    """Lookup, sums, update and catch-up of one table, by either rule; one number in four tables is damaged."""
    rows, width = generator.randrange(1, 90), generator.choice((0, 1, 3, 16, 59, 64, 65, 100))
    steps, is_adam = generator.choice((0, 1, 5, 300)), generator.random() < 0.5
    last_step = [generator.choice((-1, generator.randrange(steps + 1))) for _ in range(rows)]
    touched = [row for row in range(rows) if last_step[row] >= 0]
    slots = len(touched) + generator.choice((0, rows, rows))
    slot, used = [-(2**31)] * rows, generator.choice((len(touched),) * 9 + (-1, 2**62))
    for place, row in enumerate(touched):
        slot[row] = place
    ids = [generator.randrange(rows) for _ in range(generator.randrange(70))]
    damage = generator.randrange(16)
    if damage == 0 and ids:
        ids[-1] = generator.choice((-1, rows, 2**62, -(2**62)))
    if damage == 1 and touched:
        slot[touched[0]] = generator.choice((-1, slots, 2**31 - 1))
    if damage == 2:
        last_step[0] = generator.choice((steps + 1, 2**31 - 1))
    history = array("d", (generator.random() for _ in range((steps + 1) * (3 if is_adam else 1))))
    tensors = {
        "weight": numbers(generator, 0, rows * width),
        "state": numbers(generator, 0, slots * 2 * width),
        "slot": array("i", slot),
        "last_step": array("i", last_step),
        "history": history,
        "used": array("q", [used]),
    }
    sizes = {"rows": rows, "width": width, "slots": slots}
    table = core.RowTable(**addresses(tensors), **sizes, now=steps)
    rule, step = core.ScheduleFree(beta2=0.99, eps=1e-8, toward_z=0.1), core.ScheduleFreeStep(bias_correction=0.5)
    if is_adam:
        betas = (generator.choice((0.0, 0.9, 1.0)), generator.choice((0.5, 0.9, 0.999, 0.0)))
        rule, step = core.Adam(beta1=betas[0], beta2=betas[1], eps=1e-8), core.AdamStep(rate=0.1, root=2.0, keep=0.9)
    batch, count, threads = array("q", ids), len(ids), generator.randrange(5)
    order, distinct, start = (array("q", bytes(8 * (count + 1))) for _ in range(3))
    gathered, gradient = array("f", bytes(4 * count * width)), numbers(generator, 0, count * width)
    at = addresses({"ids": batch, "order": order, "distinct": distinct, "start": start})
    core.row_sparse_gather(table, rule, at["ids"], count, gathered.buffer_info()[0], threads)
    groups = core.row_sparse_group(at["ids"], count, at["order"], at["distinct"], at["start"])
    sums = array("f", bytes(4 * groups * width))
    places = (gradient.buffer_info()[0], sums.buffer_info()[0], threads)
    core.row_sparse_reduce(at["start"], at["order"], groups, width, width, *places)
    core.row_sparse_update(table, rule, step, at["distinct"], groups, sums.buffer_info()[0], threads)
    tensors["history"] = array("d", [*history, *history[-3 if is_adam else -1 :]])
    core.row_sparse_catch_up(core.RowTable(**addresses(tensors), **sizes, now=steps + 1), rule, threads)


def row_product(core: Any, generator: random.Random) -> None:
    """One product, and one network of pairs whose labels are damaged one time in four."""
    count, inputs, outputs = (generator.choice((0, 1, 3, 16, 33, 65, 130)) for _ in range(3))
    given = {"rows": numbers(generator, 0, count * inputs), "weight": numbers(generator, 0, inputs * outputs)}
    given |= {"bias": numbers(generator, 0, outputs)} if generator.random() < 0.5 else {}
    out = {"out": array("f", bytes(4 * count * outputs))}
    core.row_product(
        core.FloatProduct(**addresses(given | out), count=count, inputs=inputs, outputs=outputs),
    )
    clients, labels, width = generator.randrange(4), generator.choice((1, 15, 128, 200)), generator.randrange(40)
    first, second, offsets, listed = generator.choice((1, 17, 64)), generator.choice((1, 5, 32)), [0], []
    both = generator.randrange(5)
    for _ in range(clients):
        listed += sorted(generator.sample(range(labels), generator.randrange(min(labels, 9) + 1)))
        offsets.append(len(listed))
    if listed and generator.random() < 0.25:
        listed[generator.randrange(len(listed))] = generator.choice((-1, labels, 2**31 - 1))
    sizes = {
        "of_client": clients * first, "of_label": first * labels, "inputs": len(listed) * width,
        "of_both": clients * both * labels, "both_weight": both * first,
        "input_weight": width * first, "weight": second * first, "bias": second, "last_weight": second,
        "last_bias": 1, "out": clients * labels,
    }  # fmt: skip
    tensors = {name: numbers(generator, 0, size) for name, size in sizes.items()}
    tensors |= {"offsets": array("q", offsets), "label": array("i", listed)}
    numbers_of = {"clients": clients, "labels": labels, "width": width, "first": first, "second": second}
    numbers_of["both"] = both
    core.pair_network(core.PairNetwork(**addresses(tensors), **numbers_of))


OPERATORS = (flash_attention, nt_xent, row_product, row_sparse)


def is_accepted(core: Any, generator: random.Random, operator: Any) -> bool:
    """One round on a random instruction set; False when the problem was refused in the operator's words."""
    core.set_isa(generator.choice(core.usable_isas()))
    try:
        operator(core, generator)
    except (ValueError, IndexError) as error:
        if not str(error).startswith(f"{operator.__name__}: "):
            raise
        return False
    return True


def main() -> None:
    folder = sys.argv[1]
    rounds, seed = (int(sys.argv[at]) if len(sys.argv) > at else default for at, default in ((2, 300), (3, 0)))
    core = load_core(Path(folder))
    for operator in OPERATORS:
        generator = random.Random(seed)
        accepted = sum(is_accepted(core, generator, operator) for _ in range(rounds))
        print(f"{operator.__name__}: {rounds} problems, {accepted} accepted, no sanitizer report")


if __name__ == "__main__":
    main()
