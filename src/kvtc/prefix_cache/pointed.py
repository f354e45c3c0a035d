"""Prefixes of caches with sliding windows or states, which can be restored at resume points alone.

Groups of layers that keep every token have chunks and tails as in other caches. What the other
groups were at a resume point is one entry, so that a point is there whole or not at all:

    at the end of a chunk   every `resume_every` tokens, where the caller took points
    at the end of a prefix  with a tail of at least 16 tokens; it stays when the text goes on

A load takes the last point that the text contains, that is there, and whose chunks and tail are
there, too. Nodes have roots of their own; a small entry under the root of the model says that its
caches are of this sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cache import TokenIds
from ..codec.exact_groups import ExactGroup
from ..codec.transformers_cache import SplitCache
from ..key_digest import digest
from .chain import Chain, chunk_key, entry_key
from .parts import Parts, join
from .tails import NAME_TOKENS, Tails, point_key, tail_key, tail_name

SORTS = {b"tokens and points": True, b"points alone": False}
"""What the entry of a model says: whether its caches have groups that keep every token."""


@dataclass(frozen=True)
class _Point:
    """A resume point: after `stop` tokens, behind the first `n_chunks` chunks and the tail `name`, b"" for none."""

    stop: int
    n_chunks: int
    name: bytes


class PointedPrefixes:
    """Saves and loads prefixes of one model with windows or states. Safe to share between threads.

    Parameters:
        parts: Codes chunks and tails.
        chain: Of the model.
        resume_every: Tokens from one point to the next.
    """

    def __init__(self, parts: Parts, chain: Chain, resume_every: int) -> None:
        self._parts, self._entries, self._every = parts, parts.entries, resume_every
        self._model, self._size = chain, chain.chunk_tokens
        self._tails = Tails(self._entries, are_points=True)
        self._keeps_tokens: bool | None = None

    @property
    def is_known(self) -> bool:
        """Whether the model's caches were found to be of this sort."""
        return self._keeps_tokens is not None

    def discover(self) -> bool:
        """Ask the store whether they are."""
        if self._keeps_tokens is None:
            (sort,) = self._entries.read([self._sort_key])
            self._keeps_tokens = None if sort is None else SORTS.get(bytes(sort))
        return self.is_known

    def save(self, ids: TokenIds, cache: SplitCache) -> tuple[int, int, int, int]:
        """Store chunks, points and a tail.

        Parameters:
            ids: [T], of all tokens.
            cache: In tensors of its own, with its points.

        Returns:
            As `SaveReport`.

        Raises:
            StoreError: The store failed.
            BaseException: Whatever coding raises.
        """
        self._keeps_tokens = cache.keeps_tokens
        self._entries.write(self._sort_key, next(sort for sort, keeps in SORTS.items() if keeps is cache.keeps_tokens))
        before_tail = max(0, len(ids) - max(NAME_TOKENS, self._parts.codec.window_tokens)) // self._size
        points = {stop: exact for stop, exact in cache.points.items() if stop % self._every == 0}
        n_chunks = max(before_tail, max(points, default=0) // self._size)
        nodes = self._nodes(ids[: n_chunks * self._size])
        sizes = self._parts.save_chunks(ids, cache, nodes) if cache.keeps_tokens else {}
        written = sum(sizes.values())
        for stop, exact in points.items():
            written += self._save_point(nodes[stop // self._size], b"", exact, stop, cache)
        if len(ids) >= NAME_TOKENS:
            written += self._save_end(ids, cache, nodes[: before_tail + 1])
        n_coded = sum(n_bytes > 0 for n_bytes in sizes.values())
        return len(ids) if len(ids) >= NAME_TOKENS else 0, n_chunks, n_coded, written

    def _save_end(self, ids: TokenIds, cache: SplitCache, nodes: list[bytes]) -> int:
        """Store the point at the end of a prefix, and its tail; bytes written."""
        start, node = (len(nodes) - 1) * self._size, nodes[-1]
        rest = ids[start:]
        name = tail_name(node, rest)
        written = self._save_point(node, name, cache.partial, len(ids), cache)
        encode, n_bytes = self._parts.tail(ids, cache, start) if cache.keeps_tokens else (None, 0)
        return written + self._tails.save(node, rest, name, encode, n_bytes)

    def _save_point(self, node: bytes, name: bytes, exact: Sequence[ExactGroup], stop: int, cache: SplitCache) -> int:
        # Layers that hold nothing stand in chunks, if there are any.
        held = [*exact, *(() if cache.keeps_tokens else (one for one in cache.exact if one.group.is_complete))]
        n_bytes = sum(side.nbytes for one in held for sides in one.sides for side in sides)
        codec = self._parts.codec if name else self._parts.windowless
        return self._entries.put(point_key(node, name), lambda: codec.encode_point(held, stop), n_bytes)

    def load(self, ids: TokenIds) -> SplitCache | None:
        """The cache of the longest prefix of a text that can be restored; None if there is none."""
        nodes = self._nodes(ids)
        chunks: list[SplitCache] = []
        most = self._count_chunks(nodes)
        for point in self._points(ids, nodes[: most + 1]):
            if point.n_chunks > most or (end := self._load_end(ids, nodes[point.n_chunks], point)) is None:
                continue
            if self._keeps_tokens and len(chunks) < point.n_chunks:
                chunks = list(self._parts.load_chunks(ids, nodes[: point.n_chunks + 1]))
                most = len(chunks)
                if most < point.n_chunks:
                    continue
            exact, tail = end
            parts = [*chunks[: point.n_chunks], *tail]
            whole = self._entries.parse("the whole prefix", parts, join) if parts else SplitCache(None, [], 0)
            return None if whole is None else replace(whole, exact=[*whole.exact, *exact], n_tokens=point.stop)
        return None

    def contains(self, ids: TokenIds) -> int:
        """How many leading tokens of a text end at the last point that is there. Nothing is decoded."""
        nodes = self._nodes(ids)
        for point in self._points(ids, nodes[: self._count_chunks(nodes) + 1]):
            if self._entries.count_leading([point_key(nodes[point.n_chunks], point.name)]):
                return point.stop
        return 0

    def portable(self, ids: TokenIds) -> list[tuple[str, bytes | None]]:
        """As `PrefixCache.portable`: chunks, points and the tails that the text contains."""
        if not self.discover():
            return []
        nodes = self._nodes(ids)
        n_chunks = self._count_chunks(nodes)
        found: list[tuple[str, bytes | None]] = [(self._sort_key, None)]
        found += [(chunk_key(node), None) for node in nodes[1 : n_chunks + 1] if self._keeps_tokens]
        for point in self._points(ids, nodes[: n_chunks + 1]):
            node = nodes[point.n_chunks]
            if not self._entries.count_leading([point_key(node, point.name)]):
                continue
            found.append((point_key(node, point.name), None))
            if point.name:
                found.append(self._tails.index_of(node, ids[point.n_chunks * self._size :], point.name))
            if point.name and self._keeps_tokens:
                found.append((tail_key(node, point.name), None))
        return found

    def delete(self, ids: TokenIds, first: int) -> None:
        """Delete what is stored of a prefix behind its first chunks. Raises `StoreError`."""
        if not self.discover():
            return
        nodes = self._nodes(ids)
        for node in nodes[first + 1 :]:
            self._entries.delete(chunk_key(node))
            self._entries.delete(point_key(node))
        for index in range(first, len(nodes)):
            self._tails.delete(nodes[index], ids[index * self._size :])

    def _count_chunks(self, nodes: list[bytes]) -> int:
        """How many leading chunks are there; all where there is nothing to keep of them."""
        if not self._keeps_tokens:
            return len(nodes) - 1
        return self._entries.count_leading([chunk_key(node) for node in nodes[1:]])

    def _points(self, ids: TokenIds, nodes: list[bytes]) -> list[_Point]:
        """Where a text may be resumed behind some nodes, last first."""
        every = self._every // self._size
        found = [_Point(index * self._size, index, b"") for index in range(every, len(nodes), every)]
        for index, tail in self._tails.whole(nodes, ids, self._size):
            found.append(_Point(index * self._size + tail.n_tokens, index, tail.name))
        return sorted(found, key=lambda point: point.stop, reverse=True)

    def _load_end(self, ids: TokenIds, node: bytes, point: _Point) -> tuple[list[ExactGroup], list[SplitCache]] | None:
        """What was at a point, and the tail before it, if there is one."""
        key = point_key(node, point.name)
        (entry,) = self._entries.read([key])
        exact = None if entry is None else self._entries.decode(key, entry, self._parts.codec.decode_point)
        if exact is None or not point.name or not self._keeps_tokens:
            return None if exact is None else (exact, [])
        key = tail_key(node, point.name)
        (entry,) = self._entries.read([key], is_resident=True)
        tail = self._parts.decode(key, entry, ids, point.n_chunks * self._size, point.stop)
        return None if tail is None else (exact, [tail])

    def _nodes(self, ids: TokenIds) -> list[bytes]:
        """Those of the model's sort, so that none is taken for that of another."""
        root = digest("pointed prefix", root=self._model.root, keeps_tokens=bool(self._keeps_tokens))
        return Chain(root, self._size).nodes(ids)

    @property
    def _sort_key(self) -> str:
        return entry_key("sort", self._model.root)
