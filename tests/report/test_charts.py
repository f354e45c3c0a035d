"""Charts: names beside their lines, axes for any range, and pictures that are files of their own."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from kvtc.report.charts import COLORS, HEIGHT, MOST_MARKS, STYLE, WIDTH, draw, family_of, save_picture
from kvtc.report.parts import Chart, Marks

SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart):
    return draw(chart).source


def boxes(svg):
    """Of every name beside a line: left, top, right, bottom as drawn."""
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="name [^"]*">([^<]*)<', svg)
    return [(float(x), float(y) - 11, float(x) + 6.5 * len(name), float(y) + 3) for x, y, name in found]


def test_names_lie_on_the_chart_and_not_on_each_other():
    lines = {
        f"method {letter} long": [(4.0, 1e-3, "a"), (8.0 + n / 50, 2e-3, "b")] for n, letter in enumerate("abcdefghij")
    }
    svg = drawn(Chart("c", lines, "x", "y"))
    placed = boxes(svg)
    assert len(placed) == 10
    for index, (left, top, right, bottom) in enumerate(placed):
        assert left >= 0
        assert top >= 0
        assert right <= WIDTH + 1
        assert bottom <= HEIGHT
        for other in placed[:index]:
            assert left >= other[2] or other[0] >= right or top >= other[3] - 1 or other[1] >= bottom - 1


def test_of_two_lines_that_end_side_by_side_the_upper_one_has_the_upper_name():
    for order in (("first", "second"), ("second", "first")):
        lines = {name: [(4.0, 1e-2, "a"), (16.0, {"first": 0.21, "second": 0.19}[name], "b")] for name in order}
        svg = drawn(Chart("c", {**lines, "far": [(4.0, 1e-3, "a")]}, "x", "y"))
        heights = {name: float(y) for y, name in re.findall(r' y="([\d.]+)" class="name [^"]*">([^<]*)<', svg)}
        assert heights["first"] < heights["second"]


@pytest.mark.parametrize("is_log", [True, False])
@pytest.mark.parametrize(
    "values",
    [[3.0], [1.0, 1000.0], [0.2, 0.21], [5.0, 5.0], [0.9, 0.9 + 1e-16], [1e29, 1e30], [1e-30, 1e30]],
)
def test_axes_take_any_range(is_log, values):
    line = [(value, value, "p") for value in values]
    svg = drawn(Chart("c", {"a": line}, "x", "y", x_log=is_log, y_log=is_log))
    numbers = [float(n) for n in re.findall(r'(?:cx|cy)="([-\d.]+)"', svg)]
    assert len(numbers) == 2 * len(values)
    assert all(0 <= n <= WIDTH for n in numbers)
    assert svg.count('text-anchor="middle"') > 2  # titles and at least one tick


def test_a_chart_without_points_is_nothing():
    assert draw(Chart("c", {"a": [(0.0, 1.0, "p")]}, "x", "y")) is None
    assert draw(Chart("c", {}, "x", "y")) is None


def test_families():
    found = [
        family_of(name)
        for name in ("paper", "paper 32x", "KIVI 2-bit", "TOVA 1/4 + conditional", "zstd (byte planes)", "other")
    ]
    assert found == ["paper", "paper", "quantization", "eviction and kvtc", "entropy coding", "other"]


def test_every_point_says_what_it_is_unless_there_are_very_many():
    few = [(float(n), float(n), f"point {n}") for n in range(1, MOST_MARKS + 1)]
    many = [(float(n), float(n), "point") for n in range(1, MOST_MARKS + 2)]
    svg = drawn(Chart("c", {"few": few, "many": many}, "x", "y"))
    assert re.findall("<title>(.*?)</title>", svg) == [label for _, _, label in few]


def test_marks_have_the_colour_of_their_line_and_lie_in_the_chart():
    marks = [
        Marks("b", [(2.0, 900.0, "filled")]),
        Marks("b", [(3.0, 1.0, "hollow")], True),
        Marks("none", [(1.0, 1.0, "x")]),
    ]
    svg = drawn(Chart("c", {"a": [(1.0, 2.0, "p")], "b": [(1.0, 3.0, "q")]}, "x", "y", marks=marks))
    (line,) = re.findall(r'<polyline[^>]*class="(other1)"', svg)
    found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5.8" class="([^"]*)"><title>(\w+)<', svg)
    assert [(class_, label) for _, _, class_, label in found] == [(line, "filled"), (f"{line} hollow", "hollow")]
    assert all(0 < float(x) < WIDTH and 0 < float(y) < HEIGHT for x, y, _, _ in found)


def test_a_picture_is_one_file_for_light_and_dark_readers(tmp_path):
    charts = [Chart("<c>", {"a & b": [(1.0, 2.0, "p"), (2.0, 3.0, "q")]}, "x", "y")] * 2
    path = tmp_path / "new" / "picture.svg"
    save_picture(path, "t <script>", "n" * 300, charts)
    first = path.read_bytes()
    save_picture(path, "t <script>", "n" * 300, charts)
    assert path.read_bytes() == first
    root = ElementTree.fromstring(first)  # noqa: S314  it was written a moment ago
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert [words.count(word) for word in ("t <script>", "<c>", "a & b")] == [1, 2, 2]
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        "svg", "style", "rect", "text", "line", "polyline", "circle", "title"
    }  # fmt: skip
    assert b"url(" not in first
    light, dark = STYLE.split("prefers-color-scheme: dark")
    for name, (on_light, on_dark) in COLORS.items():
        assert f".{name} {{ color: {on_light}; }}" in light
        assert f".{name} {{ color: {on_dark}; }}" in dark
