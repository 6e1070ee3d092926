"""Figures against bars: the table at the end of a run, whether all bars were reached, and the tables of the documents.

`python benchmarks/bars.py` makes the tables of README.md and docs/ again from the committed results that they name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contest import Ratio

# The loops that a share of the peak is taken of.
PEAKS = ("bare multiply-adds", "bare dot products")
# The row that `best_possible.py` makes.
BEST_POSSIBLE = "the best possible, given the past"
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
    """The stored cases as a table: figure, our time, each rival's time, ratio and bar."""
    lines = ["| figure | ours | rival | rival's time | ratio | bar |", "|---|---|---|---|---|---|"]
    for case in sorted(cases.values(), key=lambda case: case["figure"]):
        for item in case["ratios"]:
            bar = "" if item["bar"] is None else f"{item['bar']:g}x" + ("" if item["is_ok"] else " **missed**")
            lines.append(f"| {' | '.join(_ratio_cells(case, item))} | {bar} |")
    return "\n".join(lines)


def _ratio_cells(case: dict[str, Any], item: dict[str, Any]) -> tuple[str, str, str, str, str]:
    name = next((one for one in case["timings"] if one != item["rival"] and one in item["figure"]), "ubp_fast")
    ours, theirs = (_time(case["timings"].get(one)) for one in (name, item["rival"]))
    return item["figure"], ours, item["rival"], theirs, f"{item['ratio']:.2f}x"


def headline(named: str, root: Path) -> str:
    """A table of single figures from several results.

    Each line of `named` is `FILE: FIGURE` or, for what `components.py` wrote, `FILE: TASK of ROW over ROW`, and for
    `readers.py` `FILE: READER of ROW over ROW`. Of several rivals of a figure the strongest is shown; the peak of
    the processor is none.

    Raises:
        ValueError: a file does not hold what its line names.
    """
    lines = ["| figure | ours | compared with | theirs | lead |", "|---|---|---|---|---|"]
    for line in named.strip().splitlines():
        path, _, wanted = line.strip().partition(": ")
        stored = json.loads((root / path).read_text(encoding="utf-8"))
        if "rows" in stored:
            cells = _lead_cells(stored["rows"], wanted)
        elif "readers" in stored:
            cells = _reader_cells(stored, wanted)
        else:
            items = [(case, item) for case in stored["cases"].values() for item in case.get("ratios", ())]
            found = [(case, item) for case, item in items if item["figure"] == wanted and item["rival"] not in PEAKS]
            cells = _ratio_cells(*min(found, key=lambda pair: pair[1]["ratio"])) if found else None
        if cells is None:
            raise ValueError(f"headline: {path} must hold '{wanted}', got none")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _lead_cells(rows: dict[str, Any], wanted: str) -> tuple[str, str, str, str, str] | None:
    task, _, names = wanted.partition(" of ")
    entries = [rows[name]["tasks"].get(task) if name in rows else None for name in names.split(" over ")]
    if len(entries) != 2 or None in entries:
        return None
    lead = entries[0]["mean"] - entries[1]["mean"]
    name, other = names.split(" over ")
    return f"AUROC, {task}: {name}", _score(entries[0]), other, _score(entries[1]), f"{lead:+.3f}"


def _reader_cells(report: dict[str, Any], wanted: str) -> tuple[str, str, str, str, str] | None:
    reader, _, names = wanted.partition(" of ")
    rows, named = report["readers"].get(reader, {}), names.split(" over ")
    if len(named) != 2 or not set(named) <= set(rows):
        return None
    ours, theirs = (_mean(rows[name], _different_tasks(report)) for name in named)
    data = f"{report['data']}, " if "data" in report else ""
    figure = f"AUROC, {data}{reader}, mean of tasks: {named[0]}"
    return figure, f"{ours:.4f}", named[1], f"{theirs:.4f}", f"{ours - theirs:+.4f}"


def _different_tasks(report: dict[str, Any]) -> list[str]:
    """Tasks of `readers.py`; churn stands for conversion where both ask the same."""
    first = next(iter(report["readers"].values()))["profile"]
    return [task for task in first if task != "conversion" or first["churn"] != first["conversion"]]


def _mean(row: dict[str, Any], tasks: list[str]) -> float:
    return float(np.mean([row[task]["mean"] for task in tasks]))


