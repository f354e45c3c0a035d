"""A worker's side of a connector: chunks from the store into pages of the engine, and pages into the store.

Knows no engine: pages are tensors, orders are the scheduler's. Coding and the store's work happen on threads of their own;
whatever fails there is a miss, counted, and the engine computes what is missing.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..backends import Target
from ..errors import KvtcError, StoreError
from ..prefix_cache.tail import Tail
from ..store import Store
from ..torch_state import neutral_torch_state, writing_into
from .counts import Counts
from .page_layout import SPLIT, PageLayout
from .pages import PageCodec
from .prefix_planner import LoadOrder, Piece, SaveOrder

logger = logging.getLogger(__name__)

MAX_PENDING_SAVES = 64
"""Pieces copied out of the engine that may wait to be coded; more are not saved, so that memory stays bounded."""
_FETCHED_AT_ONCE = 4


class EnginePages:
    """The engine's tensors, one a layer, [B, H, N, 2 D] in logical order.

    layout: of these tensors, in axes LBHNC; its pages may be smaller than the engine's, which then count several of them.
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
        """keys, values [L, H, T, D] of whole pages, copies on a device: the engine may use the pages again."""
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
        """Places of the first tokens of these pages in each layer, keys and values; None where pages pack them otherwise."""
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
    """rank: which of an order's keys are this worker's. page_tokens: of the engine."""

    def __init__(
        self, pages: EnginePages, codec: PageCodec, store: Store, rank: int, page_tokens: int, threads: int = 1
    ) -> None:
        self.counts = Counts()
        self._pages, self._codec, self._store = pages, codec, store
        self._rank, self._page_tokens = rank, page_tokens
        # Apart, so that a request that waits for its chunks does not wait for other requests' to be saved.
        self._loading = ThreadPoolExecutor(threads, thread_name_prefix="kvtc-load")
        self._saving = ThreadPoolExecutor(threads, thread_name_prefix="kvtc-save")
        self._room = threading.BoundedSemaphore(MAX_PENDING_SAVES)
        self._loaded: queue.SimpleQueue[tuple[str, list[int]]] = queue.SimpleQueue()

    def start_load(self, order: LoadOrder) -> None:
        """Begin in the background; `take_loaded` tells when it is done."""
        self._loading.submit(self._load, order)

    def take_loaded(self) -> tuple[set[str], set[int]]:
        """(requests whose loads are over since the last call, pages of theirs that could not be filled)."""
        requests: set[str] = set()
        failed: set[int] = set()
        while not self._loaded.empty():
            request_id, missing = self._loaded.get()
            requests.add(request_id)
            failed.update(missing)
        return requests, failed

    def save(self, order: SaveOrder) -> None:
        """Copy the pages now, and code and store them in the background."""
        if not self._room.acquire(blocking=False):
            self.counts.add(saves_dropped=1)
            return
        try:
            n_tokens = len(order.piece.token_ids)
            keys, values = (side[:, :, :n_tokens] for side in self._pages.read(order.page_ids, self._codec.device))
            self._saving.submit(self._save, order, keys, values)
        except Exception:  # a cache that cannot be saved is no reason to end the engine's step
            logger.exception("tokens %d .. %d are not saved", order.piece.start, order.piece.stop - 1)
            self.counts.add(save_errors=1)
            self._room.release()

    def close(self) -> None:
        """Finish what was begun."""
        self._loading.shutdown(wait=True)
        self._saving.shutdown(wait=True)

    def _load(self, order: LoadOrder) -> None:
        n_filled = 0
        try:
            n_filled = self._fill(order)
        except Exception:  # an engine that waits for this request must hear of it, whatever went wrong
            logger.exception("loading tokens %d .. %d failed", order.start, order.stop - 1)
            self.counts.add(load_errors=1)
        missing = order.page_ids[n_filled // self._page_tokens :]
        n_missing = order.stop - order.start - n_filled
        self.counts.add(loads=1, tokens_loaded=n_filled, tokens_missed=n_missing, misses=int(n_missing > 0))
        self._loaded.put((order.request_id, missing))

    def _fill(self, order: LoadOrder) -> int:
        """Tokens filled, up to the first piece that cannot be had."""
        n_filled = 0
        for first in range(0, len(order.pieces), _FETCHED_AT_ONCE):
            pieces = order.pieces[first : first + _FETCHED_AT_ONCE]
            for piece, entry in zip(pieces, self._fetch(pieces), strict=True):
                # What the engine has already stays as it is.
                skipped = max(0, order.start - piece.start)
                at, n_tokens = n_filled // self._page_tokens, len(piece.token_ids) - skipped
                page_ids = order.page_ids[at : at + n_tokens // self._page_tokens]
                if entry is None or not self._decode(piece, entry, page_ids, skipped):
                    return n_filled
                n_filled += n_tokens
        return n_filled

    def _fetch(self, pieces: list[Piece]) -> list[bytes | None]:
        try:
            fetched = self._store.get_many([piece.keys[self._rank] for piece in pieces])
        except StoreError as error:
            logger.warning("the store does not answer: %s", error)
            self.counts.add(store_errors=1)
            return [None] * len(pieces)
        self.counts.add(bytes_read=sum(len(entry) for entry in fetched if entry is not None))
        return fetched

    def _decode(self, piece: Piece, entry: bytes, page_ids: list[int], skipped: int) -> bool:
        """An entry into pages, but for its first tokens; False, counted, where the entry is none of this piece."""
        key, n_tokens = piece.keys[self._rank], len(piece.token_ids)
        try:
            if piece.nodes is not None:
                tail = Tail.from_bytes(entry)
                if tail.n_common(piece.nodes[self._rank], piece.token_ids) < n_tokens:
                    # Another text's tail has taken its place meanwhile.
                    return False
                entry = tail.stream
            targets = None
            if not skipped and self._pages.device == self._codec.device:
                targets = self._pages.targets(page_ids, n_tokens)
            if targets is not None:
                self._codec.decode_into(entry, piece.start, targets, piece.token_ids)
                self._pages.settle()
            else:
                keys, values = self._codec.decode(entry, piece.start, n_tokens, piece.token_ids)
                self._pages.write(page_ids, keys[:, :, skipped:], values[:, :, skipped:])
        except KvtcError as error:
            logger.warning("entry %s cannot be used and is deleted: %s", key, error)
            self.counts.add(entries_unusable=1)
            self._forget(key)
            return False
        return True

    def _forget(self, key: str) -> None:
        """Delete an entry that is of no use."""
        try:
            self._store.delete(key)
        except StoreError:
            self.counts.add(store_errors=1)

    def _save(self, order: SaveOrder, keys: Tensor, values: Tensor) -> None:
        piece, key = order.piece, order.piece.keys[self._rank]
        try:
            if piece.nodes is None and self._store.contains(key):
                self.counts.add(chunks_shared=1)
                return
            entry = self._codec.encode(keys, values, piece.start, piece.token_ids)
            if piece.nodes is not None:
                entry = Tail.of(piece.nodes[self._rank], piece.token_ids, entry).to_bytes()
            self._store.put(key, entry)
            kind = "chunks_saved" if piece.nodes is None else "tails_saved"
            original = self._pages.bytes(len(piece.token_ids))
            self.counts.add(**{kind: 1}, bytes_saved=len(entry), original_bytes=original)
            if order.stale_keys:
                self._forget(order.stale_keys[self._rank])
        except KvtcError as error:
            logger.warning("tokens %d .. %d are not saved: %s", piece.start, piece.stop - 1, error)
            self.counts.add(save_errors=1)
        except Exception:  # a thread that dies in silence would hide it
            logger.exception("saving tokens %d .. %d failed", piece.start, piece.stop - 1)
            self.counts.add(save_errors=1)
        finally:
            self._room.release()
