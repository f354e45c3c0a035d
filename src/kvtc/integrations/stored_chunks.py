"""Chunks that an engine names, kept as streams in a store: what cannot be saved or loaded is a miss, logged and counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import KvtcError, StoreError
from ..key_digest import Part, digest
from ..store import Store
from .chunk_coder import ChunkCoder
from .counts import Counts

logger = logging.getLogger(__name__)


class StoredChunks:
    """coder_of: number of a worker -> its coder, made once. scope: whose entries, as of `entry_scope`.

    Safe to share between threads.
    """

    def __init__(self, store: Store, coder_of: Callable[[int], ChunkCoder], scope: bytes) -> None:
        self.counts = Counts()
        self._store, self._coder_of, self._scope = store, coder_of, scope
        self._coders: dict[int, ChunkCoder] = {}
        self._lock = threading.Lock()

    def key(self, rank: int, **name: Part) -> str:
        """The store's key of a chunk of a worker. name: what the engine calls it and all that it depends on besides, by name."""
        found = digest("chunk of an engine", scope=self._scope, rank=rank, coder=self._coder(rank).name, name=name)
        return f"chunk/{found.hex()}"

    def save(self, rank: int, key: str, data: Tensor, start: int | None) -> int | None:
        """Bytes of the stream that was stored, 0 if it was there already; None: it could not be.

        data: of any shape that the worker's coder knows. start: position of the first token, None if unknown.
        """
        try:
            if self._store.contains(key):
                self.counts.add(chunks_shared=1)
                return 0
            stream = self._coder(rank).encode(data, start)
            self._store.put(key, stream)
        except KvtcError as error:
            logger.warning("kvtc: chunk %s is not stored: %s", key, error)
            self.counts.add(save_errors=1)
            return None
        original = data.numel() * data.dtype.itemsize
        self.counts.add(chunks_saved=1, bytes_saved=len(stream), original_bytes=original, starts_searched=start is None)
        return len(stream)

    def load(self, rank: int, key: str, data: Tensor) -> bool:
        """Fill a chunk from its stream; whether it was there and sound."""
        (stream,) = self.read([key])
        return stream is not None and self.fill(rank, key, stream, data)

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """Streams, None for what is not there."""
        try:
            streams = self._store.get_many(keys)
        except StoreError as error:
            logger.warning("kvtc: %d chunks are not loaded: %s", len(keys), error)
            self.counts.add(store_errors=1)
            streams = [None] * len(keys)
        self.counts.add(misses=sum(stream is None for stream in streams))
        return streams

    def fill(self, rank: int, key: str, stream: bytes, data: Tensor) -> bool:
        """Fill a chunk from its stream. An entry that cannot be decoded is deleted, to be stored anew."""
        try:
            self._coder(rank).decode(stream, data)
        except KvtcError as error:
            logger.warning("kvtc: chunk %s is deleted: %s", key, error)
            self.counts.add(misses=1, entries_unusable=1)
            self.delete(key)
            return False
        self.counts.add(chunks_loaded=1, bytes_read=len(stream))
        return True

    def n_stored(self, keys: Sequence[str]) -> int:
        """How many leading chunks are there."""
        self.counts.add(lookups=len(keys))
        try:
            return self._store.contains_prefix(keys)
        except StoreError as error:
            logger.warning("kvtc: the store does not say what it has: %s", error)
            self.counts.add(store_errors=1)
            return 0

    def delete(self, key: str) -> None:
        """Forget a chunk."""
        try:
            self._store.delete(key)
        except StoreError as error:
            logger.warning("kvtc: chunk %s is not deleted: %s", key, error)
            self.counts.add(store_errors=1)

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()
        logger.info("kvtc: %s", self.counts.read())

    def _coder(self, rank: int) -> ChunkCoder:
        with self._lock:
            if rank not in self._coders:
                self._coders[rank] = self._coder_of(rank)
            return self._coders[rank]
