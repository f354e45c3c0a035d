"""What kvtc's ways into LMCache have in common: their options, and a worker's coder. Knows LMCache's words, imports none of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .chunk_coder import ChunkCoder, ChunkOptions, FixedChunkCoder
from .engine_settings import EngineSettings

Coder = TypeVar("Coder", ChunkCoder, FixedChunkCoder)


class LmcacheOptions:
    """The keys that begin with `kvtc.` (docs/guides/lmcache.md), checked. Raises `InvalidArgument`."""

    def __init__(self, config: Mapping[str, Any], *, needs_store: bool = True) -> None:
        self._chunk, others = ChunkOptions.split(config)
        self.settings = EngineSettings.from_config(others, needs_store=needs_store)

    def coder(self, kind: type[Coder], worker: int, spacing: int | None = None) -> Coder:
        """The coder of a worker's chunks. spacing: as of `ChunkCoder`.

        Raises what `EngineSettings.read_calibration` and the coder raise.
        """
        calibration, _ = self.settings.read_calibration(worker)
        return kind(
            calibration,
            self.settings,
            lambda shape: self._chunk.lmcache_layout(shape, calibration),
            spacing,
            self._chunk.max_tokens,
        )


def worker_of(kv_rank: int) -> int:
    """The number of a worker in the `kv_rank` of LMCache's keys: world size, worker, and the same of a node, 8 bits each."""
    return kv_rank >> 16 & 0xFF
