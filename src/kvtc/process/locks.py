"""A lock for what processes and pickles may carry along."""

from __future__ import annotations

import threading

from .forks import in_child


class ForkSafeLock:
    """A lock, used in a `with` statement, that is free in every forked child and in every copy that was pickled."""

    def __init__(self) -> None:
        self._renew()
        in_child(self._renew)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[ForkSafeLock], tuple[()]]:
        return ForkSafeLock, ()

    def _renew(self) -> None:
        self._lock = threading.Lock()
