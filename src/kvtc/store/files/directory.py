"""The directory of a file store: where entries are, how each comes to be there whole or not at all,
and which are evicted first.

    entries/<2 hex digits>/<name>.entry   an entry; the modification time is its recency
    partial/<random>.part                 an entry that is being written, locked by its writer
    ledger                                lock, clock and count of bytes; may be deleted at any time

There is no index but the file system.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ...errors import StoreFull, StoreUnavailable
from ..bounded_calls import is_given_up
from ..frame import FOREIGN, FRAME_BYTES, Frame, Head, is_worth_reading
from .ledger import Ledger, LockedLedger

BLOCK_BYTES = 4096
SUFFIX = ".entry"
FUTURE_NS = 60 * 10**9  # a recency so far past the ledger's clock was not given out by it
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Found(NamedTuple):
    """An entry met on a scan. tick: its recency. n_bytes: of the file."""

    tick: int
    n_bytes: int
    path: str

    def recency(self, last_tick: int) -> int:
        """Its recency as eviction sees it: 0 for one so far past the ledger's clock that this did not give it out."""
        return self.tick if self.tick <= last_tick + FUTURE_NS else 0


class Directory:
    """Entries as files under one root, shared with other processes. `translating` makes StoreError
    of OSError.

    Parameters:
        root: The directory.
        sync: As of `FileStore`.
        timeout: Seconds to wait for the lock.
        mode: Permissions of files that are made here, less those that the umask forbids.
            Directories may be searched by those who may read the files.
    """

    def __init__(self, root: Path, sync: str, timeout: float, mode: int) -> None:
        self.root = root
        self._sync, self._mode = sync, mode
        self.entries_root = root / "entries"
        self.partial = root / "partial"
        self.ledger = Ledger(root / "ledger", timeout, mode)

    def create(self) -> None:
        """Make what is missing."""
        for directory in (self.root, self.entries_root, self.partial):
            self._make(directory)

    def _make(self, directory: Path) -> None:
        """Parents too have these permissions, which `Path.mkdir` would not give them. Below the
        root no link is followed."""
        if not self._is_made(directory):
            if directory.parent != directory:
                self._make(directory.parent)
            directory.mkdir(mode=self._mode | (self._mode & 0o444) >> 2, exist_ok=True)

    def _is_made(self, directory: Path) -> bool:
        """Whether a directory is there. OSError for what is none, a link below the root too."""
        is_below = directory != self.root and directory.is_relative_to(self.root)
        try:
            mode = directory.stat(follow_symlinks=not is_below).st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(mode):
            number = errno.ELOOP if stat.S_ISLNK(mode) else errno.ENOTDIR
            raise OSError(number, f"{directory} is no directory")
        return True

    def path(self, name: str) -> Path:
        shard = hashlib.blake2b(name.encode(), digest_size=1).hexdigest()
        return self.entries_root / shard / (name + SUFFIX)

    def shards(self) -> list[str]:
        """Directories of entries."""
        with suppress(FileNotFoundError), os.scandir(self.entries_root) as shards:
            return [shard.path for shard in shards if shard.is_dir(follow_symlinks=False)]
        return []

    def entries(self, shard: str) -> list[Found]:
        """The entries of one of them."""
        found = []
        with suppress(FileNotFoundError), os.scandir(shard) as entries:
            for entry in (entry for entry in entries if entry.name.endswith(SUFFIX)):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append(Found(status.st_mtime_ns, status.st_size, entry.path))
        return found

    def load(self, name: str, tick: int | None, entry_bytes: int) -> Frame | None:
        """The file's bytes, or its head where it is longer than allowed or than it says; stamped
        with a new recency."""
        try:
            # Of a pipe that lies there, no writer is waited for.
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return FOREIGN
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return Head(b"", 0)
            head = os.read(descriptor, FRAME_BYTES)
            if tick is not None:
                with suppress(OSError):  # a reader without the right to do so leaves recency as it is
                    os.utime(descriptor, ns=(tick, tick))
            if not is_worth_reading(head, status.st_size, entry_bytes):
                return Head(head, status.st_size)
            frame = bytearray(status.st_size)
            n_read = 0
            while n_read < len(frame) and (step := os.preadv(descriptor, [memoryview(frame)[n_read:]], n_read)):
                n_read += step
            return bytes(frame[:n_read])
        finally:
            os.close(descriptor)

    def head(self, name: str, n_bytes: int) -> bytes:
        """The first bytes of a file, and not a use of it; b"" where there is none."""
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return b""
        try:
            return os.pread(descriptor, n_bytes, 0) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        finally:
            os.close(descriptor)

    def begin(self, size: int) -> tuple[int, Path]:
        """A new locked partial file of that length, so that a scan counts it in full. The ledger
        must be locked."""
        path = self.partial / f"{secrets.token_hex(12)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, self._mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(descriptor, size)
        except BaseException:
            self.abandon(descriptor, path)
            raise
        return descriptor, path

    def finish(self, descriptor: int, partial: Path, name: str, frame: bytes, tick: int) -> None:
        """Fill the partial file and give it the entry's name: the moment from which the entry is
        there."""
        view = memoryview(frame)
        while view:
            view = view[os.write(descriptor, view) :]
        os.utime(descriptor, ns=(tick, tick))
        if self._sync != "none":
            os.fsync(descriptor)
        target = self.path(name)
        if not self._is_made(target.parent):
            self._make(target.parent)
            self._sync_directory(target.parent.parent)
        with self.ledger.locked():  # `discard` must not meet a file that changes between its look and its hand
            if is_given_up():  # a newer value may be there by now
                raise StoreUnavailable(f"file store {self.root}: written too late")
            partial.replace(target)
        self._sync_directory(target.parent)

    def abandon(self, descriptor: int, partial: Path) -> None:
        os.close(descriptor)
        with suppress(OSError):
            partial.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        path = self.path(name)
        if self._is_made(self.entries_root) and self._is_made(path.parent):
            path.unlink(missing_ok=True)

    def discard(self, name: str, frame: Frame, entry_bytes: int) -> None:
        """Remove an entry if it still holds these bytes."""
        with self.ledger.locked():
            if self.load(name, None, entry_bytes) == frame:
                self.remove(name)

    def scan(self) -> tuple[int, list[Found]]:
        """Bytes in use, in whole blocks, and all entries; partial files of the dead are removed.
        The ledger must be locked."""
        total = sum(
            self._living_partials()
        )  # first: a file that is finished meanwhile counts twice rather than not at all
        found = [entry for shard in self.shards() for entry in self.entries(shard)]
        return total + sum(blocks(entry.n_bytes) for entry in found), found

    def evict(self, held: LockedLedger, total: int, found: list[Found], target: int) -> tuple[int, int]:
        """Remove entries until at most `target` bytes are in use: those used longest ago, of equals
        the largest.

        Size does not weigh more, since what an entry saves grows with its size as well. Returns
        bytes in use and entries removed.
        """
        last_tick = held.last_tick
        order = sorted(found, key=lambda entry: (entry.recency(last_tick), -entry.n_bytes))
        n_removed = 0
        for entry in order:
            if total <= target:
                break
            with suppress(FileNotFoundError):
                os.unlink(entry.path)  # noqa: PTH108  plain paths: there may be a million of them
                n_removed += 1
            total -= blocks(entry.n_bytes)
        return total, n_removed

    def clean(self) -> None:
        """Remove what writers that died have left behind."""
        with self.ledger.locked():
            for _ in self._living_partials():
                pass

    def partial_files(self) -> list[Path]:
        """Files that are being written, or were when their writers died."""
        return list(self.partial.iterdir()) if self.partial.is_dir() else []

    def _living_partials(self) -> Iterator[int]:
        for path in self.partial_files():
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:  # finished meanwhile, another user's, or a link
                continue
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except OSError:  # its writer lives, or it is not ours to remove
                yield blocks(os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)

    def meaning(self, error: BaseException) -> BaseException:
        """What a caller learns of an error of the disk: whether it is full or cannot be used."""
        if not isinstance(error, OSError):
            return error
        kind = StoreFull if error.errno in _NO_ROOM else StoreUnavailable
        code = errno.errorcode.get(error.errno or 0, "?")
        return kind(f"file store {self.root}: {error.strerror or error} ({code})")

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
