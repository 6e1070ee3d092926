"""Figures against bars: the table at the end of a run, whether all bars were reached, and the tables of the README.

`python benchmarks/bars.py` makes the README's tables again from the committed results that it names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contest import Ratio

HEADER = ("figure", "rival", "ratio", "CPU ratio", "bar", "ok")


def table(ratios: Sequence[Ratio]) -> str:
    """The ratios as aligned text, one line each."""
    rows = [HEADER]
    for item in ratios:
        bar = "" if item.bar is None else f">= {item.bar:g}x"
        verdict = "" if item.bar is None else ("yes" if item.is_ok else "NO")
        rows.append((item.figure, item.rival, f"{item.ratio:.2f}x", f"{item.cpu_ratio:.2f}x", bar, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def missed(ratios: Sequence[Ratio]) -> list[Ratio]:
    """Those below their bar; NaN is below."""
    return [item for item in ratios if not item.is_ok]


def markdown(cases: dict[str, Any]) -> str:
    """The stored cases as a README table: figure, our time, each rival's time, ratio and bar."""
    lines = ["| figure | ours | rival | rival's time | ratio | bar |", "|---|---|---|---|---|---|"]
    for case in sorted(cases.values(), key=lambda case: case["figure"]):
        for item in case["ratios"]:
            name = next((one for one in case["timings"] if one != item["rival"] and one in item["figure"]), "ubp_fast")
            ours, theirs = case["timings"].get(name), case["timings"].get(item["rival"])
            bar = "" if item["bar"] is None else f"{item['bar']:g}x" + ("" if item["is_ok"] else " **missed**")
            times = [_time(timing) for timing in (ours, theirs)]
            lines.append(
                f"| {item['figure']} | {times[0]} | {item['rival']} | {times[1]} | {item['ratio']:.2f}x | {bar} |"
            )
    return "\n".join(lines)


def breakdown(cases: dict[str, Any]) -> str:
    """Where the time of the stored training steps goes, a table per step: part, our CPU time, the rival's."""
    tables = []
    for case in sorted(cases.values(), key=lambda case: case["figure"]):
        parts = case.get("facts", {}).get("cpu_ms_by_part")
        if parts is None:
            continue
        ours, theirs = parts["ubp_fast"], parts["rival"]
        lines = [f"| {case['figure']} | ours | share | rival's | share |", "|---|---|---|---|---|"]
        for name in dict.fromkeys([*ours, *theirs]):
            cells = [cell for one in (ours, theirs) for cell in _part(one.get(name), sum(one.values()))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) if tables else "(not measured yet)"


def _part(milliseconds: float | None, whole: float) -> tuple[str, str]:
    return ("", "") if milliseconds is None else (f"{milliseconds:.1f} ms", f"{milliseconds / whole:.0%}")


def _time(timing: dict[str, float] | None) -> str:
    if timing is None:
        return ""
    milliseconds = timing["median_ms"] if timing["rounds"] > 1 else timing["cpu_ms"]
    return f"{milliseconds / 1e3:.1f} s" if milliseconds >= 10_000 else f"{milliseconds:.1f} ms"


def components_markdown(report: dict[str, Any]) -> str:
    """What `components.py` wrote as a README table: AUROC and its standard error.

    Bold in a task: the best row, and those that its lead does not separate, paired by row order, by more than two
    standard errors.
    """
    rows = {name: row for name, row in report["rows"].items() if row["auroc"]}  # not those without any label
    tasks = list(dict.fromkeys(task for row in rows.values() for task in row["tasks"]))
    best = {
        task: max(
            (row for row in rows.values() if task in row["tasks"]),
            key=lambda row, task=task: row["tasks"][task]["mean"],
        )
        for task in tasks
    }
    lines = [
        f"| profile | {' | '.join(task.removeprefix('propensity_') for task in tasks)} | orders | seeds |",
        "|---" * (len(tasks) + 3) + "|",
    ]
    for name, row in rows.items():
        cells = []
        for task in tasks:
            if task not in row["tasks"]:
                cells.append("")
                continue
            entry = row["tasks"][task]
            mean = f"{entry['mean']:.4f}"
            error = "" if entry["standard_error"] is None else f" ± {entry['standard_error']:.4f}"
            cells.append(f"{f'**{mean}**' if _is_level(row, best[task], task) else mean}{error}")
        draws = sorted({len(seeds[0]) for seeds in row["auroc"].values()})
        orders = str(draws[0]) if len(draws) == 1 else f"{draws[0]} to {draws[-1]}"
        cells += [orders, str(len(next(iter(row["auroc"].values()))))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if report["oracle"]:
        cells = [f"{report['oracle'][task]:.4f}" if task in report["oracle"] else "" for task in tasks]
        lines.append(f"| the truth (oracle) | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def _is_level(row: dict[str, Any], best: dict[str, Any], task: str) -> bool:
    ours, theirs = (np.mean(one["auroc"][task], axis=0) for one in (row, best))
    shared = min(len(ours), len(theirs))
    lead = theirs[:shared] - ours[:shared]
    error = lead.std(ddof=1) / shared**0.5 if shared > 1 else 0.0
    return bool(lead.mean() <= 2 * error)


def rewrite_readme(readme: Path) -> str:
    """The README with every table between `<!-- benchmarks: FILE -->` and `<!-- end -->` made again from FILE.

    `<!-- breakdown: FILE -->` is the time of training steps by part.
    """

    def table_of(found: re.Match[str]) -> str:
        stored = json.loads((readme.parent / found[2]).read_text(encoding="utf-8"))
        make = {"benchmarks": markdown, "breakdown": breakdown}[found[1]]
        table = components_markdown(stored) if "rows" in stored else make(stored["cases"])
        return f"<!-- {found[1]}: {found[2]} -->\n\n{table}\n\n<!-- end -->"

    text = readme.read_text(encoding="utf-8")
    return re.sub(r"<!-- (benchmarks|breakdown): (\S+) -->.*?<!-- end -->", table_of, text, flags=re.S)


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "README.md"
    path.write_text(rewrite_readme(path), encoding="utf-8")
