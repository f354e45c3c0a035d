"""Prefixes of caches with sliding windows or states, which can be restored at resume points alone.

Groups of layers that keep every token have chunks and tails as in other caches. A resume point has
an entry: its states, and what its windows hold behind the last whole chunk. The chunks that its
windows reach back to are entries of their own, which points share (`windows`). There are points

    at the end of a chunk   every `resume_every` tokens, where the caller took points
    at the end of a prefix  with a tail of at least 16 tokens; it stays when the text goes on

A load takes the last point that the text contains and all of whose entries are there. Nodes have
roots of their own; a small entry under the root of the model, its sort, says that its caches are
like this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cache import TokenIds
from ..codec.exact_groups import ExactGroup
from ..codec.transformers_cache import SplitCache
from ..key_digest import digest
from .chain import Chain, chunk_key, entry_key, ids_digest
from .parts import Parts, join
from .sort import Sort
from .tails import NAME_TOKENS, Tails, point_key, tail_key
from .windows import Windows, extents_of


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
        self._windows = Windows(parts)
        self._sort: Sort | None = None

    @property
    def is_known(self) -> bool:
        """Whether the model's caches were found to be of this sort."""
        return self._sort is not None

    def discover(self) -> bool:
        """Ask the store whether they are."""
        if self._sort is None:
            (sort,) = self._entries.read([self._sort_key])
            self._sort = None if sort is None else self._entries.parse(self._sort_key, sort, Sort.parse)
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
        self._sort = Sort(cache.keeps_tokens, extents_of(cache.partial))
        self._entries.write(self._sort_key, self._sort.pack())
        before_tail = max(0, len(ids) - max(NAME_TOKENS, self._parts.codec.window_tokens)) // self._size
        points = {stop: exact for stop, exact in cache.points.items() if stop % self._every == 0}
        n_chunks = max(before_tail, max(points, default=0) // self._size)
        nodes = self._nodes(ids)
        sizes = self._parts.save_chunks(ids, cache, nodes[: n_chunks + 1]) if cache.keeps_tokens else {}
        written = sum(sizes.values())
        for stop, exact in points.items():
            written += self._save_point(nodes, _Point(stop, stop // self._size, b""), exact, cache)
        if len(ids) >= NAME_TOKENS:
            written += self._save_end(ids, cache, nodes, before_tail)
        n_coded = sum(n_bytes > 0 for n_bytes in sizes.values())
        return len(ids) if len(ids) >= NAME_TOKENS else 0, n_chunks, n_coded, written

    def _save_end(self, ids: TokenIds, cache: SplitCache, nodes: list[bytes], n_chunks: int) -> int:
        """Store the point at the end of a prefix, and its tail, which follows some chunks; bytes written."""
        start, node = n_chunks * self._size, nodes[n_chunks]
        rest = ids[start:]
        point = _Point(len(ids), n_chunks, ids_digest(rest))
        written = self._save_point(nodes, point, cache.partial, cache)
        encode, n_bytes = self._parts.tail(ids, cache, start) if cache.keeps_tokens else (None, 0)
        return written + self._tails.save(node, rest, encode, n_bytes)

    def _save_point(self, nodes: list[bytes], point: _Point, exact: Sequence[ExactGroup], cache: SplitCache) -> int:
        """Store a point behind the chunks of its windows: what is there of it can be restored."""
        written = self._windows.save(exact, nodes, point.stop)
        codec = self._parts.codec if point.name else self._parts.windowless
        held = self._windows.own(exact, point.stop, codec.window_tokens)
        # Layers that hold nothing stand in chunks, if there are any.
        held += [] if cache.keeps_tokens else [one for one in cache.exact if one.group.is_complete]
        n_bytes = sum(one.nbytes for one in held)
        key = point_key(nodes[point.n_chunks], point.name)
        return written + self._entries.put(key, lambda: codec.encode_point(held, point.stop), n_bytes)

    def load(self, ids: TokenIds) -> SplitCache | None:
        """The cache of the longest prefix of a text that can be restored; None if there is none."""
        nodes = self._nodes(ids)
        chunks: list[SplitCache] = []
        most = self._count_chunks(nodes)
        for point in self._points(ids, nodes[: most + 1]):
            if point.n_chunks > most or (end := self._load_end(ids, nodes, point)) is None:
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
        points = self._points(ids, nodes[: self._count_chunks(nodes) + 1])
        return next((point.stop for point in points if self._has(nodes, point)), 0)

    def portable(self, ids: TokenIds) -> list[tuple[str, bytes | None]]:
        """As `PrefixCache.portable`: chunks, points and the tails that the text contains."""
        if not self.discover():
            return []
        nodes = self._nodes(ids)
        n_chunks = self._count_chunks(nodes)
        found: list[tuple[str, bytes | None]] = [(self._sort_key, None)]
        found += [(chunk_key(node), None) for node in nodes[1 : n_chunks + 1] if self._keeps_tokens]
        for point in self._points(ids, nodes[: n_chunks + 1]):
            if not self._has(nodes, point):
                continue
            if point.name:
                rest = ids[point.n_chunks * self._size :]
                found.append(self._tails.index_of(nodes[point.n_chunks], rest, point.name))
            found += [(key, None) for key in self._keys(nodes, point)]
        return list(dict.fromkeys(found))

    def delete(self, ids: TokenIds, first: int) -> None:
        """Delete what is stored of a prefix behind its first chunks. Raises `StoreError`."""
        if not self.discover():
            return
        nodes = self._nodes(ids)
        for node in nodes[first + 1 :]:
            self._entries.delete(chunk_key(node))
            self._entries.delete(point_key(node))
            self._windows.delete(self._extents, node)
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

    def _keys(self, nodes: list[bytes], point: _Point) -> list[str]:
        """The entries of a point: of its windows, its own, and of the tail before it."""
        node = nodes[point.n_chunks]
        tail = [tail_key(node, point.name)] if point.name and self._keeps_tokens else []
        return [*self._windows.keys(self._extents, nodes, point.stop), point_key(node, point.name), *tail]

    def _has(self, nodes: list[bytes], point: _Point) -> bool:
        keys = self._keys(nodes, point)
        return self._entries.count_leading(keys) == len(keys)

    def _load_end(
        self, ids: TokenIds, nodes: list[bytes], point: _Point
    ) -> tuple[list[ExactGroup], list[SplitCache]] | None:
        """What was at a point, and the tail before it, if there is one."""
        node, windows = nodes[point.n_chunks], self._windows
        key = point_key(node, point.name)
        (entry,) = self._entries.read([key])
        if entry is None:
            return None
        decode = self._parts.codec.decode_point
        own = self._entries.decode(key, entry, lambda data: windows.check_own(decode(data), point.stop))
        exact = None if own is None else windows.load(own, nodes, point.stop)
        if exact is None or not point.name or not self._keeps_tokens:
            return None if exact is None else (exact, [])
        key = tail_key(node, point.name)
        (entry,) = self._entries.read([key], is_resident=True)
        tail = self._parts.decode(key, entry, ids, point.n_chunks * self._size, point.stop)
        return None if tail is None else (exact, [tail])

    def _nodes(self, ids: TokenIds) -> list[bytes]:
        """Those of the model's sort, so that none is taken for that of another."""
        root = digest("pointed prefix", root=self._model.root, keeps_tokens=self._keeps_tokens)
        return Chain(root, self._size).nodes(ids)

    @property
    def _keeps_tokens(self) -> bool:
        return self._sort is not None and self._sort.keeps_tokens

    @property
    def _extents(self) -> tuple[int, ...]:
        return () if self._sort is None else self._sort.windows

    @property
    def _sort_key(self) -> str:
        return entry_key("sort", self._model.root)
