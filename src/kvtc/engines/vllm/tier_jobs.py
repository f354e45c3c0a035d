"""The work of a secondary tier: chunks in an engine's host memory into a store as streams, and
back.

Imports no engine. Host memory is rows of bytes, one for each chunk, in which each worker has its
shard. The engine's scheduler hands in jobs and polls for their ends; the coding is done on threads
of their own. Whatever fails is a miss (`Entries`) and reported, and the engine computes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...entries import Entries
from ...errors import InvalidArgument
from ...key_digest import digest
from ...process.log_limits import concerning
from ...store import Store
from ..opaque_layout import OpaqueLayout
from ..page_layout import PageLayout
from ..tasks import Tasks
from ..windowless_codec import CHUNK_TOKENS, WindowlessCodec


@dataclass(frozen=True)
class RowShard:
    """A part of a row of host memory that is coded by itself: a worker's shard, or the whole row.

    Parameters:
        offset: Its first byte in the row.
        layout: Of its pages.
        dtype: Of its numbers.
        codec: Of the worker's layers and heads.
        name: Of what the layout does not say, for the keys of entries; default b"".
    """

    offset: int
    layout: PageLayout | OpaqueLayout
    dtype: torch.dtype
    codec: WindowlessCodec
    name: bytes = b""

    @property
    def is_opaque(self) -> bool:
        """Whether it is not known what it holds; then it does not matter where it stands."""
        return isinstance(self.layout, OpaqueLayout)

    @property
    def n_tokens(self) -> int | None:
        """Tokens that it counts as where it is not known what it holds; None: as a chunk has."""
        return self.layout.page_tokens if isinstance(self.layout, OpaqueLayout) else None


@dataclass(frozen=True)
class TierChunk:
    """One chunk of a job.

    Parameters:
        name: The engine's name of it.
        row: Its row of host memory.
        start: Position of its first token; None: the engine does not say.
    """

    name: bytes
    row: int
    start: int | None


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Parameters:
        job_id: The engine's number of it.
        success: Whether all of its chunks were stored or loaded.
        done: Names of the chunks that were.
        seconds: That it took.
        n_bytes: Of the streams that were stored or loaded.
    """

    job_id: int
    success: bool
    done: tuple[bytes, ...]
    seconds: float
    n_bytes: int


_Work = Callable[[str, RowShard, TierChunk, int], int | None]


