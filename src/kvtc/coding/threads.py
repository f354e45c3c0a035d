"""Work in several threads that are there for one call: threads that waited for the next one would be missing after a fork."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_LEAST_OPERATIONS = 1 << 25
"""From which a second thread pays for being started."""
_PARTS_A_THREAD = 4
_own = threading.local()
"""n_threads: how many the work of this thread may take."""


def in_threads(work: Callable[[int, int], object], count: int, n_operations: int, most: int = 1 << 10) -> None:
    """Call `work(first, stop)` for parts of `count` items, as many at a time as torch has threads; it must let go of Python's lock.

    Whoever is free takes the next part, the caller too: where a thread is late, because torch's own threads still spin on its core,
    say, the others do its work. n_operations: of all of it; a small work is done by the caller alone. Work within work shares the
    threads that this leaves. most: threads. Raises what `work` raises.
    """
    outer = getattr(_own, "n_threads", None)
    there = outer or torch.get_num_threads()
    n_threads = max(1, min(there, count, n_operations // _LEAST_OPERATIONS, most))
    if n_threads == 1:
        work(0, count)
        return
    n_parts = min(count, _PARTS_A_THREAD * n_threads)
    left = [(count * index // n_parts, count * (index + 1) // n_parts) for index in range(n_parts)]
    done = threading.Semaphore(0)
    failed: list[BaseException] = []

    def run() -> None:
        _own.n_threads = there // n_threads
        while left:
            try:
                part = left.pop()
            except IndexError:  # another one took the last part
                return
            try:
                work(*part)
            except BaseException as error:  # noqa: BLE001  the caller raises it
                failed.append(error)
            finally:
                done.release()

    for _ in range(n_threads - 1):
        try:
            # Not `Thread`, whose start waits until the thread runs.
            _thread.start_new_thread(run, ())
        except RuntimeError:  # none can be had: too many, or the interpreter ends
            break
    try:
        run()
    finally:
        _own.n_threads = outer
    for _ in range(n_parts):
        done.acquire()
    if failed:
        raise failed[0]


class Begun(Generic[T]):
    """Work that a thread of its own does beside what the caller does next; it must let go of Python's lock.

    n_operations: of all of it; a small work is done at once, as any is where torch computes on one thread.
    """

    def __init__(self, work: Callable[[], T], n_operations: int) -> None:
        self._work = work
        self._found: list[T] = []
        self._failed: list[BaseException] = []
        self._done = threading.Event()
        if torch.get_num_threads() > 1 and n_operations >= _LEAST_OPERATIONS:
            try:
                _thread.start_new_thread(self._run, ())
            except RuntimeError:
                self._run()
        else:
            self._run()

    def result(self) -> T:
        """What the work gives, or raise what it raises."""
        self._done.wait()
        if self._failed:
            raise self._failed[0]
        return self._found[0]

    def _run(self) -> None:
        try:
            self._found.append(self._work())
        except BaseException as error:  # noqa: BLE001  `result` raises it
            self._failed.append(error)
        finally:
            self._done.set()
