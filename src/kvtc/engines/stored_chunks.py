"""Chunks that an engine names, kept as streams in a store: what cannot be saved or loaded is a miss (`entries`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from ..entries import Entries
from ..key_digest import Part, digest
from ..process.locks import ForkSafeLock
from ..store import Store
from .chunk_coder import ChunkCoder

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StoredChunks:
    """coder_of: number of a worker -> its coder, made once. scope: whose entries, as of `entry_scope`.

    Safe to share between threads.
    """

    def __init__(self, store: Store, coder_of: Callable[[int], ChunkCoder], scope: bytes) -> None:
        self._entries = Entries(store)
        self.counts = self._entries.counts
        self._coder_of, self._scope = coder_of, scope
        self._coders: dict[int, ChunkCoder] = {}
        self._lock = ForkSafeLock()

    def key(self, rank: int, **name: Part) -> str:
        """The store's key of a chunk of a worker. name: what the engine calls it and all that it depends on besides, by name."""
        found = digest("chunk of an engine", scope=self._scope, rank=rank, coder=self._coder(rank).name, name=name)
        return f"chunk/{found.hex()}"

    def save(self, rank: int, key: str, data: Tensor, start: int | None) -> int | None:
        """Bytes of the stream that was stored, 0 if it was there already; None: it could not be.

        data: of any shape that the worker's coder knows. start: position of the first token, None if unknown.
        """
        original = data.numel() * data.dtype.itemsize
        n_bytes = self._entries.save(key, lambda: self._coder(rank).encode(data, start), original)
        if n_bytes and start is None:
            self.counts.add(starts_searched=1)
        return n_bytes

    def load(self, rank: int, key: str, data: Tensor) -> bool:
        """Fill a chunk from its stream; whether it was there and sound."""
        (stream,) = self.read([key])
        return self.decode(rank, key, stream, lambda coder, stream: _filled(coder, stream, data)) is not None

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """Streams, None for what is not there."""
        return self._entries.load(keys)

    def decode(self, rank: int, key: str, stream: bytes | None, decode: Callable[[ChunkCoder, bytes], T]) -> T | None:
        """What `decode` makes of a stream that was read, with the worker's coder; None for a miss."""
        return self._entries.decode(key, stream, lambda stream: decode(self._coder(rank), stream))

    def n_stored(self, keys: Sequence[str]) -> int:
        """How many leading chunks are there."""
        return self._entries.count_leading(keys)

    def delete(self, key: str) -> None:
        """Forget a chunk."""
        self._entries.forget(key)

    def close(self) -> None:
        """Let go of the store."""
        self._entries.store.close()
        logger.info("kvtc: %s", dict(self.counts.read()))

    def _coder(self, rank: int) -> ChunkCoder:
        with self._lock:
            if rank not in self._coders:
                self._coders[rank] = self._coder_of(rank)
            return self._coders[rank]


def _filled(coder: ChunkCoder, stream: bytes, data: Tensor) -> Tensor:
    coder.decode(stream, data)
    return data
