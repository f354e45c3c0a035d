"""The scheduler's side of a connector: what is stored of a prompt, what to load, and what to save.

Imports no engine. An engine's scheduler must never wait: the store is asked in the background, and
the scheduler asks here until there is an answer. Entries are those of the prefix cache
(`kvtc.prefix_cache`): whole chunks under a hash chain, and a tail for the tokens behind the last
one. Each worker and each group of layers has entries of its own (an owner). A prompt can go on from
a position where every owner has what the position needs: of full attention all tokens before it,
of a window those that it reaches back to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from uuid import uuid4

import numpy as np

from ...codec.options import as_token_ids
from ...entries import Entries
from ...errors import InvalidArgument
from ...key_digest import digest
from ...prefix_cache import Chain, chunk_key
from ...prefix_cache.tails import MAX_TRIED_TAILS, NAME_TOKENS, Tail, Tails
from ...process.log_limits import concerning
from ...process.workers import Workers
from ...store import Store
from ..windowless_codec import CHUNK_TOKENS
from .page_groups import PageGroup

_LOOKED_AT_TOKENS = 2 * CHUNK_TOKENS
"""Of the text behind a chunk's beginning, to find tails that it outgrows; longer tails stay until
they are the oldest."""

_MOST_ATTEMPTS = 32
"""Positions that are tried, the last one first, where chunks of a window are missing."""

NO_PAGE = 0
"""In place of the id of a page that the engine has dropped."""

RequestDigest = Callable[[], bytes | None]
BlockTables = Sequence[Sequence[int]]
"""For each block table of an engine, the ids of a request's pages."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a prompt that are one entry for each owner: a whole chunk, or the beginning of a
    tail or of another prompt's chunk.

    Parameters:
        start: Position of the first token.
        token_ids: Of the tokens.
        keys: Of the entry, for each owner: all groups of the first worker, of the second, and so on.
        nodes: Of the hash chain, that the tokens follow, for each owner.
        is_tail: Whether the entry is a tail.
    """

    start: int
    token_ids: np.ndarray
    keys: list[str]
    nodes: list[bytes]
    is_tail: bool = False

    def __str__(self) -> str:
        return f"the piece of tokens {self.start} .. {self.stop - 1}"

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)

    def first_kept(self, group: PageGroup) -> int:
        """The first token that an entry of a group holds."""
        return self.start if self.is_tail else group.first_kept(self.start, self.start + CHUNK_TOKENS)


@dataclass(frozen=True)
class LoadOrder:
    """Fill pages of a request from the store.

    Parameters:
        request_id: Of the request.
        start, stop: Positions of the first token that is wanted, and behind the last one.
        pieces: That hold these tokens; the first may begin before `start`.
        page_ids: The pages of these tokens, for each block table of the engine.
    """

    request_id: str
    start: int
    stop: int
    pieces: list[Piece]
    page_ids: list[list[int]]


@dataclass(frozen=True)
class SaveOrder:
    """Store a piece from pages.

    Parameters:
        request_id: Of the request.
        piece: The tokens.
        page_ids: Their pages, for each block table of the engine.
        following: Token ids of the prompt from the piece's first on, which say which tails the
            piece outgrows.
    """

    request_id: str
    piece: Piece
    page_ids: list[list[int]]
    following: np.ndarray


@dataclass
class _Prompt:
    """What is known of a request's prompt.

    Parameters:
        token_ids: Of the prompt.
        nodes: Of its hash chain, [owner][0 .. chunks].
        n_stored: Leading chunks in the store when it was looked up.
        tail: What is stored behind them: a tail, or a chunk of another prompt.
        n_tail: Tokens that it has in common with the prompt, up to a whole page.
        n_saved: Leading chunks that are stored or ordered to be saved.
        start: Leading tokens that the engine has itself.
        was_loaded, has_tail: Whether a load was ordered; whether the tail of the prompt is stored
            or ordered to be saved.
    """

    token_ids: np.ndarray
    nodes: list[list[bytes]]
    n_stored: int = 0
    tail: Tail | None = None
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
        ids = self.following(index)[:CHUNK_TOKENS]
        return Piece(
            index * CHUNK_TOKENS, ids, [chunk_key(nodes[index + 1]) for nodes in self.nodes], self.before(index)
        )

    def piece_of(self, tail: Tail, index: int, n_tokens: int) -> Piece:
        """The first tokens of a tail, or of another prompt's chunk, after `index` chunks."""
        nodes = self.before(index)
        ids = self.following(index)[:n_tokens]
        return Piece(index * CHUNK_TOKENS, ids, [tail.key(node) for node in nodes], nodes, not tail.is_chunk)

    def before(self, index: int) -> list[bytes]:
        """The node that `index` chunks lead to, one an owner."""
        return [of_owner[index] for of_owner in self.nodes]

    def following(self, index: int) -> np.ndarray:
        """Token ids after `index` chunks."""
        return self.token_ids[index * CHUNK_TOKENS :]


