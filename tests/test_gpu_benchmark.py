"""The benchmark of devices in its tiny sizes, on the CPU: all pieces run, are saved, and are not measured twice."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from kvtc.backends import ReferenceBackend

pytest.importorskip("transformers")

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
OPTIONS = ("--device", "cpu", "--backend", "reference", "--small", "--repeats", "1")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The benchmark with more options in this process: what it printed, to stdout and to stderr."""
    monkeypatch.syspath_prepend(PROGRAM.parent)

    def called(*options: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--directory", str(tmp_path), *OPTIONS, *options])
        runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr()

    return called


def saved(directory: Path) -> dict[str, dict]:
    return json.loads((directory / "gpu_small.json").read_text())["result"]["pieces"]


def test_all_pieces_run_once(run, tmp_path):
    _, progress = run("--pieces", "rans", "tiny-conditional-32")
    assert "14 comparisons with the reference agree" in progress
    before = saved(tmp_path)
    assert set(before) == {"rans", "tiny-conditional-32"}

    printed, _ = run()
    after = saved(tmp_path)
    assert {name: after[name] for name in before} == before
    for name in ("ceilings", "tiny-paper-32", "tiny-joint-32", "tiny-first-token", "rivals"):
        assert f"{name} ..." in printed
        assert after[name]["hardware"]["backend"] == "reference"
        assert after[name]["provenance"]["date"]
    (case,) = after["tiny-joint-32"]["cases"]
    assert case["stream_bytes"] < case["raw_bytes"]
    assert case["symbols"] == case["coded"][0] * case["batch"] * (case["tokens"] - 4)
    assert case["decode_stages_ms"].keys() >= {"host: open streams", "inverse product", "rotate and scatter"}

    printed, progress = run()
    assert "..." not in printed
    assert "agree" not in progress
    assert "tiny-first-token" in printed


def test_no_speed_of_a_device_that_computes_something_else(run, tmp_path, monkeypatch):
    right = ReferenceBackend.read_integers
    monkeypatch.setattr(ReferenceBackend, "read_integers", lambda *given: right(*given) * (1 + is_first_call()))
    calls = []

    def is_first_call() -> int:
        calls.append(None)
        return len(calls) == 1

    with pytest.raises(SystemExit, match="does not compute what the reference does"):
        run("--pieces", "rans")
    assert not list(tmp_path.iterdir())


def test_pieces_are_listed_and_unknown_ones_refused(run, tmp_path, capsys):
    listed = run("--list")[0].split()
    assert {"rans", "tiny-paper-32", "rivals"} <= set(listed)
    with pytest.raises(SystemExit):
        run("--pieces", "rnas")
    assert "no such pieces: rnas" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
