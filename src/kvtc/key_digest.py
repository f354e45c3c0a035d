"""Digests of named parts, for keys of entries: two different sets of parts never give one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Part: TypeAlias = "str | bytes | int | float | bool | Sequence[Part] | Mapping[str, Part] | None"


def digest(purpose: str, /, **parts: Part) -> bytes:
    """SHA-256 of a purpose and of named parts, in whatever order they are given: 32 bytes.

    purpose: separates digests of different kinds. parts: text, bytes, numbers, truth values, None, and sequences and
    mappings of these. Every part is written with its type and its length, so that no text can pass for two parts, nor
    a number for a text. A list and a tuple of the same items are the same; 1, 1.0, True and "1" are four different parts.

    Raises TypeError for a part of any other type.
    """
    return hashlib.sha256(_encoded([purpose, parts])).digest()


def entry_scope(namespace: str, identity: str) -> bytes:
    """Whose entries: a name of a tenant or of a purpose, and the identity of the model that computes the caches."""
    return digest("scope", namespace=namespace, identity=identity)


def _encoded(part: Part) -> bytes:
    """Type, length in bytes or number of items, contents: no encoding begins with another one."""
    if part is None:
        return _framed(b"n", b"")
    if isinstance(part, bool):
        return _framed(b"t", b"1" if part else b"0")
    if isinstance(part, int):
        return _framed(b"i", str(part).encode())
    if isinstance(part, float):
        return _framed(b"f", part.hex().encode())
    if isinstance(part, str):
        return _framed(b"s", part.encode("utf-8", "surrogatepass"))
    if isinstance(part, bytes):
        return _framed(b"b", part)
    if isinstance(part, Mapping):
        items = sorted((_encoded(name), _encoded(value)) for name, value in part.items())
        return _framed(b"m", b"".join(name + value for name, value in items))
    if isinstance(part, Sequence):
        return _framed(b"l", b"".join(_encoded(item) for item in part))
    raise TypeError(
        f"a part of a key is text, bytes, a number, None, or a sequence or mapping of these; got {type(part)}"
    )


def _framed(kind: bytes, contents: bytes) -> bytes:
    return kind + len(contents).to_bytes(8, "little") + contents
