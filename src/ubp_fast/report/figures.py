"""The figures of a report as HTML: one sentence that says what is seen, panels, and the numbers behind them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from itertools import pairwise
from typing import Any

from ubp_fast.evaluation.leaderboard import Difference
from ubp_fast.report.svg import HEIGHT, SERIES, Panel

Spread = tuple[float | None, float | None]
Scores = Mapping[str, Spread]
# Distance between series at one category.
STEP = 0.16
# Groups of clients by activity on the map.
STEPS = 5
WHISKERS = "Whiskers are one standard error."


def score_figure(readers: Mapping[str, Mapping[str, Scores]]) -> str:
    """AUROC by task: a panel per reader, a colour per component.

    Args:
        readers: reader -> component -> task -> (AUROC, standard error over repetitions or None).
    """
    components = list(dict.fromkeys(component for found in readers.values() for component in found))
    limits = _limits(value for found in readers.values() for tasks in found.values() for value in _ends(tasks.values()))
    panels, rows = [], []
    for reader, found in readers.items():
        tasks = list(dict.fromkeys(task for values in found.values() for task in values))
        panel = Panel(reader, [short_name(task) for task in tasks], limits, "task", "AUROC")
        for component, values in found.items():
            number = components.index(component)
            _dots(panel, [values.get(task, (None, None)) for task in tasks], number, len(components))
            rows += [[reader, component, task, *map(number_text, values[task])] for task in tasks if task in values]
        panels.append(panel.svg())
    says = (
        "How well each kind of model ranks clients by what they do in the scored window, from the profile and from the"
        f" baseline; .5 is chance, 1 is perfect. {WHISKERS} There are none with one repetition (evaluation.orders=1)."
    )
    return framed(says, panels, components, (["reader", "vectors", "task", "AUROC", "error"], rows))


def difference_figure(paired: Mapping[str, Mapping[str, Difference]], first: str, second: str) -> str:
    """What `first` leads `second` by in each task, a panel per reader.

    Args:
        paired: reader -> task -> difference.
        first: name of the one that should lead.
        second: name of the other.
    """
    spreads = [(one.mean, one.standard_error) for tasks in paired.values() for one in tasks.values()]
    limits = _limits([0.0, *_ends(spreads)])
    panels, rows = [], []
    for reader, tasks in paired.items():
        panel = Panel(reader, [short_name(task) for task in tasks], limits, "task", "difference of scores")
        panel.reference([(-0.5, 0), (len(tasks) - 0.5, 0)])
        _dots(panel, [(one.mean, one.standard_error) for one in tasks.values()], 0, 1)
        panels.append(panel.svg())
        rows += [
            [reader, task, number_text(one.mean, True), number_text(one.standard_error)] for task, one in tasks.items()
        ]
    says = (
        f"{first} less {second}, paired by row order or sample of labels, so that what both share cancels: the"
        f" challenge's score for the network, AUROC for the others; above 0 the profile leads. {WHISKERS}"
    )
    return framed(says, panels, (), (["reader", "task", "difference", "error"], rows))


def roc_figure(roc: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """ROC curves: a panel per task."""
    panels, rows = [], []
    for task, found in _by_task(roc).items():
        panel = Panel(short_name(task), (0, 1), (0, 1), "others taken for such (share)", "found (share)")
        panel.reference([(0, 0), (1, 1)])
        for number, (component, curve) in enumerate(found.items()):
            panel.line(list(zip(curve["false"], curve["true"], strict=False)), number)
            rows.append(
                [task, component, number_text(curve["auroc"]), number_text(curve["error"]), str(curve["labels"])]
            )
        panels.append(panel.svg())
    says = (
        "Of the clients who have a label, the share that the linear reader finds, at each share of the others that it"
        " takes for such; the mean over a task's labels. The dashed line is chance."
    )
    return framed(says, panels, list(roc), (["task", "vectors", "AUROC", "error", "labels"], rows))


def calibration_figure(calibration: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """Predicted against observed shares: a panel per task."""
    panels, rows = [], []
    for task, found in _by_task(calibration).items():
        most = max((max(group[:2]) for groups in found.values() for group in groups), default=1.0) * 1.05
        panel = Panel(short_name(task), (0, most), (0, most), "predicted (share)", "observed (share)")
        panel.reference([(0, 0), (most, most)])
        for number, (component, groups) in enumerate(found.items()):
            points = [(group[0], group[1]) for group in groups]
            panel.line(points, number)
            panel.dots(points, number)
            rows += [[task, component, f"{a:.4f}", f"{b:.4f}", f"{int(c):,}"] for a, b, c in groups]
        panels.append(panel.svg())
    says = (
        "Whether a predicted probability can be taken at its word: pairs of client and label in groups by what the"
        " linear reader, which learned in the window before, predicts for them, and how many have the label. On the"
        " dashed line both are equal; below it the reader promises too much."
    )
    return framed(says, panels, list(calibration), (["task", "vectors", "predicted", "observed", "pairs"], rows))


def size_figure(sizes: Mapping[str, Mapping[str, Sequence[Sequence[float | None]]]]) -> str:
    """AUROC over the number of clients learned from: a panel per task."""
    panels, rows = [], []
    for task, found in _by_task(sizes).items():
        points = [point for curve in found.values() for point in curve if point[1] is not None]
        if not points:
            continue
        counts = [float(point[0] or 1) for point in points]
        limits = _limits(_ends((point[1], point[2]) for point in points))
        panel = Panel(
            short_name(task), (min(counts) * 0.85, max(counts) * 1.15), limits, "clients learned from", "AUROC", True
        )
        for number, (component, curve) in enumerate(found.items()):
            known = [point for point in curve if point[1] is not None]
            line = [(float(point[0] or 1), float(point[1] or 0)) for point in known]
            panel.line(line, number)
            panel.dots(line, number, [point[2] for point in known])
            rows += [
                [task, component, f"{point[0]:,.0f}", number_text(point[1]), number_text(point[2])] for point in known
            ]
        ticks = [(count, f"{count:,.0f}") for count in sorted(set(counts))]
        panels.append(panel.svg(ticks))
    says = (
        "What more clients to learn from would bring: the linear reader learns from some of one half of the clients"
        f" and is scored on the other half. {WHISKERS}"
    )
    return framed(says, panels, list(sizes), (["task", "vectors", "clients", "AUROC", "error"], rows))


def group_figure(groups: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], what: str, says: str) -> str:
    """AUROC among groups of clients, or in stretches of time: a panel per task.

    Args:
        groups: component -> task -> groups with the values "from" and "to".
        what: what the values are, with their unit.
        says: what is seen.
    """
    panels, rows = [], []
    for task, found in _by_task(groups).items():
        names = [_limits_text(group) for group in next(iter(found.values()), ())]
        spreads = {name: [(group["auroc"], group["error"]) for group in one] for name, one in found.items()}
        values = _ends(spread for one in spreads.values() for spread in one)
        if not values:
            continue
        panel = Panel(short_name(task), names, _limits(values), what, "AUROC")
        for number, (component, one) in enumerate(found.items()):
            _dots(panel, spreads[component], number, len(found))
            rows += [
                [
                    task,
                    component,
                    _limits_text(group),
                    f"{group['clients']:,}" if "clients" in group else "",
                    str(group["labels"]),
                    number_text(group["auroc"]),
                    number_text(group["error"]),
                ]
                for group in one
            ]
        panels.append(panel.svg())
    header = ["task", "vectors", what, "clients", "labels", "AUROC", "error"]
    return framed(f"{says} {WHISKERS}", panels, list(groups), (header, rows))


def block_figure(blocks: Mapping[str, Mapping[str, float | None]]) -> str:
    """What the AUROC loses without each block: a panel per task."""
    panels, rows = [], []
    for task, found in blocks.items():
        values = {name: value or 0.0 for name, value in found.items()}
        low, high = min([0.0, *values.values()]), max([0.001, *values.values()])
        room = 0.05 * (high - low)
        panel = Panel(
            short_name(task), (low - room * (low < 0), high + room), list(values), "AUROC lost", "", height=HEIGHT - 10
        )
        panel.bars(list(values.values()), 0)
        panels.append(panel.svg())
        rows += [[task, name, number_text(value, True)] for name, value in found.items()]
    says = (
        "Which blocks of the profile the linear reader leans on: AUROC that it loses when a block's columns are those"
        " of the mean client. Blocks that say the same stand in for each other, so little is not nothing."
    )
    return framed(says, panels, (), (["task", "block", "AUROC lost"], rows))


def event_figure(data: Mapping[str, Any]) -> str:
    """Events per week: a panel per kind."""
    panels, rows = [], []
    weeks = [datetime.fromtimestamp(start, timezone.utc) for start in data["weeks"]]
    step = max(1, -(-len(weeks) // 5))
    ticks = [(float(number), f"{weeks[number]:%b %y}") for number in range(0, len(weeks), step)]
    cutoff = (data["cutoff_s"] - data["weeks"][0]) / (7 * 86_400) - 0.5
    end = (data["end_s"] - data["weeks"][0]) / (7 * 86_400) - 0.5
    for kind, counts in data["events"].items():
        panel = Panel(kind, (-0.6, max(len(weeks), 2) - 0.4), (0, max([*counts, 1]) * 1.05), "week", "events in a week")
        panel.bars(counts, 0)
        panel.band(cutoff, max(end, cutoff + 0.2), "cutoff")
        panels.append(panel.svg(ticks))
        rows += [[kind, f"{week:%Y-%m-%d}", f"{count:,}"] for week, count in zip(weeks, counts, strict=True)]
    says = (
        "Events of each kind in every week (UTC) as they were read. Vectors see what lies left of the cutoff; the"
        " shaded windows behind it are what readers learn from and are scored on. The last week may be cut off."
    )
    return framed(says, panels, (), (["kind", "week from", "events"], rows))


def loss_figure(losses: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Loss terms over the training: a panel per model.

    Args:
        losses: model -> mean loss terms of consecutive parts of its training; `epoch` says where each ends.
    """
    terms = list(dict.fromkeys(term for history in losses.values() for part in history for term in part))
    terms = [term for term in terms if term != "epoch"]
    panels, rows = [], []
    for model, history in losses.items():
        known = [part[term] for part in history for term in terms if term in part and math.isfinite(part[term])]
        epochs = [part["epoch"] for part in history]
        if not known:
            continue
        panel = Panel(model, (0, max(epochs)), _limits(known), "epoch", "loss")
        for number, term in enumerate(terms):
            points = [(part["epoch"], part[term]) for part in history if term in part and math.isfinite(part[term])]
            if points:
                panel.line(points, number)
                panel.dots(points[-1:], number)
        panels.append(panel.svg())
        rows += [[model, f"{part['epoch']:.2f}", *(number_text(part.get(term)) for term in terms)] for part in history]
    says = "Mean of each loss term over consecutive parts of the training; the dot is where it ended."
    return framed(says, panels, terms, (["model", "epoch", *terms], rows))


