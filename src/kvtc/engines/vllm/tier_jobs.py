"""The work of a secondary tier: chunks in an engine's host memory into a store as streams, and back.

Knows no engine. Host memory is rows of bytes, one a chunk, in which each worker has its part. The engine's scheduler hands in jobs
and polls for their ends; the coding is done on threads of their own. What fails is a miss
(`entries`) and reported, and the engine computes it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...entries import Entries
from ...errors import PROGRAM_ENDS, InvalidArgument
from ...key_digest import digest
from ...process.workers import Workers
from ...store import Store
from ..page_codec import CHUNK_TOKENS, PageCodec
from ..page_layout import PageLayout


@dataclass(frozen=True)
class RowPart:
    """Where in a row a worker's part lies, how it is laid out, and with what it is coded."""

    offset: int
    layout: PageLayout
    dtype: torch.dtype
    codec: PageCodec


@dataclass(frozen=True)
class TierChunk:
    """One chunk of a job. name: the engine's. row: in host memory. start: its first token, None if the engine does not say.

    token_ids [n]: of its tokens, where known.
    """

    name: bytes
    row: int
    start: int | None
    token_ids: npt.NDArray[np.int64] | None


@dataclass(frozen=True)
class JobEnd:
    """done: names of the chunks for which it worked out. n_bytes: of streams."""

    job_id: int
    success: bool
    done: tuple[bytes, ...]
    seconds: float
    n_bytes: int


_Work = Callable[[str, RowPart, TierChunk, int], int | None]


