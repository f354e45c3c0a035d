"""Warnings about what may go wrong thousands of times a second: one a minute of each kind."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from textwrap import indent

from ..display import shown, shown_lines, without_credentials
from .forks import in_child

SECONDS = 60.0
MAX_KINDS = 1024  # remembered; kinds are few, but nobody's texts may fill the memory


class LogLimits:
    """When each kind was logged last, and how many of it were left out since. Safe to share between threads, and after forks."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        self._renew()
        in_child(self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def pass_one(self, name: str, kind: str) -> int | None:
        """None: this one is to be left out. Else how many of its kind were left out before it."""
        now, key = time.monotonic(), (name, kind)
        with self._lock:
            last, n_left_out = self._kinds.get(key, (None, 0))
            if last is not None and now - last < SECONDS:
                self._kinds[key] = (last, n_left_out + 1)
                return None
            self._kinds[key] = (now, 0)
            self._kinds.move_to_end(key)
            if len(self._kinds) > MAX_KINDS:
                self._kinds.popitem(last=False)
            return n_left_out


_limits = LogLimits()
_subject: ContextVar[str] = ContextVar("kvtc_log_subject", default="")


@contextmanager
def concerning(subject: str) -> Iterator[None]:
    """A block whose lines of `log_once` begin with what it is done for, such as "request 7", whoever logs them in this thread."""
    before = _subject.set(subject)
    try:
        yield
    finally:
        _subject.reset(before)


def log_once(
    logger: logging.Logger,
    kind: str,
    message: str,
    *arguments: object,
    exc_info: BaseException | None = None,
    level: int = logging.WARNING,
) -> None:
    """Log a line, unless one of the same logger and kind was logged within the last minute.

    kind: what repeats, such as an operation and the class of its error; never a key or a text, of which there are any number.
    message, arguments: as of `logging.Logger.warning`. How many were left out since the last one is added.
    exc_info: an error whose traceback is of use, where it was not expected. It follows as text, each line of it indented.

    level: of the line; a warning, unless another one is given.

    What others wrote, in subject, arguments and errors, is shown as text on one line, without passwords of addresses: it forges no
    line.
    """
    n_left_out = _limits.pass_one(logger.name, kind)
    if n_left_out is None:
        return
    text = shown(": ".join(filter(None, (_subject.get(), message % arguments))))
    if n_left_out:
        text += f" (and {n_left_out} more of this kind before)"
    if exc_info is not None:
        text += "\n" + indent(
            shown_lines("".join(traceback.format_exception(exc_info)).rstrip("\n")), "    ", lambda _: True
        )
    logger.log(level, "%s", without_credentials(text))
