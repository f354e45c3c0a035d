"""Tails of prefixes: the tokens behind the last coded chunk, and the window, if any.

Several texts that go on from one chunk have one tail each. Texts that share a chunk and the 16
tokens behind it share an index, a small entry that says which tails there are:

    magic "KVTX" | for each tail, the last saved first: name, 16 bytes | tokens, uint32 | digests, 8 bytes each

There is a digest for every 16 tokens of a tail, and it covers the tail from its first token to the
end of these 16. With them a reader finds the tail that has most in common with its text, and takes
the tokens before the two part. Token ids are not stored. All numbers are little-endian. A tail
itself is a stream under its name, which is a digest of all of its tokens.

An index keeps the `MAX_TAILS` tails that were saved last. A text that goes on where a tail ended
takes its place. If two processes save tails of one index at the same moment, the index may keep
only the later one; the other is a miss until it is saved again.
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
from .chain import entry_key

MAX_TAILS = 32
NAME_TOKENS = 16
"""Tokens that tails of one index have in common. Tails of fewer are not worth an entry."""

INDEX_MAGIC = b"KVTX"
_NAME_BYTES = 16
_HEAD = struct.Struct(f"<{_NAME_BYTES}sI")
_BLOCK_TOKENS = 16
_DIGEST_BYTES = 8


@dataclass(frozen=True)
class Tail:
    """A tail, as an index describes it.

    Parameters:
        name: Digest of its node and all of its tokens.
        n_tokens: Tokens behind the node.
        digests: Of every 16 tokens, one after the other; compared one by one, so that a long index
            costs no more than its bytes.
    """

    name: bytes
    n_tokens: int
    digests: bytes  # one after the other; checked one by one, so that a long index costs no more than its bytes

    @classmethod
    def of(cls, node: bytes, token_ids: TokenIds, name: bytes) -> Tail:
        """The tail with these token ids [T], which follow the node."""
        n_tokens = len(token_ids)
        return cls(name, n_tokens, b"".join(_digest(node, token_ids[:stop]) for stop in _stops(n_tokens)))

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

    def find(self, node: bytes, token_ids: TokenIds) -> tuple[bytes, int]:
        """The tail that has most in common with a text.

        Returns:
            (its name, how many tokens); (b"", 0) if there is none.
        """
        key, digest_of = _index_key(node, token_ids), _digests_of(node, token_ids)
        tails = self._read(key, self._entries.read([key])[0]) if key else []
        common = [(tail.name, tail.n_common(digest_of)) for tail in tails]
        return max(common, key=lambda found: found[1], default=(b"", 0))

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
            found += [(index, tail) for tail in tails if tail.n_common(digest_of) == tail.n_tokens]
        return found

    def index_of(self, node: bytes, token_ids: TokenIds, name: bytes) -> tuple[str, bytes]:
        """(key, bytes) of the index of a text that tells of one tail alone, found there by its name."""
        key = _index_key(node, token_ids) or ""
        return key, pack_index([tail for tail in self._read(key, self._entries.read([key])[0]) if tail.name == name])

    def save(
        self,
        node: bytes,
        token_ids: TokenIds,
        name: bytes,
        encode: Callable[[], bytes] | None,
        original_bytes: int = 0,
    ) -> int:
        """Store a tail, and delete those that it goes on from.

        Parameters:
            node, token_ids: Of the tail, all of its tokens.
            name: As `tail_name` gives it.
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
        n_bytes = 0
        if encode is not None:
            n_bytes = self._entries.put(tail_key(node, name), encode, original_bytes, replace=True)
        self._change(node, token_ids, key, [Tail.of(node, token_ids, name)])
        return n_bytes

    def drop_outgrown(self, node: bytes, token_ids: TokenIds) -> None:
        """Delete the tails that a text contains, once its tokens are stored as a chunk. Raises
        `StoreError`."""
        if key := _index_key(node, token_ids):
            self._change(node, token_ids, key, [])

    def delete(self, node: bytes, token_ids: TokenIds) -> None:
        """Delete all tails that share the index of a text. Raises `StoreError`."""
        if key := _index_key(node, token_ids):
            with self._changing:
                for tail in self._read(key, self._entries.fetch([key])[0]):
                    for its in self._keys(node, tail.name):
                        self._entries.delete(its)
                self._entries.delete(key)

    def _change(self, node: bytes, token_ids: TokenIds, key: str, news: list[Tail]) -> None:
        """Put tails first in an index, and take out those that the text contains and those that are
        too many."""
        digest_of = _digests_of(node, token_ids)
        with self._changing:
            before = self._read(key, self._entries.fetch([key])[0])
            names = {tail.name for tail in news}
            kept = news + [
                tail
                for tail in before
                if tail.name not in names and (self._are_points or tail.n_common(digest_of) < tail.n_tokens)
            ]
            kept = kept[:MAX_TAILS]
            if kept == before:
                return
            if kept:
                self._entries.write(key, pack_index(kept))
            else:
                self._entries.forget(key)
        for name in {tail.name for tail in before} - {tail.name for tail in kept}:
            for its in self._keys(node, name):
                self._entries.forget(its)

    def _keys(self, node: bytes, name: bytes) -> list[str]:
        """The entries that a tail has besides its index."""
        return [tail_key(node, name)] + ([point_key(node, name)] if self._are_points else [])

    def _read(self, key: str, index: bytes | None) -> list[Tail]:
        """The tails of an index; none where it is damaged, which deletes it."""
        return self._entries.parse(key, index, parse_index) or [] if index is not None else []


