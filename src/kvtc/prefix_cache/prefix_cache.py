"""The prefix cache: saves the cache of a text, and loads the cache of the longest stored prefix of
a text.

Every whole chunk of the grid (256 tokens) that lies before the window is one entry, coded without a
window and named by the hash chain (`chain`). The tokens behind the last of them, window included,
are one more entry, the tail (`tails`). When a conversation grows, only its new chunks are coded:
tokens that leave the window become part of a chunk, and a new tail takes the place of the old one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from ..cache import KVCache, TokenIds
from ..codec import Codec
from ..codec import transformers_cache as interop
from ..codec.options import as_token_ids
from ..entries import Entries
from ..errors import PROGRAM_ENDS, InvalidArgument
from ..key_digest import entry_scope
from ..process.torch_state import neutral_torch_state
from ..process.workers import Workers
from ..store import Store
from .chain import Chain, chunk_key
from .tails import Tails, tail_key, tail_name

MIN_TOKENS = 512
READ_AHEAD = 4
"""Chunks fetched in one call, while those fetched before are decoded."""


@dataclass(frozen=True)
class SaveReport:
    """What a save has done.

    Parameters:
        n_tokens: Tokens of the prefix that a load finds now. 0 if the prefix was too short. Fewer
            than 16 tokens behind the last whole chunk have no entry and are not found.
        chunks: Whole chunks of the prefix.
        coded: Those of them that were not in the store before.
        written_bytes: Bytes of the entries that were written.
    """

    n_tokens: int
    chunks: int
    coded: int
    written_bytes: int


class PrefixCache:
    """Keeps caches of prefixes in a store. Safe to share between threads.

    Processes share a store, each with a PrefixCache of its own. A forked child may go on with that
    of its parent, with threads and counts of its own, if the store may be used in it.

    Parameters:
        codec: How chunks are coded; its window is the exact end of each saved prefix.
        store: As `kvtc.store.open_store` gives it; it is not closed here.
        namespace: A name or secret that separates tenants: entries of another namespace are not
            found.
        identity: Of the model that computes the caches, as `kvtc.model_identity` gives it: entries
            of another identity are not found.
        min_tokens: Shorter prefixes are not saved.
        max_pending: Saves that may wait; a further call of `save` waits until one has ended.

    Raises:
        InvalidArgument: `min_tokens` or `max_pending` is below 1.
    """

    def __init__(
        self,
        codec: Codec,
        store: Store,
        *,
        namespace: str = "",
        identity: str = "",
        min_tokens: int = MIN_TOKENS,
        max_pending: int = 4,
    ) -> None:
        if min_tokens < 1 or max_pending < 1:
            raise InvalidArgument(f"min_tokens {min_tokens} and max_pending {max_pending} must be at least 1")
        self.codec = codec
        self.store = store
        self.min_tokens = min_tokens
        self._windowless = codec.with_window(0)
        self.chain = Chain.of(
            entry_scope(namespace, identity),
            codec.fingerprint,
            self._windowless.settings_digest,
            codec.settings.chunk_tokens,
        )
        self.entries = Entries(store)
        self._tails = Tails(self.entries)
        self._saver = Workers(1, "this PrefixCache", "kvtc-save", max_pending)
        self._fetcher = Workers(2, "this PrefixCache", "kvtc-fetch")

    def __reduce__(self) -> NoReturn:
        raise InvalidArgument(
            "a PrefixCache has threads and an open store and cannot be pickled or copied; its codec can: open the store and make a "
            "PrefixCache in each process"
        )

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the saves under way. The store stays open; later calls raise
        `StoreUnavailable`."""
        self._saver.close()
        self._fetcher.close()

    @property
    def statistics(self) -> Counter[str]:
        """Counts so far, 0 for what never happened: those of `kvtc.counts.COUNTERS` that
        docs/prefix_cache.md names."""
        return self.entries.counts.read()

    def save(self, token_ids: Any, cache: Any) -> Future[SaveReport]:
        """Store a prefix in the background.

        Parameters:
            token_ids: [T], of the cached tokens; further ids, as `generate` returns one, are left
                out.
            cache: A `DynamicCache` of batch 1, or a `KVCache` that begins at position 0 and has no
                gaps. It is copied before this returns.

        Returns:
            A future: its `result` waits for the report, and raises `StoreError` if the store
            failed.

        Raises:
            InvalidCache, GeometryMismatch, UnsupportedModel: The cache is not one of the calibrated
                model.
            InvalidArgument: The cache does not begin at position 0, or has more tokens than there
                are ids.
            StoreUnavailable: After `close`.
        """
        self._saver.check_open()
        ids, whole = as_token_ids(token_ids), self._neutral(cache)
        if len(ids) < whole.n_tokens:
            raise InvalidArgument(f"the cache holds {whole.n_tokens} tokens, but {len(ids)} token ids are given")
        ids = ids[: whole.n_tokens]
        return self._saver.submit(self._save, ids, whole)

    def load(self, token_ids: Any, *, whole: bool = False) -> tuple[Any, int]:
        """The cache of the longest stored prefix of a text, ready for `generate(token_ids)`.

        Whatever cannot be fetched or decoded is a miss, counted in `statistics`.

        Parameters:
            token_ids: [T], of the text.
            whole: Whether all tokens are wanted; otherwise all but the last, since a model needs
                one token to go on from.

        Returns:
            (a transformers `DynamicCache`, its tokens); (an empty one, 0) if nothing is found.

        Raises:
            InvalidArgument: `token_ids` are no token ids.
            StoreUnavailable: After `close`.
        """
        cache, n_tokens = self.load_neutral(token_ids, whole=whole)
        if cache is None:
            return interop.new_transformers_cache(), 0
        return interop.as_transformers(cache), n_tokens

    def load_neutral(self, token_ids: Any, *, whole: bool = False) -> tuple[KVCache | None, int]:
        """As `load`, but a `KVCache`, or None if nothing is found. Needs no transformers."""
        self._fetcher.check_open()
        ids = as_token_ids(token_ids)
        asked = ids if whole else ids[:-1]
        nodes = self.chain.nodes(asked)
        parts = list(self._load_chunks(asked, nodes))
        tail = self._load_tail(asked, nodes[: len(parts) + 1])
        if tail is not None:
            n_chunks, end = tail
            parts = [*parts[:n_chunks], end]
        # Not a fault of any entry, but memory for the whole may be short where there was enough for
        # each part.
        cache = self.entries.parse("the whole prefix", parts, _join) if parts else None
        n_tokens = 0 if cache is None else cache.n_tokens
        hits = int(n_tokens > 0)
        self.entries.counts.add(loads=1, hits=hits, tokens_asked=len(asked), tokens_loaded=n_tokens)
        return cache, n_tokens

    def contains(self, token_ids: Any) -> int:
        """How many leading tokens of a text are in the store in whole chunks. Nothing is fetched or
        decoded.

        Parameters:
            token_ids: [T], of the text.

        Raises:
            InvalidArgument, StoreUnavailable: As `load`.
        """
        self._fetcher.check_open()
        nodes = self.chain.nodes(as_token_ids(token_ids))
        return self.chain.chunk_tokens * self.entries.count_leading([chunk_key(node) for node in nodes[1:]])

    def delete(self, token_ids: Any, *, keep_tokens: int = 0) -> None:
        """Delete what is stored of a prefix. Chunks and tails that other texts share are deleted
        for them, too.

        Parameters:
            token_ids: [T], of the prefix.
            keep_tokens: Leading tokens that stay, rounded up to whole chunks.

        Raises:
            StoreError: The store failed.
            InvalidArgument, StoreUnavailable: As `load`.
        """
        self._saver.check_open()
        ids, size = as_token_ids(token_ids), self.chain.chunk_tokens
        nodes = self.chain.nodes(ids)
        first = -(-keep_tokens // size)
        for node in nodes[first + 1 :]:
            self.entries.delete(chunk_key(node))
        for index in range(first, len(nodes)):
            self._tails.delete(nodes[index], ids[index * size :])

    def _save(self, ids: TokenIds, cache: KVCache) -> SaveReport:
        """The work of `save`, in the background."""
        if len(ids) < self.min_tokens:
            self.entries.counts.add(saves_skipped=1)
            return SaveReport(0, 0, 0, 0)
        try:
            report = self._save_all(ids, cache)
        except PROGRAM_ENDS:
            raise
        except BaseException as error:
            self.entries.count_error("save_errors", error, "a prefix of %d tokens is not saved", len(ids))
            raise
        self.entries.counts.add(saves=1)
        return report

    def _save_all(self, ids: TokenIds, cache: KVCache) -> SaveReport:
        """Chunks first to last, then the tail; raises what hinders it."""
        size = self.chain.chunk_tokens
        n_chunks = max(0, len(ids) - self.codec.window_tokens) // size
        nodes = self.chain.nodes(ids[: n_chunks * size])
        n_leading = self.entries.count_leading([chunk_key(node) for node in nodes[1:]])
        self.entries.counts.add(entries_shared=n_leading)
        sizes = {index: self._save_chunk(index, ids, cache, nodes) for index in range(n_leading, n_chunks)}
        coded = [index for index, n_bytes in sizes.items() if n_bytes]
        tail_bytes = self._save_tail(ids, cache, nodes)
        # Tails that hung on the way are inside the new chunks now.
        for index in coded:
            self._tails.drop_outgrown(nodes[index], ids[index * size :])
        n_stored = len(ids) if tail_bytes else n_chunks * size
        return SaveReport(n_stored, n_chunks, len(coded), sum(sizes.values()) + tail_bytes)

    def _save_chunk(self, index: int, ids: TokenIds, cache: KVCache, nodes: list[bytes]) -> int:
        """Bytes written, 0 if it was there."""
        start, stop = index * self.chain.chunk_tokens, (index + 1) * self.chain.chunk_tokens
        chunk = cache.span(start, stop)
        return self.entries.put(
            chunk_key(nodes[index + 1]),
            lambda: self._windowless.encode(chunk, self._ids(ids, start, stop)),
            _bytes_of(chunk),
        )

    def _save_tail(self, ids: TokenIds, cache: KVCache, nodes: list[bytes]) -> int:
        """Store what follows the last coded chunk; bytes written."""
        start, node = (len(nodes) - 1) * self.chain.chunk_tokens, nodes[-1]
        end, rest = cache.span(start, len(ids)), ids[start:]
        told = self._ids(ids, start, len(ids))
        return self._tails.save(node, rest, tail_name(node, rest), lambda: self.codec.encode(end, told), _bytes_of(end))

    def _load_chunks(self, ids: TokenIds, nodes: list[bytes]) -> Iterator[KVCache]:
        """The chunks that are there, first to last, up to the first that is not; the next are
        fetched while one is decoded."""
        size = self.chain.chunk_tokens
        keys = [chunk_key(node) for node in nodes[1:]]
        batches = [keys[start : start + READ_AHEAD] for start in range(0, len(keys), READ_AHEAD)]
        fetches = iter(batches)
        ahead = self._fetch(next(fetches, None))
        index = 0
        while ahead is not None:
            entries, ahead = ahead.result(), self._fetch(next(fetches, None))
            for entry in entries:
                cache = self._decode(keys[index], entry, ids, index * size, (index + 1) * size)
                if cache is None:
                    return
                yield cache
                index += 1

    def _load_tail(self, ids: TokenIds, nodes: list[bytes]) -> tuple[int, KVCache] | None:
        """(chunks before it, the tail) that reaches furthest, of those on the last node and on the
        one before it."""
        size = self.chain.chunk_tokens
        for index in range(len(nodes) - 1, max(-1, len(nodes) - 3), -1):
            name, n_common = self._tails.find(nodes[index], ids[index * size :])
            stop = index * size + n_common
            if stop <= (len(nodes) - 1) * size:
                continue
            key = tail_key(nodes[index], name)
            (entry,) = self.entries.read([key], is_resident=True)
            cache = self._decode(key, entry, ids, index * size, stop)
            if cache is not None:
                return index, cache
        return None

    def _fetch(self, keys: list[str] | None) -> Future[list[Any]] | None:
        if keys is None:
            return None
        return self._fetcher.submit(lambda: self.entries.read(keys, is_resident=True))

    def _decode(self, key: str, entry: Any, ids: TokenIds, start: int, stop: int) -> KVCache | None:
        """The tokens of an entry that stand at start .. stop - 1, the first it has."""
        told = self._ids(ids, start, stop)
        return self.entries.decode(
            key, entry, lambda stream: self.codec.decode_neutral(stream, told, tokens=stop - start)
        )

    def _ids(self, ids: TokenIds, start: int, stop: int) -> TokenIds:
        """The ids of a prefix that the codec needs for tokens start .. stop - 1."""
        return ids[0 if self.codec.needs_prefix else start : stop]

    @neutral_torch_state
    def _neutral(self, cache: Any) -> KVCache:
        """A cache of a prefix as plain tensors of its own."""
        geometry = self.codec.geometry
        if interop.is_transformers_cache(cache):
            found = interop.from_transformers(cache, geometry)
        elif isinstance(cache, KVCache):
            found = cache.plain()
            found = replace(found, keys=found.keys.clone(), values=found.values.clone())
        else:
            raise InvalidArgument(f"expected a transformers DynamicCache or a kvtc.KVCache, got {type(cache).__name__}")
        found.validate(is_finite=not self.codec.is_lossless)
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
    return KVCache(keys, values, None, first.layers, first.first_kv_head, parts[-1].rope_length)


def _bytes_of(cache: KVCache) -> int:
    return cache.keys.nbytes + cache.values.nbytes
