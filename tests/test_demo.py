"""The demo with few repeats: what it says, what it returns, what it draws."""

from __future__ import annotations

import json

import pytest

from kvtc.demo import run_demo
from kvtc.demo.report import WIDTH
from kvtc.errors import InvalidArgument


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    said: list[str] = []
    directory = tmp_path_factory.mktemp("demo")
    result = run_demo(directory, 16, ratios=(64,), n_generated=8, repeats=1, say=said.append)
    return directory, "\n".join(said), result


def test_figures(demo):
    _, _, result = demo
    json.dumps(result)
    fine, coarse = result["qualities"]
    assert (fine["name"], coarse["name"]) == ("16", "64")
    assert fine["body_ratio"] > 16
    assert fine["total_ratio"] < fine["body_ratio"]
    assert fine["n_tokens"] > 1500
    assert fine["n_continuation"] > 200
    assert fine["kl"] < 0.02 < coarse["kl"]
    assert fine["top1_agreement"] > 0.9


def test_the_facts_are_still_known(demo):
    _, _, result = demo
    assert len(result["facts"]) == 6
    assert all(fact["restored"] == fact["told"] == fact["exact"] for fact in result["facts"])
    assert result["qualities"][1]["n_known"] < 6


def test_text_names_everything_and_fits_a_terminal(demo):
    directory, text, result = demo
    words = (
        "body_ratio",
        "total_ratio",
        "KiB per token",
        "perplexity",
        "KL",
        "prefill",
        "encode",
        "decode",
        "parameters",
    )
    for word in (*words, f"{result['qualities'][0]['total_bytes']:,}"):
        assert word in text
    assert max(len(line) for line in text.splitlines() if str(directory) not in line) <= max(WIDTH, 100)


def test_pictures(demo):
    directory, _, result = demo
    assert result["plots"] == [str(directory / "spectrum.png"), str(directory / "rate_quality.png")]
    for name in ("spectrum.png", "rate_quality.png"):
        assert (directory / name).stat().st_size > 10_000


def test_impossible_ratio(tmp_path):
    with pytest.raises(InvalidArgument):
        run_demo(tmp_path, 0.5)