def tail_name(node: bytes, token_ids: TokenIds) -> bytes:
    """The name of a tail.

    Parameters:
        node: The node that it follows; of several workers the first one's, for all of them.
        token_ids: [T], all of its tokens.
    """
    return hashlib.sha256(b"tail" + node + token_ids.astype("<i8").tobytes()).digest()[:_NAME_BYTES]


def tail_key(node: bytes, name: bytes) -> str:
    """The entry of a tail."""
    return entry_key("tail", hashlib.sha256(node + name).digest())


def point_key(node: bytes, name: bytes = b"") -> str:
    """The entry of what windows and states were at a node, or at the end of the tail of this name behind it."""
    return entry_key("point", hashlib.sha256(node + name).digest())


def _index_key(node: bytes, token_ids: TokenIds) -> str | None:
    """None where the tokens that follow the node are too few for a tail."""
    if len(token_ids) < NAME_TOKENS:
        return None
    return entry_key("tails", hashlib.sha256(node + token_ids[:NAME_TOKENS].astype("<i8").tobytes()).digest())


def pack_index(tails: Sequence[Tail]) -> bytes:
    """The bytes of an index of tails."""
    return b"".join([INDEX_MAGIC, *(_HEAD.pack(tail.name, tail.n_tokens) + tail.digests for tail in tails)])


def merged_index(news: bytes, before: bytes | None) -> bytes:
    """An index with the tails of two: those of the first one count as saved later. Raises as `parse_index`."""
    tails = parse_index(news)
    names = {tail.name for tail in tails}
    tails += [tail for tail in (parse_index(before) if before is not None else []) if tail.name not in names]
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
        name, n_tokens = _HEAD.unpack_from(data, at) if begin <= len(data) else (b"", NAME_TOKENS)
        if n_tokens < NAME_TOKENS:
            raise CorruptStream(
                f"an index of tails tells of one of {n_tokens} tokens; they have at least {NAME_TOKENS}"
            )
        at = begin + _DIGEST_BYTES * -(-n_tokens // _BLOCK_TOKENS)
        if at > len(data):
            raise TruncatedStream(f"an index of tails goes on to byte {at}; it has {len(data)}")
        tails.append(Tail(name, n_tokens, data[begin:at]))
    return tails


def _stops(n_tokens: int) -> Iterator[int]:
    """Ends of the groups of 16 tokens of a tail."""
    return (min(start + _BLOCK_TOKENS, n_tokens) for start in range(0, n_tokens, _BLOCK_TOKENS))


def _digests_of(node: bytes, token_ids: TokenIds) -> Callable[[int], bytes | None]:
    """Gives the digest of so many leading tokens of a text, each computed once."""
    return cache(lambda stop: _digest(node, token_ids[:stop]) if stop <= len(token_ids) else None)


def _digest(node: bytes, token_ids: TokenIds) -> bytes:
    return hashlib.sha256(node + token_ids.astype("<i8").tobytes()).digest()[:_DIGEST_BYTES]