def drift_figure(drift: Mapping[str, Any]) -> str:
    """Inputs that moved, categories that moved, and how alike the vectors are."""
    before, now = drift["cutoffs"]
    inputs = drift["inputs"]
    names = [one["name"] for one in inputs]
    most = max([0.3, *(one["psi"] * 1.05 for one in inputs)])
    panel = Panel("inputs", (0, most), names, "population stability index", "", height=60 + 24 * len(names) + 20)
    for level in (0.1, 0.25):
        panel.reference([(level, -0.5), (level, len(names) - 0.5)])
    panel.bars([one["psi"] for one in inputs], 0)
    panels = [panel.svg()]
    vectors = drift["vectors"]
    blocks = [one["block"] or "profile" for one in vectors]
    panel = Panel("vectors", blocks, (0, 1), "block", "likeness (1: the same)")
    for number, measure in enumerate(("cka", "neighbours")):
        _dots(panel, [(one[measure], None) for one in vectors], number, 2)
    panels.append(panel.svg())
    both, new, gone = (drift["clients"][name] for name in ("both", "new", "gone"))
    says = (
        f"How far this run ({now}) has moved from the earlier one ({before}): {both:,} clients are in both, {new:,} are"
        f" new, {gone:,} are gone. Inputs: stability of each number's distribution over clients, below the first dashed"
        " line (.1) is little, above the second (.25) much. Vectors of clients in both: linear kernel alignment, and"
        " the share of the ten nearest clients that stay."
    )
    rows = [[one["name"], "stability index", number_text(one["psi"])] for one in inputs]
    for one in vectors:
        for measure in ("cka", "neighbours", "explained"):
            rows.append([one["block"] or "profile", measure, number_text(one[measure])])
    rows += [[f"category {name}", "share of purchases", f"{a:.2%} to {b:.2%}"] for name, a, b in drift["categories"]]
    return framed(says, panels, ("alignment (CKA)", "nearest that stay"), (["of", "measure", "value"], rows))


