"""What kvtc's ways into LMCache have in common: their options, and a worker's coder. Knows LMCache's words, imports none of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ...huggingface.model_files import UnknownModel
from ..chunk_coder import ChunkCoder, ChunkOptions, FixedChunkCoder
from ..served_model import ServedModel
from ..settings import PREFIX, EngineSettings

Coder = TypeVar("Coder", ChunkCoder, FixedChunkCoder)


class LmcacheOptions:
    """The keys that begin with `kvtc.` (docs/guides/lmcache.md), checked. Raises `InvalidArgument`."""

    def __init__(self, config: Mapping[str, Any], *, needs_store: bool = True) -> None:
        self._chunk, others = ChunkOptions.split(config)
        self.settings = EngineSettings.from_config(others, needs_store=needs_store)

    def served_model(self, name: str | None = None) -> ServedModel:
        """The model whose chunks come; name: as LMCache tells it at start. Raises what `ServedModel.of` raises."""
        return ServedModel.of(self.settings, name)

    def model_part(self, name: str) -> str | None:
        """What a chunk's key says of its model besides the `ServedModel`; name: as LMCache's key has it.

        None where `kvtc.model` names that model; without it, what LMCache calls the model. Raises `UnknownModel` for a chunk of
        another model than `kvtc.model`.
        """
        told = self.settings.model
        if told is None:
            return name
        if name.rstrip("/") != told.partition("@")[0].rstrip("/"):
            raise UnknownModel(f"a chunk of the model {name}; {PREFIX}model is {told}")
        return None

    def coder(self, kind: type[Coder], model: ServedModel, worker: int, spacing: int | None = None) -> Coder:
        """The coder of a worker's chunks. spacing: as of `ChunkCoder`.

        Raises what `EngineSettings.read_calibration`, `ServedModel.checked` and the coder raise.
        """
        calibration, name = self.settings.read_calibration(worker)
        return kind(
            model.checked(calibration, name),
            self.settings,
            lambda shape: self._chunk.lmcache_layout(shape, calibration),
            spacing,
            self._chunk.max_tokens,
        )


def worker_of(kv_rank: int) -> int:
    """The number of a worker in the `kv_rank` of LMCache's keys: world size, worker, and the same of a node, 8 bits each."""
    return kv_rank >> 16 & 0xFF
