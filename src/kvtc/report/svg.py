"""Charts as SVG that takes its colours from the page: lines with their names beside them, logarithmic or linear axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from ..evaluate.schema import split_name
from .markup import Markup, element
from .sections import Chart

WIDTH, HEIGHT = 920, 470
LEFT, RIGHT, TOP, BOTTOM = 66, 104, 16, 50
LETTER, LINE = 6.5, 14
MARKERS = ("circle", "square", "diamond", "triangle", "cross")

OWN = ("paper", "joint", "conditional")
FAMILIES = {
    "quantization": ("FP8", "KIVI", "GEAR", "TurboQuant"),
    "eviction": ("H2O", "TOVA"),
    "low rank": ("xKV",),
    "entropy coding": ("CacheGen", "zstd"),
    "eviction and kvtc": (),
}
"""Baselines by what they do: all of a family have one colour and differ by their marks."""

Box = tuple[float, float, float, float]
Place = tuple[float, float]


def draw(chart: Chart) -> Markup | None:
    """An <svg> element; None for a chart without points."""
    lines = {name: _drawable(chart, line) for name, line in chart.lines.items()}
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    across = _Axis([x for line in lines.values() for x, _, _ in line], chart.x_log, LEFT, WIDTH - RIGHT, is_binary=True)
    up = _Axis([y for line in lines.values() for _, y, _ in line], chart.y_log, HEIGHT - BOTTOM, TOP, is_binary=False)
    styles = _styles(list(lines))
    places = {name: [(across.at(x), up.at(y)) for x, y, _ in line] for name, line in lines.items()}
    parts = [*_grid(chart, across, up), *_lines(lines, places, styles), *_names(places, styles)]
    label = f"{chart.caption}: {chart.y_title} against {chart.x_title}"
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def legend(chart: Chart) -> list[tuple[str, str]]:
    """The families of baselines in a chart, and their colours."""
    styles = _styles(list(chart.lines))
    found = {family_of(name): color for name, (color, _, _) in styles.items() if family_of(name) in FAMILIES}
    return list(found.items())


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


def _drawable(chart: Chart, line: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    return [point for point in line if (point[0] > 0 or not chart.x_log) and (point[1] > 0 or not chart.y_log)]


def _grid(chart: Chart, across: _Axis, up: _Axis) -> list[Markup]:
    bottom, right, parts = HEIGHT - BOTTOM, WIDTH - RIGHT, []
    for value, is_labelled in across.ticks:
        x = f"{across.at(value):.1f}"
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=TOP, y2=bottom))
        if is_labelled:
            text = f"{value:g}" + ("x" if chart.x_times else "")
            parts.append(element("text", text, x=x, y=bottom + 18, text_anchor="middle"))
    for value, is_labelled in up.ticks:
        y = f"{up.at(value):.1f}"
        parts.append(element("line", class_="grid" if is_labelled else "fine", x1=LEFT, x2=right, y1=y, y2=y))
        if is_labelled:
            text = f"{100 * value:.0f}" if chart.y_percent else f"{value:g}"
            parts.append(element("text", text, x=LEFT - 8, y=f"{up.at(value) + 4:.1f}", text_anchor="end"))
    middle = (LEFT + right) / 2, (TOP + bottom) / 2
    scales = [" (logarithmic)" if is_log else "" for is_log in (chart.x_log, chart.y_log)]
    across_title = element("text", chart.x_title + scales[0], x=middle[0], y=HEIGHT - 10, text_anchor="middle")
    turned = f"translate(15 {middle[1]}) rotate(-90)"
    return [*parts, across_title, element("text", chart.y_title + scales[1], transform=turned, text_anchor="middle")]


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """Colour, mark and whether it is one of kvtc's own, by series. With few series each has a colour of its own."""
    families = list(dict.fromkeys(family_of(name) for name in names))
    others = [family for family in families if family not in OWN]
    colors = {family: f"var(--own{OWN.index(family)})" for family in families if family in OWN}
    order = [family for family in FAMILIES if family in others] + [
        family for family in others if family not in FAMILIES
    ]
    colors |= {family: f"var(--c{place % 7})" for place, family in enumerate(order)}
    styles, taken = {}, dict.fromkeys(families, 0)
    for name in names:
        family = family_of(name)
        mark = MARKERS[taken[family] % len(MARKERS)]
        taken[family] += 1
        styles[name] = (colors[family], mark, family in OWN)
    return styles


