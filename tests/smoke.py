"""What a newcomer does with an installed wheel, where there is no compiler: `make smoke` calls it.

Run as a script by the environment's own Python, in a folder that may be written to, with the environment alone in PATH.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import ubp_fast

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = 300
QUICK = ("evaluation.readers=[linear]", "report.diagnosis=false")


def main() -> None:
    found = [tool for tool in ("c++", "g++", "gcc", "cc", "clang", "cmake") if shutil.which(tool)]
    assert not found, f"compilers in PATH: {found}"
    assert not Path(ubp_fast.__file__).is_relative_to(ROOT / "src"), "not the installed package"
    print("ubp_fast", metadata.version("ubp_fast"), "torch", metadata.version("torch"), flush=True)
    call("doctor")
    write_events(Path("events.parquet"))
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S):
        exec(compile(example, "README.md", "exec"), names)
    assert len(names["today"]) == CLIENTS and np.isfinite(names["one"]).all()
    call("run", "data=synthetic", f"data.clients={CLIENTS}", "directory=runs/synthetic", *QUICK)
    vectors = pl.read_parquet("runs/synthetic/profiles.parquet")
    assert 0 < len(vectors) <= CLIENTS, len(vectors)
    assert json.loads(Path("runs/synthetic/scores.json").read_text(encoding="utf-8"))
    assert Path("runs/synthetic/report.html").stat().st_size > 10_000
    print(f"{len(vectors)} vectors, scored and reported")


def call(*words: str) -> None:
    subprocess.run([Path(sys.executable).with_name("ubp-fast"), *words], check=True)


def write_events(path: Path) -> None:
    state = np.random.default_rng(0)
    seconds = np.sort(state.integers(1_783_000_000, 1_783_000_000 + 120 * 86_400, 30 * CLIENTS))
    article = state.integers(0, 30, len(seconds))
    clients = ["ada", *(f"client {number}" for number in range(1, CLIENTS))]
    columns = {
        "customer": state.choice(clients, len(seconds)),
        "time": pl.from_epoch(pl.Series(seconds)),
        "article": [f"A{number}" for number in article],
        "price": 1.0 + article,
    }
    pl.DataFrame(columns).write_parquet(path)


if __name__ == "__main__":
    main()
