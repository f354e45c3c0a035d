"""What is right and wrong with a directory of entries; nothing in it is changed."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ...errors import StoreUnavailable
from ..framed import MAX_SKEW_SECONDS, Finding
from .directory import SUFFIX, Directory, Found, blocks

LEAST_FREE_SHARE = 0.01


def diagnose(directory: Directory, budget: int | None) -> list[Finding]:
    """Examine permissions, free space, budget, clock, lock, and what writers left behind.

    Parameters:
        directory: It exists.
        budget: Byte budget of the store; None: it has none.
    """
    entries = [entry for shard in directory.shards() for entry in directory.entries(shard)]
    used = sum(blocks(entry.n_bytes) for entry in entries)
    last_tick, counted = directory.ledger.read()
    return [
        _permissions(directory),
        *_space(directory.root, budget, used),
        *([_count(used, counted)] if counted is not None else []),
        *([] if last_tick is None else _clock(last_tick, entries)),
        *_left(directory),
        _others(directory),
    ]


def _permissions(directory: Directory) -> Finding:
    """Entries reveal what a model has read, so that nobody else should reach them."""
    places = [directory.root, directory.entries_root, directory.partial, directory.root / "ledger"]
    there = [(place, place.stat(follow_symlinks=place == directory.root)) for place in places if place.exists()]
    wrong = [f"{place.name} cannot be written to" for place, _ in there if not os.access(place, os.R_OK | os.W_OK)]
    root = there[0][1]
    wrong += [f"any user may write to {place.name}" for place, status in there if status.st_mode & stat.S_IWOTH]
    wrong += [f"any user may read {place.name}" for place, status in there[1:] if status.st_mode & stat.S_IROTH]
    owners = {status.st_uid for _, status in there}
    if len(owners) > 1:
        wrong.append(f"its parts belong to the users {sorted(owners)}")
    told = f"user {os.geteuid()}, owner {root.st_uid}, mode {stat.S_IMODE(root.st_mode):04o}"
    return Finding("permissions", not wrong, "; ".join([told, *wrong]))


def _space(root: Path, budget: int | None, used: int) -> Iterator[Finding]:
    disk = os.statvfs(root)
    free, whole = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    told = f"{free:,} of {whole:,} bytes are free"
    missing = 0 if budget is None else budget - used - free
    if missing > 0:
        told += f": {missing:,} too few for the rest of the budget"
    yield Finding("free disk", missing <= 0 and free >= LEAST_FREE_SHARE * whole, told)
    if disk.f_files:
        told = f"{disk.f_favail:,} of {disk.f_files:,} are free"
        yield Finding("free inodes", disk.f_favail >= LEAST_FREE_SHARE * disk.f_files, told)
    if budget is None:
        yield Finding("budget", True, f"none in this URL; entries take {used:,} bytes")
    else:
        yield Finding("budget", used <= budget, f"{used:,} of {budget:,} bytes in use")


def _count(used: int, counted: int) -> Finding:
    told = f"{counted:,} bytes; the files take {used:,}"
    return Finding("count in the ledger", counted >= used, told if counted >= used else f"{told}: delete the ledger")


def _clock(last_tick: int, entries: list[Found]) -> Iterator[Finding]:
    ahead = last_tick / 1e9 - time.time()
    told = "not ahead of this machine's" if ahead <= 0 else f"{ahead:,.0f} seconds ahead of this machine's"
    yield Finding("clock of the directory", ahead < MAX_SKEW_SECONDS, told)
    n_future = sum(not entry.recency(last_tick) for entry in entries)
    yield Finding("entries from the future", not n_future, f"{n_future:,}, which are evicted first")


def _left(directory: Directory) -> Iterator[Finding]:
    """The lock, and with it the files of writers: without the lock a look at them could hinder one that begins."""
    if not (directory.root / "ledger").is_file():
        yield Finding("lock", True, "there is no ledger yet")
        return
    try:
        with directory.ledger.locked():
            yield Finding("lock", True, "free")
            dead = [size for is_dead, size in map(_partial, directory.partial_files()) if is_dead]
            told = f"{len(dead):,} of {sum(dead):,} bytes, which the next process that opens the store removes"
            yield Finding("files of writers that died", not dead, told)
    except (StoreUnavailable, PermissionError) as error:
        yield Finding("lock", False, str(error))


def _partial(path: Path) -> tuple[bool, int]:
    """Whether nobody holds a partial file, and its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False, 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False, 0
    else:
        return True, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _others(directory: Directory) -> Finding:
    names = [
        path.name
        for shard in directory.shards()
        for path in Path(shard).iterdir()
        if path.is_symlink() or not path.is_file() or directory.path(path.name.removesuffix(SUFFIX)) != path
    ]
    told = f"{len(names):,}, such as {min(names)}" if names else "0"
    return Finding("files of others among the entries", True, f"{told}; they are left alone")
