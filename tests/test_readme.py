"""What the README says is what the project holds."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that makes the tables; benchmarks are no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bars")


def test_tables_are_made_from_committed_results(bars: Any) -> None:
    text = README.read_text(encoding="utf-8")
    assert "<!-- benchmarks: benchmarks/results/" in text
    assert "<!-- breakdown: benchmarks/results/" in text
    assert bars.rewrite_readme(README) == text, "run `python benchmarks/bars.py`"


def test_the_breakdown_of_a_step(bars: Any, tmp_path: Path) -> None:
    parts = {"ubp_fast": {"linear layers": 30.0, "ours only": 10.0}, "rival": {"linear layers": 100.0}}
    cases = {"one": {"figure": "a step", "facts": {"cpu_ms_by_part": parts}}, "other": {"figure": "without parts"}}
    readme = tmp_path / "README.md"
    for stored, expected in (
        (cases, ["| linear layers | 30.0 ms | 75% | 100.0 ms | 100% |", "| ours only | 10.0 ms | 25% |  |  |"]),
        ({"other": cases["other"]}, ["(not measured yet)"]),
    ):
        (tmp_path / "results.json").write_text(json.dumps({"cases": stored}), encoding="utf-8")
        readme.write_text("before <!-- breakdown: results.json -->\n\nold\n\n<!-- end --> after", encoding="utf-8")
        text = bars.rewrite_readme(readme)
        assert all(line in text for line in expected)
        assert text.startswith("before <!-- breakdown") and text.endswith("<!-- end --> after") and "old" not in text


def test_bold_is_what_the_row_orders_do_not_separate_from_the_best(bars: Any) -> None:
    draws = {
        "best": [[0.80, 0.82, 0.84]],
        "level, two seeds": [[0.79, 0.84, 0.84], [0.79, 0.82, 0.80]],  # ahead by .01, -.01 and .02 in its orders
        "always behind": [[0.799, 0.819, 0.839]],
        "one order": [[0.80]],
        "one order, behind": [[0.79]],
    }
    rows = {
        name: {
            "auroc": {"churn": seeds},
            "tasks": {"churn": {"mean": sum(map(sum, seeds)) / sum(map(len, seeds)), "standard_error": None}},
        }
        for name, seeds in draws.items()
    }
    table = bars.components_markdown({"rows": rows, "oracle": None})
    bold = {line.split("|")[1].strip() for line in table.splitlines() if "**" in line}
    assert bold == {"best", "level, two seeds", "one order"}


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
