"""The frame around every stored value, by which a truncated, corrupted or swapped entry is known for what it is.

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

from .base import Value

MAGIC = b"kvts"
VERSION = 1
DIGEST_BYTES = 16
_HEADER = struct.Struct(f"<4sB3xQ{DIGEST_BYTES}s")
FRAME_BYTES = _HEADER.size + DIGEST_BYTES


class DamagedEntry(Exception):
    """The bytes are no whole frame of that entry."""


class ForeignEntry(Exception):
    """The entry may be sound, but was written in a way that this store object cannot read."""


def seal(name: str, value: Value) -> bytes:
    """The value in its frame, bound to the entry's name."""
    content = memoryview(value).cast("B")
    header = _HEADER.pack(MAGIC, VERSION, content.nbytes, _digest(name.encode()))
    return b"".join((header, _digest(header, content), content))


def promised_bytes(head: bytes) -> int | None:
    """How long the frame is that begins so; None where no frame does. Read before memory is asked for."""
    if len(head) < FRAME_BYTES or head[:4] != MAGIC:
        return None
    length: int = _HEADER.unpack(head[: _HEADER.size])[2]
    return FRAME_BYTES + length


def unseal(name: str, frame: bytes) -> bytes:
    """The value of a frame; `DamagedEntry` or `ForeignEntry` where there is none to be had."""
    check_head(name, frame, len(frame))
    view = memoryview(frame)
    header, content = view[: _HEADER.size], view[FRAME_BYTES:]
    if bytes(view[_HEADER.size : FRAME_BYTES]) != _digest(header, content):
        raise DamagedEntry("checksum does not fit")
    return bytes(content)


def check_head(name: str, head: bytes, n_bytes: int) -> None:
    """Check what a frame of n_bytes bytes says in its first `FRAME_BYTES`, but for the checksum; errors as of `unseal`."""
    if len(head) >= _HEADER.size and head[:4] == MAGIC and head[4] > VERSION:
        raise ForeignEntry(f"frame version {head[4]}; this library reads up to {VERSION}")
    if len(head) < FRAME_BYTES:
        raise DamagedEntry(f"{len(head)} bytes; a frame has at least {FRAME_BYTES}")
    if head[: _HEADER.size] != _HEADER.pack(MAGIC, VERSION, n_bytes - FRAME_BYTES, _digest(name.encode())):
        raise DamagedEntry("magic, length or name do not fit")


def _digest(*parts: bytes | memoryview) -> bytes:
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        state.update(part)
    return state.digest()