def _lines(
    lines: Mapping[str, Sequence[tuple[float, float, str]]],
    places: Mapping[str, Sequence[Place]],
    styles: Mapping[str, tuple[str, str, bool]],
) -> list[Markup]:
    parts = []
    # kvtc's own lines are drawn last, over the others.
    for name in sorted(lines, key=lambda name: styles[name][2]):
        color, mark, is_own = styles[name]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places[name])
        width = 2.6 if is_own else 1.4
        parts.append(element("polyline", points=joined, fill="none", stroke=color, stroke_width=width))
        for (x, y), (_, _, label) in zip(places[name], lines[name], strict=True):
            parts.append(_mark(mark, x, y, color, element("title", label)))
    return parts


def _names(places: Mapping[str, Sequence[Place]], styles: Mapping[str, tuple[str, str, bool]]) -> list[Markup]:
    """A name beside the end of its line, where it covers neither marks nor other names; a hair leads to it where it had to move."""
    dots = [place for line in places.values() for place in line]
    segments = [pair for line in places.values() for pair in _halves(line)]
    taken: list[tuple[Box, Place]] = []
    parts = []
    for name in sorted(places, key=lambda name: places[name][-1][1]):
        color, _, is_own = styles[name]
        width = LETTER * len(name) * (1.08 if is_own else 1) + 4
        x, y = places[name][-1]
        box = min(_candidates(x, y, width), key=lambda box: _cost(box, (x, y), taken, dots, segments))
        taken.append((box, (x, y)))
        if _distance(box, (x, y)) > 16:
            end = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            x1, y1, x2, y2 = (f"{place:.1f}" for place in (x, y, *end))
            parts.append(element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=color, class_="hair"))
        left, base = f"{box[0] + 2:.1f}", f"{box[3] - 3:.1f}"
        weight = "own" if is_own else None
        parts.append(element("text", name, x=left, y=base, class_=weight, style=f"fill:{color}"))
    return parts


def _candidates(x: float, y: float, width: float) -> list[Box]:
    found = []
    for reach in (8, 16, 26, 38, 52, 68, 86, 106, 130):
        for turn in range(16):
            angle = math.pi * turn / 8
            near_x, near_y = x + reach * math.cos(angle), y + (reach + LINE / 2) * math.sin(angle)
            # To the right of the end names begin, to the left they stop, above and below they are centred.
            toward = math.cos(angle)
            left = near_x - width * (0.0 if toward > 0.3 else 1.0 if toward < -0.3 else 0.5)
            fits_below, fits_above = near_y + LINE / 2 <= HEIGHT - BOTTOM - 1, near_y - LINE / 2 >= 2
            if fits_below and fits_above and LEFT + 1 <= left <= WIDTH - width - 2:
                found.append((left, near_y - LINE / 2, left + width, near_y + LINE / 2))
    return found or [(min(x + 8, WIDTH - width - 2), y - LINE / 2, min(x + 8, WIDTH - width - 2) + width, y + LINE / 2)]


def _cost(
    box: Box, end: Place, taken: Sequence[tuple[Box, Place]], dots: Sequence[Place], segments: Sequence[Place]
) -> float:
    covered = sum(1 for other, _ in taken if _overlap(box, other))
    # Of two lines that end side by side the upper one has the upper name.
    swapped = sum(
        1 for other, there in taken if abs(end[0] - there[0]) < 60 and (end[1] - there[1]) * (box[1] - other[1]) < 0
    )
    on_dots = sum(1 for dot in dots if dot != end and _distance(box, dot) < 4)
    on_lines = sum(1 for point in segments if _distance(box, point) < 1)
    to_the_left = box[2] < end[0]
    return 1000 * covered + 200 * swapped + 60 * on_dots + 8 * on_lines + _distance(box, end) + 6 * to_the_left


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _halves(line: Sequence[Place]) -> list[Place]:
    """Points along a line, close enough that no name lies between them unseen."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        n = max(2, int(math.hypot(x1 - x0, y1 - y0) / 8))
        found += [(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n) for k in range(1, n)]
    return found


def _distance(box: Box, point: Place) -> float:
    x, y = point
    return math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))


def _mark(kind: str, x: float, y: float, color: str, inside: Markup) -> Markup:
    if kind == "circle":
        return element("circle", inside, cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.6, fill=color)
    shapes = {
        "square": ((-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)),
        "diamond": ((0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
        "triangle": ((0, -4.8), (4.6, 3.6), (-4.6, 3.6)),
        "cross": (
            (-4, -2),
            (-2, -4),
            (0, -2),
            (2, -4),
            (4, -2),
            (2, 0),
            (4, 2),
            (2, 4),
            (0, 2),
            (-2, 4),
            (-4, 2),
            (-2, 0),
        ),
    }
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[kind])
    return element("polygon", inside, points=corners, fill=color)
