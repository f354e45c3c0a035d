"""Statistics as text for Prometheus, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from kvtc.counts import COUNTERS
from kvtc.errors import InvalidArgument
from kvtc.metrics import COUNTER_METRICS, STORE_METRICS, prometheus_text
from kvtc.store import StoreStatistics, open_store

DOCS = Path(__file__).parents[2] / "docs"
METRICS = [*COUNTER_METRICS.values(), *STORE_METRICS.values()]
LINE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\d+)')


def parsed(text: str) -> dict[str, dict[str, int]]:
    """Samples by metric and labels, of a text whose every line is as the format wants it."""
    found: dict[str, dict[str, int]] = {}
    told: list[str] = []
    for line in text.splitlines():
        if match := re.fullmatch(r"# HELP ([a-z_]+) (\S[^\n]*)", line):
            told.append(match[1])
        elif match := re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge)", line):
            assert match[1] == told[-1]
            assert match[1] not in found
            assert match[1].endswith("_total") == (match[2] == "counter")
            found[match[1]] = {}
        else:
            match = LINE.fullmatch(line)
            assert match, line
            assert match[1] == told[-1]
            assert (match[2] or "") not in found[match[1]]
            found[match[1]][match[2] or ""] = int(match[3])
    assert len(told) == len(set(told)) == len(found)
    return found


def test_every_counter_and_every_number_of_a_store_has_a_metric():
    assert COUNTER_METRICS.keys() == COUNTERS.keys()
    assert list(STORE_METRICS) == [field.name for field in fields(StoreStatistics)]
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"kvtc_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert "bytes_" not in metric.name.removesuffix("bytes_total")  # the unit stands last
        assert metric.help.isprintable()


def test_counts_and_stores_as_text():
    statistics = StoreStatistics(hits=3, bytes_read=70, stored_bytes=4096)
    found = parsed(
        prometheus_text(
            [
                ({"cache": "a"}, Counter(loads=2, bytes_saved=10)),
                ({"cache": "b", "of": "me"}, {"loads": 5}),
                ({}, statistics),
            ]
        )
    )
    assert found["kvtc_loads_total"] == {'cache="a"': 2, 'cache="b",of="me"': 5}
    assert found["kvtc_saved_bytes_total"] == {'cache="a"': 10, 'cache="b",of="me"': 0}
    assert found["kvtc_store_hits_total"] == {"": 3}
    assert found["kvtc_store_read_bytes_total"] == {"": 70}
    assert found["kvtc_store_bytes"] == {"": 4096}
    assert "kvtc_store_entries" not in found  # not known
    assert found.keys() == {metric.name for metric in METRICS} - {"kvtc_store_entries"}
    assert prometheus_text([]) == ""


def test_labels_are_escaped_or_refused():
    text = prometheus_text([({"path": 'a"b\\c\nd'}, StoreStatistics())])
    assert parsed(text)["kvtc_store_hits_total"] == {r'path="a\"b\\c\nd"': 0}
    for name in ("", "1a", "a-b", "__name__", "a b", "ä", 'a="x",b'):
        with pytest.raises(InvalidArgument, match="label"):
            prometheus_text([({name: "x"}, {})])


def test_a_store_in_use():
    with open_store("memory:") as store:
        store.put("k", b"value")
        store.get_many(["k", "absent"])
        found = parsed(prometheus_text([({}, store.statistics())]))
    assert found["kvtc_store_entries"] == found["kvtc_store_hits_total"] == found["kvtc_store_misses_total"] == {"": 1}


def test_the_dashboard_shows_metrics_that_there_are():
    dashboard = json.loads((DOCS / "grafana" / "kvtc.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for expression in expressions for name in re.findall(r"kvtc_\w+", expression)}
    assert shown <= {metric.name for metric in METRICS}
    assert all(re.search(r'\{__name__=~"\(vllm:\)\?kvtc_', expression) for expression in expressions)
    faults = ("damaged", "other", "decode_errors", "save_errors", "load_errors", "store_errors", "saves_dropped")
    assert {COUNTER_METRICS[name].name for name in faults} <= shown
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    (query,) = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    assert "kvtc_misses_total" in query


def test_the_page_tells_every_metric():
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert [metric.name for metric in METRICS if f"| `{metric.name}` | {metric.help} |" not in page] == []
