"""Where the names of lines stand in a chart: beside the ends of the lines, and on nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float64]
Place = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

LINE_HEIGHT = 14
REACHES = (8, 16, 26, 38, 52, 68, 86, 106, 130)
N_DIRECTIONS = 16
COVERS_NAME, SWAPS_NAMES, COVERS_MARK, COVERS_LINE, STANDS_LEFT, OFF_LEVEL = 1000, 200, 60, 8, 6, 0.5
"""What a fault of a box costs, where a pixel away from the end of its line costs 1."""


def place_names(lines: Sequence[Sequence[Place]], widths: Sequence[float], area: Box) -> list[Box]:
    """A box for the name of each line.

    Parameters:
        lines: the points of each line, in pixels.
        widths: pixels that each name takes.
        area: where names may stand.
    """
    marks = np.array([place for line in lines for place in line])
    along = np.array([place for line in lines for place in _along(line)]).reshape(-1, 2)
    found: dict[int, Box] = {}
    for index in sorted(range(len(lines)), key=lambda index: lines[index][-1][1]):
        end = lines[index][-1]
        boxes = _candidates(end, widths[index], area)
        cost = distance(boxes, end)[:, 0] + STANDS_LEFT * (boxes[:, 2] < end[0])
        cost += OFF_LEVEL * abs(boxes[:, 1] + LINE_HEIGHT / 2 - end[1])
        others = marks[(marks != end).any(axis=1)]
        cost += COVERS_MARK * (distance(boxes, others) < 4).sum(axis=1)
        cost += COVERS_LINE * (distance(boxes, along) < 1).sum(axis=1)
        for other, (left, top, right, bottom) in found.items():
            x, y = lines[other][-1]
            is_beside, is_above = (boxes[:, 2] > left) & (boxes[:, 0] < right), boxes[:, 1] < top
            cost += COVERS_NAME * (is_beside & (boxes[:, 3] > top) & (boxes[:, 1] < bottom))
            # Of two lines that end side by side the upper one has the upper name.
            if abs(end[0] - x) < 60 and end[1] != y:
                cost += SWAPS_NAMES * (is_above if end[1] > y else boxes[:, 1] > top)
        left, top, right, bottom = boxes[int(cost.argmin())].tolist()
        found[index] = (left, top, right, bottom)
    return [found[index] for index in range(len(lines))]


def distance(boxes: Pixels, points: Pixels | Place) -> Pixels:
    """Pixels from each box [n, 4] to each point [m, 2], 0 inside: [n, m]."""
    left, top, right, bottom = boxes.T[:, :, None]
    x, y = np.reshape(points, (-1, 2)).T
    across, down = np.maximum(left - x, x - right), np.maximum(top - y, y - bottom)
    found: Pixels = np.hypot(np.maximum(0, across), np.maximum(0, down))
    return found


def _candidates(end: Place, width: float, area: Box) -> Pixels:
    """Boxes [n, 4] around the end of a line; the one to its right if none lies in the area."""
    left, top, right, bottom = area
    reach, turn = (part.ravel() for part in np.meshgrid(REACHES, np.arange(N_DIRECTIONS), indexing="ij"))
    across, down = np.cos(2 * math.pi * turn / N_DIRECTIONS), np.sin(2 * math.pi * turn / N_DIRECTIONS)
    # To the right of the end names begin, to the left they stop, above and below they are centred.
    x = end[0] + reach * across - width * np.select([across > 0.3, across < -0.3], [0.0, 1.0], 0.5)
    y = end[1] + (reach + LINE_HEIGHT / 2) * down - LINE_HEIGHT / 2
    is_inside = (x >= left) & (x + width <= right) & (y >= top) & (y + LINE_HEIGHT <= bottom)
    if not is_inside.any():
        x, y = np.array([min(end[0] + 8, right - width)]), np.array([end[1] - LINE_HEIGHT / 2])
        is_inside = np.array([True])
    return np.stack([x, y, x + width, y + LINE_HEIGHT], axis=1)[is_inside]


def _along(line: Sequence[Place]) -> list[Place]:
    """Points along a line, close enough that no name lies between them unseen."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        n = max(2, int(math.hypot(x1 - x0, y1 - y0) / 8))
        found += [(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n) for k in range(1, n)]
    return found
