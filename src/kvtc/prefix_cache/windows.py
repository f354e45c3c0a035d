"""Sliding windows by chunk of the text, so that resume points share what their windows have in common.

A window reaches back from a point over some chunks. What the windows of one length hold of a chunk is an entry:

    whole       all tokens of the chunk
    fragment    the last ones, where the windows had begun to forget the chunk before anybody saved it

The tokens behind the last whole chunk, and those that the codec keeps exactly, are the point's own: they stand in its entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..codec.exact_groups import ExactGroup
from ..codec.transformers_cache import SplitCache
from ..container.groups import WINDOW, Group
from ..container.stream import parse_stream
from ..errors import CorruptStream, GeometryMismatch, TokenMismatch
from ..key_digest import digest
from .chain import entry_key
from .parts import Parts, join


def extents_of(exact: Sequence[ExactGroup]) -> tuple[int, ...]:
    """The lengths of windows among some groups, ascending, as of `Group.extent`."""
    return tuple(sorted({one.group.extent for one in exact if one.group.kind == WINDOW}))


@dataclass(frozen=True)
class _Stretch:
    """What a point needs of a chunk: the tokens start .. stop - 1 of windows of one length. The chunk ends at `stop`, at a node.

    is_fragment: whether the chunk begins before `start`.
    """

    extent: int
    node: bytes
    start: int
    stop: int
    is_fragment: bool

    def key(self, is_fragment: bool) -> str:
        return _key(self.node, self.extent, is_fragment)


class Windows:
    """The chunks of windows in a store. Safe to share between threads.

    In all methods `nodes` are those of the text, from the first one on, and `stop` is the position of a point.

    Parameters:
        parts: Of the prefix cache.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._entries, self._size = parts, parts.entries, parts.chunk_tokens

    def save(self, exact: Sequence[ExactGroup], nodes: Sequence[bytes], stop: int) -> int:
        """Store the chunks of the windows of a point that are not there; bytes written.

        Raises:
            StoreError: The store failed.
            BaseException: Whatever coding raises.
        """
        written, stretches = 0, self._stretches(extents_of(exact), nodes, stop)
        for stretch, is_whole in zip(stretches, self._whole(stretches), strict=True):
            if is_whole or (stretch.is_fragment and self._has_fragment(stretch)):
                self._entries.counts.add(entries_shared=1)
                continue
            held = [one.span(stretch.start, stretch.stop, stop) for one in _windows(exact, stretch.extent)]
            encode = partial(self._parts.windowless.encode_point, held, stretch.stop)
            n_bytes = sum(one.nbytes for one in held)
            written += self._entries.put(stretch.key(stretch.is_fragment), encode, n_bytes, replace=True)
        return written

    def own(self, exact: Sequence[ExactGroup], stop: int, exact_tokens: int) -> list[ExactGroup]:
        """The groups of a point as its entry has them. exact_tokens: that the codec keeps at the end."""
        # A stream has at least one token.
        start = min(self._grid(stop), stop - max(exact_tokens, 1))
        return [one.span(start, stop, stop) if one.group.kind == WINDOW else one for one in exact]

    def check_own(self, own: list[ExactGroup], stop: int) -> list[ExactGroup]:
        """The same; raises `CorruptStream` where the entry of a point lacks tokens that no chunk has."""
        for one in own:
            if one.group.kind == WINDOW and one.n_rows < one.group.rows_held(stop, self._grid(stop)):
                raise CorruptStream(
                    f"the point at position {stop} has {one.n_rows} tokens of a window of {one.group.extent}"
                )
        return own

    def load(self, own: list[ExactGroup], nodes: Sequence[bytes], stop: int) -> list[ExactGroup] | None:
        """The groups of a point with the whole of their windows; None where a chunk cannot be had.

        Parameters:
            own: As `check_own` has found them.
        """
        whole: dict[Group, ExactGroup] = {}
        for extent in extents_of(own):
            its = _windows(own, extent)
            chunks = self._load_chunks(extent, its, nodes, stop)
            parts = None if chunks is None else [SplitCache(None, part, 0) for part in (*chunks, its)]
            joined = None if parts is None else self._entries.parse("the whole window", parts, join)
            if joined is None:
                return None
            whole |= {one.group: one for one in joined.exact}
        return [whole.get(one.group, one) for one in own]

    def keys(self, extents: Iterable[int], nodes: Sequence[bytes], stop: int) -> list[str]:
        """The entries that a point needs of windows of some lengths: the fragment of a chunk where it is not there whole."""
        return self._keys(self._stretches(extents, nodes, stop))

    def delete(self, extents: Iterable[int], node: bytes) -> None:
        """Delete what is stored of the chunk that ends at a node. Raises `StoreError`."""
        for extent in extents:
            for is_fragment in (False, True):
                self._entries.delete(_key(node, extent, is_fragment))

    def _load_chunks(
        self, extent: int, own: list[ExactGroup], nodes: Sequence[bytes], stop: int
    ) -> list[list[ExactGroup]] | None:
        """What windows hold before the tokens of their own, chunk by chunk."""
        stretches, behind, found = self._stretches([extent], nodes, stop), stop - own[0].n_rows, []
        keys = self._keys(stretches)
        for stretch, key, entry in zip(stretches, keys, self._entries.read(keys), strict=True):
            chunk = self._entries.decode(key, entry, partial(self._decode, stretch, [one.group for one in own]))
            if chunk is None:
                return None
            found.append([one.span(stretch.start, min(stretch.stop, behind), stretch.stop) for one in chunk])
        return found

    def _stretches(self, extents: Iterable[int], nodes: Sequence[bytes], stop: int) -> list[_Stretch]:
        found, size = [], self._size
        for extent in extents:
            first = max(0, stop - extent + 1)
            for start in range(first // size * size, self._grid(stop), size):
                end = start + size
                found.append(_Stretch(extent, nodes[end // size], max(first, start), end, is_fragment=first > start))
        return found

    def _keys(self, stretches: Sequence[_Stretch]) -> list[str]:
        there = zip(stretches, self._whole(stretches), strict=True)
        return [one.key(one.is_fragment and not is_whole) for one, is_whole in there]

    def _whole(self, stretches: Sequence[_Stretch]) -> list[bool]:
        """Which of these chunks are there whole."""
        return self._entries.present([one.key(is_fragment=False) for one in stretches]) if stretches else []

    def _has_fragment(self, stretch: _Stretch) -> bool:
        """Whether the fragment of a chunk that is there is as long as a point needs."""
        key = stretch.key(is_fragment=True)
        (entry,) = self._entries.read([key])
        n_tokens = None if entry is None else self._entries.parse(key, entry, lambda data: parse_stream(data).n_tokens)
        return n_tokens is not None and n_tokens >= stretch.stop - stretch.start

    def _decode(self, stretch: _Stretch, groups: list[Group], data: Any) -> list[ExactGroup]:
        chunk = self._parts.codec.decode_point(data)
        if [one.group for one in chunk] != groups:
            raise GeometryMismatch("the chunk of a window has other groups of layers than the point that needs it")
        if (n_rows := chunk[0].n_rows) < stretch.stop - stretch.start:
            raise TokenMismatch(
                f"the chunk of a window has the {n_rows} tokens before position {stretch.stop}; a point needs those from "
                f"{stretch.start} on"
            )
        return chunk

    def _grid(self, position: int) -> int:
        """Where the last whole chunk before a position ends."""
        return position // self._size * self._size


def _windows(exact: Sequence[ExactGroup], extent: int) -> list[ExactGroup]:
    return [one for one in exact if one.group.kind == WINDOW and one.group.extent == extent]


def _key(node: bytes, extent: int, is_fragment: bool) -> str:
    return entry_key("window", digest("window", node=node, extent=extent, is_fragment=is_fragment))
