"""The frame around every stored value, by which a truncated, corrupted or swapped entry is known
for what it is.

offset  size  field
     0     4  magic "kvts"
     4     1  frame version, 1
     5     3  zero
     8     8  length of the value, little-endian
    16    16  BLAKE2b-128 of the entry's name
    32    16  BLAKE2b-128 of the 32 bytes before and of the value
    48        the value; the frame ends with it
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple, TypeAlias

from .base import Value

MAGIC = b"kvts"
VERSION = 1
ENCRYPTED_MAGIC = b"kvte"
"""What an encrypted value inside of a frame begins with."""
DIGEST_BYTES = 16
_HEADER = struct.Struct(f"<4sB3xQ{DIGEST_BYTES}s")
FRAME_BYTES = _HEADER.size + DIGEST_BYTES


DEFAULT_ENTRY_BYTES = 512 << 20  # of one value: what Redis takes, and hundreds of times what a chunk has


class Head(NamedTuple):
    """What was read of an entry that is too long to be read, or not as long as it says."""

    head: bytes
    size: int  # of the whole entry, in bytes


Frame: TypeAlias = bytes | Head
FOREIGN = Head(MAGIC + bytes([VERSION + 1]), 0)
"""Stands for what is left alone without being read."""


class DamagedEntry(Exception):
    """The bytes are no whole frame of that entry."""


class ForeignEntry(Exception):
    """The entry may be sound, but was written in a way that this store object cannot read."""


def seal(name: str, value: Value) -> bytes:
    """The value in its frame, bound to the entry's name."""
    content = memoryview(value).cast("B")
    header = _HEADER.pack(MAGIC, VERSION, content.nbytes, _digest(name.encode()))
    return b"".join((header, _digest(header, content), content))


def is_worth_reading(head: bytes, size: int, entry_bytes: int) -> bool:
    """Whether an entry of that size may be a frame that begins so, with a value within the limit.
    Asked before memory is."""
    return FRAME_BYTES <= size <= FRAME_BYTES + entry_bytes and (
        len(head) >= FRAME_BYTES and size == FRAME_BYTES + _HEADER.unpack(head[: _HEADER.size])[2]
    )


def unseal(name: str, frame: Frame, entry_bytes: int) -> bytes:
    """The value of a frame; `DamagedEntry` or `ForeignEntry` where there is none to be had.

    entry_bytes: the longest value to be read. A frame that is as long as it says, and longer than
    that, is foreign.
    """
    head, size = frame if isinstance(frame, Head) else (frame, len(frame))
    check_head(name, head, size)
    if size > FRAME_BYTES + entry_bytes:
        raise ForeignEntry(f"a value of {size - FRAME_BYTES} bytes; this store reads up to {entry_bytes}")
    if len(head) < size:
        raise DamagedEntry(f"{len(head)} of {size} bytes could be read")
    view = memoryview(head)
    header, content = view[: _HEADER.size], view[FRAME_BYTES:]
    if bytes(view[_HEADER.size : FRAME_BYTES]) != _digest(header, content):
        raise DamagedEntry("checksum does not fit")
    return bytes(content)


def check_head(name: str, head: bytes, n_bytes: int) -> None:
    """Check what a frame of n_bytes bytes says in its first `FRAME_BYTES`, but for the checksum;
    errors as of `unseal`."""
    if len(head) > len(MAGIC) and head[:4] == MAGIC and head[4] > VERSION:
        raise ForeignEntry(f"frame version {head[4]}; this library reads up to {VERSION}")
    if len(head) < FRAME_BYTES:
        raise DamagedEntry(f"{n_bytes} bytes; a frame has at least {FRAME_BYTES}")
    if head[: _HEADER.size] != _HEADER.pack(MAGIC, VERSION, n_bytes - FRAME_BYTES, _digest(name.encode())):
        raise DamagedEntry("magic, length or name do not fit")


def _digest(*parts: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(part)
    return state.digest()
