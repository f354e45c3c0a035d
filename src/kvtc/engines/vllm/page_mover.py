"""A worker's side of a connector: pieces of prompts from the store into pages of the engine, and
back.

Imports no engine: pages are tensors, and the orders come from the scheduler's side
(`PrefixPlanner`). Coding and the store's work happen on threads of their own; whatever fails there
is a miss (`Entries`), and the engine computes what is missing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from ...backends import Target
from ...entries import Entries
from ...prefix_cache.tails import Tails
from ...process.log_limits import concerning, log_once
from ...process.torch_state import neutral_torch_state, writing_into
from ...process.workers import Workers
from ...store import Store
from ..latent_layout import LatentLayout
from ..opaque_layout import OpaqueLayout
from ..page_layout import SPLIT, PageLayout
from ..tasks import Tasks
from ..windowless_codec import CHUNK_TOKENS, WindowlessCodec
from .page_groups import PageGroup
from .prefix_planner import NO_PAGE, LoadOrder, Piece, SaveOrder

logger = logging.getLogger(__name__)

MAX_PENDING_SAVES = 64
"""Pieces copied out of the engine that may wait to be coded; more are not saved, so that memory
stays bounded."""
_FETCHED_AT_ONCE = 4

PageIds = Mapping[int, Sequence[int]]
"""By the number of the block table."""


class EnginePages:
    """The pages of a group of layers on the engine's device.

    Parameters:
        layers: One tensor for each layer. Of plain pages [B, H, N, 2 D] in this order of axes,
            whatever their order in memory; of others [B, ..].
        layout: Of these tensors, with axes LBHNC. Its pages may be smaller than the engine's; then
            an engine's page is several.
        engine_page_tokens: Tokens of a page of the engine.
        dtype: Of the numbers, which the tensors may hold as bytes.
        tables: For each layer the block table in which its pages stand; None: all in table 0.
        scales: For each layer, of keys and of values, by what the engine's numbers are multiplied;
            None: by nothing.
    """

    def __init__(
        self,
        layers: Sequence[Tensor],
        layout: PageLayout | OpaqueLayout | LatentLayout,
        engine_page_tokens: int,
        dtype: torch.dtype,
        tables: Sequence[int] | None = None,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        self._layers = [layer.view(dtype) if layer.dtype != dtype else layer for layer in layers]
        self.layout, self.dtype = layout, dtype
        self._per_engine_page = engine_page_tokens // layout.page_tokens
        self._tables = list(tables) if tables is not None else [0] * len(layers)
        self._scales = None
        if scales is not None and any(scale != (1.0, 1.0) for scale in scales):
            self._scales = torch.tensor(scales, dtype=torch.float32, device="cpu").T[:, :, None, None, None]

    @neutral_torch_state
    def read(self, page_ids: PageIds, device: torch.device) -> tuple[Tensor, Tensor]:
        """keys, values [L, H, T, D] of whole pages, copies on a device: the engine may use the
        pages again. page_ids: of each block table."""
        index = {table: self._index(page_ids[table]) for table in set(self._tables)}
        gathered = torch.stack([layer[index[table]] for layer, table in zip(self._layers, self._tables, strict=True)])
        keys, values = self.layout.read(gathered.to(device))
        if self._scales is not None:
            scales = self._scales.to(device)
            keys, values = (
                (side.float() * scale).to(torch.bfloat16) for side, scale in zip((keys, values), scales, strict=True)
            )
        self.settle()
        return keys, values

    @neutral_torch_state
    def write(self, page_ids: PageIds, keys: Tensor, values: Tensor) -> None:
        """Fill whole pages; done when this returns."""
        if self._scales is not None:
            scales, most = self._scales.to(keys.device), torch.finfo(self.dtype).max
            keys, values = (
                (side.float() / scale).clamp(-most, most) for side, scale in zip((keys, values), scales, strict=True)
            )
        data = self.layout.write(keys.to(self.dtype), values.to(self.dtype))
        with writing_into(*self._layers):
            for layer, table, pages in zip(self._layers, self._tables, data, strict=True):
                index = self._index(page_ids[table])
                # By bytes: not every device assigns fp8 by index.
                octets = layer.view(torch.uint8)
                octets[index] = pages.to(layer.device).view(torch.uint8).reshape(len(index), *octets.shape[1:])
        self.settle()

    @neutral_torch_state
    def targets(self, page_ids: PageIds, n_tokens: int) -> list[tuple[Target, Target]] | None:
        """Places of the first tokens of these pages in each layer, keys and values; None where
        pages hold them otherwise."""
        if not isinstance(self.layout, PageLayout) or self.layout.packing != SPLIT or self._scales is not None:
            return None
        size = self.layout.page_tokens
        found = []
        for layer, table in zip(self._layers, self._tables, strict=True):
            index = self._index(page_ids[table])
            token = torch.arange(n_tokens, device=index.device)
            page, slot = index[token // size], token % size
            whole = layer.as_strided((layer.untyped_storage().nbytes() // layer.element_size(),), (1,), 0)
            offsets = int(layer.storage_offset()) + page * layer.stride(0) + slot * layer.stride(2)
            beside = self.layout.head_dim * layer.stride(3)
            sides = (Target(whole, offsets + at, layer.stride(1), layer.stride(3)) for at in (0, beside))
            found.append((next(sides), next(sides)))
        return found

    def settle(self) -> None:
        """Wait until what was written is there."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @property
    def coded_dtype(self) -> torch.dtype:
        """Of what `read` gives."""
        return self.dtype if self._scales is None else torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self._layers[0].device

    def bytes(self, n_tokens: int) -> int:
        """What they take in the engine."""
        return self.layout.bytes(n_tokens, self.dtype)

    def _index(self, page_ids: Sequence[int]) -> Tensor:
        ids = torch.tensor(page_ids, dtype=torch.int64, device=self._layers[0].device)
        inner = torch.arange(self._per_engine_page, device=ids.device)
        return (ids[:, None] * self._per_engine_page + inner).flatten()


