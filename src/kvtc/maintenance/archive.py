"""Entries of a store as one file, to be carried to another one.

    magic "KVTA" | version, uint8, 1 | 3 bytes 0
    for each entry: length of the key, uint16 | length of the value, uint64 | key | value
    uint16 0 | number of entries, uint64 | BLAKE2b-256 of all bytes before it

All numbers are little-endian. The entry that is needed least comes first, so that a store which takes them in this order evicts
them in this order.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import CorruptStream, InvalidArgument, KvtcError, StoreFull, TruncatedStream, UnsupportedVersion
from ..files import write_atomically
from ..prefix_cache.tails import merged_index
from ..process.progress import track
from ..store.base import MAX_KEY_LENGTH, check_key
from ..store.frame import ENCRYPTED_MAGIC, FRAME_BYTES
from ..store.place import SOUND, Place
from .contents import ENCRYPTED, check, kind_of

_HEAD, _RECORD = struct.Struct("<4sB3x"), struct.Struct("<HQ")
_MAGIC, _VERSION = b"KVTA", 1
_DIGEST_BYTES = 32


def export(place: Place, wanted: Iterable[tuple[str, bytes | None]], path: Path) -> Counter[str]:
    """Write entries into a file, which its owner alone may read. Values are in clear if the place has their key; otherwise they
    stay encrypted.

    Parameters:
        place: Their store.
        wanted: (key, value) of each, the entry that is needed least first; None: the value that the store has.
        path: Of the file.

    Returns:
        How many were written, under "written"; others, by the state in which they were found. These are left out.

    Raises:
        StoreUnavailable: The storage cannot be read.
        OSError: The file cannot be written.
    """
    states: Counter[str] = Counter()

    def entries() -> Iterator[tuple[str, bytes]]:
        for key, value in track(list(wanted), "exporting", "entries"):
            state, found = _sound(place, key) if value is None else (SOUND, value)
            states["written" if state == SOUND else state] += 1
            if state == SOUND:
                yield key, found

    write_atomically(path, _packed(entries()))
    return states


def import_entries(place: Place, path: Path) -> Counter[str]:
    """Put the entries of a file into a store. The whole file is checked before the first entry is put. An entry that the store has
    stays as it is, and indexes of tails are joined.

    Parameters:
        place: The store, recovered. Its byte budget holds: it evicts other entries for new ones.
        path: Of the file; it is not trusted.

    Returns:
        How many entries were "written" and how many were "there", and the "bytes" of those written.

    Raises:
        CorruptStream, TruncatedStream, UnsupportedVersion: The file is no such file, is damaged, or of a later kvtc.
        InvalidArgument: It is no regular file, or its entries are encrypted and the URL has a key.
        StoreFull: The entries exceed the byte budget, or one of them is longer than `entry_bytes`.
        StoreUnavailable: The storage cannot be changed.
    """
    done: Counter[str] = Counter(written=0, there=0, bytes=0)
    with os.fdopen(
        os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb"
    ) as file:  # of a pipe, no writer is waited for
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument(f"{path} is no regular file")
        try:
            _check(place, file, status.st_size)
        except KvtcError as error:
            raise type(error)(f"{path}: {error}") from error
        for key, value in track(_unpacked(file, status.st_size, place.store.entry_bytes), "importing", "entries"):
            is_news = _put(place, key, value)
            done.update(written=int(is_news), there=int(not is_news), bytes=is_news * len(value))
    return done


def _sound(place: Place, key: str) -> tuple[str, bytes]:
    """The state of an entry, and its value if it is sound."""
    reading = place.read(place.entry(key))
    if reading.state != SOUND:
        return reading.state, b""
    try:
        check(key, reading.value)
    except KvtcError:
        return "damaged", b""
    return SOUND, reading.value


def _check(place: Place, file: BinaryIO, n_bytes: int) -> None:
    """Raise unless every entry of a file can be put."""
    store, total = place.store, 0
    for key, value in track(_unpacked(file, n_bytes, store.entry_bytes), "checking", "entries"):
        form = check(key, value)
        if form == ENCRYPTED and place.users is not store:
            raise InvalidArgument(f"entry {key} is encrypted: leave the key out of the URL of the store")
        total += store.cost(FRAME_BYTES + len(value))
    if store.filled_bytes is not None and total > store.filled_bytes:
        raise StoreFull(
            f"its entries take {total} bytes; {store.filled_bytes} can be kept together by the byte budget of {store.budget_bytes}"
        )


def _put(place: Place, key: str, value: bytes) -> bool:
    """Put an entry, unless it is there."""
    store = place.users
    if kind_of(key) == "tails" and not value.startswith(ENCRYPTED_MAGIC):
        before = store.get(key)
        with suppress(CorruptStream, TruncatedStream):  # of the one that is there
            merged = merged_index(value, before)
            if merged == before:
                return False
            value = merged
    elif store.contains(key):
        return False
    store.put(key, value)
    return True


def _packed(entries: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """The bytes of a file."""
    state, n_entries = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0
    parts = [_HEAD.pack(_MAGIC, _VERSION)]
    for key, value in entries:
        yield from _hashed(state, parts)
        name, n_entries = key.encode(), n_entries + 1
        parts = [_RECORD.pack(len(name), len(value)), name, value]
    yield from _hashed(state, [*parts, _RECORD.pack(0, n_entries)])
    yield state.digest()


def _hashed(state: hashlib.blake2b, parts: list[bytes]) -> list[bytes]:
    for part in parts:
        state.update(part)
    return parts


def _unpacked(file: BinaryIO, n_bytes: int, entry_bytes: int) -> Iterator[tuple[str, bytes]]:
    """The entries of a file of n_bytes bytes, one after the other; no length in it takes memory before it is checked. What is wrong
    shows at the latest at its end."""
    file.seek(0)
    state, n_entries = hashlib.blake2b(digest_size=_DIGEST_BYTES), 0

    def read(size: int) -> bytes:
        if size > n_bytes - file.tell():
            raise TruncatedStream(f"{size} bytes are expected at byte {file.tell()} of {n_bytes}")
        part = file.read(size)
        if len(part) < size:
            raise TruncatedStream(f"the file became shorter than {n_bytes} bytes while it was read")
        state.update(part)
        return part

    magic, version = _HEAD.unpack(read(_HEAD.size)) if n_bytes >= _HEAD.size else (b"", 0)
    if magic != _MAGIC:
        raise CorruptStream(f"no file of entries: it does not begin with {_MAGIC.decode()}")
    if version != _VERSION:
        raise UnsupportedVersion(f"a file of entries of version {version}; this kvtc reads version {_VERSION}")
    while True:
        key_bytes, size = _RECORD.unpack(read(_RECORD.size))
        if not key_bytes:
            break
        if key_bytes > MAX_KEY_LENGTH:
            raise CorruptStream(f"a key of {key_bytes} bytes; the longest has {MAX_KEY_LENGTH}")
        try:
            key = check_key(read(key_bytes).decode("ascii"))
        except (UnicodeDecodeError, InvalidArgument) as error:
            raise CorruptStream(f"entry {n_entries} has no key: {error}") from error
        if size > entry_bytes:
            raise StoreFull(f"entry {key} has {size} bytes; the store takes up to {entry_bytes} (entry_bytes)")
        n_entries += 1
        yield key, read(size)
    expected = state.digest()
    if size != n_entries or read(_DIGEST_BYTES) != expected or file.tell() != n_bytes:
        raise CorruptStream("its checksum, or the number of its entries, does not fit")
