"""Threads that work in the background, as long as their owner is open, in whichever process it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ..errors import StoreUnavailable
from .forks import in_child

T = TypeVar("T")


def side_by_side(work: Callable[..., T], n_threads: int, *arguments: Iterable[Any]) -> list[T]:
    """As the built-in `map`, on threads that end with the call; one after another where the process can begin no more threads.

    That is so at the end of the interpreter, while what was begun in the background is finished.
    """
    tasks = list(zip(*arguments, strict=True))
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            futures = [pool.submit(work, *task) for task in tasks]
        except RuntimeError:
            return [work(*task) for task in tasks]
        return [future.result() for future in futures]


class Workers:
    """n_threads threads, made when there is work. owner: what they work for, in words, for messages.

    max_pending: tasks that may wait or run before `submit` waits for one to end; None: any number.

    A forked child has threads of its own. What the parent had to do it does; the child's copies of those futures end with
    `StoreUnavailable`.
    """

    def __init__(self, n_threads: int, owner: str, name: str, max_pending: int | None = None) -> None:
        self._n_threads, self._owner, self._name, self._max_pending = n_threads, owner, name, max_pending
        self._is_closed = False
        self._start()
        in_child(self._renew)

    def submit(self, work: Callable[..., T], *arguments: object) -> Future[T]:
        """Begin a task. Raises `StoreUnavailable` after `close`, and where the process can begin no more tasks."""
        if self._room is not None:
            self._room.acquire()
        try:
            future = self._pool.submit(work, *arguments)
        except BaseException as error:
            self._leave()
            if isinstance(error, RuntimeError):
                why = "is closed" if self._is_closed else f"can begin no more tasks: {error}"
                raise StoreUnavailable(f"{self._owner} {why}") from error
            raise
        self._pending.add(future)
        future.add_done_callback(self._end)
        return future

    def map(self, work: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
        """As the built-in `map`, side by side; waits for all."""
        return [future.result() for future in [self.submit(work, *these) for these in zip(*arguments, strict=True)]]

    def check_open(self) -> None:
        """Raise `StoreUnavailable` after `close`."""
        if self._is_closed:
            raise StoreUnavailable(f"{self._owner} is closed")

    def close(self, *, finish: bool = True) -> None:
        """Wait for what was begun; finish: and for what waits, which is dropped otherwise. Closing twice is allowed."""
        self._is_closed = True
        self._pool.shutdown(wait=True, cancel_futures=not finish)

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix=self._name)
        self._room = threading.BoundedSemaphore(self._max_pending) if self._max_pending else None
        self._pending: set[Future[Any]] = set()

    def _renew(self) -> None:
        abandoned = self._pending
        self._start()
        if self._is_closed:
            self._pool.shutdown()
        for future in abandoned:
            Future.__init__(future)  # its lock may be held by a thread that is not here
            future.set_exception(StoreUnavailable(f"{self._owner} was forked meanwhile; the parent process does this"))

    def _end(self, future: Future[Any]) -> None:
        self._pending.discard(future)
        self._leave()

    def _leave(self) -> None:
        if self._room is not None:
            self._room.release()