class TierJobs:
    """rows: [chunks, bytes] uint8, shared with the engine. parts: of all workers. scope: whose entries. n_tokens: of a chunk."""

    def __init__(
        self,
        rows: npt.NDArray[np.uint8],
        parts: Sequence[RowPart],
        store: Store,
        scope: bytes,
        n_tokens: int,
        threads: int = 1,
    ) -> None:
        if n_tokens % CHUNK_TOKENS and CHUNK_TOKENS % n_tokens:
            raise InvalidArgument(
                f"the engine's chunks hold {n_tokens} tokens; expected a multiple or a divisor of {CHUNK_TOKENS}"
            )
        for part in parts:
            end = part.offset + part.layout.bytes(n_tokens, part.dtype)
            if end > rows.shape[1]:
                raise InvalidArgument(f"a row of host memory has {rows.shape[1]} bytes; {part.layout} ends at {end}")
        self.entries = Entries(store)
        self.counts = self.entries.counts
        self._rows, self._parts, self._n_tokens = rows, list(parts), n_tokens
        self._scope = scope
        # Apart: a request waits for a load, nothing waits for a store.
        self._loading = Workers(threads, "the loading of chunks", "kvtc-load")
        self._storing = Workers(threads, "the storing of chunks", "kvtc-store")
        self._ends: queue.SimpleQueue[JobEnd] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._n_pending = 0

    def serves(self, has_token_ids: bool) -> bool:
        """Whether chunks with, or without, token ids can be coded in the profile that is asked for."""
        return all(part.codec.serves(has_token_ids) for part in self._parts)

    def keys(self, name: bytes, has_token_ids: bool) -> list[str]:
        """The store's keys of a chunk, one a worker. Streams made with token ids stand apart: without ids nobody can read them.

        Engines name a chunk by the hash of its last block, so that chunks of another length can have the same name.
        """
        return [f"page/{self._key(part.codec, name, has_token_ids).hex()}" for part in self._parts]

    def _key(self, codec: PageCodec, name: bytes, has_token_ids: bool) -> bytes:
        return digest(
            "page",
            scope=self._scope,
            calibration=codec.calibration.fingerprint,
            settings=codec.codec(has_token_ids).settings_digest,
            n_tokens=self._n_tokens,
            name=name,
        )

    def store(self, job_id: int, chunks: Sequence[TierChunk]) -> None:
        """Begin to code rows of host memory; they must stay as they are until the job has ended."""
        self._submit(self._storing, job_id, chunks, self._store_part, "save_errors")

    def load(self, job_id: int, chunks: Sequence[TierChunk]) -> None:
        """Begin to fill rows of host memory."""
        self._submit(self._loading, job_id, chunks, self._load_part, "load_errors")

    def take_ends(self) -> list[JobEnd]:
        """Jobs that have ended since the last call."""
        ends = []
        while not self._ends.empty():
            ends.append(self._ends.get())
        return ends

    @property
    def is_busy(self) -> bool:
        """Whether jobs are under way or ended but not taken."""
        return self._n_pending > 0 or not self._ends.empty()

    def drain(self) -> None:
        """Wait until no job is under way."""
        with self._idle:
            self._idle.wait_for(lambda: self._n_pending == 0)

    def close(self) -> None:
        """Finish what was begun."""
        self._loading.close()
        self._storing.close()

    def _submit(self, pool: Workers, job_id: int, chunks: Sequence[TierChunk], work: _Work, errors: str) -> None:
        pool.check_open()
        with self._idle:
            self._n_pending += 1
        pool.submit(self._run, job_id, chunks, work, errors)

    def _run(self, job_id: int, chunks: Sequence[TierChunk], work: _Work, errors: str) -> None:
        begin, n_bytes, done = time.monotonic(), 0, []
        try:
            for chunk in chunks:
                sizes = self._of_parts(chunk, work, errors)
                if None not in sizes:
                    done.append(chunk.name)
                n_bytes += sum(size or 0 for size in sizes)
        finally:  # the engine waits for the end of each job, whatever went wrong
            end = JobEnd(job_id, len(done) == len(chunks), tuple(done), time.monotonic() - begin, n_bytes)
            with self._idle:
                self._ends.put(end)
                self._n_pending -= 1
                self._idle.notify_all()

    def _of_parts(self, chunk: TierChunk, work: _Work, errors: str) -> list[int | None]:
        """Bytes of each worker's entry of a chunk, 0 for one that was stored already; up to the first None, which failed."""
        sizes: list[int | None] = []
        try:
            if chunk.start is None:
                raise InvalidArgument("the engine does not say where the chunk stands")
            keys = self.keys(chunk.name, chunk.token_ids is not None)
            for key, part in zip(keys, self._parts, strict=True):
                sizes.append(work(key, part, chunk, chunk.start))
                if sizes[-1] is None:
                    break
        except PROGRAM_ENDS:
            raise
        except BaseException as error:  # noqa: BLE001
            self.entries.count_error(errors, error, "chunk %s is given up", chunk.name.hex())
            sizes.append(None)
        return sizes

    def _store_part(self, key: str, part: RowPart, chunk: TierChunk, start: int) -> int | None:
        def encode() -> bytes:
            keys, values = part.layout.read(self._window(chunk, part))
            return part.codec.encode(keys, values, start, chunk.token_ids)

        return self.entries.save(key, encode, part.layout.bytes(self._n_tokens, part.dtype))

    def _load_part(self, key: str, part: RowPart, chunk: TierChunk, start: int) -> int | None:
        (stream,) = self.entries.load([key])
        return self.entries.decode(key, stream, partial(self._decode, part, chunk, start))

    def _decode(self, part: RowPart, chunk: TierChunk, start: int, stream: bytes) -> int:
        """A stream into its part of a row; its bytes."""
        keys, values = part.codec.decode(stream, start, self._n_tokens, chunk.token_ids)
        data = part.layout.write(keys.to(part.dtype), values.to(part.dtype))
        self._window(chunk, part).copy_(data.flatten())
        return len(stream)

    def _window(self, chunk: TierChunk, part: RowPart) -> Tensor:
        """The part's numbers in a row, shared memory."""
        end = part.offset + part.layout.bytes(self._n_tokens, part.dtype)
        return torch.from_numpy(self._rows[chunk.row, part.offset : end]).view(part.dtype)
