"""A serde for LMCache's server: any L2 adapter of LMCache (fs, resp, s3, ..) then stores streams, all of one size.

    python -m kvtc.engines.lmcache.server server .. --l2-adapter '{"type": "fs", "base_path": "/var/cache/lmcache",
        "serde": {"type": "kvtc", "kvtc.calibration": "model.safetensors", "kvtc.model": "MODEL", "kvtc.ratio": 8}}'

Importing this module registers the type `kvtc`. LMCache sizes a load by what `estimate_serialized_size` says before it knows the
chunk, and most adapters refuse any other length, so each stream is padded to exactly that. LMCache names the entries, so
each begins with 16 bytes that say whose it is: one of another model is a miss. Written for LMCache 0.5.6.
"""

from __future__ import annotations

from typing import Any

import torch
from lmcache.logging import init_logger
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, Serializer, register_serde_factory
from lmcache.v1.mp_observability.event import EventType
from lmcache.v1.mp_observability.event_bus import get_event_bus

from ...errors import CalibrationMismatch, UnsupportedLayout
from ...key_digest import digest
from ...process.locks import ForkSafeLock
from ..chunk_coder import FixedChunkCoder
from ..position_search import KnownStarts
from .options import LmcacheOptions, worker_of

logger = init_logger(f"lmcache.{__name__}")

SERDE_TYPE = "kvtc"
OWNER_BYTES = 16


class _Coders:
    """Of all workers, and what is known of where chunks stand."""

    def __init__(self, options: LmcacheOptions) -> None:
        self._options, self._lock = options, ForkSafeLock()
        self._model = options.served_model()
        self._coders: dict[int, FixedChunkCoder] = {}
        self.starts = KnownStarts()

    def of(self, worker: int) -> FixedChunkCoder:
        with self._lock:
            if worker not in self._coders:
                self._coders[worker] = self._options.coder(FixedChunkCoder, self._model, worker)
            return self._coders[worker]

    def owner(self, key: Any) -> bytes:
        """Whose a chunk is, in `OWNER_BYTES` bytes. Raises `UnknownModel` for one of another model than `kvtc.model`."""
        model = self._options.model_part(key.model_name)
        return digest("owner", scope=self._model.scope, model=model)[:OWNER_BYTES]

    def learn_starts(self, event: Any) -> None:
        self.starts.learn([bytes(name) for name in event.metadata["chunk_hashes"]], event.metadata["chunk_size"])


class KvtcSerializer(Serializer):
    """What raises here is logged by LMCache, and the chunk is not stored."""

    def __init__(self, coders: _Coders) -> None:
        self._coders = coders

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """Exact. Workers of one server hold the same number of heads, so the first stands for all."""
        raw = sum(
            shape.numel() * dtype.itemsize for shape, dtype in zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
        )
        try:
            if len(layout_desc.shapes) != 1:
                raise UnsupportedLayout(f"a chunk of {len(layout_desc.shapes)} tensors; kvtc reads one")
            return OWNER_BYTES + self._coders.of(0).size(layout_desc.shapes[0], layout_desc.dtypes[0])
        except UnsupportedLayout as error:
            # LMCache does not expect an error here; `serialize` raises it where it is dealt with.
            logger.warning("kvtc: chunks are not stored: %s", error)
            return int(raw)

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        owner, coder = self._coders.owner(key), self._coders.of(worker_of(key.kv_rank))
        stream = owner + coder.encode(src.tensor, self._coders.starts.get(key.chunk_hash))
        dst.tensor.flatten()[: len(stream)].copy_(torch.frombuffer(bytearray(stream), dtype=torch.uint8))
        return len(stream)


class KvtcDeserializer(Deserializer):
    """What raises here is logged by LMCache, and the chunks of the load are misses."""

    def __init__(self, coders: _Coders) -> None:
        self._coders = coders

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        owner, coder = self._coders.owner(key), self._coders.of(worker_of(key.kv_rank))
        data = src.tensor.flatten().view(torch.uint8).numpy().tobytes()
        if data[:OWNER_BYTES] != owner:
            raise CalibrationMismatch("the entry is of another model or namespace than this serde's")
        coder.decode(data[OWNER_BYTES:], dst.tensor)


def make_serde(config: dict[str, Any]) -> Any:
    """The serde of an adapter's "serde" options. Raises `InvalidArgument` and what reading the calibration raises."""
    options = LmcacheOptions(config, needs_store=False)
    coders = _Coders(options)
    coders.of(0)  # what cannot work ends the server's start
    get_event_bus().subscribe(EventType.MP_LOOKUP, coders.learn_starts)
    return AsyncSerdeProcessor(KvtcSerializer(coders), KvtcDeserializer(coders), max_workers=options.settings.threads)


register_serde_factory(SERDE_TYPE, make_serde)