class PrefixPlanner:
    """Plans the loads and saves of requests, for one scheduler thread.

    Parameters:
        store: Where the entries are; it is asked in the background.
        scope: Whose entries, as of `entry_scope`.
        owners: For each worker and each group, what keys say of its codec, as of
            `WindowlessCodec.names`.
        groups: Of layers, whose pages have a divisor of a chunk as tokens. Entries do not depend on
            it.

    Raises:
        InvalidArgument: The pages do not divide a chunk.
    """

    def __init__(
        self,
        store: Store,
        scope: bytes,
        owners: Sequence[Sequence[tuple[bytes, bytes]]],
        groups: Sequence[PageGroup],
    ) -> None:
        for group in groups:
            if CHUNK_TOKENS % group.page_tokens:
                raise InvalidArgument(
                    f"the engine's pages (blocks) hold {group.page_tokens} tokens; expected a divisor of {CHUNK_TOKENS}"
                )
        self._entries = Entries(store)
        self.counts = self._entries.counts
        self._tails = Tails(self._entries)
        self._scope, self._groups = scope, list(groups)
        self._owners = [names for worker in owners for names in worker]
        # Powers of two, for they divide a chunk: a multiple of the largest is one of all.
        self._page_tokens = max(group.page_tokens for group in groups)
        self._table_tokens = dict(sorted((table, group.page_tokens) for group in groups for table in group.tables))
        self._asking = Workers(1, "the lookup of prompts", "kvtc-lookup")
        self._prompts: dict[str, Future[_Prompt]] = {}
        self._loads: list[LoadOrder] = []

    def matched_tokens(
        self, request_id: str, token_ids: Sequence[int], n_computed: int, request: RequestDigest | None = None
    ) -> int | None:
        """How many tokens of a prompt can be loaded. A request is served once: if its load fails,
        it is computed.

        Parameters:
            request_id: Of the request.
            token_ids: Of its prompt.
            n_computed: Leading tokens that the engine has itself.
            request: Gives, in the background, the digest of all that the cache depends on besides
                token ids, such as an adapter's weights; if it raises, the request is neither looked
                up nor saved. None: there is nothing of the kind.

        Returns:
            Tokens stored behind the first `n_computed`, up to a whole page; None: not known yet,
            ask again.
        """
        if request_id not in self._prompts:
            self._prompts[request_id] = self._asking.submit(self._look_up, request_id, token_ids, request)
        asked = self._prompts[request_id]
        if not asked.done():
            return None
        prompt = asked.result()
        if prompt.was_loaded or prompt.n_found <= n_computed:
            return 0
        prompt.start = n_computed
        return prompt.n_found - n_computed

    def plan_load(self, request_id: str, n_tokens: int, page_ids: BlockTables) -> None:
        """Order the n_tokens that `matched_tokens` has promised.

        Parameters:
            request_id: Of the request.
            n_tokens: Tokens that the engine wants.
            page_ids: Of the request's pages from its first token on, for each block table.
        """
        prompt = self._prompts[request_id].result()
        prompt.was_loaded = True
        start, stop = prompt.start, prompt.start + n_tokens
        pieces = [prompt.chunk(index) for index in range(start // CHUNK_TOKENS, prompt.n_stored)]
        if prompt.tail is not None:
            pieces.append(prompt.piece_of(prompt.tail, prompt.n_stored, prompt.n_tail))
        self.counts.add(hits=1, tokens_promised=n_tokens)
        self._loads.append(LoadOrder(request_id, start, stop, pieces, self._pages(page_ids, start, stop)))

    def take_loads(self) -> list[LoadOrder]:
        """The loads ordered since the last call."""
        loads, self._loads = self._loads, []
        return loads

    def plan_saves(self, request_id: str, n_covered: int, page_ids: BlockTables) -> list[SaveOrder]:
        """The saves of what is not stored yet of a prompt.

        Parameters:
            request_id: Of the request.
            n_covered: Leading tokens of the prompt that are computed when the step has ended.
            page_ids: Of the request's pages from its first token on, for each block table.
        """
        asked = self._prompts.get(request_id)
        if asked is None or not asked.done():
            return []
        prompt = asked.result()
        n_chunks = min(n_covered // CHUNK_TOKENS, prompt.n_chunks)
        orders = []
        for index in range(prompt.n_saved, n_chunks):
            piece = prompt.chunk(index)
            pages = self._pages(page_ids, piece.start, piece.stop)
            orders.append(SaveOrder(request_id, piece, pages, prompt.following(index)[:_LOOKED_AT_TOKENS]))
        prompt.n_saved = max(prompt.n_saved, n_chunks)
        if n_covered >= len(prompt.token_ids) and not prompt.has_tail:
            prompt.has_tail = True
            rest = prompt.following(prompt.n_chunks)
            if len(rest) >= max(NAME_TOKENS, self._page_tokens):
                tail = prompt.piece_of(Tail.of(prompt.before(prompt.n_chunks)[0], rest), prompt.n_chunks, len(rest))
                orders.append(SaveOrder(request_id, tail, self._pages(page_ids, tail.start, tail.stop), rest))
        return orders

    def forget(self, request_id: str) -> None:
        """The request is over."""
        if asked := self._prompts.pop(request_id, None):
            asked.cancel()

    def start_over(self) -> None:
        """The model has changed: from now on find nothing that was stored before, by giving entries
        other names."""
        self._scope = digest("scope after a change of weights", scope=self._scope, change=uuid4().bytes)

    def close(self) -> None:
        """Wait for the lookup that runs, and drop those that wait."""
        self._asking.close(finish=False)

    def _pages(self, page_ids: BlockTables, start: int, stop: int) -> list[list[int]]:
        """Of the tokens start .. stop - 1; none of a table in which no group stands."""
        found = []
        for table, ids in enumerate(page_ids):
            size = self._table_tokens.get(table)
            found.append([] if size is None else list(ids[start // size : -(-stop // size)]))
        return found

    def _look_up(self, request_id: str, token_ids: Sequence[int], request: RequestDigest | None) -> _Prompt:
        """The work of `matched_tokens`, in the background; the scheduler waits for an answer,
        whatever fails."""
        with (
            concerning(f"request {request_id}"),
            self._entries.giving_up("requests_unknown", "its prompt is neither looked up nor saved"),
        ):
            of_request = request() if request is not None else None
            with self._entries.giving_up("load_errors", "its prompt is not looked up"):
                ids = as_token_ids(token_ids)
                chains = [Chain.of(self._scope, *codec, CHUNK_TOKENS, of_request) for codec in self._owners]
                prompt = _Prompt(ids, [chain.nodes(ids) for chain in chains])
                self._find(prompt)
                self.counts.add(tokens_asked=len(ids), tokens_found=prompt.n_found)
                return prompt
        return _Prompt(np.empty(0, np.int64), [[b""]], has_tail=True)  # of which nothing is loaded and nothing saved

    def _find(self, prompt: _Prompt) -> None:
        """After how many chunks every owner can go on, and what is stored there that has most in
        common with this prompt."""
        prompt.n_stored = prompt.n_saved = self._n_restorable(prompt)
        # What the owners have there has one name, so one index says what there is.
        node = prompt.before(prompt.n_stored)[0]
        found = self._tails.find(node, prompt.following(prompt.n_stored))
        for tail, n_common in [one for one in found if self._can_begin(one[0])][:MAX_TRIED_TAILS]:
            n_tail = n_common // self._page_tokens * self._page_tokens
            keys = prompt.piece_of(tail, prompt.n_stored, n_tail).keys
            if n_tail and self._entries.count_leading(keys) == len(keys):
                prompt.tail, prompt.n_tail = tail, n_tail
                break
        n_whole = len(prompt.token_ids) // self._page_tokens * self._page_tokens
        prompt.has_tail = prompt.n_stored == prompt.n_chunks and prompt.n_found == n_whole

    def _n_restorable(self, prompt: _Prompt) -> int:
        """The most chunks after which every owner has what it needs.

        For example 8 chunks, 0 to 7, and a window of two: after all 8 the window needs 6 and 7. If 6 is gone, 7 chunks cannot be
        gone on from either, for these need 5 and 6, and 6 chunks are tried next.
        """
        whole = [owner for owner, group in self._of_owners() if group.reach is None]
        windows = [(owner, group) for owner, group in self._of_owners() if group.reach is not None]
        n_chunks = prompt.n_chunks
        if whole:
            keys = [keys[owner] for keys in self._chunk_keys(prompt, 0, n_chunks) for owner in whole]
            n_chunks = self._entries.count_leading(keys) // len(whole)
        for _ in range(_MOST_ATTEMPTS if windows else 0):
            stop = n_chunks * CHUNK_TOKENS
            first = min(group.first_needed(stop) for _, group in windows) // CHUNK_TOKENS
            # The last chunk first: what is missing next to the end rules out most.
            needed = [
                (index, keys[owner])
                for index, keys in reversed(list(enumerate(self._chunk_keys(prompt, first, n_chunks), first)))
                for owner, group in windows
                if (index + 1) * CHUNK_TOKENS > group.first_needed(stop)
            ]
            n_there = self._entries.count_leading([key for _, key in needed])
            if n_there == len(needed):
                return n_chunks
            n_chunks = needed[n_there][0]  # a prefix with the missing chunk in its window cannot be gone on from
        return n_chunks if not windows else 0  # a store full of gaps is not searched for ever

    def _can_begin(self, tail: Tail) -> bool:
        """Whether its first tokens are there in all groups: of a chunk, a short window keeps the last ones alone."""
        return not tail.is_chunk or all(group.first_kept(0, CHUNK_TOKENS) == 0 for group in self._groups)

    def _of_owners(self) -> list[tuple[int, PageGroup]]:
        return [(owner, self._groups[owner % len(self._groups)]) for owner in range(len(self._owners))]

    def _chunk_keys(self, prompt: _Prompt, first: int, stop: int) -> list[list[str]]:
        return [prompt.chunk(index).keys for index in range(first, stop)]