@dataclass(frozen=True)
class GroupPages:
    """A group of layers of one worker: where its pages are, and how they are coded."""

    group: PageGroup
    pages: EnginePages
    codec: WindowlessCodec


class PageMover:
    """Loads and saves pieces of prompts for one worker.

    Parameters:
        groups: Of layers, all of them.
        store: Where the entries are.
        rank: Global rank of the worker: which keys of a piece are its own.
        threads: Loads at a time, and saves at a time.
    """

    def __init__(self, groups: Sequence[GroupPages], store: Store, rank: int, threads: int = 1) -> None:
        self._entries = Entries(store)
        self.counts = self._entries.counts
        self._tails = Tails(self._entries)
        self._groups = list(groups)
        self._first_owner = rank * len(self._groups)
        # Apart, so that a request that waits for its chunks does not wait for other requests' to be
        # saved.
        self._loads = Tasks[str, int]("the loading of pages", "kvtc-load", threads)
        self._saving = Workers(threads, "the saving of pages", "kvtc-save")
        self._room = threading.BoundedSemaphore(MAX_PENDING_SAVES)
        self._orders: dict[str, LoadOrder] = {}
        self._unfilled: set[int] = set()
        self._failed: set[str] = set()

    def start_load(self, order: LoadOrder) -> None:
        """Begin a load in the background; `take_loaded` says when it has ended."""
        self._orders[order.request_id] = order
        self._loads.submit(order.request_id, partial(self._load, order), 0)

    def take_loaded(self) -> set[str]:
        """The requests whose loads have ended since the last call."""
        ended = self._loads.take_all()
        for request_id, n_filled in ended.items():
            self._note(self._orders.pop(request_id), n_filled)
        return set(ended)

    def take_unfilled(self) -> set[int]:
        """Ids of the pages that the loads which `take_loaded` has given could not fill, since the
        last call; of an engine with one block table."""
        unfilled, self._unfilled = self._unfilled, set()
        return unfilled

    def take_failed(self) -> set[str]:
        """The requests, of those which `take_loaded` has given since the last call, of which
        nothing is loaded: all of them where something is missing and there are several block tables."""
        failed, self._failed = self._failed, set()
        return failed

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
            copies = [self._copy(order, one) for one in self._groups]
            self._saving.submit(self._save, order, copies)
            is_begun = True
        if not is_begun:
            self._room.release()

    def close(self) -> None:
        """Finish the loads and saves that were begun."""
        self._loads.close()
        self._saving.close()

    def _note(self, order: LoadOrder, n_filled: int) -> None:
        """What of an order is not filled, as engines ask for it."""
        if order.start + n_filled >= order.stop:
            return
        if len(order.page_ids) > 1:
            self._failed.add(order.request_id)
        else:
            self._unfilled.update(order.page_ids[0][n_filled // self._groups[0].group.page_tokens :])

    def _load(self, order: LoadOrder) -> int:
        """Fill the pages of an order -> how many leading tokens are there."""
        n_filled = 0
        with (
            concerning(f"request {order.request_id}"),
            self._entries.giving_up("load_errors", "tokens %d .. %d are not loaded", order.start, order.stop - 1),
        ):
            n_filled = min(self._fill(order, number) for number in range(len(self._groups)))
        if len(order.page_ids) > 1 and order.start + n_filled < order.stop:
            n_filled = 0
        self.counts.add(loads=1, tokens_loaded=n_filled, tokens_missed=order.stop - order.start - n_filled)
        return n_filled

    def _fill(self, order: LoadOrder, number: int) -> int:
        """How many tokens of a group are filled, up to the first piece that cannot be had; those that a window does not reach
        count as filled."""
        one, owner = self._groups[number], self._first_owner + number
        first = max(order.start, one.group.first_needed(order.stop))
        pieces = [piece for piece in order.pieces if piece.stop > first]
        reached = first
        for at in range(0, len(pieces), _FETCHED_AT_ONCE):
            fetched = pieces[at : at + _FETCHED_AT_ONCE]
            entries = self._entries.read([piece.keys[owner] for piece in fetched])
            for piece, entry in zip(fetched, entries, strict=True):
                # What the engine has already stays as it is.
                page_ids = self._pages_of(one.group, order, reached, piece.stop)
                decode = partial(self._decode, one, piece, page_ids, reached)
                if not self._entries.decode(piece.keys[owner], entry, decode):
                    left = reached if len(order.page_ids) == 1 else order.start
                    text = "tokens %d .. %d are left to the engine: entry %s is missing, or could not be read as logged before"
                    log_once(logger, "unfilled", text, left, order.stop - 1, piece.keys[owner])
                    return reached - order.start
                reached = piece.stop
        return reached - order.start

    def _pages_of(self, group: PageGroup, order: LoadOrder | SaveOrder, start: int, stop: int) -> dict[int, list[int]]:
        """Of the tokens start .. stop - 1 of an order, by block table."""
        size = group.page_tokens
        origin = (order.start if isinstance(order, LoadOrder) else order.piece.start) // size
        return {
            table: order.page_ids[table][start // size - origin : -(-stop // size) - origin] for table in group.tables
        }

    def _decode(self, one: GroupPages, piece: Piece, page_ids: dict[int, list[int]], start: int, stream: bytes) -> bool:
        """A stream into pages, from the token at position `start` on."""
        first = piece.first_kept(one.group)
        n_tokens, token_ids, targets = piece.stop - first, piece.token_ids[first - piece.start :], None
        # An engine may have dropped the first pages already: they are not needed.
        dropped = max(len(list(takewhile(lambda page: page == NO_PAGE, ids))) for ids in page_ids.values())
        kept = {table: ids[dropped:] for table, ids in page_ids.items()}
        skipped = start - first + dropped * one.group.page_tokens
        if not skipped and one.pages.device == one.codec.device:
            targets = one.pages.targets(kept, n_tokens)
        if targets is not None:
            one.codec.decode_into(stream, first, targets, token_ids)
            one.pages.settle()
        else:
            keys, values = one.codec.decode(stream, first, n_tokens, token_ids)
            one.pages.write(kept, keys[:, :, skipped:], values[:, :, skipped:])
        return True

    def _copy(self, order: SaveOrder, one: GroupPages) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a group that are saved; None where the engine has dropped some of their pages."""
        piece = order.piece
        first = piece.first_kept(one.group)
        page_ids = self._pages_of(one.group, order, first, piece.stop)
        if any(NO_PAGE in ids for ids in page_ids.values()):
            self.counts.add(saves_dropped=1)
            log_once(logger, "gone", "%s is not saved of %s: the engine has dropped its pages", piece, one.group.kind)
            return None
        keys, values = one.pages.read(page_ids, one.codec.device)
        n_tokens = piece.stop - first
        return keys[:, :, :n_tokens], values[:, :, :n_tokens]

    def _save(self, order: SaveOrder, copies: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        try:
            with concerning(f"request {order.request_id}"):
                for number, copied in enumerate(copies):
                    if copied is not None:
                        with self._entries.giving_up("save_errors", "%s is not saved", order.piece):
                            self._save_group(order, number, *copied)
        finally:
            self._room.release()

    def _save_group(self, order: SaveOrder, number: int, keys: Tensor, values: Tensor) -> None:
        piece, one, owner = order.piece, self._groups[number], self._first_owner + number
        node, first = piece.nodes[owner], piece.first_kept(one.group)
        original = one.pages.bytes(piece.stop - first)

        def encode() -> bytes:
            return one.codec.encode(keys, values, first, piece.token_ids[first - piece.start :])

        if piece.is_tail:
            self._tails.save(node, piece.token_ids, encode, original)
        elif self._entries.put(piece.keys[owner], encode, original):
            self._tails.note_chunk(node, order.following, CHUNK_TOKENS)
