"""The scheduler's side of a connector: what is stored of a prompt, what to load, and what to save.

Knows no engine. An engine's scheduler must never wait, so the store is asked in the background, and asked again here. Entries
are those of the prefix cache (`kvtc.prefix_cache`): whole chunks under a hash chain, and a tail for what follows the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from uuid import uuid4

import numpy as np

from ...codec.options import as_token_ids
from ...entries import Entries
from ...errors import PROGRAM_ENDS, InvalidArgument
from ...key_digest import digest
from ...prefix_cache import Chain, chunk_key
from ...prefix_cache.tails import NAME_TOKENS, Tails, tail_key, tail_name
from ...process.workers import Workers
from ...store import Store
from ..page_codec import CHUNK_TOKENS

_LOOKED_AT_TOKENS = 2 * CHUNK_TOKENS
"""Of the text behind a chunk's beginning, to find tails that it outgrows; longer tails stay until they are the oldest."""

RequestDigest = Callable[[], bytes | None]


@dataclass(frozen=True)
class Piece:
    """The tokens from start on whose ids are token_ids: a whole chunk, or what is wanted of a tail.

    keys: of the entry, one a worker. nodes: of the chain, that it follows, one a worker. tail_name: None for a chunk.
    """

    start: int
    token_ids: np.ndarray
    keys: list[str]
    nodes: list[bytes]
    tail_name: bytes | None = None

    def __str__(self) -> str:
        return f"the piece of tokens {self.start} .. {self.stop - 1}"

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
    """Store a piece that lies in page_ids. following: token ids from the piece's first on, which say what tails it outgrows."""

    piece: Piece
    page_ids: list[int]
    following: np.ndarray


@dataclass
class _Prompt:
    """nodes: [worker][0 .. chunks]. n_stored: leading chunks in the store when first asked; n_tail: tokens of the tail after them,
    which tail_name names.

    n_saved: chunks stored or handed over since.
    """

    token_ids: np.ndarray
    nodes: list[list[bytes]]
    n_stored: int = 0
    n_tail: int = 0
    tail_name: bytes = b""
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
        ids = self.following(index)[:CHUNK_TOKENS]
        return Piece(
            index * CHUNK_TOKENS, ids, [chunk_key(nodes[index + 1]) for nodes in self.nodes], self.before(index)
        )

    def tail(self, index: int, name: bytes, n_tokens: int | None = None) -> Piece:
        """Of the tail of that name after `index` chunks, the first tokens; None: all, to the end of the prompt."""
        nodes = self.before(index)
        ids = self.following(index)[:n_tokens]
        return Piece(index * CHUNK_TOKENS, ids, [tail_key(node, name) for node in nodes], nodes, name)

    def before(self, index: int) -> list[bytes]:
        """The node that `index` chunks lead to, one a worker."""
        return [of_worker[index] for of_worker in self.nodes]

    def following(self, index: int) -> np.ndarray:
        """Token ids after `index` chunks."""
        return self.token_ids[index * CHUNK_TOKENS :]


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
        self._entries = Entries(store)
        self.counts = self._entries.counts
        self._tails = Tails(self._entries)
        self._scope, self._codecs = scope, list(codecs)
        self._page_tokens = page_tokens
        self._asking = Workers(1, "the lookup of prompts", "kvtc-lookup")
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
        if prompt.n_tail:
            pieces.append(prompt.tail(prompt.n_stored, prompt.tail_name, prompt.n_tail))
        self.counts.add(hits=1, tokens_promised=n_tokens)
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
            piece = prompt.chunk(index)
            pages = self._pages(page_ids, piece.start, piece.stop)
            orders.append(SaveOrder(piece, pages, prompt.following(index)[:_LOOKED_AT_TOKENS]))
        prompt.n_saved = max(prompt.n_saved, n_chunks)
        if n_covered >= len(prompt.token_ids) and not prompt.has_tail:
            prompt.has_tail = True
            rest = prompt.following(prompt.n_chunks)
            if len(rest) >= max(NAME_TOKENS, self._page_tokens):
                tail = prompt.tail(prompt.n_chunks, tail_name(prompt.before(prompt.n_chunks)[0], rest))
                orders.append(SaveOrder(tail, self._pages(page_ids, tail.start, tail.stop), rest))
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
        self._asking.close(finish=False)

    def _pages(self, page_ids: Sequence[int], start: int, stop: int) -> list[int]:
        return list(page_ids[start // self._page_tokens : -(-stop // self._page_tokens)])

    def _look_up(self, token_ids: Sequence[int], request: RequestDigest | None) -> _Prompt:
        """The work of `matched_tokens`, in the background."""
        nothing = _Prompt(np.empty(0, np.int64), [[b""]], has_tail=True)
        try:
            more = request() if request is not None else None
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001  the scheduler waits for an answer
            self._entries.count_error("requests_unknown", error, "a request is neither looked up nor saved")
            return nothing
        try:
            ids = as_token_ids(token_ids)
            chains = [Chain.of(self._scope, *codec, CHUNK_TOKENS, more) for codec in self._codecs]
            prompt = _Prompt(ids, [chain.nodes(ids) for chain in chains])
            self._find(prompt)
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001  the scheduler waits for an answer
            self._entries.count_error("load_errors", error, "a prompt is not looked up")
            return nothing
        self.counts.add(tokens_asked=len(ids), tokens_found=prompt.n_found)
        return prompt

    def _find(self, prompt: _Prompt) -> None:
        """How many chunks every worker finds, and the tail on the last of them that has most in common with this prompt."""
        keys = [key for index in range(prompt.n_chunks) for key in prompt.chunk(index).keys]
        prompt.n_stored = prompt.n_saved = self._entries.count_leading(keys) // len(prompt.nodes)
        # The workers' tails have one name, so one index says what there is.
        node = prompt.before(prompt.n_stored)[0]
        prompt.tail_name, n_common = self._tails.find(node, prompt.following(prompt.n_stored))
        n_tail = n_common // self._page_tokens * self._page_tokens
        if n_tail:
            keys = prompt.tail(prompt.n_stored, prompt.tail_name).keys
            prompt.n_tail = n_tail if self._entries.count_leading(keys) == len(keys) else 0
        n_whole = len(prompt.token_ids) // self._page_tokens * self._page_tokens
        prompt.has_tail = prompt.n_stored == prompt.n_chunks and prompt.n_found == n_whole
