"""What processes on one directory share: a lock, a clock for recency, and a count of bytes.

The ledger is a help, not an index: lost or damaged, it is made anew, and the count is taken again
from the files themselves.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import StoreUnavailable
from ...process.forks import in_child

_RECORD = struct.Struct("<4sIQq")  # magic, version, last tick, bytes in use or -1
_HEAD = (b"kvtl", 1)
_TICK_OFFSET, _USAGE_OFFSET = 8, 16
MAX_TICK = 1 << 62
MAX_PAUSE_SECONDS = 0.02


class Ledger:
    """The file that processes on one directory share. It is opened for every use, so that threads,
    forks and processes may use it alike.

    Parameters:
        path: Of the file.
        timeout: Seconds to wait for the lock.
        mode: Permissions of the file, if it is made.
    """

    def __init__(self, path: Path, timeout: float, mode: int) -> None:
        self._path, self._timeout, self._mode = path, timeout, mode
        self._last_tick = 0
        self._renew()
        in_child(self._renew)

    def _renew(self) -> None:
        self._mutex = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[LockedLedger]:
        """Exclude every other thread and process; a holder that dies lets go. `StoreUnavailable`
        after the timeout."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, self._mode)
        try:
            self._wait_for(descriptor)
            try:
                yield LockedLedger(descriptor)
            finally:
                # Not by closing alone: a child forked meanwhile has the descriptor too, and would
                # hold the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def ticks(self, count: int) -> range:
        """Ascending recency stamps, later than all given out before by any process.

        They are nanoseconds of the wall clock as long as it runs forward, and go on by ones where
        it was set back.
        """
        with self._mutex:
            start = max(time.time_ns(), self._last_tick + 1)
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:  # a store that can only be read keeps no recency
                return range(start, start + count)
            try:
                start = max(start, (_parse(descriptor)[0] or 0) + 1)
                if start + count < MAX_TICK:
                    # Not under the lock: two processes may give out the same stamps, which is as
                    # good as an order of them.
                    os.pwrite(descriptor, (start + count).to_bytes(8, "little"), _TICK_OFFSET)
            finally:
                os.close(descriptor)
            self._last_tick = start + count
            return range(start, start + count)

    def read(self) -> tuple[int | None, int | None]:
        """The last tick and the bytes in use, None where unknown."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None, None
        try:
            return _parse(descriptor)
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int) -> None:
        deadline, pause = time.monotonic() + self._timeout, 0.0005
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                    raise
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"{self._path} was locked by another process for {self._timeout:g} seconds")
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)


class LockedLedger:
    """The ledger while this thread alone may change the count."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        if _parse(descriptor)[0] is None:
            os.pwrite(descriptor, _RECORD.pack(*_HEAD, 0, -1), 0)

    @property
    def last_tick(self) -> int:
        return _parse(self._descriptor)[0] or 0

    @property
    def usage(self) -> int | None:
        """Bytes in use, never too few; None where they must be counted."""
        return _parse(self._descriptor)[1]

    @usage.setter
    def usage(self, value: int) -> None:
        os.pwrite(self._descriptor, value.to_bytes(8, "little", signed=True), _USAGE_OFFSET)


def _parse(descriptor: int) -> tuple[int | None, int | None]:
    record = os.pread(descriptor, _RECORD.size, 0)
    if len(record) < _RECORD.size:
        return None, None
    magic, version, tick, usage = _RECORD.unpack(record)
    if (magic, version) != _HEAD:
        return None, None
    return (tick if tick < MAX_TICK else 0), (usage if usage >= 0 else None)
