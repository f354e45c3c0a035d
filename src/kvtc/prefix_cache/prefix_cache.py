"""The prefix cache: saves the cache of a text, and loads the cache of the longest stored prefix of
a text.

Every whole chunk of the grid (256 tokens) that lies before the window is one entry, coded without a
window and named by the hash chain (`chain`). The tokens behind the last of them, window included,
are one more entry, the tail (`tails`). When a conversation grows, only its new chunks are coded:
tokens that leave the window become part of a chunk, and a new tail takes the place of the old one.

Caches with sliding windows or states can be restored at resume points alone; `pointed` keeps these.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ..cache import CacheGeometry, KVCache, TokenIds
from ..codec import Codec
from ..codec import transformers_cache as interop
from ..codec.options import as_token_ids
from ..codec.resume_points import RESUME_EVERY, ResumePoints
from ..codec.transformers_cache import SplitCache
from ..entries import Entries
from ..errors import PROGRAM_ENDS, InvalidArgument, InvalidCache, UnsupportedModel
from ..key_digest import entry_scope
from ..process.torch_state import neutral_torch_state
from ..process.workers import Workers
from ..store import Store
from .chain import Chain, chunk_key
from .parts import Parts, join
from .pointed import PointedPrefixes
from .tails import MAX_TRIED_TAILS, Tails

MIN_TOKENS = 512


@dataclass(frozen=True)
class SaveReport:
    """What a save has done.

    Parameters:
        n_tokens: Tokens of the prefix that a load finds now. 0 if the prefix was too short.
            Fewer than 16 tokens behind the last whole chunk have no entry and are not found,
            unless the cache has windows or states.
        chunks: Whole chunks of the prefix.
        coded: Those of them that were not in the store before.
        written_bytes: Bytes of the entries that were written.

    Example:
        >>> with kvtc.PrefixCache(codec, kvtc.open_store("memory:")) as prefixes:
        ...     report = prefixes.save(token_ids, cache).result()
        >>> report.n_tokens, report.chunks, report.coded
        (600, 1, 1)
    """

    n_tokens: int
    chunks: int
    coded: int
    written_bytes: int


class PrefixCache:
    """Keeps caches of prefixes in a store. Safe to share between threads.

    Processes share a store, each with a PrefixCache of its own. A forked child may go on with
    that of its parent, with threads and counts of its own, if the store may be used in it.

    Parameters:
        codec: How chunks are coded; its window is the exact end of each saved prefix.
        store: As `kvtc.store.open_store` gives it; it is not closed here.
        namespace: A name or secret that separates tenants: entries of another namespace are not
            found. Default "".
        identity: Of the model that computes the caches, as `kvtc.model_identity` gives it:
            entries of another identity are not found. A codec without a calibration, whose
            streams may be of any model, needs one. Default "".
        min_tokens: Shorter prefixes are not saved; default 512.
        max_pending: Saves that may wait; a further call of `save` waits until one has ended.
            Default 4.
        resume_every: Of caches with windows or states, tokens from one resume point to the
            next; a multiple of the codec's chunk_tokens. The end of each saved prefix is one in
            any case. Default 4096.

    Raises:
        InvalidArgument: `min_tokens` or `max_pending` is below 1, `resume_every` no multiple,
            or the identity missing.

    Example:
        >>> prefixes = kvtc.PrefixCache(codec, kvtc.open_store("memory:?bytes=100MB"))
        >>> prefixes.save(token_ids, cache).result().n_tokens
        600
        >>> prompt = torch.cat([token_ids, torch.tensor([7, 8, 9])])
        >>> restored, n_tokens = prefixes.load(prompt)
        >>> n_tokens, prefixes.statistics["hits"]
        (600, 1)
        >>> len(prefixes.portable(token_ids))
        3
        >>> prefixes.close()
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
        resume_every: int = RESUME_EVERY,
    ) -> None:
        if min_tokens < 1 or max_pending < 1:
            raise InvalidArgument(f"min_tokens {min_tokens} and max_pending {max_pending} must be at least 1")
        self.codec = codec
        self.store = store
        self.min_tokens = min_tokens
        if codec.calibration is None and not identity:
            raise InvalidArgument("the codec has no calibration, which would tell models apart: give an identity")
        if resume_every < 1 or resume_every % codec.settings.chunk_tokens:
            raise InvalidArgument(
                f"resume_every {resume_every} must be a multiple of chunk_tokens, {codec.settings.chunk_tokens}"
            )
        self.entries = Entries(store)
        self._saver = Workers(1, "this PrefixCache", "kvtc-save", max_pending)
        self._fetcher = Workers(2, "this PrefixCache", "kvtc-fetch")
        self._parts = Parts(codec, self.entries, self._fetcher)
        self.chain = Chain.of(
            entry_scope(namespace, identity),
            codec.fingerprint,
            self._parts.windowless.settings_digest,
            codec.settings.chunk_tokens,
        )
        self._tails = Tails(self.entries)
        self._pointed = PointedPrefixes(self._parts, self.chain, resume_every)

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

    def save(self, token_ids: Any, cache: Any, points: ResumePoints | None = None) -> Future[SaveReport]:
        """Store a prefix in the background.

        Parameters:
            token_ids: [T], of the cached tokens; further ids, as `generate` returns one, are left
                out. Of a cache of states alone, which does not know how many tokens it has read,
                they are exactly these.
            cache: A transformers cache of batch 1, or a `KVCache` that begins at position 0 and has
                no gaps. It is copied before this returns.
            points: Resume points that were taken while the cache grew; those at multiples of
                `resume_every` are stored.

        Returns:
            A future: its `result` waits for the report, and raises `StoreError` if the store
            failed.

        Raises:
            InvalidCache, GeometryMismatch, UnsupportedModel: The cache is not one of the calibrated
                model.
            InvalidArgument: The cache does not begin at position 0, or has more tokens than there
                are ids, or the points are of another cache.
            StoreUnavailable: After `close`.
        """
        self._saver.check_open()
        ids, whole = as_token_ids(token_ids), self._split(cache)
        n_tokens = len(ids) if whole.n_tokens is None else whole.n_tokens
        if len(ids) < n_tokens:
            raise InvalidArgument(f"the cache holds {n_tokens} tokens, but {len(ids)} token ids are given")
        if points is not None:
            whole = replace(whole, points=points.of(whole, n_tokens, self.chain.chunk_tokens))
        return self._saver.submit(self._save, ids[:n_tokens], replace(whole, n_tokens=n_tokens))

    def load(self, token_ids: Any, *, whole: bool = False) -> tuple[Any, int]:
        """The cache of the longest stored prefix of a text, ready for `generate(token_ids)`.

        Whatever cannot be fetched or decoded is a miss, counted in `statistics`. A cache with
        windows or states is loaded up to the last resume point before the two texts part.

        Parameters:
            token_ids: [T], of the text.
            whole: Whether all tokens are wanted; otherwise all but the last, since a model needs
                one token to go on from.

        Returns:
            (a transformers cache, its tokens); (an empty `DynamicCache`, 0) if nothing is found. A
            model with other layers than full attention makes its own in place of the empty one.

        Raises:
            InvalidArgument: `token_ids` are no token ids.
            StoreUnavailable: After `close`.
        """
        found = self._load(token_ids, whole)
        if found is None:
            return interop.new_transformers_cache(), 0
        return interop.from_split(found, self.codec.device), found.n_tokens or 0

    def load_neutral(self, token_ids: Any, *, whole: bool = False) -> tuple[KVCache | None, int]:
        """As `load`, but a `KVCache`. Needs no transformers.

        Parameters:
            token_ids, whole: As in `load`.

        Returns:
            (the cache, its tokens); (None, 0) if nothing is found.

        Raises:
            UnsupportedModel: The cache has other layers than full attention.
            InvalidArgument, StoreUnavailable: As `load`.

        Example:
            >>> with kvtc.PrefixCache(codec, kvtc.open_store("memory:")) as prefixes:
            ...     prefixes.load_neutral(token_ids)
            (None, 0)
        """
        found = self._load(token_ids, whole)
        if found is not None and (found.exact or found.coded is None):
            raise UnsupportedModel("the stored cache has several groups of layers, which load gives back")
        return (None, 0) if found is None else (found.coded, found.n_tokens or 0)

    def _load(self, token_ids: Any, whole: bool) -> SplitCache | None:
        self._fetcher.check_open()
        ids = as_token_ids(token_ids)
        asked = ids if whole else ids[:-1]
        found = None if self._pointed.is_known else self._load_complete(asked)
        if found is None and self._pointed.discover():
            found = self._pointed.load(asked)
        n_tokens = 0 if found is None else found.n_tokens or 0
        hits = int(n_tokens > 0)
        self.entries.counts.add(loads=1, hits=hits, tokens_asked=len(asked), tokens_loaded=n_tokens)
        return found

    def _load_complete(self, asked: TokenIds) -> SplitCache | None:
        """A cache that can be restored at any token."""
        nodes = self.chain.nodes(asked)
        parts = list(self._parts.load_chunks(asked, nodes))
        tail = self._load_tail(asked, nodes[: len(parts) + 1])
        if tail is not None:
            n_chunks, end = tail
            parts = [*parts[:n_chunks], end]
        # Not a fault of any entry, but memory for the whole may be short where there was enough for
        # each part.
        return self.entries.parse("the whole prefix", parts, join) if parts else None

    def contains(self, token_ids: Any) -> int:
        """How many leading tokens of a text are in the store. Nothing is decoded.

        Parameters:
            token_ids: [T] integers, of the text.

        Returns:
            Tokens in whole chunks; of a cache with windows or states, tokens up to a resume
            point.

        Raises:
            InvalidArgument, StoreUnavailable: As `load`.

        Example:
            >>> with kvtc.PrefixCache(codec, kvtc.open_store("memory:")) as prefixes:
            ...     report = prefixes.save(token_ids, cache).result()
            ...     prefixes.contains(token_ids)
            256
        """
        self._fetcher.check_open()
        ids = as_token_ids(token_ids)
        nodes = [] if self._pointed.is_known else self.chain.nodes(ids)
        n_chunks = self.entries.count_leading([chunk_key(node) for node in nodes[1:]])
        if not n_chunks and self._pointed.discover():
            return self._pointed.contains(ids)
        return self.chain.chunk_tokens * n_chunks

    def portable(self, token_ids: Any) -> list[tuple[str, bytes | None]]:
        """The entries with which another store loads what this one has of a text.

        Parameters:
            token_ids: [T] integers, of the text.

        Returns:
            (key, value) of each, those first that others are of no use without. None: the value
            under this key of the store. An index of tails is told of the text's own tail alone,
            and not of those of other texts.

        Raises:
            InvalidArgument, StoreUnavailable: As `load`.

        Example:
            >>> with kvtc.PrefixCache(codec, kvtc.open_store("memory:")) as prefixes:
            ...     report = prefixes.save(token_ids, cache).result()
            ...     [key.split("/")[0] for key, value in prefixes.portable(token_ids)]
            ['chunk', 'tails', 'tail']
        """
        self._fetcher.check_open()
        ids, size = as_token_ids(token_ids), self.chain.chunk_tokens
        nodes = self.chain.nodes(ids)
        n_chunks = self.entries.count_leading([chunk_key(node) for node in nodes[1:]])
        found: list[tuple[str, bytes | None]] = [(chunk_key(node), None) for node in nodes[1 : n_chunks + 1]]
        for index in range(n_chunks, max(-1, n_chunks - 2), -1):
            rest = ids[index * size :]
            tails = [tail for tail, _ in self._tails.find(nodes[index], rest) if not tail.is_chunk]
            if tails:
                found += [self._tails.index_of(nodes[index], rest, tails[0].name), (tails[0].key(nodes[index]), None)]
        return [*self._pointed.portable(ids), *found]

    def delete(self, token_ids: Any, *, keep_tokens: int = 0) -> None:
        """Delete what is stored of a prefix. Chunks and tails that other texts share are deleted
        for them, too.

        Parameters:
            token_ids: [T] integers, of the prefix.
            keep_tokens: Leading tokens that stay, rounded up to whole chunks; default 0.

        Raises:
            StoreError: The store failed.
            InvalidArgument, StoreUnavailable: As `load`.

        Example:
            >>> with kvtc.PrefixCache(codec, kvtc.open_store("memory:")) as prefixes:
            ...     report = prefixes.save(token_ids, cache).result()
            ...     prefixes.delete(token_ids)
            ...     prefixes.contains(token_ids)
            0
        """
        self._saver.check_open()
        ids, size = as_token_ids(token_ids), self.chain.chunk_tokens
        nodes = self.chain.nodes(ids)
        first = -(-keep_tokens // size)
        for node in nodes[first + 1 :]:
            self.entries.delete(chunk_key(node))
        for index in range(first, len(nodes)):
            self._tails.delete(nodes[index], ids[index * size :])
        self._pointed.delete(ids, first)

    def _save(self, ids: TokenIds, cache: SplitCache) -> SaveReport:
        """The work of `save`, in the background."""
        if len(ids) < self.min_tokens:
            self.entries.counts.add(saves_skipped=1)
            return SaveReport(0, 0, 0, 0)
        try:
            report = self._save_all(ids, cache)
        except PROGRAM_ENDS:
            raise
        except BaseException as error:
            name = self.chain.nodes(ids)[-1].hex()
            self.entries.count_error("save_errors", error, "prefix %s of %d tokens is not saved", name, len(ids))
            raise
        self.entries.counts.add(saves=1)
        return report

    def _save_all(self, ids: TokenIds, cache: SplitCache) -> SaveReport:
        """Chunks first to last, then the tail; raises what hinders it."""
        if cache.partial:
            return SaveReport(*self._pointed.save(ids, cache))
        size = self.chain.chunk_tokens
        n_chunks = max(0, len(ids) - self.codec.window_tokens) // size
        nodes = self.chain.nodes(ids[: n_chunks * size])
        sizes = self._parts.save_chunks(ids, cache, nodes)
        coded = [index for index, n_bytes in sizes.items() if n_bytes]
        tail_bytes = self._save_tail(ids, cache, nodes)
        for index in coded:
            self._tails.note_chunk(nodes[index], ids[index * size :], size)
        n_stored = len(ids) if tail_bytes else n_chunks * size
        return SaveReport(n_stored, n_chunks, len(coded), sum(sizes.values()) + tail_bytes)

    def _save_tail(self, ids: TokenIds, cache: SplitCache, nodes: list[bytes]) -> int:
        """Store what follows the last coded chunk; bytes written."""
        start, node = (len(nodes) - 1) * self.chain.chunk_tokens, nodes[-1]
        end, rest = self._parts.tail(ids, cache, start), ids[start:]
        return self._tails.save(node, rest, *end)

    def _load_tail(self, ids: TokenIds, nodes: list[bytes]) -> tuple[int, SplitCache] | None:
        """(chunks before it, the tail or the beginning of another text's chunk) that reaches
        furthest, of those on the last node and on the one before it."""
        size = self.chain.chunk_tokens
        for index in range(len(nodes) - 1, max(-1, len(nodes) - 3), -1):
            for tail, n_common in self._tails.find(nodes[index], ids[index * size :])[:MAX_TRIED_TAILS]:
                stop = index * size + n_common
                if stop <= (len(nodes) - 1) * size:
                    break
                key = tail.key(nodes[index])
                (entry,) = self.entries.read([key], is_resident=True)
                cache = self._parts.decode(key, entry, ids, index * size, stop)
                if cache is not None:
                    return index, cache
        return None

    @neutral_torch_state
    def _split(self, cache: Any) -> SplitCache:
        """A cache of a prefix in tensors of its own."""
        geometry = None if self.codec.calibration is None else self.codec.geometry
        if interop.is_transformers_cache(cache):
            whole = interop.TransformersCache(cache)
            if whole.n_sequences != 1:
                raise InvalidCache(f"the cache holds {whole.n_sequences} sequences; expected one")
            found = whole.split(self.codec.covered)
            found = replace(found, exact=[one.copied() for one in found.exact])
        elif isinstance(cache, KVCache):
            coded = cache.plain()
            coded = replace(coded, keys=coded.keys.clone(), values=coded.values.clone())
            found = SplitCache(coded, [], coded.n_tokens)
        else:
            raise InvalidArgument(f"expected a transformers DynamicCache or a kvtc.KVCache, got {type(cache).__name__}")
        return found if found.coded is None else replace(found, coded=self._checked(found.coded, geometry))

    def _checked(self, cache: KVCache, geometry: CacheGeometry | None) -> KVCache:
        """The same from position 0 on, as positions and length say."""
        cache.validate(is_finite=not self.codec.is_lossless)
        if geometry is not None:
            geometry.check(cache)
        positions = cache.resolved_positions()
        if positions.numel() and int(positions[-1]) != len(positions) - 1:
            raise InvalidArgument(
                f"a prefix holds every token from position 0 on; this cache holds {len(positions)} tokens up to position "
                f"{int(positions[-1])}"
            )
        # Whatever part of it is coded, the rotation is that of the whole.
        depends = geometry is not None and geometry.rope.depends_on_length
        return replace(
            cache, positions=positions, rope_length=cache.resolved_rope_length() if depends else cache.rope_length
        )
