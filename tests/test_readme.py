"""What the README says is what the project holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_tables_are_made_from_committed_results() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from bars import rewrite_readme
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    text = README.read_text(encoding="utf-8")
    assert "<!-- benchmarks: benchmarks/results/" in text
    assert rewrite_readme(README) == text, "run `python benchmarks/bars.py`"


def test_every_path_of_the_file_map_exists() -> None:
    table = README.read_text(encoding="utf-8").split("## Where things are")[1].split("##")[0]
    first_columns = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [path for column in first_columns for path in re.findall(r"`([^`]+)`", column)]
    assert len(named) > 12
    package = ROOT / "src" / "ubp_fast"
    for path in named:
        assert (ROOT / path).exists() or (package / path).exists(), path


def python_examples() -> list[dict[str, Any]]:
    """What is defined after each of the README's examples."""
    results = []
    for example in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S):
        names: dict[str, Any] = {}
        exec(compile(example, "README.md", "exec"), names)
        results.append(names)
    return results


def test_the_python_examples_run() -> None:
    kernels, attention = python_examples()
    assert kernels["context"].shape == (270, 4, 64)
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    ours = attention["PackedAttention"](24, 3)
    ours.load_state_dict(theirs.state_dict())
    rows = torch.randn(12, 24)
    found = ours(rows, torch.tensor([0, 5, 12]))
    for part in (slice(0, 5), slice(5, 12)):
        sequence = rows[None, part]
        torch.testing.assert_close(found[part], theirs(sequence, sequence, sequence, need_weights=False)[0][0])
