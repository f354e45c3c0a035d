"""A worker's side of a connector: pieces of prompts from the store into pages of the engine, and
back.

Imports no engine: pages are tensors, and the orders come from the scheduler's side
(`PrefixPlanner`). Coding and the store's work happen on threads of their own; whatever fails there
is a miss (`Entries`), and the engine computes what is missing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...backends import Target
from ...entries import Entries
from ...prefix_cache.tails import Tails
from ...process.log_limits import concerning, log_once
from ...process.torch_state import neutral_torch_state, writing_into
from ...process.workers import Workers
from ...store import Store
from ..page_layout import SPLIT, PageLayout
from ..tasks import Tasks
from ..windowless_codec import WindowlessCodec
from .prefix_planner import LoadOrder, Piece, SaveOrder

logger = logging.getLogger(__name__)

MAX_PENDING_SAVES = 64
"""Pieces copied out of the engine that may wait to be coded; more are not saved, so that memory
stays bounded."""
_FETCHED_AT_ONCE = 4


class EnginePages:
    """The pages of an engine on its device.

    Parameters:
        layers: One tensor for each layer, [B, H, N, 2 D] in this order of axes, whatever their
            order in memory.
        layout: Of these tensors, with axes LBHNC. Its pages may be smaller than the engine's; then
            an engine's page is several.
        engine_page_tokens: Tokens of a page of the engine.
        dtype: Of the numbers, which the tensors may hold as bytes.
    """

    def __init__(
        self, layers: Sequence[Tensor], layout: PageLayout, engine_page_tokens: int, dtype: torch.dtype
    ) -> None:
        self._layers = [layer.view(dtype) if layer.dtype != dtype else layer for layer in layers]
        self._layout = layout
        self._dtype = dtype
        self._per_engine_page = engine_page_tokens // layout.page_tokens

    @neutral_torch_state
    def read(self, page_ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """keys, values [L, H, T, D] of whole pages, copies on a device: the engine may use the
        pages again."""
        index = self._index(page_ids)
        gathered = torch.stack([layer[index] for layer in self._layers])
        keys, values = self._layout.read(gathered.to(device))
        self.settle()
        return keys, values

    @neutral_torch_state
    def write(self, page_ids: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Fill whole pages; done when this returns."""
        index = self._index(page_ids)
        data = self._layout.write(keys.to(self._dtype), values.to(self._dtype)).to(index.device)
        with writing_into(*self._layers):
            for layer, pages in zip(self._layers, data, strict=True):
                # By bytes: not every device assigns fp8 by index.
                layer.view(torch.uint8)[index] = pages.view(torch.uint8)
        self.settle()

    @neutral_torch_state
    def targets(self, page_ids: Sequence[int], n_tokens: int) -> list[tuple[Target, Target]] | None:
        """Places of the first tokens of these pages in each layer, keys and values; None where
        pages pack them otherwise."""
        if self._layout.packing != SPLIT:
            return None
        index, size = self._index(page_ids), self._layout.page_tokens
        token = torch.arange(n_tokens, device=index.device)
        page, slot = index[token // size], token % size
        found = []
        for layer in self._layers:
            whole = layer.as_strided((layer.untyped_storage().nbytes() // layer.element_size(),), (1,), 0)
            offsets = int(layer.storage_offset()) + page * layer.stride(0) + slot * layer.stride(2)
            beside = self._layout.head_dim * layer.stride(3)
            sides = (Target(whole, offsets + at, layer.stride(1), layer.stride(3)) for at in (0, beside))
            found.append((next(sides), next(sides)))
        return found

    def settle(self) -> None:
        """Wait until what was written is there."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._layers[0].device

    def bytes(self, n_tokens: int) -> int:
        """What they take in the engine."""
        return self._layout.bytes(n_tokens, self._dtype)

    def _index(self, page_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(page_ids, dtype=torch.int64, device=self._layers[0].device)
        inner = torch.arange(self._per_engine_page, device=ids.device)
        return (ids[:, None] * self._per_engine_page + inner).flatten()


class PageMover:
    """Loads and saves pieces of prompts for one worker.

    Parameters:
        pages: The engine's pages.
        codec: The codec of this worker's layers and heads.
        store: Where the entries are.
        rank: Global rank of the worker: which keys of a piece are its own.
        page_tokens: Tokens of a page of the engine.
        threads: Loads at a time, and saves at a time.
    """

    def __init__(
        self, pages: EnginePages, codec: WindowlessCodec, store: Store, rank: int, page_tokens: int, threads: int = 1
    ) -> None:
        self._entries = Entries(store)
        self.counts = self._entries.counts
        self._tails = Tails(self._entries)
        self._pages, self._codec = pages, codec
        self._rank, self._page_tokens = rank, page_tokens
        # Apart, so that a request that waits for its chunks does not wait for other requests' to be
        # saved.
        self._loads = Tasks[str, list[int]]("the loading of pages", "kvtc-load", threads)
        self._saving = Workers(threads, "the saving of pages", "kvtc-save")
        self._room = threading.BoundedSemaphore(MAX_PENDING_SAVES)
        self._unfilled: set[int] = set()

    def start_load(self, order: LoadOrder) -> None:
        """Begin a load in the background; `take_loaded` says when it has ended."""
        self._loads.submit(order.request_id, partial(self._load, order), order.page_ids)

    def take_loaded(self) -> set[str]:
        """The requests whose loads have ended since the last call."""
        ended = self._loads.take_all()
        self._unfilled.update(*ended.values())
        return set(ended)

    def take_unfilled(self) -> set[int]:
        """Ids of the pages that the loads which `take_loaded` has given could not fill, since the
        last call."""
        unfilled, self._unfilled = self._unfilled, set()
        return unfilled

    def save(self, order: SaveOrder) -> None:
        """Copy the pages now, and code and store them in the background."""
        if not self._room.acquire(blocking=False):
            self.counts.add(saves_dropped=1)
            with concerning(f"request {order.request_id}"):
                log_once(logger, "dropped", "%s is not saved: %d pieces wait already", order.piece, MAX_PENDING_SAVES)
            return
        is_begun = False
        # A cache that cannot be saved is no reason to end the engine's step.
        with (
            concerning(f"request {order.request_id}"),
            self._entries.giving_up("save_errors", "%s is not saved", order.piece),
        ):
            n_tokens = len(order.piece.token_ids)
            keys, values = (side[:, :, :n_tokens] for side in self._pages.read(order.page_ids, self._codec.device))
            self._saving.submit(self._save, order, keys, values)
            is_begun = True
        if not is_begun:
            self._room.release()

    def close(self) -> None:
        """Finish the loads and saves that were begun."""
        self._loads.close()
        self._saving.close()

    def _load(self, order: LoadOrder) -> list[int]:
        """Fill the pages of an order; the ids of those that are not filled."""
        n_filled = 0
        with concerning(f"request {order.request_id}"):
            with self._entries.giving_up("load_errors", "tokens %d .. %d are not loaded", order.start, order.stop - 1):
                n_filled = self._fill(order)
            self._log_unfilled(order, order.start + n_filled)
        self.counts.add(loads=1, tokens_loaded=n_filled, tokens_missed=order.stop - order.start - n_filled)
        return order.page_ids[n_filled // self._page_tokens :]

    def _log_unfilled(self, order: LoadOrder, reached: int) -> None:
        missing = next((piece for piece in order.pieces if piece.stop > reached), None)
        if reached < order.stop and missing is not None:
            text = "tokens %d .. %d are left to the engine: entry %s is missing, or could not be read as logged before"
            log_once(logger, "unfilled", text, reached, order.stop - 1, missing.keys[self._rank])

    def _fill(self, order: LoadOrder) -> int:
        """Tokens filled, up to the first piece that cannot be had."""
        n_filled = 0
        for first in range(0, len(order.pieces), _FETCHED_AT_ONCE):
            pieces = order.pieces[first : first + _FETCHED_AT_ONCE]
            entries = self._entries.read([piece.keys[self._rank] for piece in pieces])
            for piece, entry in zip(pieces, entries, strict=True):
                # What the engine has already stays as it is.
                skipped = max(0, order.start - piece.start)
                at, n_tokens = n_filled // self._page_tokens, len(piece.token_ids) - skipped
                page_ids = order.page_ids[at : at + n_tokens // self._page_tokens]
                decode = partial(self._decode, piece, page_ids, skipped)
                if not self._entries.decode(piece.keys[self._rank], entry, decode):
                    return n_filled
                n_filled += n_tokens
        return n_filled

    def _decode(self, piece: Piece, page_ids: list[int], skipped: int, stream: bytes) -> bool:
        """A stream into pages, but for its first tokens."""
        n_tokens, targets = len(piece.token_ids), None
        if not skipped and self._pages.device == self._codec.device:
            targets = self._pages.targets(page_ids, n_tokens)
        if targets is not None:
            self._codec.decode_into(stream, piece.start, targets, piece.token_ids)
            self._pages.settle()
        else:
            keys, values = self._codec.decode(stream, piece.start, n_tokens, piece.token_ids)
            self._pages.write(page_ids, keys[:, :, skipped:], values[:, :, skipped:])
        return True

    def _save(self, order: SaveOrder, keys: Tensor, values: Tensor) -> None:
        piece, node = order.piece, order.piece.nodes[self._rank]
        original = self._pages.bytes(len(piece.token_ids))

        def encode() -> bytes:
            return self._codec.encode(keys, values, piece.start, piece.token_ids)

        try:
            with (
                concerning(f"request {order.request_id}"),
                self._entries.giving_up("save_errors", "%s is not saved", piece),
            ):
                if piece.tail_name is not None:
                    self._tails.save(node, piece.token_ids, piece.tail_name, encode, original)
                elif self._entries.put(piece.keys[self._rank], encode, original):
                    self._tails.drop_outgrown(node, order.following)
        finally:
            self._room.release()
