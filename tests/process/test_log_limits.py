"""Warnings that repeat, and what a forked child makes anew."""

import logging
import os
import re
import threading
from pathlib import Path

import pytest

from kvtc.process import log_limits
from kvtc.process.forks import in_child
from kvtc.process.log_limits import concerning, log_once
from tests.forking import in_forked_child

logger = logging.getLogger("kvtc.test_log_limits")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr(log_limits.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(log_limits, "_limits", log_limits.LogLimits())
    return now


def test_one_a_minute_of_each_kind_is_logged_and_says_how_many_were_not(caplog, clock):
    for number in range(5):
        log_once(logger, "get OSError", "get failed: %s", number)
    log_once(logger, "put OSError", "put failed")
    clock[0] += 61
    log_once(logger, "get OSError", "get failed: %s", 5)
    clock[0] += 61
    log_once(logger, "get OSError", "get failed: %s", 6)
    assert caplog.messages == [
        "get failed: 0",
        "put failed",
        "get failed: 5 (and 4 more of this kind before)",
        "get failed: 6",
    ]


def test_kinds_without_end_fill_no_memory():
    for number in range(3000):
        log_once(logging.getLogger("kvtc.silent"), str(number), "")
    assert len(log_limits._limits._kinds) == log_limits.MAX_KINDS


def test_lines_begin_with_what_they_concern_and_are_of_one_kind(caplog):
    with concerning("request 7"):
        log_once(logger, "kind", "entry %s is damaged", "a")
        with concerning("request 8\nforged"):
            log_once(logger, "other", "100%% gone")
        log_once(logger, "kind", "entry %s is damaged", "b")
        log_once(logger, "third", "again")
    log_once(logger, "fourth", "nobody's")
    assert caplog.messages == [
        "request 7: entry a is damaged",
        r"request 8\nforged: 100% gone",
        "request 7: again",
        "nobody's",
    ]


def test_the_traceback_of_an_error_is_kept(caplog):
    log_once(logger, "ValueError", "failed", exc_info=ValueError("why"))
    assert caplog.messages == ["failed\n    ValueError: why"]


def test_what_others_wrote_forges_no_line_steers_no_terminal_and_tells_no_password(caplog):
    error = RuntimeError("\x1b[31mred\nWARNING forged s3://u:pa55word@h")
    log_once(logger, "kind", "%s failed: %s", "a\rb", error, exc_info=error)
    assert caplog.messages == [
        "a\\rb failed: \\x1b[31mred\\nWARNING forged s3://h\n    RuntimeError: \\x1b[31mred\n    WARNING forged s3://h"
    ]


def test_a_child_logs_although_another_thread_held_the_lock_when_it_was_forked():
    with log_limits._limits._lock:
        assert in_forked_child(lambda: log_once(logging.getLogger("kvtc.silent"), "kind", "text")) == "None"


def test_objects_are_renewed_in_a_child_as_long_as_they_live():
    class Locked:
        def __init__(self):
            self.renew()
            in_child(self.renew)

        def renew(self):
            self.lock, self.process = threading.Lock(), os.getpid()

    kept, dropped = Locked(), Locked()
    del dropped
    kept.lock.acquire()
    assert in_forked_child(lambda: kept.lock.acquire(timeout=5) and kept.process == os.getpid()) == "True"
    assert kept.process == os.getpid()
    assert kept.lock.locked()


def test_nothing_warns_past_the_limit():
    """What can go wrong thousands of times a second fills no log: every warning of kvtc is one of `log_once`."""
    sources = Path(log_limits.__file__).parents[1].rglob("*.py")
    found = {file.name for file in sources if re.search(r"logger\.(log|warning|error|exception)\(", file.read_text())}
    assert found == {"log_limits.py"}
