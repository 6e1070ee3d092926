"""Figures against bars: the table at the end of a run, and whether all bars were reached."""

from __future__ import annotations

from collections.abc import Sequence

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
