"""The prefix cache: token ids and a cache in, the cache of the longest stored prefix out.

What is stored. Every whole chunk of the grid (256 tokens) that lies before the window is one entry, coded without a window and
named by the hash chain (`chain`); what follows the last of them, window included, is one more entry, the tail. A conversation that
grows codes only its new chunks: tokens that leave the window become part of one, and a new tail takes the place of the old.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from .. import interop
from ..backends import Bytes
from ..cache import KVCache
from ..codec import Codec
from ..errors import InvalidArgument, KvtcError, StoreError
from ..store import Store
from ..torch_state import neutral_torch_state
from .chain import Chain, TokenIds, as_token_ids, chunk_key
from .statistics import Counters, Statistics
from .tail import Tail

MIN_TOKENS = 512
READ_AHEAD = 4
"""Chunks fetched in one call, while those fetched before are decoded."""


@dataclass(frozen=True)
class SaveReport:
    """What a save did. n_tokens: of the prefix now stored, 0 where it was too short. chunks: its whole chunks, of which coded were
    not there before. written_bytes: of the entries written."""

    n_tokens: int
    chunks: int
    coded: int
    written_bytes: int


class PrefixCache:
    """Keeps caches of prefixes in a store. Safe to share between threads; processes share a store, each with its own object.

    codec: how chunks are coded; its window is the exact end of each saved prefix. store: see `kvtc.store.open_store`; it is not
    closed here. namespace: a name or secret that separates tenants: entries of another namespace cannot be found. min_tokens:
    shorter prefixes are not saved. max_pending: saves that may wait; further calls of `save` wait for one to end.
    """

    def __init__(
        self, codec: Codec, store: Store, *, namespace: str = "", min_tokens: int = MIN_TOKENS, max_pending: int = 4
    ) -> None:
        if min_tokens < 1 or max_pending < 1:
            raise InvalidArgument(f"min_tokens {min_tokens} and max_pending {max_pending} must be at least 1")
        self.codec = codec
        self.store = store
        self.min_tokens = min_tokens
        self._pages = codec.with_window(0)
        self.chain = Chain.of(
            namespace, codec.calibration.fingerprint, self._pages.settings_name, codec.settings.chunk_tokens
        )
        self._counters = Counters()
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="kvtc-save")
        self._fetcher = ThreadPoolExecutor(2, thread_name_prefix="kvtc-fetch")
        self._room = threading.BoundedSemaphore(max_pending)

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the saves under way. The store stays open."""
        self._saver.shutdown(wait=True)
        self._fetcher.shutdown(wait=True)

    @property
    def statistics(self) -> Statistics:
        """Counts so far."""
        return self._counters.read()

    def save(self, token_ids: Any, cache: Any) -> Future[SaveReport]:
        """Store a prefix in the background; `.result()` waits, and raises `StoreError` where the store failed.

        token_ids [T]: of the cached tokens; ids beyond them, as `generate` returns one, are left out. cache: a `DynamicCache` of
        batch 1 or a `KVCache` that begins at position 0 without gaps; it is read before this returns and may change afterwards.

        Raises `InvalidCache`, `GeometryMismatch`, `UnsupportedModel`, `InvalidArgument`.
        """
        ids, whole = as_token_ids(token_ids), self._neutral(cache)
        if len(ids) < whole.n_tokens:
            raise InvalidArgument(f"the cache holds {whole.n_tokens} tokens, but {len(ids)} token ids are given")
        ids = ids[: whole.n_tokens]
        self._room.acquire()
        try:
            future = self._saver.submit(self._save, ids, whole)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(lambda _: self._room.release())
        return future

    def load(self, token_ids: Any, *, whole: bool = False) -> tuple[Any, int]:
        """(cache, n_tokens): a transformers `DynamicCache` of the longest stored prefix, ready for `generate(token_ids)`.

        At most all but the last token, since a model needs one to go on from; whole: all of them. Nothing found: (an empty cache,
        0). What cannot be fetched or decoded is a miss, counted in `statistics`.
        """
        cache, n_tokens = self.load_neutral(token_ids, whole=whole)
        if cache is None:
            return interop.new_transformers_cache(), 0
        return interop.as_transformers(cache), n_tokens

    def load_neutral(self, token_ids: Any, *, whole: bool = False) -> tuple[KVCache | None, int]:
        """As `load`, but a `KVCache`, and None where nothing is found; without transformers."""
        ids = as_token_ids(token_ids)
        asked = ids if whole else ids[:-1]
        nodes = self.chain.nodes(asked)
        parts = list(self._load_chunks(asked, nodes))
        tail = self._load_tail(asked, nodes[: len(parts) + 1])
        if tail is not None:
            n_chunks, cache = tail
            parts = [*parts[:n_chunks], cache]
        n_tokens = sum(part.n_tokens for part in parts)
        self._counters.add(loads=1, hits=int(n_tokens > 0), tokens_asked=len(asked), tokens_loaded=n_tokens)
        return (_join(parts), n_tokens) if parts else (None, 0)

    def contains(self, token_ids: Any) -> int:
        """How many leading tokens of token_ids stand in the store in whole chunks; nothing is fetched or decoded."""
        nodes = self.chain.nodes(as_token_ids(token_ids))
        try:
            return self.chain.chunk_tokens * self.store.contains_prefix([chunk_key(node) for node in nodes[1:]])
        except StoreError:
            self._counters.add(store_errors=1)
            return 0

    def delete(self, token_ids: Any, *, keep_tokens: int = 0) -> None:
        """Delete what is stored of this prefix past its first `keep_tokens` tokens, in whole chunks.

        Chunks that other conversations share are gone for them too. Raises `StoreError`.
        """
        ids = as_token_ids(token_ids)
        nodes = self.chain.nodes(ids)
        first = -(-keep_tokens // self.chain.chunk_tokens)
        keys = [chunk_key(node) for node in nodes[first + 1 :]]
        keys += [key for index in range(first, len(nodes)) if (key := self._tail_key(ids, nodes, index))]
        for key in keys:
            self.store.delete(key)

    def _save(self, ids: TokenIds, cache: KVCache) -> SaveReport:
        """The work of `save`, in the background."""
        if len(ids) < self.min_tokens:
            self._counters.add(saves_skipped=1)
            return SaveReport(0, 0, 0, 0)
        size = self.chain.chunk_tokens
        n_chunks = max(0, len(ids) - self.codec.window_tokens) // size
        nodes = self.chain.nodes(ids[: n_chunks * size])
        try:
            missing = self._missing(nodes)
            written = 0
            for index in missing:
                start, stop = index * size, (index + 1) * size
                stream = self._pages.encode(cache.span(start, stop), ids[start:stop])
                self.store.put(chunk_key(nodes[index + 1]), stream)
                written += len(stream)
            written += self._save_tail(ids, cache, nodes)
            # Tails that hung on the way are inside the new chunks now.
            for index in missing:
                if key := self._tail_key(ids, nodes, index):
                    self.store.delete(key)
        except StoreError:
            self._counters.add(store_errors=1)
            raise
        self._counters.add(
            saves=1, chunks_coded=len(missing), chunks_shared=n_chunks - len(missing), bytes_written=written
        )
        return SaveReport(len(ids), n_chunks, len(missing), written)

    def _missing(self, nodes: list[bytes]) -> list[int]:
        """Which of the chunks between the nodes are not in the store."""
        keys = [chunk_key(node) for node in nodes[1:]]
        n_leading = self.store.contains_prefix(keys)
        return [
            index for index in range(n_leading, len(keys)) if index == n_leading or not self.store.contains(keys[index])
        ]

    def _save_tail(self, ids: TokenIds, cache: KVCache, nodes: list[bytes]) -> int:
        """Store what follows the last coded chunk; bytes written."""
        start, node = (len(nodes) - 1) * self.chain.chunk_tokens, nodes[-1]
        key = self.chain.tail_key(node, ids[start:])
        if key is None:
            return 0
        stream = self.codec.encode(cache.span(start, len(ids)), ids[start:])
        entry = Tail.of(node, ids[start:], stream).to_bytes()
        self.store.put(key, entry)
        self._counters.add(tails_saved=1)
        return len(entry)

    def _load_chunks(self, ids: TokenIds, nodes: list[bytes]) -> Iterator[KVCache]:
        """The chunks that are there, first to last, up to the first that is not; the next are fetched while one is decoded."""
        size = self.chain.chunk_tokens
        keys = [chunk_key(node) for node in nodes[1:]]
        batches = [keys[start : start + READ_AHEAD] for start in range(0, len(keys), READ_AHEAD)]
        fetches = iter(batches)
        ahead = self._fetch(next(fetches, None))
        index = 0
        while ahead is not None:
            entries, ahead = ahead.result(), self._fetch(next(fetches, None))
            for entry in entries:
                start = index * size
                cache = self._decode(keys[index], entry, ids[start : start + size], size)
                if cache is None:
                    return
                yield cache
                index += 1

    def _load_tail(self, ids: TokenIds, nodes: list[bytes]) -> tuple[int, KVCache] | None:
        """(chunks before it, the tail) that reaches furthest, of those on the last node and on the one before it."""
        for index in range(len(nodes) - 1, max(-1, len(nodes) - 3), -1):
            start = index * self.chain.chunk_tokens
            key = self._tail_key(ids, nodes, index)
            entry = self._get([key], self.store.get_many)[0] if key else None
            if key is None or entry is None:
                continue
            try:
                tail = Tail.from_bytes(entry)
            except KvtcError:
                self._forget(key)
                continue
            common = tail.n_common(nodes[index], ids[start:])
            if start + common <= (len(nodes) - 1) * self.chain.chunk_tokens:
                continue
            cache = self._decode(key, tail.stream, ids[start:], common)
            if cache is not None:
                return index, cache
        return None

    def _tail_key(self, ids: TokenIds, nodes: list[bytes], index: int) -> str | None:
        return self.chain.tail_key(nodes[index], ids[index * self.chain.chunk_tokens :])

    def _fetch(self, keys: list[str] | None) -> Future[list[Any]] | None:
        return None if keys is None else self._fetcher.submit(self._get, keys, self.store.resident_many)

    def _get(self, keys: list[str], read: Callable[[list[str]], list[Any]]) -> list[Any]:
        try:
            entries = read(keys)
        except StoreError:
            self._counters.add(store_errors=1)
            return [None] * len(keys)
        self._counters.add(bytes_read=sum(len(entry) for entry in entries if entry is not None))
        return entries

    def _decode(self, key: str, stream: Bytes | None, ids: TokenIds, n_tokens: int) -> KVCache | None:
        """The first n_tokens of a stream; None, counted, where there is none or it cannot be used."""
        if stream is None:
            return None
        try:
            cache = self.codec.decode_neutral(stream, ids[:n_tokens], tokens=n_tokens)
        except KvtcError:
            self._forget(key)
            return None
        return cache

    def _forget(self, key: str) -> None:
        """Delete an entry that cannot be used, so that the next save writes it anew."""
        self._counters.add(unusable=1)
        try:
            self.store.delete(key)
        except StoreError:
            self._counters.add(store_errors=1)

    @neutral_torch_state
    def _neutral(self, cache: Any) -> KVCache:
        """A cache of a prefix as plain tensors of its own."""
        geometry = self.codec.calibration.geometry
        if interop.is_transformers_cache(cache):
            if interop.batch_shape(cache)[0] != 1:
                raise InvalidArgument(
                    f"the cache holds {interop.batch_shape(cache)[0]} sequences; save them one by one"
                )
            found = interop.from_transformers(cache, geometry)
        elif isinstance(cache, KVCache):
            found = cache.plain()
            found = replace(found, keys=found.keys.clone(), values=found.values.clone())
        else:
            raise InvalidArgument(f"expected a transformers DynamicCache or a kvtc.KVCache, got {type(cache).__name__}")
        found.validate()
        geometry.check(found)
        positions = found.resolved_positions()
        if positions.numel() and int(positions[-1]) != len(positions) - 1:
            raise InvalidArgument(
                f"a prefix holds every token from position 0 on; this cache holds {len(positions)} tokens up to position "
                f"{int(positions[-1])}"
            )
        # Whatever part of it is coded, the rotation is that of the whole.
        rope_length = found.resolved_rope_length() if geometry.rope.depends_on_length else found.rope_length
        return replace(found, positions=positions, rope_length=rope_length)


@neutral_torch_state
def _join(parts: list[KVCache]) -> KVCache:
    """Consecutive parts as one cache, in the dtype of the first."""
    first = parts[0]
    keys, values = (
        torch.cat([getattr(part, side).to(first.dtype) for part in parts], dim=2) for side in ("keys", "values")
    )
    return KVCache(keys, values, None, first.first_layer, first.first_kv_head, parts[-1].rope_length)
