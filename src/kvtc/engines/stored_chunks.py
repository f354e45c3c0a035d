"""Chunks under the names that an engine gives them, kept as streams in a store. Whatever fails is a
miss (`Entries`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from ..entries import Entries
from ..key_digest import Part, digest
from ..metrics import prometheus_text
from ..store import Store
from .chunk_coder import ChunkCoder
from .metrics_file import MetricsFile

T = TypeVar("T")
W = TypeVar("W", int, str)


class StoredChunks(Generic[W]):
    """Saves chunks of an engine's workers, and loads them. Safe to share between threads.

    Parameters:
        store: Where the streams are kept; `close` closes it.
        coder_of: Gives the coder of a worker from its number, or of a pool of pages from its name.
        scope: Whose entries these are, as of `entry_scope`.
    """

    def __init__(self, store: Store, coder_of: Callable[[W], ChunkCoder], scope: bytes) -> None:
        self.entries = Entries(store)
        self.counts = self.entries.counts
        self._coder_of: Callable[[W], ChunkCoder] = coder_of
        self._scope = scope
        self._metrics = MetricsFile(None, str)

    def write_metrics(self, path: str | None, **labels: str) -> None:
        """Write `metrics` into a file again and again, until `close`.

        Parameters:
            path: Of the file; None: it is not written.
            labels: Of all metrics.

        Raises:
            InvalidArgument: The file cannot be written.
        """
        self._metrics = MetricsFile(path, lambda: self.metrics(**labels))

    def metrics(self, **labels: str) -> str:
        """What was counted here and in the store, as of `prometheus_text`."""
        return prometheus_text([(labels, self.counts.read()), (labels, self.entries.store.statistics())])

    def key(self, worker: W, **name: Part) -> str:
        """The store's key of a chunk of a worker. name: all that the engine calls it and that it
        depends on, by name."""
        found = digest(
            "chunk of an engine", scope=self._scope, rank=worker, coder=self._coder_of(worker).name, name=name
        )
        return f"chunk/{found.hex()}"

    def save(self, worker: W, key: str, data: Tensor, start: int | None) -> int | None:
        """Store a chunk.

        Parameters:
            worker: Number of the worker whose chunk it is, or name of its pool.
            key: As `key` gives it.
            data: The chunk, of any shape that the worker's coder knows.
            start: Position of its first token; None: it is searched.

        Returns:
            Bytes of the stream; 0 if the key has an entry already; None if it cannot be coded or
            stored.
        """
        original = data.numel() * data.dtype.itemsize
        n_bytes = self.entries.save(key, lambda: self._coder_of(worker).encode(data, start), original)
        if n_bytes and start is None and self._coder_of(worker).needs_start(data):
            self.counts.add(starts_searched=1)
        return n_bytes

    def load(self, worker: W, key: str, data: Tensor) -> bool:
        """Fill a chunk from its stream. Returns whether there is one that is sound."""
        (stream,) = self.read([key])
        return self.decode(worker, key, stream, lambda coder, stream: _filled(coder, stream, data)) is not None

    def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """The streams under these keys; None for each that is missing."""
        return self.entries.read(keys)

    def decode(self, worker: W, key: str, stream: bytes | None, decode: Callable[[ChunkCoder, bytes], T]) -> T | None:
        """What `decode` makes of a stream that was read, with the worker's coder; None for a
        miss."""
        return self.entries.decode(key, stream, lambda stream: decode(self._coder_of(worker), stream))

    def n_stored(self, keys: Sequence[str]) -> int:
        """How many leading keys have entries."""
        return self.entries.count_leading(keys)

    def which_stored(self, keys: Sequence[str]) -> list[bool]:
        """Which keys have entries."""
        return self.entries.present(keys)

    def delete(self, key: str) -> None:
        """Delete a chunk."""
        self.entries.forget(key)

    def close(self) -> None:
        """Close the file of metrics and the store."""
        self._metrics.close()
        self.entries.store.close()


def _filled(coder: ChunkCoder, stream: bytes, data: Tensor) -> Tensor:
    coder.decode(stream, data)
    return data
