"""The scheduler's side of a connector: which stored chunks a prompt begins with, what to load, and what to save.

Knows no engine. An engine's scheduler must never wait, so the store is asked in the background, and asked again here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidArgument, StoreError
from ..prefix_cache import Chain, as_token_ids, chunk_key
from ..store import Store
from .pages import CHUNK_TOKENS, Counts


@dataclass(frozen=True)
class LoadOrder:
    """Bring tokens start .. stop - 1 of a request into its pages.

    token_ids: of the chunks that hold these tokens. keys: [chunk][worker] of those chunks. page_ids: pages of these tokens.
    """

    request_id: str
    start: int
    stop: int
    token_ids: np.ndarray
    keys: list[list[str]]
    page_ids: list[int]


@dataclass(frozen=True)
class SaveOrder:
    """Store the chunk that begins at token start. keys: one a worker. page_ids: its pages."""

    start: int
    token_ids: np.ndarray
    keys: list[str]
    page_ids: list[int]


@dataclass
class _Prompt:
    """n_stored: leading chunks in the store when first asked. n_saved: chunks stored or handed over since."""

    token_ids: np.ndarray
    keys: list[list[str]]
    n_stored: int
    n_saved: int
    start: int = 0
    was_loaded: bool = False


class PrefixPlanner:
    """Safe for one scheduler thread.

    fingerprints: of each worker's calibration. settings_name: of the codec. page_tokens: of the engine, a divisor of a chunk.
    """

    def __init__(
        self, store: Store, namespace: str, fingerprints: Sequence[bytes], settings_name: str, page_tokens: int
    ) -> None:
        if CHUNK_TOKENS % page_tokens:
            raise InvalidArgument(
                f"the engine's pages (blocks) hold {page_tokens} tokens; expected a divisor of {CHUNK_TOKENS}"
            )
        self.counts = Counts()
        self._store = store
        self._namespace, self._fingerprints, self._settings_name = namespace, list(fingerprints), settings_name
        self._page_tokens = page_tokens
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="kvtc-lookup")
        self._prompts: dict[str, Future[_Prompt]] = {}

    def matched_tokens(self, request_id: str, token_ids: Sequence[int], salt: str, n_computed: int) -> int | None:
        """Tokens stored past the first n_computed ones; None: not known yet, ask again.

        salt: whatever besides token ids the cache depends on (an adapter's weights, a tenant). A request is served once: one whose
        load failed is computed.
        """
        if request_id not in self._prompts:
            self._prompts[request_id] = self._asking.submit(self._look_up, token_ids, salt)
        asked = self._prompts[request_id]
        if not asked.done():
            return None
        prompt = asked.result()
        n_tokens = prompt.n_stored * CHUNK_TOKENS
        if prompt.was_loaded or n_tokens <= n_computed:
            return 0
        prompt.start = n_computed
        return n_tokens - n_computed

    def plan_load(self, request_id: str, n_tokens: int, page_ids: Sequence[int]) -> LoadOrder:
        """The order for n_tokens that `matched_tokens` promised; page_ids: of the request from its first token on."""
        prompt = self._prompts[request_id].result()
        prompt.was_loaded = True
        start, stop = prompt.start, prompt.start + n_tokens
        first, last = start // CHUNK_TOKENS, -(-stop // CHUNK_TOKENS)
        pages = page_ids[start // self._page_tokens : -(-stop // self._page_tokens)]
        ids = prompt.token_ids[first * CHUNK_TOKENS : last * CHUNK_TOKENS]
        self.counts.add(requests_hit=1, tokens_promised=n_tokens)
        return LoadOrder(request_id, start, stop, ids, prompt.keys[first:last], list(pages))

    def plan_saves(self, request_id: str, n_covered: int, page_ids: Sequence[int]) -> list[SaveOrder]:
        """Whole chunks of the prompt among its first n_covered tokens, once these are computed, that are not stored yet."""
        asked = self._prompts.get(request_id)
        if asked is None or not asked.done():
            return []
        prompt = asked.result()
        n_chunks = min(n_covered // CHUNK_TOKENS, len(prompt.keys))
        orders = []
        for index in range(prompt.n_saved, n_chunks):
            start, stop = index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS
            pages = page_ids[start // self._page_tokens : stop // self._page_tokens]
            orders.append(SaveOrder(start, prompt.token_ids[start:stop], prompt.keys[index], list(pages)))
        prompt.n_saved = max(prompt.n_saved, n_chunks)
        return orders

    def forget(self, request_id: str) -> None:
        """The request is over."""
        if asked := self._prompts.pop(request_id, None):
            asked.cancel()

    def close(self) -> None:
        """Wait for the question under way."""
        self._asking.shutdown(wait=True, cancel_futures=True)

    def _look_up(self, token_ids: Sequence[int], salt: str) -> _Prompt:
        ids = as_token_ids(token_ids)
        namespace = f"{self._namespace}\n{salt}" if salt else self._namespace
        chains = [Chain.of(namespace, print_, self._settings_name, CHUNK_TOKENS) for print_ in self._fingerprints]
        by_worker = [[chunk_key(node) for node in chain.nodes(ids)[1:]] for chain in chains]
        keys = [list(of_chunk) for of_chunk in zip(*by_worker, strict=True)]
        try:
            n_stored = self._store.contains_prefix([key for of_chunk in keys for key in of_chunk]) // len(chains)
        except StoreError:
            self.counts.add(store_errors=1)
            n_stored = 0
        self.counts.add(lookups=1, tokens_asked=len(ids), tokens_found=n_stored * CHUNK_TOKENS)
        return _Prompt(ids, keys, n_stored, n_stored)
