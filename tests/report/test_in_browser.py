"""The report page in a browser: nothing goes wrong on its console, and a narrow screen scrolls what is wide inside of the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvtc.evaluate.schema import ResultFile
from kvtc.report.page import render_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

WIDTH = 500
"""Pixels; a window of Chromium is never narrower, so what is narrower is an inner frame."""
NARROW = 420
MEASURE = """<script>
const found = [...document.querySelectorAll(".wide")].map(box => ({
  shown: box.clientWidth, whole: box.scrollWidth, overflow: getComputedStyle(box).overflowX}));
parent.postMessage({page: document.documentElement.scrollWidth, seen: document.documentElement.clientWidth, found}, "*");
</script>"""
FRAME = """<!doctype html><iframe src="page.html" width="%d" height="900"></iframe><script>
addEventListener("message", event => { document.body.dataset.found = JSON.stringify(event.data); });
</script>"""


def quality(name: str, ratio: float, kl: float) -> dict[str, object]:
    return {
        "name": name, "window_tokens": 0, "n_texts": 3, "n_tokens": 900, "kl": kl, "top1_agreement": 0.9, "perplexity": 10.0,
        "perplexity_exact": 9.9, "body_ratio": ratio, "total_ratio": ratio * 0.9, "original_bytes": 1000, "total_bytes": 100,
        "kl_by_text": [kl, kl * 1.1, kl * 0.9], "body_bytes_by_text": [100, 101, 99],
    }  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> str:
    qualities = [
        quality(f"{series} {ratio}x", ratio, ratio**2 * scale)
        for series, scale in (("paper", 1e-4), ("joint", 1e-5), ("KIVI 2-bit with a long name", 1e-3))
        for ratio in (4, 8, 16, 32, 64)
    ]
    result = {"kind": "evaluation", "model": "a model", "qualities": qualities}
    text = render_page("A page", [ResultFile("result", {"command": "kvtc evaluate " + "x" * 300}, result)])
    (tmp_path / "whole.html").write_text(text)
    return text


def run(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--allow-file-access-from-files",
        f"--window-size={WIDTH},1000", f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=3000", *options,
        path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.mark.usefixtures("page")
def test_nothing_goes_wrong_on_the_console(tmp_path: Path) -> None:
    done = run(tmp_path / "whole.html", "--dump-dom")
    assert "<h1>A page</h1>" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_a_narrow_screen_scrolls_tables_and_charts_inside_of_the_page(page: str, tmp_path: Path) -> None:
    # The page forbids scripts; the one that measures needs a copy that does not.
    measured = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", MEASURE + "</body>")
    (tmp_path / "page.html").write_text(measured)
    (tmp_path / "frame.html").write_text(FRAME % NARROW)
    dom = run(tmp_path / "frame.html", "--dump-dom").stdout
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None
    sizes = json.loads(found[1].replace("&quot;", '"'))
    assert sizes["page"] <= sizes["seen"] <= NARROW
    assert sizes["found"]
    assert all(box["overflow"] == "auto" for box in sizes["found"])
    assert any(box["whole"] > box["shown"] for box in sizes["found"])
