"""Seconds of a call."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """A result, and the seconds it took."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def best(run: Callable[[], object], repeats: int, prepare: Callable[[], object] = lambda: None) -> float:
    """Least seconds of a run, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        prepare()
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found[1:])
