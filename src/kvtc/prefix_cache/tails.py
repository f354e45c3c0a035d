"""What follows a node of a chain: tails, the tokens behind the last coded chunk and the window, if
any; and chunks, as far as texts begin like them.

Several texts that go on from one node have a tail or a chunk each. Texts that share a node and the
16 tokens behind it share an index, a small entry that says what there is:

    magic "KVTX" | for each, the last saved first: name, 32 bytes | 0 tail, 1 chunk | tokens, uint32 | digests, 16 bytes each

There is a digest for every 16 tokens of a tail or chunk, and it covers those from its first token
to the end of these 16. With them a reader finds the one that has most in common with its text, and
takes the tokens before the two part. Token ids are not stored. All numbers are little-endian. A
tail itself is a stream under its name, a digest of all of its tokens; so is a chunk, under the node
that follows from its name.

An index keeps the `MAX_TAILS` tails and chunks that were saved last. A text that goes on where a
tail ended takes its place. If two processes save what one index tells of at the same moment, it may
keep only the later one; the other tail is a miss until it is saved again.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from ..cache import TokenIds
from ..entries import Entries
from ..errors import CorruptStream, TruncatedStream
from ..process.locks import ForkSafeLock
from .chain import chunk_key, entry_key, ids_digest, next_node

MAX_TAILS = 32
MAX_TRIED_TAILS = 4
"""Of those that begin like a text: what an index tells of may be gone."""
NAME_TOKENS = 16
"""Tokens that tails of one index have in common. Tails of fewer are not worth an entry."""

INDEX_MAGIC = b"KVTX"
_HEAD = struct.Struct("<32s?I")
_BLOCK_TOKENS = 16
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Tail:
    """A tail or a chunk, as an index describes it.

    Parameters:
        name: Digest of all of its tokens.
        n_tokens: Tokens behind the node.
        digests: Of every 16 tokens, one after the other; compared one by one, so that a long index
            costs no more than its bytes.
        is_chunk: Whether it is a chunk.
    """

    name: bytes
    n_tokens: int
    digests: bytes
    is_chunk: bool = False

    @classmethod
    def of(cls, node: bytes, token_ids: TokenIds, is_chunk: bool = False) -> Tail:
        """The tail or the chunk with these token ids [T], which follow the node."""
        stops = _stops(len(token_ids))
        digests = b"".join(_digest(node, token_ids[:stop]) for stop in stops)
        return cls(ids_digest(token_ids), len(token_ids), digests, is_chunk)

    @property
    def place(self) -> tuple[bytes, bool]:
        """What tells it apart in an index."""
        return self.name, self.is_chunk

    def key(self, node: bytes) -> str:
        """The entry of its stream. node: that it follows, of whichever worker and group of layers."""
        return chunk_key(next_node(node, self.name)) if self.is_chunk else tail_key(node, self.name)

    def n_common(self, digest_of: Callable[[int], bytes | None]) -> int:
        """How many leading tokens a tail has in common with a text, as far as digests say.

        Parameters:
            digest_of: Gives the digest of so many leading tokens of the text; None if it has fewer.
        """
        common = 0
        for index, stop in enumerate(_stops(self.n_tokens)):
            if digest_of(stop) != self.digests[index * _DIGEST_BYTES : (index + 1) * _DIGEST_BYTES]:
                break
            common = stop
        return common


class Tails:
    """The tails in a store. Safe to share between threads.

    In all methods `node` is a node of a `Chain`, and `token_ids` [T] are the tokens that follow it.

    Parameters:
        entries: The entries of the store.
        are_points: Whether a tail can be restored at its end alone, where a resume point is: it
            then stays when a text goes on from it.
    """

    def __init__(self, entries: Entries, are_points: bool = False) -> None:
        self._entries, self._are_points = entries, are_points
        self._changing = ForkSafeLock()

    def find(self, node: bytes, token_ids: TokenIds) -> list[tuple[Tail, int]]:
        """The tails and chunks that begin like a text, each with the number of tokens that they have in common with it,
        those with most first; no chunk that the text contains, for that has a node of the text's own chain."""
        key, digest_of = _index_key(node, token_ids), _digests_of(node, token_ids)
        tails = self._read(key, self._entries.read([key])[0]) if key else []
        common = [(tail, tail.n_common(digest_of)) for tail in tails]
        found = [(tail, n) for tail, n in common if n and not (tail.is_chunk and n == tail.n_tokens)]
        return sorted(found, key=lambda one: one[1], reverse=True)

    def whole(self, nodes: Sequence[bytes], token_ids: TokenIds, chunk_tokens: int) -> list[tuple[int, Tail]]:
        """The tails that a text contains from their first token to their last.

        Parameters:
            nodes: Of the text, from the first one on.
            token_ids: [T], of the text.
            chunk_tokens: Tokens between two nodes.

        Returns:
            For each the index of its node, and the tail.
        """
        rests = [(index, node, token_ids[index * chunk_tokens :]) for index, node in enumerate(nodes)]
        keys = {index: key for index, node, rest in rests if (key := _index_key(node, rest))}
        read = dict(zip(keys, self._entries.read(list(keys.values())), strict=True))
        found = []
        for index, node, rest in rests:
            tails = self._read(keys[index], read[index]) if index in keys else []
            digest_of = _digests_of(node, rest)
            found += [
                (index, tail) for tail in tails if not tail.is_chunk and tail.n_common(digest_of) == tail.n_tokens
            ]
        return found

    def index_of(self, node: bytes, token_ids: TokenIds, name: bytes) -> tuple[str, bytes]:
        """(key, bytes) of the index of a text that tells of one tail alone, found there by its name."""
        key = _index_key(node, token_ids) or ""
        tails = self._read(key, self._entries.read([key])[0])
        return key, pack_index([tail for tail in tails if tail.name == name and not tail.is_chunk])

    def save(
        self,
        node: bytes,
        token_ids: TokenIds,
        encode: Callable[[], bytes] | None,
        original_bytes: int = 0,
    ) -> int:
        """Store a tail, and delete those that it goes on from.

        Parameters:
            node, token_ids: Of the tail, all of its tokens.
            encode: Gives its stream; None where its resume point is all that there is of it.
            original_bytes: Bytes of its cache, to be counted.

        Returns:
            Bytes of the stream; 0 if the tail is too short to be stored.

        Raises:
            StoreError: The store failed.
            BaseException: Whatever `encode` raises.
        """
        key = _index_key(node, token_ids)
        if key is None:
            return 0
        n_bytes, tail = 0, Tail.of(node, token_ids)
        if encode is not None:
            n_bytes = self._entries.put(tail.key(node), encode, original_bytes, replace=True)
        self._change(node, token_ids, key, tail)
        return n_bytes

    def note_chunk(self, node: bytes, token_ids: TokenIds, chunk_tokens: int) -> None:
        """Tell of a chunk that is stored, so that texts which part from it find it, and delete the
        tails that it outgrows: those that the text contains.

        Parameters:
            node, token_ids: Of the text from the chunk's first token on.
            chunk_tokens: Tokens of the chunk.

        Raises:
            StoreError: The store failed.
        """
        if key := _index_key(node, token_ids):
            self._change(node, token_ids, key, Tail.of(node, token_ids[:chunk_tokens], is_chunk=True))

    def delete(self, node: bytes, token_ids: TokenIds) -> None:
        """Delete all tails that share the index of a text. Raises `StoreError`."""
        if key := _index_key(node, token_ids):
            with self._changing:
                for tail in self._read(key, self._entries.fetch([key])[0]):
                    for its in self._keys(node, tail):
                        self._entries.delete(its)
                self._entries.delete(key)

    def _change(self, node: bytes, token_ids: TokenIds, key: str, news: Tail) -> None:
        """Put a tail or a chunk first in an index, and take out the tails that the text contains and
        what is too much."""
        digest_of = _digests_of(node, token_ids)
        with self._changing:
            before = self._read(key, self._entries.fetch([key])[0])
            kept = [tail for tail in before if tail.place != news.place and not self._is_outgrown(tail, digest_of)]
            kept = [news, *kept[: MAX_TAILS - 1]]
            if kept != before:
                self._entries.write(key, pack_index(kept))
        places = {tail.place for tail in kept}
        for tail in before:
            if tail.place not in places:
                for its in self._keys(node, tail):
                    self._entries.forget(its)

    def _is_outgrown(self, tail: Tail, digest_of: Callable[[int], bytes | None]) -> bool:
        return not (self._are_points or tail.is_chunk) and tail.n_common(digest_of) == tail.n_tokens

    def _keys(self, node: bytes, tail: Tail) -> list[str]:
        """The entries that a tail has besides its index, and that go with it; a chunk stays."""
        points = [point_key(node, tail.name)] if self._are_points else []
        return [] if tail.is_chunk else [tail.key(node), *points]

    def _read(self, key: str, index: bytes | None) -> list[Tail]:
        """The tails of an index; none where it is damaged, which deletes it."""
        return self._entries.parse(key, index, parse_index) or [] if index is not None else []


