"""The end of a prefix: what follows its last coded chunk, window included, as one entry.

    magic "KVTT" | tokens uint32 | digests, 8 bytes for every 16 tokens | stream

A digest covers all tail tokens up to the end of its sixteen, so that a reader whose tokens fork off inside the tail still takes
what comes before; the token ids themselves are not stored. Little-endian.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from ..errors import CorruptStream, TruncatedStream
from .chain import TokenIds

_MAGIC = b"KVTT"
_HEAD = struct.Struct("<4sI")
_BLOCK_TOKENS = 16
_DIGEST_BYTES = 8


@dataclass(frozen=True)
class Tail:
    """n_tokens tokens after a node, as the stream of a codec."""

    n_tokens: int
    digests: tuple[bytes, ...]
    stream: bytes

    @classmethod
    def of(cls, node: bytes, tail_ids: TokenIds, stream: bytes) -> Tail:
        """tail_ids [T]: those of the stream's tokens."""
        stops = _stops(len(tail_ids))
        return cls(len(tail_ids), tuple(_digest(node, tail_ids[:stop]) for stop in stops), stream)

    def n_common(self, node: bytes, token_ids: TokenIds) -> int:
        """How many leading tokens of the tail are surely the given ones, which follow the node."""
        common = 0
        for stop, digest in zip(_stops(self.n_tokens), self.digests, strict=True):
            if stop > len(token_ids) or _digest(node, token_ids[:stop]) != digest:
                break
            common = stop
        return common

    def to_bytes(self) -> bytes:
        """The entry."""
        return b"".join([_HEAD.pack(_MAGIC, self.n_tokens), *self.digests, self.stream])

    @classmethod
    def from_bytes(cls, data: bytes) -> Tail:
        """Inverse of `to_bytes`; raises `CorruptStream`, `TruncatedStream`."""
        if len(data) < _HEAD.size:
            raise TruncatedStream(f"a tail begins with {_HEAD.size} bytes; there are {len(data)}")
        magic, n_tokens = _HEAD.unpack_from(data)
        start = _HEAD.size + _DIGEST_BYTES * -(-n_tokens // _BLOCK_TOKENS)
        if magic != _MAGIC:
            raise CorruptStream(f"a tail begins with {_MAGIC!r}; got {magic!r}")
        if start > len(data):
            raise TruncatedStream(f"a tail of {n_tokens} tokens begins with {start} bytes; there are {len(data)}")
        digests = tuple(data[at : at + _DIGEST_BYTES] for at in range(_HEAD.size, start, _DIGEST_BYTES))
        return cls(n_tokens, digests, data[start:])


def _stops(n_tokens: int) -> list[int]:
    return [min(start + _BLOCK_TOKENS, n_tokens) for start in range(0, n_tokens, _BLOCK_TOKENS)]


def _digest(node: bytes, token_ids: TokenIds) -> bytes:
    return hashlib.sha256(node + token_ids.astype("<i8").tobytes()).digest()[:_DIGEST_BYTES]
