"""The names of LMCache that kvtc's adapters import, with LMCache 0.5.6's signatures and as little behind them as works.

`make test` runs the adapters on this; `make test-engines` runs them in LMCache itself.
"""

from __future__ import annotations

import enum
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .fake_modules import fake_modules

ADAPTERS = tuple(f"kvtc.engines.lmcache.{name}" for name in ("l2", "serde", "remote", "server"))


class Bitmap:
    def __init__(self, size: int) -> None:
        self._bits = [False] * size

    def set(self, index: int) -> None:
        self._bits[index] = True

    def test(self, index: int) -> bool:
        return self._bits[index]

    def bits(self) -> list[bool]:
        return list(self._bits)


@dataclass(frozen=True)
class L2StoreResult:
    success: bool
    n_bytes: int

    def is_successful(self) -> bool:
        return self.success

    def bytes_transferred(self) -> int:
        return self.n_bytes


@dataclass(frozen=True)
class ObjectKey:
    chunk_hash: bytes
    model_name: str = "tiny"
    kv_rank: int = (1 << 24) | (1 << 8)
    object_group_id: int = 0
    cache_salt: str = ""


@dataclass(frozen=True)
class MemoryLayoutDesc:
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]


@dataclass
class MemoryObjMetadata:
    cached_positions: torch.Tensor | None = None
    shapes: list[torch.Size] | None = None
    dtypes: list[torch.dtype] | None = None


class MemoryObj:
    """Memory that holds a tensor, or several behind one another."""

    def __init__(self, *tensors: torch.Tensor, cached_positions: torch.Tensor | None = None) -> None:
        shapes, dtypes = [tensor.shape for tensor in tensors], [tensor.dtype for tensor in tensors]
        self.meta, self.n_references = MemoryObjMetadata(cached_positions, shapes, dtypes), 1
        # The memory behind the end is LMCache's alignment.
        parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        self.raw_tensor = torch.cat([*parts, torch.zeros(64, dtype=torch.uint8)])

    @property
    def tensor(self) -> torch.Tensor:
        (shape, *_), (dtype, *_) = self.meta.shapes, self.meta.dtypes
        return self.raw_tensor[: self.get_size()].view(dtype).view(shape)

    def get_tensor(self, index: int) -> torch.Tensor:
        sizes = [
            shape.numel() * dtype.itemsize for shape, dtype in zip(self.meta.shapes, self.meta.dtypes, strict=True)
        ]
        begin = sum(sizes[:index])
        part = self.raw_tensor[begin : begin + sizes[index]]
        return part.view(self.meta.dtypes[index]).view(self.meta.shapes[index])

    def get_size(self) -> int:
        return sum(
            shape.numel() * dtype.itemsize for shape, dtype in zip(self.meta.shapes, self.meta.dtypes, strict=True)
        )

    def ref_count_down(self) -> None:
        self.n_references -= 1


class EventType(enum.Enum):
    MP_LOOKUP = "mp.lookup"


class EventBus:
    def __init__(self) -> None:
        self.callbacks: dict[EventType, list[Any]] = {}

    def subscribe(self, event_type: EventType, callback: Any) -> None:
        self.callbacks.setdefault(event_type, []).append(callback)

    def publish_lookup(self, hashes: list[bytes], chunk_size: int) -> None:
        for callback in self.callbacks.get(EventType.MP_LOOKUP, []):
            callback(SimpleNamespace(metadata={"chunk_hashes": hashes, "chunk_size": chunk_size}))


class Notifier:
    n_made = 0

    def __init__(self) -> None:
        Notifier.n_made += 1
        self._fd, self.n_signals = Notifier.n_made, 0

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        self.n_signals += 1

    def close(self) -> None:
        self._fd = -1


class L2AdapterInterface(ABC):
    def __init__(self, max_capacity_bytes: int = 0) -> None:  # noqa: ARG002
        self.events: list[tuple[str, Any, Any]] = []

    def _notify_keys_stored(self, keys, sizes):
        self.events.append(("stored", keys, sizes))

    def _notify_keys_accessed(self, keys):
        self.events.append(("accessed", keys, None))

    def _notify_keys_deleted(self, keys, sizes):
        self.events.append(("deleted", keys, sizes))

    @abstractmethod
    def get_store_event_fd(self) -> int: ...

    @abstractmethod
    def get_lookup_and_lock_event_fd(self) -> int: ...

    @abstractmethod
    def get_load_event_fd(self) -> int: ...

    @abstractmethod
    def submit_store_task(self, keys, objects) -> int: ...

    @abstractmethod
    def pop_completed_store_tasks(self): ...

    @abstractmethod
    def submit_lookup_and_lock_task(self, keys, group_layout_descs) -> int: ...

    @abstractmethod
    def query_lookup_and_lock_result(self, task_id): ...

    @abstractmethod
    def submit_unlock(self, keys) -> None: ...

    @abstractmethod
    def submit_load_task(self, keys, objects) -> int: ...

    @abstractmethod
    def query_load_result(self, task_id): ...

    @abstractmethod
    def close(self) -> None: ...


class Serializer(ABC):
    @abstractmethod
    def serialize(self, src, dst, key) -> int: ...

    @abstractmethod
    def estimate_serialized_size(self, layout_desc) -> int: ...


class Deserializer(ABC):
    @abstractmethod
    def deserialize(self, src, dst, key) -> None: ...


@dataclass
class AsyncSerdeProcessor:
    serializer: Any
    deserializer: Any
    max_workers: int = 1


class RemoteConnector(ABC):
    def __init__(self, config: Any, metadata: Any) -> None:  # noqa: ARG002
        self.meta_shapes, self.meta_dtypes, self.meta_fmt = metadata.shapes, metadata.dtypes, "KV_2LTD"
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(metadata.shapes, metadata.dtypes, strict=True)]
        self.single_token_size = sum(sizes) // metadata.chunk_size

    @abstractmethod
    async def exists(self, key): ...

    @abstractmethod
    def exists_sync(self, key): ...

    @abstractmethod
    async def get(self, key): ...

    @abstractmethod
    async def put(self, key, memory_obj): ...

    @abstractmethod
    async def list(self): ...

    @abstractmethod
    async def close(self): ...


@contextmanager
def fake_lmcache() -> Iterator[SimpleNamespace]:
    """LMCache's modules for as long as the block runs -> bus: its events; serdes: factories by name."""
    bus, serdes = EventBus(), {}
    base = "lmcache.v1"
    modules = {
        "lmcache.lmcache_native": {"Bitmap": Bitmap},
        "lmcache.logging": {"init_logger": logging.getLogger},
        "lmcache.cli.main": {"main": lambda: 0},
        f"{base}.distributed.internal_api": {"L2StoreResult": L2StoreResult},
        f"{base}.distributed.l2_adapters.base": {"L2AdapterInterface": L2AdapterInterface},
        f"{base}.distributed.serde": {
            "AsyncSerdeProcessor": AsyncSerdeProcessor,
            "Serializer": Serializer,
            "Deserializer": Deserializer,
            "register_serde_factory": serdes.__setitem__,
        },
        f"{base}.mp_observability.event": {"EventType": EventType},
        f"{base}.mp_observability.event_bus": {"get_event_bus": lambda: bus},
        f"{base}.platform": {"create_event_notifier": Notifier},
        f"{base}.storage_backend.connector.base_connector": {"RemoteConnector": RemoteConnector},
    }
    with fake_modules(modules, ADAPTERS):
        yield SimpleNamespace(bus=bus, serdes=serdes)
