"""Charts as SVG, light and dark: lines with their names beside them, on logarithmic or linear axes.

All charts of the project are drawn here: `draw` makes the element that a page holds, `save_picture`
writes a file.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..evaluate.method_names import split_name
from ..files import SHARED, write_atomically
from .label_places import LINE_HEIGHT, Place, distance, place_names
from .markup import Markup, element
from .parts import Chart, Point

WIDTH, HEIGHT = 920, 470
HALF_WIDTH, HALF_HEIGHT = 560, 420
"""Pixels of a chart, and of one that stands beside another."""
LEFT, RIGHT, TOP, BOTTOM = 66, 104, 16, 50
LETTER = 6.5
MOST_MARKS = 40
"""A line of more points has none marked."""

COLORS = {
    "ink": ("#1b1f27", "#e7eaf0"), "muted": ("#5b6472", "#9aa4b2"), "panel": ("#f7f8fa", "#1b1f26"),
    "grid": ("#dde1e7", "#353c47"), "fine": ("#eceff3", "#262c35"),
    "own0": ("#2f6fb5", "#74b3f5"), "own1": ("#0b7a75", "#4fd1c5"), "own2": ("#7b2d8b", "#d79bea"),
    "other0": ("#b4532a", "#f2935f"), "other1": ("#7d7a1f", "#d3cf6a"), "other2": ("#5d6b7c", "#aab6c5"),
    "other3": ("#a63d63", "#f08ab5"), "other4": ("#3b4cc0", "#9aa8ff"), "other5": ("#8a6d3b", "#d8b988"),
    "other6": ("#2f7d4f", "#6fcf97"),
}  # fmt: skip
"""By class: on light and on dark ground."""
STYLE = """
svg text { font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
svg .bold { font-weight: 700; }
svg text, svg circle, svg polygon, svg rect { fill: currentColor; }
svg line, svg polyline, svg .hollow { stroke: currentColor; fill: none; }
svg polyline { stroke-width: 1.4; } svg .thick { stroke-width: 2.6; }
svg .hair { stroke-width: .8; opacity: .6; } svg .hollow { stroke-width: 1.6; }
""" + "".join(
    ground.format("\n".join(f".{name} {{ color: {pair[which]}; }}" for name, pair in COLORS.items()))
    for which, ground in enumerate(("{}\n", "@media (prefers-color-scheme: dark) {{\n{}\n}}\n"))
)
"""What `draw` relies on; the colours follow the reader's preference."""

OWN = ("paper", "joint", "conditional")
FAMILIES = {
    "quantization": ("FP8", "NVFP4", "INT4", "KIVI", "GEAR", "TurboQuant"),
    "eviction": ("H2O", "TOVA"),
    "low rank": ("xKV",),
    "entropy coding": ("CacheGen", "zstd"),
    "eviction and kvtc": (),
}
"""Baselines by what they do: all of a family have one colour and differ by their marks."""
SHAPES: Mapping[str, Sequence[Place]] = {
    "circle": (),
    "square": ((-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)),
    "diamond": ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
    "triangle": ((0, -4.8), (4.6, 3.6), (-4.6, 3.6)),
    "cross": ((-4, -2), (-2, -4), (0, -2), (2, -4), (4, -2), (2, 0), (4, 2), (2, 4), (0, 2), (-2, 4), (-4, 2), (-2, 0)),
}  # fmt: skip
"""Corners of marks by name; a circle has none."""


def draw(chart: Chart, width: int = WIDTH, height: int = HEIGHT) -> Markup | None:
    """The chart as an <svg> element for a document with `STYLE`; None for a chart without points.

    Parameters:
        chart: what is drawn.
        width, height: size in pixels of the picture that everything is placed in; it may be scaled.
    """
    lines = {name: kept for name, line in chart.lines.items() if (kept := _drawable(chart, line))}
    if not lines:
        return None
    marks = [(each, _drawable(chart, each.points)) for each in chart.marks if each.line in lines]
    points = [point for line in (*lines.values(), *(kept for _, kept in marks)) for point in line]
    right, bottom = width - RIGHT, height - BOTTOM
    across = _Axis([x for x, _, _ in points], chart.x_log, LEFT, right, is_binary=True)
    up = _Axis([y for _, y, _ in points], chart.y_log, bottom, TOP, is_binary=False)
    styles = _styles(list(lines))
    places = {name: [(across.at(x), up.at(y)) for x, y, _ in line] for name, line in lines.items()}
    parts = list(_grid(chart, across, up, right, bottom))
    # kvtc's own lines are drawn last, over the others.
    for name in sorted(lines, key=lambda name: styles[name].is_own):
        parts += _line(styles[name], places[name], lines[name])
    for each, kept in marks:
        style = styles[each.line]
        hollow = " hollow" if each.is_hollow else ""
        parts += [_mark(style.mark, (across.at(x), up.at(y)), style.color + hollow, label, 1.6) for x, y, label in kept]
    parts += _names(places, styles, width, bottom)
    label = f"{chart.caption}: {chart.y_title} against {chart.x_title}"
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def save_picture(path: str | Path, title: str, note: str, charts: Sequence[Chart]) -> None:
    """Write charts side by side as an SVG file of its own; missing directories are made.

    Parameters:
        path: the file.
        title, note: what stands above the charts.
        charts: one or more, each with at least one point.
    """
    width, height = (WIDTH, HEIGHT) if len(charts) == 1 else (HALF_WIDTH, HALF_HEIGHT)
    lines = [title, *textwrap.wrap(note, int(width * len(charts) / LETTER) - 4)]
    top = 14 + 18 * len(lines)
    parts = [
        element("text", line, class_="ink bold" if n == 0 else "muted", x=12, y=22 + 18 * n)
        for n, line in enumerate(lines)
    ]
    for n, chart in enumerate(charts):
        parts.append(element("text", chart.caption, class_="ink", x=n * width + LEFT, y=top + 16))
        drawn = draw(chart, width, height) or element("svg")
        parts.append(element("svg", drawn, x=n * width, y=top + 18, width=width, height=height))
    whole, tall = width * len(charts), top + 18 + height
    content = element("style", Markup(STYLE)), element("rect", class_="panel", width=whole, height=tall), *parts
    space = "http://www.w3.org/2000/svg"
    picture = element("svg", *content, xmlns=space, viewBox=f"0 0 {whole} {tall}", width=whole, height=tall)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{picture.source}\n".encode(), SHARED)


def legend(chart: Chart) -> list[tuple[str, str]]:
    """The families of baselines in a chart, and the classes of their colours."""
    found = {family_of(name): style.color for name, style in _styles(list(chart.lines)).items()}
    return [(family, color) for family, color in found.items() if family in FAMILIES]


def family_of(series: str) -> str:
    """What a series, or a method, belongs to: one of `OWN`, a family of baselines, or itself."""
    if " + " in series:
        return "eviction and kvtc"
    if (plain := split_name(series)[0]) in OWN:
        return plain
    first = series.split(" ")[0]
    return next((family for family, members in FAMILIES.items() if first in members), series)


class _Axis:
    """Values to pixels between two ends; `ticks` are (value, is labelled)."""

    def __init__(self, values: Sequence[float], is_log: bool, start: float, stop: float, is_binary: bool) -> None:
        self._log, self._start, self._stop = is_log, start, stop
        low, high = min(values), max(values)
        if is_log and is_binary:
            # At least an octave, so that there is a power of two to name.
            margin = max(0.12, (0.75 - math.log(high / low)) / 2)
            self._low, self._high = math.log(low) - margin, math.log(high) + margin
            octaves = range(math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 2)
            self.ticks = [(2.0**n, True) for n in octaves]
        elif is_log:
            self._low, self._high = math.log(low / 1.5), math.log(high * 1.5)
            decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
            fine = math.log10(high / low) < 1.5
            self.ticks = [(n * 10.0**d, n == 1 or (fine and n in (2, 5))) for d in decades for n in range(1, 10)]
        else:
            size = max(abs(low), abs(high)) or 1.0
            # Values that differ by their roundings alone are one.
            step = _step(high - low if high - low > 1e-9 * size else size)
            if all(float(value).is_integer() for value in values):
                step = max(1.0, round(step))
            self._low, self._high = math.floor(low / step) * step, math.ceil(high / step) * step
            if self._low == self._high:
                self._low, self._high = self._low - step, self._high + step
            self.ticks = [(self._low + n * step, True) for n in range(round((self._high - self._low) / step) + 1)]
        inside = (min(start, stop) - 0.5, max(start, stop) + 0.5)
        self.ticks = [tick for tick in self.ticks if inside[0] <= self.at(tick[0]) <= inside[1]]

    def at(self, value: float) -> float:
        """The pixel of a value."""
        share = ((math.log(value) if self._log else value) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)


def _step(span: float) -> float:
    """A round step of which about five make the span."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)


def _drawable(chart: Chart, line: Sequence[Point]) -> list[Point]:
    return [point for point in line if (point[0] > 0 or not chart.x_log) and (point[1] > 0 or not chart.y_log)]


def _grid(chart: Chart, across: _Axis, up: _Axis, right: float, bottom: float) -> Iterator[Markup]:
    for value, _ in across.ticks:
        x = f"{across.at(value):.1f}"
        yield element("line", class_="grid", x1=x, x2=x, y1=TOP, y2=bottom)
        yield _text(f"{value:g}" + ("x" if chart.x_times else ""), x=x, y=bottom + 18, text_anchor="middle")
    for value, is_labelled in up.ticks:
        y = f"{up.at(value):.1f}"
        yield element("line", class_="grid" if is_labelled else "fine", x1=LEFT, x2=right, y1=y, y2=y)
        if is_labelled:
            text = f"{100 * value:.0f}" if chart.y_percent else f"{value:g}"
            yield _text(text, x=LEFT - 8, y=f"{up.at(value) + 4:.1f}", text_anchor="end")
    scales = [" (logarithmic)" if is_log else "" for is_log in (chart.x_log, chart.y_log)]
    yield _text(chart.x_title + scales[0], x=(LEFT + right) / 2, y=bottom + BOTTOM - 10, text_anchor="middle")
    turned = f"translate(15 {(TOP + bottom) / 2}) rotate(-90)"
    yield _text(chart.y_title + scales[1], transform=turned, text_anchor="middle")


def _text(text: str, **attributes: object) -> Markup:
    return element("text", text, class_="muted", **attributes)


@dataclass(frozen=True)
class _Style:
    """The class of a line's colour, the name of its mark, and whether it is one of kvtc's own."""

    color: str
    mark: str
    is_own: bool


def _styles(names: Sequence[str]) -> dict[str, _Style]:
    """The style of each series. A series without a family has a colour of its own while there are
    enough.
    """
    families = list(dict.fromkeys(family_of(name) for name in names))
    others = [family for family in families if family not in OWN]
    colors = {family: f"own{place}" for place, family in enumerate(OWN)}
    order = sorted(others, key=lambda family: [*FAMILIES, family].index(family))
    n_colors = sum(name.startswith("other") for name in COLORS)
    colors |= {family: f"other{place % n_colors}" for place, family in enumerate(order)}
    styles, taken = {}, dict.fromkeys(families, 0)
    for name in names:
        family = family_of(name)
        styles[name] = _Style(colors[family], [*SHAPES][taken[family] % len(SHAPES)], family in OWN)
        taken[family] += 1
    return styles


def _line(style: _Style, places: Sequence[Place], points: Sequence[Point]) -> Iterator[Markup]:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield element("polyline", points=joined, class_=style.color + (" thick" if style.is_own else ""))
    if len(points) <= MOST_MARKS:
        for place, (_, _, label) in zip(places, points, strict=True):
            yield _mark(style.mark, place, style.color, label)


def _mark(mark: str, place: Place, class_: str, label: str, size: float = 1.0) -> Markup:
    """One point, with what it is in words for those who point at it."""
    x, y = place
    if not SHAPES[mark]:
        return element(
            "circle", element("title", label), cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{3.6 * size:.1f}", class_=class_
        )
    corners = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in SHAPES[mark])
    return element("polygon", element("title", label), points=corners, class_=class_)


def _names(
    places: Mapping[str, Sequence[Place]], styles: Mapping[str, _Style], width: float, bottom: float
) -> Iterator[Markup]:
    """A name beside the end of each line; a hair leads to it where it had to move away."""
    widths = [LETTER * len(name) * (1.08 if styles[name].is_own else 1) + 4 for name in places]
    boxes = place_names(list(places.values()), widths, (LEFT + 1, 2, width - 2, bottom - 1))
    for (name, line), box in zip(places.items(), boxes, strict=True):
        (x, y), color = line[-1], styles[name].color
        if distance(np.array([box]), (x, y)).item() > LINE_HEIGHT + 2:
            end = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            x1, y1, x2, y2 = (f"{place:.1f}" for place in (x, y, *end))
            yield element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=f"{color} hair")
        bold = " bold" if styles[name].is_own else ""
        yield element("text", name, x=f"{box[0] + 2:.1f}", y=f"{box[3] - 3:.1f}", class_=f"name {color}{bold}")
