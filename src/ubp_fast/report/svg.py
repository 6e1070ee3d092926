"""Panels of figures as inline SVG, narrow enough to be read on a phone; several stand side by side on a wide screen.

Colours are classes (`c0`, `c1`, ... for series) that the page's style gives, so that a panel fits light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 340.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 26.0, 42.0
TICKS = 5
SERIES = 8
Range = tuple[float, float]


class Panel:
    """One pair of axes.

    Args:
        title: above it.
        x: range of the horizontal axis, in its units, or names of categories, which lie at 0, 1, ...
        y: the same of the vertical axis; the first category is the uppermost.
        x_label: what the axis shows, with its unit.
        y_label: the same.
        log_x: decades of x are of one length.
        height: of the drawing.
    """

    def __init__(
        self,
        title: str,
        x: Range | Sequence[str],
        y: Range | Sequence[str],
        x_label: str,
        y_label: str,
        log_x: bool = False,
        height: float = HEIGHT,
    ) -> None:
        self._title, self._labels, self._log_x, self._height = title, (x_label, y_label), log_x, height
        self._x_names, self._y_names = _names(x), _names(y)
        self._left = LEFT if self._y_names is None else 12 + 6.2 * max(map(len, self._y_names), default=0)
        self._is_turned = self._x_names is not None and (
            max(map(len, self._x_names), default=0) * len(self._x_names) > 46 or len(self._x_names) > 9
        )
        self._bottom = BOTTOM + (30 if self._is_turned else 0)
        self._x_range: Range = (-0.5, len(self._x_names) - 0.5) if self._x_names is not None else _open(x)
        self._y_range: Range = (len(self._y_names) - 0.5, -0.5) if self._y_names is not None else _open(y)
        self._marks: list[str] = []

    def line(self, points: Sequence[tuple[float, float]], series: int) -> None:
        """Points joined in the order given."""
        text = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self._marks.append(f'<polyline class="line c{series % SERIES}" points="{text}"/>')

    def dots(self, points: Sequence[tuple[float, float]], series: int, errors: Sequence[float | None] = ()) -> None:
        """Points alone, with whiskers up and down where an error is given."""
        kind = f"c{series % SERIES}"
        for position, (x, y) in enumerate(points):
            error = errors[position] if position < len(errors) else None
            if error:
                low, high = self._y(y - error), self._y(y + error)
                self._marks.append(f'<path class="line {kind}" d="M{self._x(x):.1f} {low:.1f}V{high:.1f}"/>')
            self._marks.append(f'<circle class="dot {kind}" cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="2.8"/>')

    def bars(self, values: Sequence[float], series: int, share: float = 0.8) -> None:
        """One bar per category of the axis that has categories, or per whole number of x."""
        for position, value in enumerate(values):
            low, high = position - share / 2, position + share / 2
            if self._y_names is not None:
                x0, x1, y0, y1 = self._x(min(value, 0)), self._x(max(value, 0)), self._y(low), self._y(high)
            else:
                x0, x1, y0, y1 = self._x(low), self._x(high), self._y(max(value, 0)), self._y(min(value, 0))
            self._marks.append(
                f'<rect class="dot c{series % SERIES}" x="{x0:.1f}" y="{y0:.1f}" width="{max(x1 - x0, 0.5):.1f}"'
                f' height="{max(y1 - y0, 0.5):.1f}"/>'
            )

    def reference(self, points: Sequence[tuple[float, float]]) -> None:
        """A dashed line to compare with."""
        text = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self._marks.append(f'<polyline class="reference" points="{text}"/>')

    def band(self, low: float, high: float, text: str) -> None:
        """A stretch of x, named at its top."""
        x0, x1 = self._x(low), self._x(high)
        self._marks.insert(
            0,
            f'<rect class="band" x="{x0:.1f}" y="{TOP}" width="{x1 - x0:.1f}"'
            f' height="{self._height - TOP - self._bottom:.1f}"/><text class="small" x="{x0 - 3:.1f}" y="{TOP + 9}"'
            f' text-anchor="end">{escape(text)}</text>',
        )

    def svg(self, x_ticks: Sequence[tuple[float, str]] | None = None) -> str:
        """The drawing; `x_ticks` are (place, text), chosen where none are given."""
        bottom, right = self._height - self._bottom, WIDTH - RIGHT
        parts = [
            f'<svg viewBox="0 0 {WIDTH:.0f} {self._height:.0f}" role="img" aria-label="{escape(self._title)}">',
            f'<text class="title" x="{WIDTH / 2:.0f}" y="15" text-anchor="middle">{escape(self._title)}</text>',
        ]
        if self._y_names is None:
            for value, text in ticks(*self._y_range):
                y = self._y(value)
                parts.append(f'<path class="grid" d="M{self._left:.1f} {y:.1f}H{right}"/>')
                parts.append(f'<text x="{self._left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for position, name in enumerate(self._y_names or ()):
            y = self._y(position) + 4
            parts.append(f'<text x="{self._left - 5:.1f}" y="{y:.1f}" text-anchor="end">{escape(name)}</text>')
        if self._x_names is not None:
            x_ticks = list(enumerate(self._x_names))
        elif x_ticks is None:
            x_ticks = _decades(*self._x_range) if self._log_x else ticks(*self._x_range)
        for value, text in x_ticks:
            x = self._x(value)
            if self._x_names is None:
                parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom:.1f}"/>')
            turned = f' transform="rotate(-35 {x + 4:.1f} {bottom + 13:.1f})"' if self._is_turned else ""
            anchor = "end" if self._is_turned else "middle"
            place = f'x="{x + (4 if self._is_turned else 0):.1f}" y="{bottom + 14:.1f}" text-anchor="{anchor}"'
            parts.append(f"<text {place}{turned}>{escape(text)}</text>")
        parts.append(f'<path class="axis" d="M{self._left:.1f} {TOP}V{bottom:.1f}H{right}"/>')
        middle = (self._left + right) / 2
        parts.append(
            f'<text class="label" x="{middle:.0f}" y="{self._height - 6:.0f}" text-anchor="middle">'
            f"{escape(self._labels[0])}</text>"
        )
        if self._labels[1]:
            y = (TOP + bottom) / 2
            parts.append(
                f'<text class="label" transform="rotate(-90 11 {y:.0f})" x="11" y="{y:.0f}" text-anchor="middle">'
                f"{escape(self._labels[1])}</text>"
            )
        return "".join([*parts, *self._marks, "</svg>"])

    def _x(self, value: float) -> float:
        low, high = self._x_range
        if self._log_x:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self._left + (value - low) / (high - low) * (WIDTH - RIGHT - self._left)

    def _y(self, value: float) -> float:
        low, high = self._y_range
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return self._height - self._bottom - share * (self._height - TOP - self._bottom)


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers inside a range, with as many digits as tell them apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, short(number * step, digits)) for number in range(first, last + 1)]


def short(value: float, digits: int = 0) -> str:
    """A number for an axis: 12k for twelve thousand."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1):
            return f"{value / size:g}{letter}"
    return f"{value:,.{digits}f}" if value else "0"


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    found = [factor * 10.0**power for power in range(0, 10) for factor in (1, 2, 5)]
    inside = [value for value in found if low <= value <= high]
    return [(value, short(value)) for value in inside[:: max(1, -(-len(inside) // 6))]]


def _names(axis: Range | Sequence[str]) -> list[str] | None:
    return None if axis and not isinstance(axis[0], str) else [str(name) for name in axis]


def _open(axis: Range | Sequence[str]) -> Range:
    """A range that is no point."""
    low, high = float(axis[0]), float(axis[1])
    return (low, high) if high > low else (low, low + 1.0)