def client_map(portrait: Mapping[str, Any]) -> str:
    """The map of clients, which a reader colours and asks."""
    found = portrait.get("map")
    if found is None:
        return f'<p class="note">{escape(portrait["map_missing"])}</p>'
    size = 340.0
    room = 8.0
    scale = (size - 2 * room) / 1000
    order = sorted(found["events"])
    edges = [order[-(-len(order) * step // STEPS) - 1] for step in range(1, STEPS + 1)]
    marks = []
    for position, (x, y) in enumerate(zip(found["x"], found["y"], strict=True)):
        step = bisect_left(edges, found["events"][position])
        main = found["main"][position]
        kinds = f"a{step} m{main if main >= 0 else 'x'} b{found['buys'][position]}"
        marks.append(f'<circle class="{kinds}" cx="{room + x * scale:.1f}" cy="{room + y * scale:.1f}" r="2.6"/>')
    activity = {
        step: f"{low + 1:,} to {high:,}" for step, (low, high) in enumerate(pairwise([-1, *edges])) if low < high
    }
    legends = {
        "activity": [(f"a{step}", f"{text} events") for step, text in activity.items()],
        "main": [(f"m{number}", name) for number, name in enumerate(found["mains"])] + [("mx", "other")],
        "buys": [("b1", "buys in the window behind the cutoff"), ("b0", "does not")],
    }
    options = {"activity": "activity", "main": f"main {portrait['item']}", "buys": "purchase behind the cutoff"}
    chosen = "".join(
        f'<label><input type="radio" name="by" value="{name}"{" checked" if name == "activity" else ""}> '
        f"{escape(text)}</label>"
        for name, text in options.items()
    )
    keys = "".join(
        f'<p class="legend by-{name}">' + "".join(_key(kind, text) for kind, text in entries) + "</p>"
        for name, entries in legends.items()
    )
    of = f"{len(found['x']):,} of {portrait['clients']:,}" if len(found["x"]) < portrait["clients"] else "All"
    block = "the near block of their profiles" if portrait["has_near"] else "their profiles"
    says = (
        f"{of} clients by {block}: those who are alike lie close (t-SNE; distances between far groups mean little, and"
        " the axes have no unit). Point at a client, or tap it, for what it did."
    )
    return (
        f'<figure id="client-map" data-by="activity"><figcaption>{escape(says)}</figcaption><div class="choice">Colour:'
        f' {chosen}</div>{keys}<div class="map"><svg viewBox="0 0 {size:.0f} {size:.0f}" role="img"'
        f' aria-label="map of clients">{"".join(marks)}</svg><div class="tip" hidden></div></div>'
        f"{_activity_table(found)}</figure>"
    )


def neighbour_tables(portrait: Mapping[str, Any]) -> str:
    """A few clients beside those who are nearest, by what they bought."""
    tables = []
    for number, entry in enumerate(portrait["neighbours"]):
        letter = chr(ord("A") + number)
        heads = [f"client {letter}", *(f"nearest {one}" for one in range(1, len(entry["counts"])))]
        names = entry.get("ids")
        head = ""
        for one, text in enumerate(heads):
            told = [names[one]] if names else []
            told += [f"{entry['events'][one]:,} events"] + ([f"cos {entry['cosine'][one]:.2f}"] if one else [])
            head += f'<th>{escape(text)}<br><span class="small">{escape(", ".join(told))}</span></th>'
        rows = ""
        totals = [max(sum(counts), 1) for counts in entry["counts"]]
        for item, name in enumerate(entry["items"]):
            cells = "".join(
                f'<td style="--part:{min(counts[item] / total * 1.6, 1):.2f}" class="part">{counts[item] or ""}</td>'
                for counts, total in zip(entry["counts"], totals, strict=True)
            )
            rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
        tables.append(
            f'<div class="wide"><table class="baskets"><tr><th>{escape(portrait["item"])}</th>{head}</tr>{rows}'
            "</table></div>"
        )
    if not tables:
        return ""
    says = (
        f"Clients from little to much activity beside the three nearest by cosine, and how often each bought what they"
        f" buy most (the {portrait['item']} and purchases before the cutoff). The darker a cell, the larger its part of"
        " the purchases shown."
    )
    return f"<figure><figcaption>{escape(says)}</figcaption>{''.join(tables)}</figure>"


def framed(
    says: str,
    panels: Sequence[str],
    legend: Sequence[str] = (),
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
) -> str:
    """A figure: what it says, its panels, what the colours mean, and the numbers behind it."""
    keys = "".join(_key(f"c{number % SERIES}", name) for number, name in enumerate(legend))
    numbers = ""
    if table is not None:
        numbers = f"<details><summary>The numbers</summary>{table_html(*table)}</details>"
    return (
        f"<figure><figcaption>{escape(says)}</figcaption>"
        + (f'<p class="legend">{keys}</p>' if keys else "")
        + f'<div class="panels">{"".join(panels)}</div>{numbers}</figure>'
    )


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table that scrolls where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def short_name(task: str) -> str:
    """A task's name where there is little room."""
    return task.removeprefix("propensity_")


def number_text(value: float | None, has_sign: bool = False) -> str:
    """Four digits; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:+.4f}" if has_sign else f"{value:.4f}"


def _key(kind: str, text: str) -> str:
    return f'<span><i class="{kind}"></i>{escape(text)}</span>'


def _by_task(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Component -> task -> curve, the other way round; curves without points are left out."""
    tasks = dict.fromkeys(task for curves in found.values() for task in curves)
    return {task: {name: curves[task] for name, curves in found.items() if curves.get(task)} for task in tasks}


def _dots(panel: Panel, spreads: Sequence[Spread], number: int, of: int) -> None:
    """Dots at the categories of a panel, series beside each other."""
    shift = (number - (of - 1) / 2) * STEP
    known = [(position, value, error) for position, (value, error) in enumerate(spreads) if value is not None]
    panel.dots([(position + shift, value) for position, value, _ in known], number, [error for *_, error in known])


def _ends(spreads: Iterable[Spread]) -> list[float]:
    """Both ends of every whisker."""
    return [value + side * (error or 0.0) for value, error in spreads if value is not None for side in (-1, 1)]


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """A range that holds all values with some room."""
    known = list(values)
    if not known:
        return 0.0, 1.0
    room = 0.06 * (max(known) - min(known)) or 0.01
    return min(known) - room, max(known) + room


def _limits_text(group: Mapping[str, Any]) -> str:
    low, high = group["from"], group["to"]
    if low is None or high is None:
        return "none"
    digits = 0 if high >= 10 or (low == int(low) and high == int(high)) else 1
    first, last = f"{low:,.{digits}f}", f"{high:,.{digits}f}"
    return first if first == last else f"{first}-{last}"


def _activity_table(found: Mapping[str, Any]) -> str:
    """Clients of the map by their main item: what the colours show, as numbers."""
    rows = []
    for number, name in enumerate([*found["mains"], "other"]):
        wanted = number if number < len(found["mains"]) else -1
        own = [one for one, main in enumerate(found["main"]) if main == wanted]
        if own:
            events = sum(found["events"][one] for one in own) / len(own)
            buys = sum(found["buys"][one] for one in own) / len(own)
            rows.append([name, f"{len(own):,}", f"{events:,.0f}", f"{buys:.0%}"])
    table = table_html(["main item", "clients", "mean events", "buy behind the cutoff"], rows)
    return f"<details><summary>The numbers</summary>{table}</details>"
