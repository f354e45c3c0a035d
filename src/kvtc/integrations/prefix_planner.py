"""The scheduler's side of a connector: what is stored of a prompt, what to load, and what to save.

Knows no engine. An engine's scheduler must never wait, so the store is asked in the background, and asked again here. Entries
are those of the prefix cache (`kvtc.prefix_cache`): whole chunks under a hash chain, and a tail for what follows the last one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from uuid import uuid4

import numpy as np

from ..errors import InvalidArgument, KvtcError, StoreError
from ..key_digest import digest
from ..prefix_cache import Chain, as_token_ids, chunk_key
from ..prefix_cache.tail import Tail
from ..store import Store
from .counts import Counts
from .pages import CHUNK_TOKENS

logger = logging.getLogger(__name__)

RequestDigest = Callable[[], bytes | None]


@dataclass(frozen=True)
class Piece:
    """The tokens from start on whose ids are token_ids: a whole chunk, or a tail.

    keys: of the entry, one a worker. nodes: of a tail, the node of the chain that it hangs on, one a worker.
    """

    start: int
    token_ids: np.ndarray
    keys: list[str]
    nodes: list[bytes] | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class LoadOrder:
    """Bring tokens start .. stop - 1 of a request into its pages page_ids; the first piece may begin before start."""

    request_id: str
    start: int
    stop: int
    pieces: list[Piece]
    page_ids: list[int]


@dataclass(frozen=True)
class SaveOrder:
    """Store a piece that lies in page_ids. stale_keys: entries that it makes superfluous, one a worker."""

    piece: Piece
    page_ids: list[int]
    stale_keys: list[str] | None = None


@dataclass
class _Prompt:
    """nodes: [worker][0 .. chunks]. n_stored: leading chunks in the store when first asked; n_tail: tokens of the tail after them.

    n_saved: chunks stored or handed over since.
    """

    token_ids: np.ndarray
    chains: list[Chain]
    nodes: list[list[bytes]]
    n_stored: int = 0
    n_tail: int = 0
    n_saved: int = 0
    start: int = 0
    was_loaded: bool = False
    has_tail: bool = False

    @property
    def n_chunks(self) -> int:
        return len(self.nodes[0]) - 1

    @property
    def n_found(self) -> int:
        return self.n_stored * CHUNK_TOKENS + self.n_tail

    def chunk(self, index: int) -> Piece:
        start = index * CHUNK_TOKENS
        keys = [chunk_key(nodes[index + 1]) for nodes in self.nodes]
        return Piece(start, self.token_ids[start : start + CHUNK_TOKENS], keys)

    def tail(self, index: int, n_tokens: int | None = None) -> Piece | None:
        """What follows `index` chunks; None where it is too short to have an entry."""
        start = index * CHUNK_TOKENS
        rest = self.token_ids[start:]
        nodes = [of_worker[index] for of_worker in self.nodes]
        keys = [chain.tail_key(node, rest) for chain, node in zip(self.chains, nodes, strict=True)]
        found = [key for key in keys if key is not None]
        return Piece(start, rest[:n_tokens], found, nodes) if len(found) == len(keys) else None


class PrefixPlanner:
    """For one scheduler thread.

    scope: whose entries, as of `entry_scope`. codecs: of each worker, its calibration's fingerprint and its `settings_digest`.
    page_tokens: of the engine, a divisor of a chunk; entries do not depend on it.
    """

    def __init__(self, store: Store, scope: bytes, codecs: Sequence[tuple[bytes, bytes]], page_tokens: int) -> None:
        if CHUNK_TOKENS % page_tokens:
            raise InvalidArgument(
                f"the engine's pages (blocks) hold {page_tokens} tokens; expected a divisor of {CHUNK_TOKENS}"
            )
        self.counts = Counts()
        self._store = store
        self._scope, self._codecs = scope, list(codecs)
        self._page_tokens = page_tokens
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="kvtc-lookup")
        self._prompts: dict[str, Future[_Prompt]] = {}

    def matched_tokens(
        self, request_id: str, token_ids: Sequence[int], n_computed: int, request: RequestDigest | None = None
    ) -> int | None:
        """Tokens stored past the first n_computed ones, to whole pages; None: not known yet, ask again.

        request: gives, in the background, the digest of whatever besides token ids the cache depends on (an adapter's weights, a
        tenant); where it raises, the request is neither looked up nor saved. None: on nothing else. A request is served once: one
        whose load failed is computed.
        """
        if request_id not in self._prompts:
            self._prompts[request_id] = self._asking.submit(self._look_up, token_ids, request)
        asked = self._prompts[request_id]
        if not asked.done():
            return None
        prompt = asked.result()
        if prompt.was_loaded or prompt.n_found <= n_computed:
            return 0
        prompt.start = n_computed
        return prompt.n_found - n_computed

    def plan_load(self, request_id: str, n_tokens: int, page_ids: Sequence[int]) -> LoadOrder:
        """The order for n_tokens that `matched_tokens` promised; page_ids: of the request from its first token on."""
        prompt = self._prompts[request_id].result()
        prompt.was_loaded = True
        start, stop = prompt.start, prompt.start + n_tokens
        pieces = [prompt.chunk(index) for index in range(start // CHUNK_TOKENS, prompt.n_stored)]
        if prompt.n_tail and (tail := prompt.tail(prompt.n_stored, prompt.n_tail)):
            pieces.append(tail)
        self.counts.add(requests_hit=1, tokens_promised=n_tokens)
        return LoadOrder(request_id, start, stop, pieces, self._pages(page_ids, start, stop))

    def plan_saves(self, request_id: str, n_covered: int, page_ids: Sequence[int]) -> list[SaveOrder]:
        """What is not stored yet of the prompt's first n_covered tokens, which are about to be computed."""
        asked = self._prompts.get(request_id)
        if asked is None or not asked.done():
            return []
        prompt = asked.result()
        n_chunks = min(n_covered // CHUNK_TOKENS, prompt.n_chunks)
        orders = []
        for index in range(prompt.n_saved, n_chunks):
            piece, stale = prompt.chunk(index), prompt.tail(index)
            pages = self._pages(page_ids, piece.start, piece.stop)
            orders.append(SaveOrder(piece, pages, stale.keys if stale else None))
        prompt.n_saved = max(prompt.n_saved, n_chunks)
        if n_covered >= len(prompt.token_ids) and not prompt.has_tail:
            prompt.has_tail = True
            tail = prompt.tail(prompt.n_chunks)
            if tail and len(tail.token_ids) >= self._page_tokens:
                orders.append(SaveOrder(tail, self._pages(page_ids, tail.start, tail.stop)))
        return orders

    def forget(self, request_id: str) -> None:
        """The request is over."""
        if asked := self._prompts.pop(request_id, None):
            asked.cancel()

    def start_over(self) -> None:
        """Find nothing that was stored before: the model is another one now. Older entries have names that nobody asks for."""
        self._scope = digest("scope after a change of weights", scope=self._scope, change=uuid4().bytes)

    def close(self) -> None:
        """Wait for the question under way."""
        self._asking.shutdown(wait=True, cancel_futures=True)

    def _pages(self, page_ids: Sequence[int], start: int, stop: int) -> list[int]:
        return list(page_ids[start // self._page_tokens : -(-stop // self._page_tokens)])

    def _look_up(self, token_ids: Sequence[int], request: RequestDigest | None) -> _Prompt:
        """The work of `matched_tokens`, in the background."""
        ids, more = as_token_ids(token_ids), None
        try:
            more = request() if request is not None else None
        except Exception as error:  # the scheduler waits for an answer
            if not isinstance(error, KvtcError):
                logger.exception("what a request's cache depends on is not found out")
            logger.warning("a request is neither looked up nor saved: %s", error)
            self.counts.add(requests_unknown=1)
            ids = ids[:0]
        chains = [Chain.of(self._scope, *codec, CHUNK_TOKENS, more) for codec in self._codecs]
        prompt = _Prompt(ids, chains, [chain.nodes(ids) for chain in chains])
        try:
            self._find(prompt)
        except Exception as error:  # the scheduler waits for an answer
            if not isinstance(error, StoreError):
                logger.exception("looking for a prompt failed")
            self.counts.add(store_errors=1)
            prompt.n_stored = prompt.n_tail = 0
        prompt.n_saved = prompt.n_stored
        n_whole = len(ids) // self._page_tokens * self._page_tokens
        prompt.has_tail = prompt.n_stored == prompt.n_chunks and prompt.n_found == n_whole
        self.counts.add(lookups=1, tokens_asked=len(ids), tokens_found=prompt.n_found)
        return prompt

    def _find(self, prompt: _Prompt) -> None:
        """How many chunks every worker finds, and how much of the tail on the last of them is this prompt's."""
        keys = [key for index in range(prompt.n_chunks) for key in prompt.chunk(index).keys]
        prompt.n_stored = self._store.contains_prefix(keys) // len(prompt.chains)
        tail = prompt.tail(prompt.n_stored)
        entry = self._store.get(tail.keys[0]) if tail else None
        if tail is None or tail.nodes is None or entry is None:
            return
        try:
            n_common = Tail.from_bytes(entry).n_common(tail.nodes[0], tail.token_ids)
        except KvtcError:
            return
        if self._store.contains_prefix(tail.keys[1:]) == len(tail.keys) - 1:
            prompt.n_tail = n_common // self._page_tokens * self._page_tokens
