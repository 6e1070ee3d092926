"""What the README says is what the project holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

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


def test_the_python_example_runs() -> None:
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert example is not None
    names: dict[str, object] = {}
    exec(compile(example[1], "README.md", "exec"), names)
    assert names["context"].shape == (270, 4, 64)  # type: ignore[attr-defined]
