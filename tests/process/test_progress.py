"""Long work is seen: what is said of a task, where, and how often; and what an interruption leaves."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtc.demo.run import CONVERSATION
from kvtc.process import progress
from kvtc.process.progress import note, reporting, task, track

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_said_unless_somebody_listens(capsys):
    with task("prefill", 10, "tokens") as advance:
        advance(5)
    with reporting(), reporting(enabled=False), task("prefill", 10, "tokens"):
        note("a word")
    assert capsys.readouterr() == ("", "")


def test_a_task_is_told_in_few_lines_with_what_is_left(capsys, clock):
    with reporting(), task("prefill", 1200, "tokens") as advance:
        for _ in range(12):
            clock[0] += 4
            advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "prefill: 1,200 tokens",
        "prefill: 300 of 1,200 tokens, about 36 s left",
        "prefill: 600 of 1,200 tokens, about 24 s left",
        "prefill: 900 of 1,200 tokens, about 12 s left",
        "prefill: 1,200 of 1,200 tokens, about 0 s left",
        "prefill: done in 48.0 s",
    ]


def test_short_tasks_and_those_of_unknown_length_say_less(capsys, clock):
    with reporting():
        assert list(track([1, 2], "short", "parts")) == [1, 2]
        for _ in track(iter([1, 2, 3]), "unknown", "blocks"):
            clock[0] += 11
    assert capsys.readouterr().err.splitlines() == [
        "short: 2 parts",
        "unknown",
        "unknown: 1 blocks",
        "unknown: 2 blocks",
        "unknown: 3 blocks",
        "unknown: done in 33.0 s",
    ]


def test_of_tasks_within_a_task_only_the_outer_one_is_told(capsys):
    with reporting():
        with task("outer", 1):
            assert list(track([1], "inner")) == [1]
        for _ in track([1, 2], "left early"):
            break
        with task("after", 1):
            pass
    assert capsys.readouterr().err.splitlines() == ["outer: 1 steps", "left early: 2 steps", "after: 1 steps"]


def test_a_failed_task_is_not_done(capsys, clock):
    def fail():
        with task("prefill", 10, "tokens"):
            clock[0] += 60
            raise ValueError

    with reporting(), pytest.raises(ValueError, match=r"^$"):
        fail()
    assert capsys.readouterr().err == "prefill: 10 tokens\n"


def test_on_a_terminal_there_is_a_bar_that_goes_away(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with reporting(), task("prefill\x1b[2J", 200, "tokens") as advance:
        advance(100)
        advance(100)
    text = terminal.getvalue()
    assert "prefill\\x1b[2J:   0%" in text
    assert " tokens" in text
    assert text.rsplit("\r", 2)[1].strip() == ""


@pytest.fixture
def text(tmp_path_factory) -> Path:
    """Some 100 000 tokens in documents."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(f"{CONVERSATION.read_text(encoding='utf-8')}\n\n\n" * 60, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["encode", "TEXT", "-o", "out.json", "--truncate"], "prefill: 4,096 tokens"),
        (["calibrate", "--text", "TEXT", "-o", "out.json", "--tokens", "60000"], "reading text: 60,000 tokens"),
        (["measure", "--text", "TEXT", "-o", "out.json"], "exact predictions: "),
        (["evaluate", "--text", "TEXT", "-o", "out.json"], "quality: window 128, 4 texts of 1,792 tokens: 96 caches"),
    ],
)
def test_an_interruption_leaves_the_old_file_and_says_one_line(tmp_path, text, arguments, told):
    out = tmp_path / "out.json"
    out.write_bytes(b"old")
    command = [sys.executable, "-m", "kvtc", *(str(text) if word == "TEXT" else word for word in arguments)]
    assert interrupted([*command, "--model", "reference", "--force"], told, tmp_path)
    assert out.read_bytes() == b"old"
    # Only a calibration keeps what it has done so far, to go on from there.
    assert {path.name for path in tmp_path.iterdir()} - {"out.json.partial"} == {"out.json"}


def test_an_interrupted_demo_leaves_no_folder(tmp_path):
    command = [sys.executable, "-m", "kvtc", "demo", "--output", str(tmp_path / "pictures"), "--json"]
    assert interrupted(command, "kvtc demo: ", tmp_path)
    assert list(tmp_path.iterdir()) == []


def interrupted(command: list[str], told: str, directory: Path) -> bool:
    """Whether a command that is interrupted when it has told something ends at once, in one line and as it should."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background of a shell, interruptions are ignored, and by children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if told in line:
                process.send_signal(signal.SIGINT)
                break
        out, rest = process.communicate(timeout=120)
        assert process.returncode == 130, (lines, rest)
        assert rest.splitlines()[-1] == "kvtc: interrupted", rest
        assert "Traceback" not in rest
        assert out == ""
    return True