def _score(entry: dict[str, Any]) -> str:
    error = entry["standard_error"]
    return f"{entry['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")


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
    """What `components.py` wrote as a table: AUROC and its standard error.

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
            mean, *error = _score(row["tasks"][task]).split(" ", 1)
            cells.append(" ".join([f"**{mean}**" if _is_level(row, best[task], task) else mean, *error]))
        draws = sorted({len(seeds[0]) for seeds in row["auroc"].values()})
        orders = str(draws[0]) if len(draws) == 1 else f"{draws[0]} to {draws[-1]}"
        cells += [orders, str(len(next(iter(row["auroc"].values()))))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if report["oracle"]:
        cells = [f"{report['oracle'][task]:.4f}" if task in report["oracle"] else "" for task in tasks]
        lines.append(f"| the truth (oracle) | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def readers_markdown(report: dict[str, Any]) -> str:
    """What `readers.py` wrote as a table: AUROC by reader, and how far the profile is ahead of each row in the mean.

    Labels and row orders are the same for all rows of a reader.
    """
    tasks = _different_tasks(report)
    names = " | ".join(task.removeprefix("propensity_") for task in tasks)
    lines = [f"| reader | reads | {names} | mean | profile leads by |", "|---" * (len(tasks) + 4) + "|"]
    for reader, rows in report["readers"].items():
        for name, row in rows.items():
            mean = _mean(row, tasks)
            lead = "" if name == "profile" else f"{_mean(rows['profile'], tasks) - mean:+.4f}"
            cells = [f"{row[task]['mean']:.4f}" for task in tasks]
            lines.append(f"| {reader} | {name} | {' | '.join(cells)} | {mean:.4f} | {lead} |")
    return "\n".join(lines)


def spend_markdown(report: dict[str, Any]) -> str:
    """What `spend.py` wrote as a table: AUROC in the mean of the days, and how far the vector is ahead of each row."""
    asked = report["spend"]
    lines = [f"| reads | {' | '.join(asked)} |", "|---" * (len(asked) + 1) + "|"]
    for row in next(iter(asked.values())):
        found = [of_rows[row] for of_rows in asked.values()]
        cells = [f"{np.mean(one['auroc']):.4f}" for one in found]
        if any(one["error"] for one in found):
            cells = [f"{cell}: {one['lead']:+.4f} ± {one['error']:.4f}" for cell, one in zip(cells, found, strict=True)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rivals_markdown(report: dict[str, Any]) -> str:
    """What `rivals.py` wrote as a table: mean AUROC of the tasks, alone and as what is added to features and profiles.

    After several seeds mean and standard error; what is added is paired seed by seed.
    """
    heads = "reader | vectors | columns | CPU minutes | alone | beside features | beside profile | beside that of best"
    lines = [f"| {heads} |", "|---" * 8 + "|"]
    for reader, rows in report["rivals"].items():
        first = rows["features"][0]
        tasks = [task for task in first if task != "conversion" or first["churn"] != first["conversion"]]
        means = {name: np.array([[seed[task] for task in tasks] for seed in row]).mean(1) for name, row in rows.items()}
        bases = ("features", "profile", "profile of best")
        cells = [_of_seeds(means[name], ".4f") if name in means else "" for name in bases]
        lines.append(f"| {reader} | none |  |  |  | {' | '.join(cells)} |")
        for name in dict.fromkeys(name.rpartition(" + ")[2] for name in rows if name not in bases):
            minutes = [seed[name] for seed in report["cpu_minutes"].values() if name in seed]
            cells = [str(report["width"].get(name, "")), f"{np.mean(minutes):.1f}" if minutes else ""]
            cells.append(_of_seeds(means[name], ".4f") if name in means else "")
            for base in bases:
                both = means.get(f"{base} + {name}")
                cells.append("" if both is None else _of_seeds(both - means[base][: len(both)], "+.4f"))
            lines.append(f"| {reader} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _of_seeds(values: np.ndarray, digits: str) -> str:
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{values.mean():{digits}}{error}"


def variations_markdown(report: dict[str, Any]) -> str:
    """What `constants.py` wrote as a table: AUROC of the unvaried vectors, and how far each variation is from them."""
    found = report["variations"]
    tasks = list(next(iter(found.values()))["seeds"][0])
    names = " | ".join(task.removeprefix("propensity_") for task in tasks)
    lines = [f"| vectors | varied | {names} | mean |", "|---" * (len(tasks) + 3) + "|"]
    for name, one in found.items():
        values = np.array([[seed[task] for task in tasks] for seed in one["seeds"]])
        is_base = name == one["of"]
        if not is_base:
            unvaried = found[one["of"]]["seeds"][: len(values)]
            values = values - np.array([[seed[task] for task in tasks] for seed in unvaried])
        by_seed = np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)
        cells = [f"{mean:.4f}" if is_base else f"{mean:+.4f}" for mean in by_seed.mean(axis=0)]
        if len(by_seed) > 1:
            cells[-1] += f" ± {by_seed[:, -1].std(ddof=1) / len(by_seed) ** 0.5:.4f}"
        lines.append(f"| {one['of']} | {'' if is_base else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def possible_markdown(report: dict[str, Any]) -> str:
    """What `best_possible.py` wrote as a table; after each AUROC its part of what is possible above chance."""
    rows: dict[str, dict[str, float]] = report["possible"]
    best = rows[BEST_POSSIBLE]
    names = " | ".join(task.removeprefix("propensity_") for task in best)
    lines = [f"| who | {names} |", "|---" * (len(best) + 1) + "|"]
    for name, row in rows.items():
        cells = [
            f"{row[task]:.4f} ({(row[task] - 0.5) / (best[task] - 0.5):.1%})" if task in row else "" for task in best
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lengths_markdown(report: dict[str, Any]) -> str:
    """What `learned.py --lengths` wrote as a table: AUROC by length of history, and how far the first are ahead.

    A task that leaves clients out has fewer in a group than the table says; one that asks the same as an earlier one is
    left out.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = report["lengths"]
    every = next(iter(found.values()))
    profile = {task: one for task, one in every.items() if one not in [*every.values()][: [*every].index(task)]}
    names = " | ".join(task.removeprefix("propensity_") for task in profile)
    lines = [f"| events before | clients | reads | {names} |", "|---" * (len(profile) + 3) + "|"]
    for group in max(profile.values(), key=lambda groups: sum(one["clients"] for one in groups)):
        low, high = group["from"], group["to"]
        ends = f"{low:.0f}" if low == high else f"{low:.0f}-{high:,.0f}"
        if all(_within(one, low, high) is None for one in profile.values()):
            lines.append(f"| {ends} | {group['clients']:,} | no label that enough have |{' |' * len(profile)}")
            continue
        for name, tasks in found.items():
            cells = [
                _length_cell(_within(tasks[task], low, high), _within(profile[task], low, high)) for task in profile
            ]
            lines.append(f"| {ends} | {group['clients']:,} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _within(groups: list[dict[str, Any]], low: float, high: float) -> dict[str, Any] | None:
    return next((one for one in groups if low <= one["from"] <= high and one["auroc"] is not None), None)


def _length_cell(one: dict[str, Any] | None, first: dict[str, Any] | None) -> str:
    if one is None or first is None:
        return ""
    return f"{one['auroc']:.4f} " + (
        f"± {one['error']:.4f}" if one is first else f"({first['auroc'] - one['auroc']:+.4f})"
    )


def shards_markdown(report: dict[str, Any]) -> str:
    """What `shards.py` wrote as a table per part; memory is that of the largest process."""
    heads = {"features": "store and decayed features", "run": "`stages=[profiles]`"}
    tables = []
    for part, head in heads.items():
        lines = [f"| {head} | seconds | CPU | memory | with mapped files |", "|---|---|---|---|---|"]
        for name, one in report.get(part, {}).items():
            made = one.get("shards")
            name = f"{name}, {made} made" if made and not name.startswith(f"{made} ") else name
            name = name if one.get("compared", True) else f"{name}, bytes not compared"
            memory = f"{one['peak_anonymous_mb']:,} MB"
            memory += f", of all {one['peak_of_all_mb']:,} MB" if "peak_of_all_mb" in one else ""
            cells = f"{one['cpu_seconds']:.1f} s | {memory} | {one['peak_resident_mb']:,} MB"
            lines.append(f"| {name} | {one['seconds']:.1f} s | {cells} |")
        tables += ["\n".join(lines)] if part in report else []
    return "\n\n".join(tables)


def _is_level(row: dict[str, Any], best: dict[str, Any], task: str) -> bool:
    ours, theirs = (np.mean(one["auroc"][task], axis=0) for one in (row, best))
    shared = min(len(ours), len(theirs))
    lead = theirs[:shared] - ours[:shared]
    error = lead.std(ddof=1) / shared**0.5 if shared > 1 else 0.0
    return bool(lead.mean() <= 2 * error)


def rewrite(text: str, root: Path) -> str:
    """A document with the tables between its markers and `<!-- end -->` made again; files are named from `root`.

    `<!-- benchmarks: FILE -->` is the table of a result, `<!-- breakdown: FILE -->` the time of training steps by part,
    `<!-- headline: LINES -->` one table of single figures, see `headline`.
    """

    def table_of(found: re.Match[str]) -> str:
        opening, kind, named = found[0], found[1], found[2]
        if kind == "headline":
            table = headline(named, root)
        else:
            stored = json.loads((root / named.strip()).read_text(encoding="utf-8"))
            make = {"benchmarks": markdown, "breakdown": breakdown}[kind]
            named_by = {
                "lengths": lengths_markdown,
                "readers": readers_markdown,
                "rows": components_markdown,
                "rivals": rivals_markdown,
                "spend": spend_markdown,
                "variations": variations_markdown,
                "possible": possible_markdown,
                "run": shards_markdown,
                "features": shards_markdown,
            }
            kinds = [show for key, show in named_by.items() if key in stored]
            table = kinds[0](stored) if kinds else make(stored["cases"])
        return f"{opening[: opening.index('-->') + 3]}\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- (benchmarks|breakdown|headline):\s+(.*?) ?-->.*?<!-- end -->", table_of, text, flags=re.S)


def documents(root: Path) -> list[Path]:
    """README.md and everything in docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


if __name__ == "__main__":
    home = Path(__file__).resolve().parent.parent
    for document in documents(home):
        document.write_text(rewrite(document.read_text(encoding="utf-8"), home), encoding="utf-8")
