"""Writing to slow tiers in the background: a bounded queue, one worker, and an answer for what is still on its way."""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from ..errors import StoreUnavailable

ENTRY_BYTES = 512  # what an entry costs beside its value, roughly


class WriteBack:
    """Entries on their way to `write`, in the order in which they were put.

    A later value of a key takes the place of one that still waits. At most `max_bytes` wait; more makes `put` wait instead.
    """

    def __init__(self, write: Callable[[str, bytes], None], max_bytes: int) -> None:
        self._write, self._max_bytes = write, max_bytes
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._in_flight: tuple[str, bytes] | None = None
        self._is_stopping = False
        self._has_ended = False
        self._worker = threading.Thread(target=self._work, name="kvtc-write-back", daemon=True)
        self._worker.start()
        atexit.register(self.stop)  # what waits is written even where nobody closes the store

    def put(self, key: str, value: bytes) -> None:
        cost = len(value) + ENTRY_BYTES
        with self._changed:
            self._forget(key)
            # Into an empty queue goes a value of any size.
            self._changed.wait_for(
                lambda: not self._waiting or self._bytes + cost <= self._max_bytes or self._has_ended
            )
            if self._has_ended:
                raise StoreUnavailable("writing in the background has ended")
            self._forget(key)  # another thread may have put the same key meanwhile
            self._waiting[key] = value
            self._bytes += cost
            self._changed.notify_all()

    def get(self, key: str) -> bytes | None:
        with self._changed:
            if key in self._waiting:
                return self._waiting[key]
            if self._in_flight is not None and self._in_flight[0] == key:
                return self._in_flight[1]
            return None

    def keys(self) -> Sequence[str]:
        with self._changed:
            return [*self._waiting, *([self._in_flight[0]] if self._in_flight else ())]

    def delete(self, key: str) -> None:
        """Forget what waits under that key, and let what is being written arrive: nothing of it comes after this."""
        with self._changed:
            self._forget(key)
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._has_ended or self._in_flight is None or self._in_flight[0] != key,
            )

    def flush(self) -> None:
        """Wait until nothing is on its way."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or (not self._waiting and self._in_flight is None))

    def stop(self) -> None:
        """Write what waits and end the worker."""
        atexit.unregister(self.stop)
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._worker.join()

    def _forget(self, key: str) -> None:
        value = self._waiting.pop(key, None)
        if value is not None:
            self._bytes -= len(value) + ENTRY_BYTES

    def _work(self) -> None:
        try:
            self._write_all()
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_stopping)
                if not self._waiting:
                    return
                key, value = next(iter(self._waiting.items()))
                self._forget(key)
                self._in_flight = (key, value)
                self._changed.notify_all()
            self._write(key, value)
            with self._changed:
                self._in_flight = None
                self._changed.notify_all()
