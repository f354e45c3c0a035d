"""Result files, and the page and tables made of them: everything measured is there, nothing is fetched, foreign text stays text."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtc.cli import main
from kvtc.errors import InvalidArgument
from kvtc.evaluate import schema
from kvtc.evaluate.provenance import save_result
from kvtc.report.charts import draw, legend
from kvtc.report.page import render_page
from kvtc.report.parts import Chart, Table
from kvtc.report.sections import render_text, sections_of

PROVENANCE = {
    "date": "2026-11-22 08:00 UTC", "commit": "0123456789ab", "machine": "a machine <b>", "n_cores": 2, "n_threads": 2,
    "python": "3.11", "torch": "2.13", "kvtc": "0.1", "command": "kvtc evaluate --text a & b",
}  # fmt: skip


def quality(name, ratio, kl, **more):
    return {
        "name": name, "body_ratio": ratio, "total_ratio": ratio / 2, "kl": kl, "top1_agreement": 0.95, "perplexity": 20.5,
        "perplexity_exact": 20.25, "n_documents": 4, "n_continuation": 1024, **more,
    }  # fmt: skip


def score(codec, task, exact, ratio, tokens=1.0):
    return {
        "task": task, "context": 1024, "codec": codec, "exact": exact, "tokens": tokens, "n_contexts": 1, "n_questions": 8,
        "kl": 0.0, "body_ratio": ratio, "total_ratio": ratio, "by_depth": [exact, None, 0.25, 0.5], "window_tokens": 0,
    }  # fmt: skip


QUALITIES = [
    quality("paper 8x", 8.8, 1e-3), quality("paper 16x", 17.0, 4e-3), quality("joint 16x", 16.0, 3e-4),
    quality("joint 64x", 64.0, 2e-3), quality("KIVI 2-bit", 5.0, 5e-2), quality("zstd", 1.4, 0.0),
    quality("TOVA 1/4 + joint 8x", 32.0, 9e-2),
]  # fmt: skip
TURN = {
    "name": "joint 16x", "turn_tokens": 16, "n_documents": 1, "n_tokens": 400, "n_codings": 3, "n_continuation": 32, "kl": 7e-4,
    "kl_once": 6e-4, "kl_by_turn": [5e-4, 9e-4], "top1_agreement": 0.9, "perplexity_exact": 3.0, "perplexity": 3.25,
    "body_ratio": 16.0, "total_ratio": 9.0, "window_tokens": 112,
}  # fmt: skip
RESULTS = {
    "sweep": {
        "kind": schema.EVALUATION,
        "model": "reference",
        "bits_per_byte": {"code": 1.25},
        "qualities": [{**record, "window_tokens": window} for window in (0, 128) for record in QUALITIES],
        "scores": [
            score("exact cache", "needle", 0.9, None), score("exact cache", "copy", 0.0, None, tokens=0.8),
            score("paper 8x", "needle", 0.85, 8.5), score("paper 8x", "copy", 0.0, 8.5, tokens=0.8),
        ],
        "turns": [TURN, {**TURN, "name": "paper 16x"}],
    },
    "parts": {
        "kind": schema.ABLATIONS,
        "studies": [{"title": "Sinks <exact>", "note": "Why sinks.", "qualities": QUALITIES[:3]}],
    },
    "phases": {
        "kind": schema.PHASE_SWEEP,
        "points": [
            asdict(schema.PhasePoint("joint 16x", phase, depth, 8, depth, 0.1, 16.0, 15.0))
            for phase in (0, 64) for depth in (0.25, 0.75)
        ],
    },
    "shift": {
        "kind": schema.DOMAIN_SHIFT,
        "cells": [
            asdict(schema.ShiftCell("paper 16x", source, text, kl, 0.9, 3.0, 2.9, 16.5, 9.0))
            for source, text, kl in (
                ("code", "code", 1e-3), ("code", "novels", 8e-3), ("novels", "code", 2.5e-3), ("novels", "novels", 2e-3)
            )
        ],
    },
    "again": {
        "kind": schema.RECOMPUTE,
        "points": [asdict(schema.RecomputePoint("joint 16x", n, n / 1000, 0.1, n / 8000, n * 1000, n * 50)) for n in (1000, 4000)],
    },
    "new": {"kind": "something_new", "answer": 42.125, "rows": [{"a": 1, "b": {"c": "deep"}}, {"a": 2, "d": [1, 2]}]},
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    paths = [save_result(name, result, tmp_path) for name, result in RESULTS.items()]
    return [schema.ResultFile(file.name, PROVENANCE, file.result) for file in map(schema.read_result, paths)]


# All that a page is made of: nothing of it runs, nothing fetches.
TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "dl", "dt", "dd", "nav", "ol", "ul", "li", "a", "section",
    "figure", "figcaption", "b", "span", "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary",
    "footer", "code", "svg", "line", "text", "polyline", "circle", "polygon",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "id", "href", "style", "viewbox", "role", "aria-label", "x", "y",
    "x1", "x2", "y1", "y2", "cx", "cy", "r", "points", "fill", "stroke", "stroke-width", "text-anchor", "transform",
}  # fmt: skip


class Checker(HTMLParser):
    """Collects text and targets, and the tags that are open."""

    VOID = ("meta", "line", "circle", "polygon", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.words, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert values.keys() <= ATTRIBUTES
        assert tag in TAGS
        assert values.get("href", "#").startswith("#")
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_and_holds_every_figure(files):
    page = render_page("A & B", files)
    checker = Checker()
    checker.feed(page)
    text = " ".join(checker.words)
    assert checker.open == []
    assert sorted(link.removeprefix("#") for link in checker.links) == sorted(checker.ids)
    for expected in (
        "A & B", "paper 16x", "17.0x", "0.00400", "needle", "85.0", "1.250", "a machine <b>", "0123456789ab", "window 0",
        "window 128", "Sinks <exact>", "Why sinks.", "calibrated on", "0.00800", "32.0x", "0.00090", "something_new", "42.125",
        "deep", "1, 2", "8.0x", "accuracy by place", "75 %", "1,000",
    ):  # fmt: skip
        assert expected in text, expected
    assert "://" not in page
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page


def test_what_falls_short_is_marked_and_what_is_worse_is_shaded(files):
    page = render_page("t", files)
    assert 'class="low">85.0' in page
    assert 'class="low">80.0' not in page
    assert 'style="--s:1.00">0.00800' in page  # four times the best of its column
    assert 'style="--s:0.00">0.00100' in page


PAYLOADS = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>", "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>", "javascript:alert(1)", "<!--", "]]>", "&lt;script&gt;",
)  # fmt: skip


def infected(value, payload):
    """With a payload in every text of it, names of fields that are not of a record included."""
    if isinstance(value, str):
        return value + payload
    if isinstance(value, dict):
        kept = "kind", "codec"  # what decides how the rest is shown
        return {
            name: inner if name in kept and isinstance(inner, str) else infected(inner, payload)
            for name, inner in [*value.items(), (f"more{payload}", 0.5)]
        }
    return [infected(inner, payload) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_text_of_a_file_becomes_markup(payload):
    provenance = {name: f"{value}{payload}" for name, value in PROVENANCE.items()}
    results = [infected(result, payload) for result in RESULTS.values()]
    page = render_page(payload, [schema.ResultFile(f"file{payload}", provenance, result) for result in results])
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    text = "\0".join(checker.words)
    shown = [
        "commit 0123456789ab",
        "2 of 2 cores",
        "kvtc evaluate --text a & b",
        "paper 16x",
        "joint 64x",
        "needle",
        "Why sinks.",
    ]
    for words in (*shown, "code", "more", "file: something_new"):
        assert words in text.replace(payload, ""), words
    assert text.count(payload) > 100
    assert not re.search(r"<(script|img|iframe|object|svg on)", page, re.IGNORECASE)


def test_the_page_asks_the_browser_to_run_and_fetch_nothing(files):
    policy = re.search('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', render_page("t", files))
    rules = dict(rule.split(" ", 1) for rule in unescape(policy[1]).split("; "))
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'"
    }  # fmt: skip
    assert render_page("t", files).index("Content-Security-Policy") < render_page("t", files).index("<title>")


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(allow_nan=False), st.sampled_from(["", "x", "exact cache"]),
    st.lists(st.integers(0, 3), max_size=2), st.dictionaries(st.sampled_from(["name", "kl"]), st.integers(0, 3), max_size=2),
)  # fmt: skip


def places(value, way=()):
    """Every place in a JSON value."""
    yield way
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*way, key))


@given(data=st.data(), name=st.sampled_from(sorted(RESULTS)))
def test_whatever_a_file_holds_there_is_a_page_or_one_error(tmp_path_factory, data, name):
    stored = json.loads(json.dumps({"schema": 1, "provenance": PROVENANCE, "result": RESULTS[name]}))
    for _ in range(data.draw(st.integers(1, 3))):
        way = data.draw(st.sampled_from([way for way in places(stored) if len(way) > 1]))
        target = stored
        for key in way[:-1]:
            target = target[key]
        if data.draw(st.booleans()):
            target[way[-1]] = data.draw(JUNK)
        elif isinstance(target, dict):
            del target[way[-1]]
    path = tmp_path_factory.mktemp("junk") / "x.json"
    path.write_text(json.dumps(stored))
    try:
        file = schema.read_result(path)
    except InvalidArgument:
        return
    checker = Checker()
    checker.feed(render_page("t", [file]))
    assert checker.open == []
    # Every part that is shown is shown as text, too.
    titles = [section.title for section in sections_of(file) if any(isinstance(part, Table) for part in section.parts)]
    assert all(title in render_text(sections_of(file)) for title in titles)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("kl", "0.1", "qualities[1].kl: expected numbers"),
        ("kl", -1.0, "qualities[1].kl: expected numbers"),
        ("top1_agreement", 1.5, "qualities[1].top1_agreement: expected numbers of 0 to 1"),
        ("total_ratio", 0, "qualities[1].total_ratio: expected numbers"),
        ("body_ratio", True, "qualities[1].body_ratio: expected numbers"),
        ("n_documents", 1.5, "qualities[1].n_documents: expected whole numbers"),
        ("name", 5, "qualities[1].name: expected text"),
        ("name", ["a"], "qualities[1].name: expected text"),
        ("kl", float("nan"), "not JSON: the number NaN"),
        ("kl", float("inf"), "not JSON: the number Infinity"),
        ("kl", 1e300, "not JSON: the number 1e+300"),
    ],
)
def test_values_that_cannot_be_are_refused_where_they_stand(tmp_path, capsys, field, value, expected):
    path = tmp_path / "x.json"
    result = {"qualities": [quality("a", 2.0, 1e-3), {**quality("b", 4.0, 1e-3), field: value}]}
    path.write_text(json.dumps({"provenance": PROVENANCE, "result": result}))
    assert main(["report", str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"kvtc: error: {path}")
    assert expected in error


@pytest.mark.parametrize("text", ["[" * 100_000, '{"result": ' * 50 + "1" + "}" * 50, "1" * 10_000, "\xff"])
def test_texts_that_would_wear_a_parser_out_are_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InvalidArgument, match=r"x\.json is not JSON"):
        schema.read_result(path)


def test_a_record_that_lacks_a_figure_is_listed_and_the_others_are_drawn():
    broken = {**quality("joint 8x", 8.0, 1e-4), "kl": None}
    turns = [TURN, {**TURN, "name": "paper 99x", "kl_by_turn": [1e-3, None]}]
    found = sections_of(schema.ResultFile("x", PROVENANCE, {"qualities": [*QUALITIES, broken], "turns": turns}))
    text = render_text(found)
    assert "x: rate and distortion" in text
    assert "joint 8x" in text
    assert "paper 99x" in text
    lines = next(part for part in found[0].parts if isinstance(part, Chart)).lines
    assert [x for x, _, _ in lines["joint"]] == [16.0, 64.0]


def test_every_result_of_this_project_can_be_shown():
    paths = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
    page = render_page("all", [schema.read_result(path) for path in paths])
    Checker().feed(page)
    assert len(paths) > 20


def section(files, title):
    return next(found for file in files for found in sections_of(file) if title in found.title)


def test_curves_are_drawn_by_series_and_lossless_points_are_left_out(files):
    charts = [part for part in section(files, "distortion, window 0").parts if isinstance(part, Chart)]
    assert [chart.x_title for chart in charts] == ["body_ratio", "total_ratio"]
    assert set(charts[0].lines) == {"paper", "joint", "KIVI", "TOVA 1/4 + joint"}
    assert [x for x, _, _ in charts[0].lines["joint"]] == [16.0, 64.0]
    assert len(re.findall("<polyline", draw(charts[0]).source)) == 4
    assert [family for family, _ in legend(charts[0])] == ["quantization", "eviction and kvtc"]


def test_fewer_bytes_follow_from_the_points(files):
    tables = [part for part in section(files, "distortion, window 128").parts if isinstance(part, Table)]
    own, others = tables[0], tables[1]
    assert own.header[2:] == ["joint, body", "joint, total"]
    assert [row[0] for row in own.rows] == ["paper 8x", "paper 16x"]
    assert own.rows[1][2] == "≥ 3.8x"
    assert [row[0] for row in others.rows] == ["KIVI 2-bit", "TOVA 1/4 + joint 8x"]


def test_a_result_of_an_unknown_kind_is_listed_whole():
    (found,) = sections_of(schema.ResultFile("x", PROVENANCE, RESULTS["new"]))
    assert found.title == "x: something_new"
    single, rows = found.parts
    assert single.rows == [["answer", "42.125"]]
    assert (rows.header, rows.rows) == (["a", "b.c", "d"], [["1", "deep", ""], ["2", "", "1, 2"]])


def test_what_stands_beside_known_parts_is_folded_away_under_them():
    found = sections_of(schema.ResultFile("x", PROVENANCE, {**RESULTS["parts"], "seconds": 12.5, "places": [{"z": 7}]}))
    assert [section.title for section in found] == ["x: Sinks <exact>"]
    folded = [part for part in found[0].parts if isinstance(part, Table) and part.is_long]
    assert [(part.caption, part.rows) for part in folded] == [
        ("also recorded", [["seconds", "12.5"]]),
        ("places", [["7"]]),
    ]


def test_points_and_cells_of_another_kind_are_listed_too():
    (found,) = sections_of(
        schema.ResultFile("x", PROVENANCE, {"kind": "other", "points": [{"z": 7}], "cells": [{"y": 8}]})
    )[:1]
    shown = render_text(
        sections_of(schema.ResultFile("x", PROVENANCE, {"kind": "other", "points": [{"z": 7}], "cells": [{"y": 8}]}))
    )
    assert "7" in shown
    assert "8" in shown
    assert found.title.startswith("x: ")


def test_results_without_window_and_kind_are_shown():
    old = {"gains": [{"at": "paper 8x", "joint": 4.0}], "qualities": QUALITIES}
    text = render_text(sections_of(schema.ResultFile("old", PROVENANCE, old)))
    assert "old: rate and distortion\n" in text
    assert "4" in text


def test_the_subcommand_writes_the_page_or_prints_the_tables(tmp_path, capsys):
    path = save_result("quality", RESULTS["sweep"], tmp_path)
    assert main(["report", str(path), "-o", str(tmp_path / "report.html")]) == 0
    assert "paper 8x" in (tmp_path / "report.html").read_text()
    assert main(["report", str(path), "-o", str(tmp_path / "report.html")]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["report", str(path)]) == 0
    assert "quality: rate and distortion, window 128" in capsys.readouterr().out
    assert main(["report", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["results"] == [{"name": "quality", "kind": "evaluation"}]
    assert printed["tables"][0]["header"] == ["text", "bits per byte"]


@pytest.mark.parametrize("text", ["", "[1]", '{"result": {}}', "{", '{"result": [], "provenance": {}}'])
def test_other_files_are_refused(tmp_path, capsys, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main(["report", str(path), "-o", str(tmp_path / "report.html")]) == 1
    assert "x.json is" in capsys.readouterr().err


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_later_schemas_are_refused(tmp_path, version):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": version, "provenance": {}, "result": {}}))
    with pytest.raises(InvalidArgument, match="schema"):
        schema.read_result(path)