class TierJobs:
    """Codes rows of an engine's host memory into a store, and back.

    Parameters:
        rows: [chunks, bytes] uint8, memory that is shared with the engine.
        shards: Where the shards of all workers lie in a row.
        store: Where the streams are kept.
        scope: Whose entries these are, as of `entry_scope`.
        n_tokens: Tokens of a chunk of the engine, a multiple or a divisor of kvtc's.
        threads: Jobs that load at a time, and jobs that store at a time.

    Raises:
        InvalidArgument: The chunks or the shards do not fit.
    """

    def __init__(
        self,
        rows: npt.NDArray[np.uint8],
        shards: Sequence[RowShard],
        store: Store,
        scope: bytes,
        n_tokens: int,
        threads: int = 1,
    ) -> None:
        if n_tokens % CHUNK_TOKENS and CHUNK_TOKENS % n_tokens:
            raise InvalidArgument(
                f"the engine's chunks hold {n_tokens} tokens; expected a multiple or a divisor of {CHUNK_TOKENS}"
            )
        self._rows, self._shards, self._n_tokens = rows, list(shards), n_tokens
        for shard in shards:
            end = shard.offset + self._bytes(shard)
            if end > rows.shape[1]:
                raise InvalidArgument(f"a row of host memory has {rows.shape[1]} bytes; {shard.layout} ends at {end}")
        self.entries = Entries(store)
        self.counts = self.entries.counts
        self._scope = scope
        # Apart: a request waits for a load, nothing waits for a store.
        self._loads = Tasks[int, JobEnd]("the loading of chunks", "kvtc-load", threads)
        self._stores = Tasks[int, JobEnd]("the storing of chunks", "kvtc-store", threads)

    def keys(self, name: bytes) -> list[str]:
        """The store's keys of a chunk, one a worker.

        Engines name a chunk by the hash of its last block, so that chunks of another length can
        have the same name.
        """
        return [f"page/{self._key(shard, name).hex()}" for shard in self._shards]

    def _key(self, shard: RowShard, name: bytes) -> bytes:
        calibration, settings = shard.codec.names
        return digest(
            "page",
            scope=self._scope,
            of=shard.name,
            calibration=calibration,
            settings=settings,
            n_tokens=self._n_tokens,
            name=name,
        )

    def store(self, job_id: int, chunks: Sequence[TierChunk], request_id: str = "") -> None:
        """Begin to code rows of host memory; they must stay as they are until the job has ended.

        Parameters:
            job_id, chunks: Of the engine.
            request_id: Of the request that the log names.
        """
        self._submit(self._stores, job_id, chunks, self._store_shard, "save_errors", request_id)

    def load(self, job_id: int, chunks: Sequence[TierChunk], request_id: str = "") -> None:
        """Begin to fill rows of host memory; parameters as of `store`."""
        self._submit(self._loads, job_id, chunks, self._load_shard, "load_errors", request_id)

    def take_ends(self) -> list[JobEnd]:
        """Jobs that have ended since the last call."""
        return [*self._loads.take_all().values(), *self._stores.take_all().values()]

    @property
    def is_busy(self) -> bool:
        """Whether jobs are under way or ended but not taken."""
        return self._loads.is_busy or self._stores.is_busy

    def drain(self) -> None:
        """Wait until no job is under way."""
        self._loads.drain()
        self._stores.drain()

    def close(self) -> None:
        """Finish what was begun."""
        self._loads.close()
        self._stores.close()

    def _submit(
        self,
        tasks: Tasks[int, JobEnd],
        job_id: int,
        chunks: Sequence[TierChunk],
        work: _Work,
        errors: str,
        request_id: str,
    ) -> None:
        run = partial(self._run, job_id, chunks, work, errors, request_id)
        tasks.submit(job_id, run, JobEnd(job_id, False, (), 0.0, 0))

    def _run(self, job_id: int, chunks: Sequence[TierChunk], work: _Work, errors: str, request_id: str) -> JobEnd:
        begin, n_bytes, done = time.monotonic(), 0, []
        for chunk in chunks:
            with concerning(f"request {request_id}"):
                sizes = self._of_shards(chunk, work, errors)
            if None not in sizes:
                done.append(chunk.name)
            n_bytes += sum(size or 0 for size in sizes)
        return JobEnd(job_id, len(done) == len(chunks), tuple(done), time.monotonic() - begin, n_bytes)

    def _of_shards(self, chunk: TierChunk, work: _Work, errors: str) -> list[int | None]:
        """Bytes of each worker's entry of a chunk, 0 for one that was stored already; up to the
        first None, which failed."""
        sizes: list[int | None] = []
        with self.entries.giving_up(errors, "chunk %s is given up", chunk.name.hex()):
            for key, shard in zip(self.keys(chunk.name), self._shards, strict=True):
                start = 0 if shard.is_opaque else chunk.start
                if start is None:
                    raise InvalidArgument("the engine does not say where the chunk stands")
                sizes.append(work(key, shard, chunk, start))
                if sizes[-1] is None:
                    break
            return sizes
        return [*sizes, None]

    def _store_shard(self, key: str, shard: RowShard, chunk: TierChunk, start: int) -> int | None:
        def encode() -> bytes:
            keys, values = shard.layout.read(self._window(chunk, shard))
            return shard.codec.encode(keys, values, start)

        return self.entries.save(key, encode, self._bytes(shard))

    def _load_shard(self, key: str, shard: RowShard, chunk: TierChunk, start: int) -> int | None:
        (stream,) = self.entries.read([key])
        return self.entries.decode(key, stream, partial(self._decode, shard, chunk, start))

    def _decode(self, shard: RowShard, chunk: TierChunk, start: int, stream: bytes) -> int:
        """A stream into its shard of a row; its bytes."""
        keys, values = shard.codec.decode(stream, start, shard.n_tokens or self._n_tokens)
        data = shard.layout.write(keys.to(shard.dtype), values.to(shard.dtype))
        self._window(chunk, shard).copy_(data.flatten())
        return len(stream)

    def _window(self, chunk: TierChunk, shard: RowShard) -> Tensor:
        """The shard's numbers in a row, shared memory."""
        end = shard.offset + self._bytes(shard)
        return torch.from_numpy(self._rows[chunk.row, shard.offset : end]).view(shard.dtype)

    def _bytes(self, shard: RowShard) -> int:
        return shard.layout.bytes(shard.n_tokens or self._n_tokens, shard.dtype)
