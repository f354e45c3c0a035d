"""The demo with few repeats: what it says, what it returns, what it draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtc.demo import run_demo
from kvtc.demo.report import WIDTH
from kvtc.demo.run import SHIPPED, choose_model
from kvtc.errors import InvalidArgument
from kvtc.installed_models import SMOLLM2, places_of
from kvtc.reference import CALIBRATION_FILE, MODEL_DIRECTORY


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    said: list[str] = []
    directory = tmp_path_factory.mktemp("demo")
    result = run_demo(directory, 16, ratios=(64,), n_generated=8, repeats=1, say=said.append)
    return directory, "\n".join(said), result


def test_figures(demo):
    _, _, result = demo
    json.dumps(result)
    qualities = {quality["name"]: quality for quality in result["qualities"]}
    assert list(qualities) == [
        f"{profile} {ratio}x" for profile in ("paper", "joint", "conditional") for ratio in (16, 64)
    ]
    for name, quality in qualities.items():
        wanted = float(name.split()[1][:-1])
        assert quality["body_ratio"] > 0.97 * wanted
        assert quality["total_ratio"] < quality["body_ratio"]
        assert quality["n_tokens"] > 1500
        assert quality["n_continuation"] > 200
    story = qualities["conditional 16x"]
    assert story["kl"] < 0.005
    assert story["top1_agreement"] > 0.95
    # What the profiles are for: at 64x each is far better than the one before it.
    kl = {name: quality["kl"] for name, quality in qualities.items()}
    assert kl["conditional 64x"] < kl["joint 64x"] < kl["paper 64x"] / 2


def test_the_facts_are_still_known(demo):
    _, _, result = demo
    assert len(result["facts"]) == 6
    assert all(fact["restored"] == fact["exact"] for fact in result["facts"])
    assert sum(fact["exact"] == fact["told"] for fact in result["facts"]) >= 5


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
    story = next(quality for quality in result["qualities"] if quality["name"] == "conditional 16x")
    for word in (*words, f"{story['total_bytes']:,}"):
        assert word in text
    assert max(len(line) for line in text.splitlines() if str(directory) not in line) <= max(WIDTH, 100)


def test_picture(demo):
    directory, _, result = demo
    assert result["plot"] == str(directory / "rate_quality.svg")
    quality = Path(result["plot"]).read_text(encoding="utf-8")
    for measured in result["qualities"]:
        assert f"<title>{measured['name']}: {measured['body_ratio']:.1f}x, KL {measured['kl']:.5f}</title>" in quality


def test_impossible_ratio(tmp_path):
    with pytest.raises(InvalidArgument):
        run_demo(tmp_path, 0.5)


def test_the_model_is_smollm2_where_it_is_ready(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTC_MODELS", str(tmp_path))
    assert choose_model("reference") == (SHIPPED, "")
    shipped, why = choose_model()
    assert shipped == SHIPPED
    assert "make bench-models" in why
    with pytest.raises(InvalidArgument, match="not installed"):
        choose_model(SMOLLM2)
    place = places_of(SMOLLM2)
    place.directory.symlink_to(MODEL_DIRECTORY)
    assert "kvtc calibrate --model smollm2-135m" in choose_model()[1]
    with pytest.raises(InvalidArgument, match="not calibrated"):
        choose_model(SMOLLM2)
    place.calibration.symlink_to(CALIBRATION_FILE)
    assert choose_model() == (place, "")
