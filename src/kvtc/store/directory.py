"""The directory of a file store: where entries lie, how one comes to be there whole or not at all, and which go first.

entries/<2 hex digits>/<name>.entry    the file system is the index; a file's modification time is its recency
partial/<random>.part                  being written, locked by whoever writes it
ledger                                 lock, clock and count of bytes; may be deleted at any time
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import StoreFull, StoreUnavailable
from .frame import FRAME_BYTES, promised_bytes
from .ledger import Ledger, LockedLedger

BLOCK_BYTES = 4096
SUFFIX = ".entry"
FUTURE_NS = 60 * 10**9  # a recency so far past the ledger's clock was not given out by it
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Found(NamedTuple):
    """An entry met on a scan."""

    tick: int
    size: int
    path: str


class Directory:
    """Entries as files under one root, shared with other processes. OSError becomes StoreError in `translating`."""

    def __init__(self, root: Path, sync: str, timeout: float) -> None:
        self.root = root
        self._sync = sync
        self._entries = root / "entries"
        self._partial = root / "partial"
        self.ledger = Ledger(root / "ledger", timeout)

    def create(self) -> None:
        """Make what is missing; only its owner may look inside, for values reveal what a model has read."""
        for directory in (self.root, self._entries, self._partial):
            if not directory.is_dir():
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        shard = hashlib.blake2b(name.encode(), digest_size=1).hexdigest()
        return self._entries / shard / (name + SUFFIX)

    def names(self) -> Iterator[str]:
        for entry in self._walk():
            yield entry.name.removesuffix(SUFFIX)

    def load(self, name: str, tick: int | None) -> bytes | None:
        """The file's bytes, or its head alone where its length is not what that says; stamped with a new recency."""
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        with io.FileIO(descriptor) as file:
            head = file.read(FRAME_BYTES)
            rest = b"" if promised_bytes(head) != os.fstat(descriptor).st_size else file.readall()
            if tick is not None:
                with suppress(OSError):  # a reader without the right to do so leaves recency as it is
                    os.utime(descriptor, ns=(tick, tick))
            return head + rest

    def begin(self, size: int) -> tuple[int, Path]:
        """A new locked partial file of that length, so that a scan counts it in full. The ledger must be locked."""
        path = self._partial / f"{secrets.token_hex(12)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(descriptor, size)
        except BaseException:
            self.abandon(descriptor, path)
            raise
        return descriptor, path

    def finish(self, descriptor: int, partial: Path, name: str, frame: bytes, tick: int) -> None:
        """Fill the partial file and give it the entry's name: the moment from which the entry is there."""
        view = memoryview(frame)
        while view:
            view = view[os.write(descriptor, view) :]
        os.utime(descriptor, ns=(tick, tick))
        if self._sync != "none":
            os.fsync(descriptor)
        target = self.path(name)
        if not target.parent.is_dir():
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sync_directory(target.parent.parent)
        with self.ledger.locked():  # `discard` must not meet a file that changes between its look and its hand
            partial.replace(target)
        self._sync_directory(target.parent)

    def abandon(self, descriptor: int, partial: Path) -> None:
        os.close(descriptor)
        with suppress(OSError):
            partial.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def discard(self, name: str, frame: bytes) -> None:
        """Remove an entry if it still holds these bytes."""
        with self.ledger.locked():
            if self.load(name, None) == frame:
                self.remove(name)

    def scan(self) -> tuple[int, list[Found]]:
        """Bytes in use, in whole blocks, and all entries; partial files of the dead are removed. The ledger must be locked."""
        total = sum(
            self._living_partials()
        )  # first: a file that is finished meanwhile counts twice rather than not at all
        found = []
        for entry in self._walk():
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                found.append(Found(status.st_mtime_ns, blocks(status.st_size), entry.path))
                total += found[-1].size
        return total, found

    def evict(self, held: LockedLedger, total: int, found: list[Found], target: int) -> tuple[int, int]:
        """Remove entries until at most `target` bytes are in use: those used longest ago, of equals the largest.

        Size does not weigh more, since what an entry saves grows with its size as well. Returns bytes in use and entries removed.
        """
        newest = held.last_tick + FUTURE_NS
        order = sorted(found, key=lambda entry: (entry.tick if entry.tick <= newest else 0, -entry.size))
        n_removed = 0
        for entry in order:
            if total <= target:
                break
            with suppress(FileNotFoundError):
                os.unlink(entry.path)  # noqa: PTH108  plain paths: there may be a million of them
                n_removed += 1
            total -= entry.size
        return total, n_removed

    def clean(self) -> None:
        """Remove what writers that died have left behind."""
        with self.ledger.locked():
            for _ in self._living_partials():
                pass

    def _living_partials(self) -> Iterator[int]:
        for path in self._partial.iterdir() if self._partial.is_dir() else ():
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except (FileNotFoundError, PermissionError):  # finished meanwhile, or another user's
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                yield blocks(os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)

    def _walk(self) -> Iterator[os.DirEntry[str]]:
        paths = []
        with suppress(FileNotFoundError), os.scandir(self._entries) as shards:
            paths = [shard.path for shard in shards if shard.is_dir(follow_symlinks=False)]
        for path in paths:
            with suppress(FileNotFoundError), os.scandir(path) as entries:
                yield from (entry for entry in entries if entry.name.endswith(SUFFIX))

    def _sync_directory(self, path: Path) -> None:
        if self._sync != "full":
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def blocks(size: int) -> int:
    """Bytes that a file of that size takes on disk."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


@contextmanager
def translating(root: Path) -> Iterator[None]:
    """OSError as the StoreError that it means."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in _NO_ROOM else StoreUnavailable
        raise kind(
            f"file store {root}: {error.strerror or error} ({errno.errorcode.get(error.errno or 0, '?')})"
        ) from error