def tail_key(node: bytes, name: bytes) -> str:
    """The entry of a tail."""
    return entry_key("tail", next_node(node, name))


def point_key(node: bytes, name: bytes = b"") -> str:
    """The entry of what windows and states were at a node, or at the end of the tail of this name behind it."""
    return entry_key("point", next_node(node, name))


def _index_key(node: bytes, token_ids: TokenIds) -> str | None:
    """None where the tokens that follow the node are too few for a tail."""
    if len(token_ids) < NAME_TOKENS:
        return None
    return entry_key("tails", hashlib.sha256(node + token_ids[:NAME_TOKENS].astype("<i8").tobytes()).digest())


def pack_index(tails: Sequence[Tail]) -> bytes:
    """The bytes of an index of tails."""
    return b"".join(
        [INDEX_MAGIC, *(_HEAD.pack(tail.name, tail.is_chunk, tail.n_tokens) + tail.digests for tail in tails)]
    )


def merged_index(news: bytes, before: bytes | None) -> bytes:
    """An index with the tails of two: those of the first one count as saved later. Raises as `parse_index`."""
    tails = parse_index(news)
    places = {tail.place for tail in tails}
    tails += [tail for tail in (parse_index(before) if before is not None else []) if tail.place not in places]
    return pack_index(tails[:MAX_TAILS])


