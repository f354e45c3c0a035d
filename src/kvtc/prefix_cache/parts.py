"""Chunks and tails of caches as entries, and back: the groups of layers that keep every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Any

import torch

from ..cache import KVCache, TokenIds
from ..codec import Codec
from ..codec.exact_groups import ExactGroup
from ..codec.transformers_cache import SplitCache
from ..entries import Entries
from ..errors import CorruptStream
from ..process.torch_state import neutral_torch_state
from ..process.workers import Workers
from .chain import chunk_key

READ_AHEAD = 4
"""Chunks fetched in one call, while those fetched before are decoded."""


class Parts:
    """What a codec makes of chunks and tails of prefixes.

    Parameters:
        codec: Of the prefix cache; its window is the exact end of a tail.
        entries: Of the store.
        fetcher: Fetches chunks.

    Attributes:
        windowless: The codec of chunks.
    """

    def __init__(self, codec: Codec, entries: Entries, fetcher: Workers) -> None:
        self.codec, self.entries, self._fetcher = codec, entries, fetcher
        self.windowless = codec.with_window(0)
        self.chunk_tokens = codec.settings.chunk_tokens

    def save_chunks(self, ids: TokenIds, cache: SplitCache, nodes: list[bytes]) -> dict[int, int]:
        """Store the chunks that end at the nodes 1, 2, .. and are not there.

        Returns:
            By the index of a chunk that was not among the leading ones, bytes written; 0 if it was
            there.

        Raises:
            StoreError: The store failed.
            BaseException: Whatever coding raises.
        """
        n_leading = self.entries.count_leading([chunk_key(node) for node in nodes[1:]])
        self.entries.counts.add(entries_shared=n_leading)
        return {index: self._save_chunk(index, ids, cache, nodes) for index in range(n_leading, len(nodes) - 1)}

    def _save_chunk(self, index: int, ids: TokenIds, cache: SplitCache, nodes: list[bytes]) -> int:
        start, stop = index * self.chunk_tokens, (index + 1) * self.chunk_tokens
        chunk, told = cache.span(start, stop), self.told(ids, start, stop)
        return self.entries.put(
            chunk_key(nodes[index + 1]), lambda: self.windowless.encode_split(chunk, told), _bytes_of(chunk)
        )

    def tail(self, ids: TokenIds, cache: SplitCache, start: int) -> tuple[Callable[[], bytes], int]:
        """What gives the stream of the tokens from a position on, and the bytes of their cache."""
        end, told = cache.span(start, len(ids)), self.told(ids, start, len(ids))
        return lambda: self.codec.encode_split(end, told), _bytes_of(end)

    def load_chunks(self, ids: TokenIds, nodes: list[bytes]) -> Iterator[SplitCache]:
        """The chunks that are there, first to last, up to the first that is not; the next are
        fetched while one is decoded."""
        size = self.chunk_tokens
        keys = [chunk_key(node) for node in nodes[1:]]
        fetches = iter([keys[start : start + READ_AHEAD] for start in range(0, len(keys), READ_AHEAD)])
        ahead = self._fetch(next(fetches, None))
        index = 0
        while ahead is not None:
            entries, ahead = ahead.result(), self._fetch(next(fetches, None))
            for entry in entries:
                cache = self.decode(keys[index], entry, ids, index * size, (index + 1) * size)
                if cache is None:
                    return
                yield cache
                index += 1

    def _fetch(self, keys: list[str] | None) -> Future[list[Any]] | None:
        if keys is None:
            return None
        return self._fetcher.submit(lambda: self.entries.read(keys, is_resident=True))

    def decode(self, key: str, entry: Any, ids: TokenIds, start: int, stop: int) -> SplitCache | None:
        """The tokens of an entry that stand at start .. stop - 1, the first it has."""
        told = self.told(ids, start, stop)
        return self.entries.decode(
            key, entry, lambda stream: self.codec.decode_split(stream, told, tokens=stop - start)
        )

    def told(self, ids: TokenIds, start: int, stop: int) -> TokenIds:
        """The ids of a prefix that the codec needs for tokens start .. stop - 1."""
        return ids[0 if self.codec.needs_prefix else start : stop]


@neutral_torch_state
def join(parts: Sequence[SplitCache]) -> SplitCache:
    """Consecutive parts as one cache, coded groups in the dtype of the first.

    Raises `CorruptStream` for parts of several models.
    """
    for before, after in pairwise(parts):
        if [one.group for one in before.exact] != [one.group for one in after.exact]:
            raise CorruptStream(f"the part at position {after.start} has other groups of layers than the one before it")
    exact = [
        ExactGroup(members[0].group, [_joined(sides) for sides in zip(*(one.sides for one in members), strict=True)])
        for members in zip(*(part.exact for part in parts), strict=True)
    ]
    coded = [part.coded for part in parts if part.coded is not None]
    return SplitCache(_join_coded(coded) if coded else None, exact, sum(part.n_tokens or 0 for part in parts))


def _joined(parts: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Sides of one layer, one behind the other."""
    return tuple(torch.cat(same, dim=1) for same in zip(*parts, strict=True))


def _join_coded(parts: Sequence[KVCache]) -> KVCache:
    first = parts[0]
    keys, values = (
        torch.cat([getattr(part, side).to(first.dtype) for part in parts], dim=2) for side in ("keys", "values")
    )
    return KVCache(keys, values, None, first.layers, first.first_kv_head, parts[-1].rope_length)


def _bytes_of(cache: SplitCache) -> int:
    """Of the tokens of its complete groups."""
    coded, n_tokens = cache.coded, cache.n_tokens or 0
    exact = sum(one.group.row_bytes * n_tokens // max(one.group.extent, 1) for one in cache.exact)
    return exact + (0 if coded is None else coded.keys.nbytes + coded.values.nbytes)
