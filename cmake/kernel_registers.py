"""Registers and spills of every CUDA kernel, from a build log with `ptxas -v` in it; fails when one spills.

python cmake/kernel_registers.py build/cuda/build.log
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def readable(names: list[str]) -> list[str]:
    """`void ubp::(anonymous namespace)::forward_kernel<float, 64>(...)` -> `forward_kernel<float, 64>`."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"\(anonymous namespace\)|ubp::|^void |::", "", line).split("(")[0] for line in plain.splitlines()]


def main(log: Path) -> int:
    """Prints the table; 1 if a kernel spills or there is none."""
    entries = list(ENTRY.finditer(log.read_text(encoding="utf-8")))
    if not entries:
        print(f"{log}: must hold the output of ptxas -v, got none of it")
        return 1
    table: dict[str, dict[str, str]] = {}
    spilling = []
    for entry, name in zip(entries, readable([entry["name"] for entry in entries]), strict=True):
        spilled = int(entry["stores"]) + int(entry["loads"])
        table.setdefault(name, {})[entry["architecture"]] = f"{entry['registers']} ({spilled})"
        if spilled:
            spilling.append(f"{name} for {entry['architecture']}")
    architectures = sorted({entry["architecture"] for entry in entries})
    width = max(map(len, table))
    print(f"{'registers (bytes spilled)':{width}}", *(f"{name:>9}" for name in architectures))
    for name in sorted(table):
        print(f"{name:{width}}", *(f"{table[name].get(architecture, '-'):>9}" for architecture in architectures))
    if spilling:
        print(f"registers are spilled by {', '.join(spilling)}; make its tile or its unrolled loops smaller")
    return bool(spilling)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
