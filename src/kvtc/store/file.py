"""`file:///path` entries as files in a directory that any number of processes share."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InvalidArgument, StoreFull
from .base import StoreStatistics
from .directory import Directory, blocks, translating
from .framed import FramedStore
from .ledger import LockedLedger
from .urls import StoreUrl, parse_bytes, parse_choice, parse_seconds

SYNC = ("none", "data", "full")
LOCK_SECONDS = 30.0
FILLED_AFTER_EVICTION = 0.9  # of the budget, so that one scan pays for many puts


class FileStore(FramedStore):
    """Entries as files under `root`, at most `max_bytes` of disk (None: as much as there is).

    sync: "none" leaves it to the operating system when bytes reach the disk (a killed process loses nothing, a power cut may cost
    the last entries), "data" writes every entry through before it appears, "full" its directory as well.
    """

    def __init__(
        self,
        root: str | Path,
        max_bytes: int | None = None,
        sync: str = "none",
        lock_timeout: float = LOCK_SECONDS,
        namespace: str | None = None,
        on_error: str = "raise",
    ) -> None:
        super().__init__(namespace, on_error)
        if max_bytes is not None and max_bytes < 1:
            raise InvalidArgument(f"bytes is {max_bytes}; expected a positive byte budget")
        if sync not in SYNC:
            raise InvalidArgument(f"sync is {sync!r}; expected one of {', '.join(SYNC)}")
        self._max_bytes = max_bytes
        self._directory = Directory(Path(root), sync, lock_timeout)
        with translating(self._directory.root):
            self._directory.create()
            self._recover()

    @classmethod
    def from_url(cls, url: StoreUrl) -> FileStore:
        if url.host or not url.path.startswith("/"):
            raise InvalidArgument(f"{url}: expected file:///absolute/path")
        max_bytes = url.take("bytes", parse_bytes)
        sync = url.take("sync", parse_choice(*SYNC), "none")
        lock_timeout = url.take("lock_timeout", parse_seconds, LOCK_SECONDS)
        return cls(url.path, max_bytes, sync, lock_timeout, **url.take_common())

    def __repr__(self) -> str:
        return f"FileStore({str(self._directory.root)!r})"

    def statistics(self) -> StoreStatistics:
        """stored_bytes is what the processes on this directory have counted together: never too few, sometimes too many."""
        return self._counters.snapshot(stored_bytes=self._directory.ledger.read()[1])

    def _recover(self) -> None:
        """Clean up after the dead and count what is there; a store that can only be read stays as it is."""
        try:
            if self._max_bytes is None:
                self._directory.clean()
            else:
                with self._directory.ledger.locked() as held:
                    self._make_room(held, 0)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise

    def _read(self, names: Sequence[str]) -> list[bytes | None]:
        with translating(self._directory.root):
            # The head of a chain gets the latest stamp: without it the rest is of no use.
            ticks = reversed(self._directory.ledger.ticks(len(names)))
            return [self._directory.load(name, tick) for name, tick in zip(names, ticks, strict=True)]

    def _write(self, names: Sequence[str], frames: Iterator[bytes]) -> None:
        with translating(self._directory.root):
            self._directory.create()  # again, where somebody has emptied it
            ticks = reversed(self._directory.ledger.ticks(len(names)))
            for name, frame, tick in zip(names, frames, ticks, strict=True):
                self._write_one(name, frame, tick)

    def _write_one(self, name: str, frame: bytes, tick: int) -> None:
        try:
            self._attempt_write(name, frame, tick)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self._max_bytes is None:
                raise
            # The disk is smaller than the budget: make room as if the budget were.
            with self._directory.ledger.locked() as held:
                total, found = self._directory.scan()
                target = total - max(2 * blocks(len(frame)), total // 10)
                held.usage, n_removed = self._directory.evict(held, total, found, target)
            self._counters.add(evictions=n_removed)
            self._attempt_write(name, frame, tick)

    def _attempt_write(self, name: str, frame: bytes, tick: int) -> None:
        size = blocks(len(frame))
        with self._directory.ledger.locked() as held:
            if self._max_bytes is not None and (held.usage is None or held.usage + size > self._max_bytes):
                self._make_room(held, size)
            if held.usage is not None:
                # Taken back by a scan alone: whoever dies meanwhile leaves the count too high and not too low.
                held.usage += size
            descriptor, partial = self._directory.begin(len(frame))
        try:
            self._directory.finish(descriptor, partial, name, frame, tick)
        except BaseException:
            self._directory.abandon(descriptor, partial)
            raise
        os.close(descriptor)

    def _make_room(self, held: LockedLedger, size: int) -> None:
        """Count again, and evict where `size` more bytes exceed the budget."""
        budget = self._max_bytes
        if budget is None:
            return
        if size > budget:
            raise StoreFull(f"an entry of {size} bytes on disk exceeds the byte budget of {budget} bytes of {self!r}")
        total, found = self._directory.scan()
        if total + size > budget:
            target = min(budget - size, max(0, int(FILLED_AFTER_EVICTION * budget) - size))
            total, n_removed = self._directory.evict(held, total, found, target)
            self._counters.add(evictions=n_removed)
        held.usage = total

    def _leading(self, names: Sequence[str]) -> int:
        with translating(self._directory.root):
            return next((i for i, name in enumerate(names) if not self._directory.path(name).exists()), len(names))

    def _remove(self, name: str) -> None:
        with translating(self._directory.root):
            self._directory.remove(name)

    def _discard(self, name: str, frame: bytes) -> None:
        with translating(self._directory.root):
            self._directory.discard(name, frame)

    def _list(self) -> Iterator[str]:
        with translating(self._directory.root):
            yield from self._directory.names()
