"""A serde for LMCache's server: any L2 adapter of LMCache (fs, resp, s3, ..) then stores streams,
all of one size.

    python -m kvtc.engines.lmcache.server server .. --l2-adapter '{"type": "fs", "base_path": "/var/cache/lmcache",
        "serde": {"type": "kvtc", "kvtc.calibration": "model.safetensors", "kvtc.model": "MODEL", "kvtc.ratio": 8}}'

Importing this module registers the type `kvtc`. LMCache sizes a load by what
`estimate_serialized_size` says before it knows the chunk, and most adapters refuse any other
length, so each stream is padded to exactly that. LMCache names the entries, so each begins with 16
bytes that say whose it is: one of another model is a miss. Written for LMCache 0.5.6.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer, register_serde_factory
from lmcache.v1.mp_observability.event import EventType
from lmcache.v1.mp_observability.event_bus import get_event_bus

from ...errors import CalibrationMismatch, UnsupportedLayout
from ...key_digest import digest
from ...process.log_limits import log_once
from ..chunk_coder import FixedChunkCoder
from ..position_search import KnownStarts
from ..served_model import ServedModel
from .settings import LmcacheSettings, WorkerCoders, learn_starts, worker_of

logger = init_logger(f"lmcache.{__name__}")

SERDE_TYPE = "kvtc"
OWNER_BYTES = 16


def make_serde(config: dict[str, Any]) -> AsyncSerdeProcessor:
    """The serde of an adapter.

    Parameters:
        config: The adapter's options "serde": those of docs/guides/lmcache.md.

    Raises:
        KvtcError, FileNotFoundError: Whatever cannot work is refused when the server starts.
    """
    chunks = _Chunks(LmcacheSettings.from_config(config, needs_store=False))
    get_event_bus().subscribe(EventType.MP_LOOKUP, partial(learn_starts, chunks.starts))
    return AsyncSerdeProcessor(KvtcSerializer(chunks), KvtcDeserializer(chunks), max_workers=chunks.settings.threads)


class _Chunks:
    """What serializer and deserializer know of chunks: whose they are, how they are coded, and
    where they stand."""

    def __init__(self, settings: LmcacheSettings) -> None:
        self.settings, self.starts = settings, KnownStarts()
        self._model = ServedModel.of(settings, None)
        self.coders = WorkerCoders(FixedChunkCoder, settings, self._model)

    def coder(self, key: Any) -> FixedChunkCoder:
        return self.coders.of(worker_of(key.kv_rank))

    def owner(self, key: Any) -> bytes:
        """Whose a chunk is, in `OWNER_BYTES` bytes. Raises `UnknownModel` for one of another model
        than `kvtc.model`."""
        model = self.settings.model_in_key(key.model_name)
        return digest("owner", scope=self._model.scope, model=model)[:OWNER_BYTES]


class KvtcSerializer(Serializer):
    """Chunks to bytes. Whatever is raised here LMCache logs, and it does not store the chunk."""

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = chunks

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """Exact. Workers of one server hold the same number of heads, so the first stands for
        all."""
        raw = sum(
            shape.numel() * dtype.itemsize for shape, dtype in zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
        )
        try:
            if len(layout_desc.shapes) != 1:
                raise UnsupportedLayout(f"a chunk of {len(layout_desc.shapes)} tensors; kvtc reads one")
            return OWNER_BYTES + self._chunks.coders.of(0).size(layout_desc.shapes[0], layout_desc.dtypes[0])
        except UnsupportedLayout as error:
            # LMCache expects no error here; `serialize` raises the same, where LMCache deals with
            # it.
            log_once(logger, "layout", "kvtc: chunks are not stored: %s", error)
            return int(raw)

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        owner, coder = self._chunks.owner(key), self._chunks.coder(key)
        stream = owner + coder.encode(src.tensor, self._chunks.starts.get(key.chunk_hash))
        dst.tensor.flatten()[: len(stream)].copy_(torch.frombuffer(bytearray(stream), dtype=torch.uint8))
        return len(stream)


class KvtcDeserializer(Deserializer):
    """Bytes to chunks. Whatever is raised here LMCache logs, and the chunks of the load are
    misses."""

    def __init__(self, chunks: _Chunks) -> None:
        self._chunks = chunks

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        owner, coder = self._chunks.owner(key), self._chunks.coder(key)
        data = src.tensor.flatten().view(torch.uint8).numpy().tobytes()
        if data[:OWNER_BYTES] != owner:
            raise CalibrationMismatch("the entry is of another model or namespace than this serde's")
        coder.decode(data[OWNER_BYTES:], dst.tensor)


register_serde_factory(SERDE_TYPE, make_serde)
