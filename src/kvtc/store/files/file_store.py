"""`file:///path` entries as files in a directory that any number of processes share."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ...errors import InvalidArgument, StoreError, StoreFull, StoreUnavailable
from ..base import StoreStatistics
from ..bounded_calls import BoundedCalls
from ..frame import Frame
from ..framed import PROBE_NAME, Finding, FramedStore, Listed
from ..urls import StoreUrl, parse_bytes, parse_choice, parse_mode, parse_seconds
from .diagnosis import diagnose
from .directory import SUFFIX, Directory, blocks
from .ledger import LockedLedger

T = TypeVar("T")
SYNC = ("none", "data", "full")
DEFAULT_SECONDS = 30.0
LOCK_SHARE = 0.9  # of them, so that a caller learns of the lock
DEFAULT_MODE = 0o600  # values reveal what a model has read
BATCH_NAMES = 16  # read or written within one deadline
FILLED_AFTER_EVICTION = 0.9  # of the budget, so that one scan pays for many puts


class FileStore(FramedStore):
    """Entries as files of a directory.

    Parameters:
        url: `file:///path`, of a directory, which is made. Options:
            `bytes`: Byte budget on disk.
            `sync`: When bytes reach the disk. `none`: when the operating system writes them; a
            killed process loses nothing, a power cut may cost the last entries. `data`: before the
            entry appears. `full`: as `data`, and its name in the directory, too.
            `timeout`: Seconds that a caller waits for a batch of up to 16 entries, the lock of the
            directory included; see `BoundedCalls`.
            `mode`: Permissions of files that are made, less those that the umask forbids.
            Directories may be searched by those who may read the files.
    """

    def __init__(self, url: StoreUrl) -> None:
        if url.host or not url.path.startswith("/"):
            raise InvalidArgument(f"{url}: expected file:///absolute/path")
        self.budget_bytes = url.take("bytes", parse_bytes)
        sync = url.take("sync", parse_choice(*SYNC), "none")
        timeout = url.take("timeout", parse_seconds, DEFAULT_SECONDS)
        mode = url.take("mode", parse_mode, DEFAULT_MODE)
        super().__init__(url)
        self._directory = Directory(Path(url.path), sync, LOCK_SHARE * timeout, mode)
        # Writing waits for a lock, and may hang where reading does not: neither uses up the other's
        # threads.
        self._reading = BoundedCalls(repr(self), timeout, self._probe_reading, self._directory.meaning)
        self._writing = BoundedCalls(repr(self), timeout, self._probe_writing, self._directory.meaning)

    def __repr__(self) -> str:
        return f"FileStore({str(self._directory.root)!r})"

    def statistics(self) -> StoreStatistics:
        """stored_bytes is what the processes on this directory have counted together: never too
        few, sometimes too many."""
        try:
            stored_bytes = self._reading.run(self._directory.ledger.read)[1]
        except StoreError:
            stored_bytes = None
        return self._counters.snapshot(stored_bytes=stored_bytes)

    def _probe_reading(self) -> None:
        self._directory.path(PROBE_NAME).exists()

    def _probe_writing(self) -> None:
        self._directory.create()
        with self._directory.ledger.locked():
            pass

    def recover(self) -> None:
        """Clean up after the dead and count what is there; a store that can only be read stays as
        it is."""
        self._translated(lambda: self._writing.run(self._recover))

    @property
    def filled_bytes(self) -> int | None:
        return None if self.budget_bytes is None else int(FILLED_AFTER_EVICTION * self.budget_bytes)

    def cost(self, n_bytes: int) -> int:
        return blocks(n_bytes)

    def check_place(self) -> None:
        if not self._reading.run(self._directory.root.is_dir):
            raise StoreUnavailable(f"file store {self._directory.root}: there is no such directory")

    def diagnose(self) -> list[Finding]:
        self.check_place()
        return [*super().diagnose(), *self._reading.run(lambda: diagnose(self._directory, self.budget_bytes))]

    def _recover(self) -> None:
        self._directory.create()
        try:
            if self.budget_bytes is None:
                self._directory.clean()
            else:
                with self._directory.ledger.locked() as held:
                    self._make_room(held, 0)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise

    def _read(self, names: Sequence[str]) -> list[Frame | None]:
        frames: list[Frame | None] = []
        ticks: list[int] = []
        for start in range(0, len(names), BATCH_NAMES):
            frames += self._reading.run(partial(self._read_batch, names, start, ticks))
        return frames

    def _read_batch(self, names: Sequence[str], start: int, ticks: list[int]) -> list[Frame | None]:
        if start == 0:
            # The head of a chain gets the latest stamp: without it the rest is of no use.
            ticks += reversed(self._directory.ledger.ticks(len(names)))
        batch = slice(start, start + BATCH_NAMES)
        return [
            self._directory.load(name, tick, self.entry_bytes)
            for name, tick in zip(names[batch], ticks[batch], strict=True)
        ]

    def _write(self, names: Sequence[str], frames: Iterator[bytes]) -> None:
        ticks: list[int] = []
        for start in range(0, len(names), BATCH_NAMES):
            self._writing.run(partial(self._write_batch, names, start, ticks, frames))

    def _write_batch(self, names: Sequence[str], start: int, ticks: list[int], frames: Iterator[bytes]) -> None:
        if start == 0:
            self._directory.create()  # again, where somebody has emptied it
            ticks += reversed(self._directory.ledger.ticks(len(names)))
        batch = slice(start, start + BATCH_NAMES)
        for name, frame, tick in zip(names[batch], islice(frames, BATCH_NAMES), ticks[batch], strict=True):
            self._write_one(name, frame, tick)

    def _write_one(self, name: str, frame: bytes, tick: int) -> None:
        try:
            self._attempt_write(name, frame, tick)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or self.budget_bytes is None:
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
            if self.budget_bytes is not None and (held.usage is None or held.usage + size > self.budget_bytes):
                self._make_room(held, size)
            if held.usage is not None:
                # Taken back by a scan alone: whoever dies meanwhile leaves the count too high and
                # not too low.
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
        budget = self.budget_bytes
        if budget is None:
            return
        if size > budget:
            raise StoreFull(f"an entry of {size} bytes on disk exceeds the byte budget of {budget} bytes of {self!r}")
        total, found = self._directory.scan()
        if total + size > budget:
            target = min(budget - size, max(0, (self.filled_bytes or 0) - size))
            total, n_removed = self._directory.evict(held, total, found, target)
            self._counters.add(evictions=n_removed)
        held.usage = total

    def _leading(self, names: Sequence[str]) -> int:
        return self._reading.run(
            lambda: next((i for i, name in enumerate(names) if not self._directory.path(name).exists()), len(names)),
        )

    def _present(self, names: Sequence[str]) -> list[bool]:
        return self._reading.run(lambda: [self._directory.path(name).exists() for name in names])

    def _remove(self, name: str) -> None:
        self._writing.run(lambda: self._directory.remove(name))

    def _discard(self, name: str, frame: Frame) -> None:
        self._writing.run(lambda: self._directory.discard(name, frame, self.entry_bytes))

    def _list(self) -> Iterator[Listed]:
        last_tick = self._reading.run(self._directory.ledger.read)[0]
        for shard in self._reading.run(self._directory.shards):
            for entry in self._reading.run(partial(self._directory.entries, shard)):
                recency = entry.tick if last_tick is None else entry.recency(last_tick)
                name = os.path.basename(entry.path).removesuffix(SUFFIX)  # noqa: PTH119  there may be a million of them
                yield Listed(name, entry.n_bytes, recency / 1e9 if recency else None)

    def _look(self, name: str) -> Frame | None:
        return self._reading.run(lambda: self._directory.load(name, None, self.entry_bytes))

    def _heads(self, names: Sequence[str], n_bytes: int) -> list[bytes]:
        heads: list[bytes] = []
        for start in range(0, len(names), BATCH_NAMES):
            heads += self._reading.run(partial(self._batch_heads, names[start : start + BATCH_NAMES], n_bytes))
        return heads

    def _batch_heads(self, names: Sequence[str], n_bytes: int) -> list[bytes]:
        return [self._directory.head(name, n_bytes) for name in names]
