"""Writing to slow tiers in the background: a bounded queue, one worker, and an answer for what is
still on its way."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from ..errors import PROGRAM_ENDS, StoreUnavailable
from ..process.forks import in_child
from ..process.log_limits import log_once

ENTRY_BYTES = 512  # what an entry costs beside its value, roughly
logger = logging.getLogger(__name__)


class WriteBack:
    """Entries on their way to slow tiers, written in the order in which they were put.

    A later value of a key takes the place of one that waits. An error of `write` is logged, and the
    next entry is written. Entries that wait when the process ends regularly are written then. In a
    forked child nothing waits: the parent writes what the parent has put.

    Parameters:
        write: Writes one entry.
        max_bytes: Bytes that may wait; with more, `put` waits.
    """

    def __init__(self, write: Callable[[str, bytes], None], max_bytes: int) -> None:
        self._write, self._max_bytes = write, max_bytes
        self._is_stopping = False
        self._renew()
        in_child(self._renew)
        atexit.register(self.stop)  # what waits is written even where nobody closes the store

    def _renew(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._in_flight: tuple[str, bytes] | None = None
        self._worker: threading.Thread | None = None  # while there is something to write

    def put(self, key: str, value: bytes) -> None:
        """`StoreUnavailable` once it is stopped, also to those who wait for room then."""
        cost = len(value) + ENTRY_BYTES
        with self._changed:
            self._forget(key)

            def has_room() -> bool:  # into an empty queue goes a value of any size
                return not self._waiting or self._bytes + cost <= self._max_bytes

            while not self._is_stopping and not has_room():
                self._ensure_worker()  # a third-party store may have ended the last one, and may end this one
                self._changed.wait_for(lambda: self._is_stopping or self._worker is None or has_room())
            if self._is_stopping:
                raise StoreUnavailable("writing in the background has ended: the store is closed")
            self._forget(key)  # another thread may have put the same key meanwhile
            self._ensure_worker()
            self._waiting[key] = value
            self._bytes += cost

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
        """Forget what waits under that key, and let what is being written arrive: nothing of it
        comes after this."""
        with self._changed:
            self._forget(key)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._in_flight is None or self._in_flight[0] != key)

    def flush(self) -> None:
        """Wait until nothing is on its way."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._worker is None or not (self._waiting or self._in_flight))
                if not self._waiting and self._in_flight is None:
                    return
                self._worker = threading.current_thread()  # the last one has died, or none could be had
            self._work()

    def stop(self) -> None:
        """Write what waits and take nothing more."""
        atexit.unregister(self.stop)
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            worker = self._worker
        self.flush()
        if worker is not None:
            worker.join()

    def _forget(self, key: str) -> None:
        value = self._waiting.pop(key, None)
        if value is not None:
            self._bytes -= len(value) + ENTRY_BYTES

    def _ensure_worker(self) -> None:
        if self._worker is None:
            worker = threading.Thread(target=self._work, name="kvtc-write-back", daemon=True)
            try:
                worker.start()
            except RuntimeError as error:
                raise StoreUnavailable(f"no thread to write in the background: {error}") from error
            self._worker = worker

    def _work(self) -> None:
        try:
            while (entry := self._next()) is not None:
                try:
                    self._write(*entry)
                except PROGRAM_ENDS:
                    raise
                except BaseException as error:  # noqa: BLE001  of this entry; the next may well be written
                    log_once(logger, type(error).__name__, "an entry is not written in the background", exc_info=error)
        except BaseException:
            with self._changed:  # the next entry starts another thread
                self._in_flight = self._worker = None
                self._changed.notify_all()
            raise

    def _next(self) -> tuple[str, bytes] | None:
        """The entry that has waited longest, from now on in flight; None where none waits."""
        with self._changed:
            self._in_flight = None
            if self._waiting:
                key, value = next(iter(self._waiting.items()))
                self._forget(key)
                self._in_flight = (key, value)
            else:
                self._worker = None
            self._changed.notify_all()
            return self._in_flight
