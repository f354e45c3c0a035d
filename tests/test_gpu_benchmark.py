"""The benchmark of devices in its tiny sizes, on the CPU: all pieces run, are saved, and are not measured twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
OPTIONS = ("--device", "cpu", "--backend", "reference", "--small", "--repeats", "1")


def run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), "--directory", str(directory), *OPTIONS, *options],
        capture_output=True,
        text=True,
        check=False,
    )


def saved(directory: Path) -> dict[str, dict]:
    return json.loads((directory / "gpu_small.json").read_text())["result"]["pieces"]


def test_all_pieces_run_once(tmp_path):
    first = run(tmp_path, "--pieces", "rans", "tiny-conditional-32")
    assert first.returncode == 0, first.stderr
    assert "comparisons with the reference agree" in first.stderr
    before = saved(tmp_path)
    assert set(before) == {"rans", "tiny-conditional-32"}

    second = run(tmp_path)
    assert second.returncode == 0, second.stderr
    after = saved(tmp_path)
    assert {name: after[name] for name in before} == before
    for name in ("ceilings", "tiny-paper-32", "tiny-joint-32", "tiny-first-token", "rivals"):
        assert f"{name} ..." in second.stdout
        assert after[name]["provenance"]["command"]
        assert after[name]["hardware"]["backend"] == "reference"
    (case,) = after["tiny-joint-32"]["cases"]
    assert case["stream_bytes"] < case["raw_bytes"]
    assert case["symbols"] == case["coded"][0] * case["batch"] * (case["tokens"] - 4)
    assert case["decode_stages_ms"].keys() >= {"host: open streams", "inverse product", "rotate and scatter"}

    third = run(tmp_path)
    assert third.returncode == 0, third.stderr
    assert "..." not in third.stdout
    assert "agree" not in third.stderr
    assert "tiny-first-token" in third.stdout


def test_pieces_are_listed_and_unknown_ones_refused(tmp_path):
    listed = run(tmp_path, "--list").stdout.split()
    assert "rans" in listed
    assert "tiny-paper-32" in listed
    refused = run(tmp_path, "--pieces", "rnas")
    assert refused.returncode != 0
    assert "no such pieces: rnas" in refused.stderr
    assert not list(tmp_path.iterdir())
