"""What a long task does, how far it is and how long it will still take, on stderr: a bar on a terminal, few lines elsewhere.

Functions that may take long name their tasks with `task` or `track`. Nothing is shown unless the caller asks with `reporting`, as
the command line does; of tasks within a task only the outer one is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from ..display import shown

Item = TypeVar("Item")
Advance = Callable[[int], object]

LINE_SECONDS = 10.0
"""Between two lines of one task where there is no terminal."""
LONG_SECONDS = 2.0
"""A task that took so long says when it is done."""


@dataclass
class _Listener:
    """Somebody who wants to see tasks. is_told: of one, now."""

    is_told: bool = False


_listener: ContextVar[_Listener | None] = ContextVar("kvtc_progress", default=None)


@contextmanager
def reporting(enabled: bool = True) -> Iterator[None]:
    """Inside, tasks of this thread are shown, or not."""
    token = _listener.set(_Listener() if enabled else None)
    try:
        yield
    finally:
        _listener.reset(token)


def note(text: str) -> None:
    """One line, beside the tasks."""
    if _listener.get() is not None:
        print(shown(text), file=sys.stderr, flush=True)


@contextmanager
def task(what: str, total: int | None = None, unit: str = "steps") -> Iterator[Advance]:
    """A task of `total` units, None where nobody knows; gives the function to call with the number of units that were just done."""
    listener = _listener.get()
    if listener is None or listener.is_told:
        yield nobody
        return
    listener.is_told = True
    try:
        with (_bar if sys.stderr.isatty() else _lines)(shown(what), total, unit) as advance:
            yield advance
    finally:
        listener.is_told = False


def nobody(_: int) -> None:
    """An `Advance` for those who need not know."""


def track(items: Iterable[Item], what: str, unit: str = "steps") -> Iterator[Item]:
    """The items, each a unit of a task that is done when the next is asked for."""
    with task(what, len(items) if isinstance(items, Sized) else None, unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def _bar(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A task on a terminal: a bar that goes away when it is done."""
    from tqdm import tqdm

    # Without a total there is nothing to draw a bar of.
    form = "{desc} [{elapsed}]" if total is None else None
    with tqdm(desc=what, total=total, unit=f" {unit}", leave=False, file=sys.stderr, bar_format=form) as bar:
        yield bar.update


@contextmanager
def _lines(what: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A task told in lines: when it begins, at a sane pace meanwhile, and at its end if it took long."""
    done, started = 0, time.monotonic()
    told = started

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def advance(n: int = 1) -> None:
        nonlocal done, told
        done += n
        now = time.monotonic()
        if now - told < LINE_SECONDS:
            return
        told = now
        if total is None:
            say(f"{what}: {done:,} {unit}")
            return
        left = (now - started) * max(0, total - done) / done if done else 0.0
        say(f"{what}: {done:,} of {total:,} {unit}, about {left:,.0f} s left")

    say(what if total is None else f"{what}: {total:,} {unit}")
    yield advance
    seconds = time.monotonic() - started
    if seconds >= LONG_SECONDS:
        say(f"{what}: done in {seconds:,.1f} s")