def parse_index(data: bytes) -> list[Tail]:
    """Inverse of `pack_index`; raises `CorruptStream`, `TruncatedStream`."""
    if not data.startswith(INDEX_MAGIC):
        raise CorruptStream(f"an index of tails begins with {INDEX_MAGIC!r}; got {data[: len(INDEX_MAGIC)]!r}")
    tails: list[Tail] = []
    at = len(INDEX_MAGIC)
    while at < len(data):
        if len(tails) == MAX_TAILS:
            raise CorruptStream(f"an index of tails tells of at most {MAX_TAILS}; {len(data) - at} bytes follow those")
        begin = at + _HEAD.size
        name, is_chunk, n_tokens = _HEAD.unpack_from(data, at) if begin <= len(data) else (b"", False, NAME_TOKENS)
        if n_tokens < NAME_TOKENS:
            raise CorruptStream(
                f"an index of tails tells of one of {n_tokens} tokens; they have at least {NAME_TOKENS}"
            )
        at = begin + _DIGEST_BYTES * -(-n_tokens // _BLOCK_TOKENS)
        if at > len(data):
            raise TruncatedStream(f"an index of tails goes on to byte {at}; it has {len(data)}")
        tails.append(Tail(name, n_tokens, data[begin:at], is_chunk))
    return tails


def _stops(n_tokens: int) -> Iterator[int]:
    """Ends of the groups of 16 tokens of a tail."""
    return (min(start + _BLOCK_TOKENS, n_tokens) for start in range(0, n_tokens, _BLOCK_TOKENS))


def _digests_of(node: bytes, token_ids: TokenIds) -> Callable[[int], bytes | None]:
    """Gives the digest of so many leading tokens of a text, each computed once."""
    return cache(lambda stop: _digest(node, token_ids[:stop]) if stop <= len(token_ids) else None)


def _digest(node: bytes, token_ids: TokenIds) -> bytes:
    return hashlib.sha256(node + token_ids.astype("<i8").tobytes()).digest()[:_DIGEST_BYTES]
