"""A remote storage plugin for LMCache inside the engine's process: chunks go as streams into any
store of kvtc.

    remote_storage_plugins: ["kvtc"]
    extra_config:
      remote_storage_plugin.kvtc.module_path: kvtc.engines.lmcache.remote
      remote_storage_plugin.kvtc.class_name: KvtcRemoteConnector
      kvtc.calibration: model.safetensors
      kvtc.store: file:///var/cache/kvtc

LMCache awaits `exists`, `get` and `put` of one chunk at a time; they are those of `StoredChunks`.
It seldom says at which position of its text a chunk stands; if not, the position is searched.
Written for LMCache 0.5.6.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from ...errors import GeometryMismatch, UnsupportedLayout
from ...store import open_store
from ..chunk_coder import ChunkCoder, restored_bytes
from ..served_model import ServedModel
from ..stored_chunks import StoredChunks
from .objects import tensor_of
from .settings import LmcacheSettings, WorkerCoders

logger = init_logger(f"lmcache.{__name__}")


class KvtcRemoteConnector(RemoteConnector):
    """The plugin. LMCache awaits its calls in one event loop, so each works in a thread.

    Parameters:
        loop: LMCache's event loop, which is not used.
        local_cpu_backend: Gives memory for chunks, and says which model and worker this is.
        config: LMCache's configuration, whose `extra_config` has the options of
            docs/guides/lmcache.md.

    Raises:
        KvtcError, FileNotFoundError: Whatever cannot work is refused when LMCache starts.
    """

    def __init__(self, loop: Any, local_cpu_backend: Any, config: Any) -> None:  # noqa: ARG002
        super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
        if local_cpu_backend.config.use_layerwise:
            raise UnsupportedLayout(
                "LMCache's use_layerwise is set: its chunks are of one layer; expected those of all layers"
            )
        self._memory, metadata = local_cpu_backend, local_cpu_backend.metadata
        settings = LmcacheSettings.from_config(config.extra_config or {})
        model = ServedModel.of(settings, metadata.model_name)
        self._chunk_tokens = int(metadata.chunk_size)
        coders = WorkerCoders(ChunkCoder, settings, model, metadata.worker_id, self._chunk_tokens, self.meta_dtypes)
        self._key_parts = settings.key_parts
        self._store = open_store(settings.store)
        self._chunks = StoredChunks(self._store, coders.of, model.scope)
        self._worker = str(metadata.worker_id)
        self._chunks.write_metrics(settings.metrics_path(metadata.worker_id), engine="lmcache", worker=self._worker)

    async def exists(self, key: Any) -> bool:
        return await asyncio.to_thread(self.exists_sync, key)

    def exists_sync(self, key: Any) -> bool:
        return self._chunks.n_stored([self._key(key)]) == 1

    async def put(self, key: Any, memory_obj: Any) -> None:
        positions = memory_obj.meta.cached_positions
        start = None if positions is None else int(positions[0])
        await asyncio.to_thread(self._chunks.save, key.worker_id, self._key(key), tensor_of(memory_obj), start)

    async def get(self, key: Any) -> Any:
        return await asyncio.to_thread(self._get, key)

    async def list(self) -> list[str]:
        return list(self._store.keys())

    def metrics(self) -> str:
        """What was counted here and in the store, in Prometheus' text format."""
        return self._chunks.metrics(engine="lmcache", worker=self._worker)

    async def close(self) -> None:
        logger.info("kvtc, remote: %s", dict(self._chunks.counts.read()))
        self._chunks.close()

    def remove_sync(self, key: Any) -> bool:
        self._chunks.delete(self._key(key))
        return True

    def _get(self, key: Any) -> Any:
        """A filled memory object; None for a miss."""
        name = self._key(key)
        (stream,) = self._chunks.read([name])
        return self._chunks.decode(key.worker_id, name, stream, self._filled)

    def _filled(self, coder: ChunkCoder, stream: bytes) -> Any:
        # The last chunk of a text is shorter than the others.
        n_tokens = restored_bytes(stream) // self.single_token_size
        if n_tokens > self._chunk_tokens:
            raise GeometryMismatch(
                f"the stream holds {n_tokens} tokens of a chunk; expected at most {self._chunk_tokens}"
            )
        shapes = [torch.Size([*full[:2], n_tokens, *full[3:]]) for full in self.meta_shapes]
        memory = self._memory.allocate(shapes, self.meta_dtypes, self.meta_fmt)
        if memory is None:
            raise MemoryError(f"LMCache has no memory for a chunk of shapes {[tuple(shape) for shape in shapes]}")
        try:
            coder.decode(stream, tensor_of(memory))
        except BaseException:
            memory.ref_count_down()
            raise
        return memory

    def _key(self, key: Any) -> str:
        """Of LMCache's key all but the model's name, which can be a path."""
        return self._chunks.key(
            key.worker_id,
            chunk=key.chunk_hash,
            chunk_tokens=self._chunk_tokens,
            world_size=key.world_size,
            dtype=str(key.dtype),
            layer=getattr(key, "layer_id", None),
            tags=[[str(name), str(value)] for name, value in key.tags or ()],
            **self._key_parts,
        )
