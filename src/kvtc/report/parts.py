"""What a report is made of: sections of tables and charts. Nothing here draws, and nothing here
needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..evaluate.method_names import split_name

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

Result = Mapping[str, Any]
Point = tuple[float, float, str]
"""x, y, and what the point is, in words."""


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Parameters:
        header: a name for each column.
        rows: the cells of each row.
        caption: what the table shows.
        low: (row, column) of cells that fall short.
        shades: how dark a cell is, 0 .. 1, by (row, column).
        is_long: whether the page may fold the table away.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    low: frozenset[tuple[int, int]] = frozenset()
    shades: Mapping[tuple[int, int], float] | None = None
    is_long: bool = False


@dataclass(frozen=True)
class Marks:
    """Points beside a line: they have its colour and its mark, larger, and are not joined.

    Parameters:
        line: the name of the line.
        points: the points.
        is_hollow: whether the marks are outlines.
    """

    line: str
    points: Sequence[Point]
    is_hollow: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines by name. A logarithmic axis leaves out what is not positive.

    Parameters:
        caption: what the chart shows.
        lines: the points of each line.
        x_title, y_title: what the axes show, with the unit.
        x_log, y_log: whether the axes are logarithmic.
        x_times: whether x is a ratio, shown as "16x".
        y_percent: whether y is a share 0 .. 1, shown as per cent.
        marks: points beside the lines.
    """

    caption: str
    lines: Mapping[str, Sequence[Point]]
    x_title: str
    y_title: str
    x_log: bool = True
    y_log: bool = True
    x_times: bool = True
    y_percent: bool = False
    marks: Sequence[Marks] = field(default=())


@dataclass(frozen=True)
class Section:
    """A heading, a few words, and what stands under it."""

    title: str
    note: str
    parts: Sequence[Table | Chart]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by their key, in the order in which they come."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def by_series(points: Iterable[tuple[str, Point]]) -> dict[str, list[Point]]:
    """Points, each with the name of its method, as lines of a chart: one for each series."""
    groups = grouped(points, lambda named: split_name(named[0])[0])
    return {series: sorted(point for _, point in group) for series, group in groups.items()}


def ratio(value: float | None) -> str:
    """17.03 -> "17.0x"; nothing where there is none."""
    return "" if value is None else f"{value:.1f}x"


def percent(value: float | None) -> str:
    """0.854 -> "85.4"; nothing where there is none."""
    return "" if value is None else f"{100 * value:.1f}"
