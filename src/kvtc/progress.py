"""What a long task does, how far it is and how long it will still take, on stderr: a bar on a terminal, few lines elsewhere.

Functions that may take long name their tasks with `task` or `track`. Nothing is shown unless the caller asks with `reporting`, as
the command line does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from .display import shown

Item = TypeVar("Item")
Advance = Callable[[int], object]

LINE_SECONDS = 10.0
"""Between two lines of one task where there is no terminal."""
LONG_SECONDS = 2.0
"""A task that took so long says when it is done."""

_reporting: ContextVar[bool] = ContextVar("kvtc_reporting", default=False)


@contextmanager
def reporting(enabled: bool = True) -> Iterator[None]:
    """Inside, tasks of this thread are shown, or not."""
    token = _reporting.set(enabled)
    try:
        yield
    finally:
        _reporting.reset(token)


def note(text: str) -> None:
    """One line, beside the tasks."""
    if _reporting.get():
        print(shown(text), file=sys.stderr, flush=True)


@contextmanager
def task(what: str, total: int | None = None, unit: str = "steps") -> Iterator[Advance]:
    """A task of `total` units, None where nobody knows; gives the function to call with the number of units that were just done."""
    if not _reporting.get():
        yield lambda _: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=shown(what), total=total, unit=f" {unit}", leave=False, file=sys.stderr) as bar:
            yield bar.update
    else:
        lines = _Lines(shown(what), total, unit)
        yield lines.advance
        lines.finish()


def track(items: Iterable[Item], what: str, total: int | None = None, unit: str = "steps") -> Iterator[Item]:
    """The items, each a unit of a task that is done when the next is asked for."""
    with task(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)


class _Lines:
    """A task told in lines: when it begins, at a sane pace meanwhile, and at its end if it took long."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._started = self._told = time.monotonic()
        self._say(what if total is None else f"{what}: {total:,} {unit}")

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._told < LINE_SECONDS:
            return
        self._told = now
        if self._total is None:
            self._say(f"{self._what}: {self._done:,} {self._unit}")
            return
        left = (now - self._started) * max(0, self._total - self._done) / self._done if self._done else 0.0
        self._say(f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, about {left:,.0f} s left")

    def finish(self) -> None:
        seconds = time.monotonic() - self._started
        if seconds >= LONG_SECONDS:
            self._say(f"{self._what}: done in {seconds:,.1f} s")

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
