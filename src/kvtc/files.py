"""Files that are there whole or not at all, and that are their owner's unless they are made to be shown around."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PRIVATE, SHARED = 0o600, 0o666
"""Modes of new files, before the umask: what holds a cache, or what was learnt from texts; and figures, pages and pictures."""


def write_atomically(path: str | Path, data: bytes | memoryview | Iterable[bytes], mode: int = PRIVATE) -> None:
    """Write a file so that a reader, or a failure or interruption on the way, never leaves half of it.

    data: the bytes, or parts of them that are written one after the other.
    mode: of a new file, less what the umask takes away. A file of the same owner that is replaced hands its permissions on; a
    symbolic link is itself replaced. When this returns the bytes are on the disk. Raises OSError where the file cannot be written.
    """
    path = Path(path)
    # A name that nobody can know, and never a file or link that is there already.
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _hand_on_permissions(path, descriptor)
                file.writelines([data] if isinstance(data, bytes | memoryview) else data)
                file.flush()
                os.fsync(descriptor)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        error.filename = str(path)  # the one that the caller knows
        raise
    _sync_directory(path.parent)


def _hand_on_permissions(path: Path, descriptor: int) -> None:
    """Give an open file the permissions of the regular file at a path, if one is there and whoever writes is its owner.

    In a folder of many users others could put a file there that everybody may read.
    """
    try:
        there = path.lstat()
    except FileNotFoundError:
        return
    here = os.fstat(descriptor)
    is_own = stat.S_ISREG(there.st_mode) and there.st_uid == here.st_uid
    if is_own and stat.S_IMODE(there.st_mode) != stat.S_IMODE(here.st_mode):
        os.fchmod(descriptor, there.st_mode & 0o777)


def _sync_directory(directory: Path) -> None:
    """So that the file's name outlives a power cut too; some file systems cannot."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
