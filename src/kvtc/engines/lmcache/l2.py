"""An L2 adapter for LMCache's server: chunks go as streams of any length into any store of kvtc.

    lmcache server .. --l2-adapter '{"type": "plugin", "module_path": "kvtc.engines.lmcache.l2",
        "class_name": "KvtcL2Adapter", "adapter_params": {"kvtc.calibration": "model.safetensors",
        "kvtc.model": "MODEL", "kvtc.store": "file:///var/cache/kvtc"}}'

LMCache's controllers submit tasks and poll event descriptors; the work is done on threads. LMCache tells an adapter neither token
ids nor positions, but publishes the hashes of each prompt's chunks in order when it looks them up. Written for LMCache 0.5.6.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.mp_observability.event import EventType
from lmcache.v1.mp_observability.event_bus import get_event_bus
from lmcache.v1.platform import create_event_notifier

from ...huggingface.model_files import UnknownModel
from ...process.workers import Workers
from ...store import open_store
from ..chunk_coder import ChunkCoder
from ..position_search import KnownStarts
from ..stored_chunks import StoredChunks
from .options import LmcacheOptions, worker_of
from .task_board import TaskBoard

logger = init_logger(f"lmcache.{__name__}")


class KvtcL2Adapter(L2AdapterInterface):
    """Options: docs/guides/lmcache.md. The store keeps its own byte budget, so LMCache evicts nothing here."""

    def __init__(self, adapter_params: dict[str, Any], l1_memory_desc: Any = None) -> None:  # noqa: ARG002
        super().__init__()
        self._options = options = LmcacheOptions(adapter_params)
        model = options.served_model()
        options.coder(ChunkCoder, model, 0)  # what cannot work ends the server's start
        self._store = open_store(options.settings.store)
        self._chunks = StoredChunks(self._store, lambda worker: options.coder(ChunkCoder, model, worker), model.scope)
        self._starts = KnownStarts()
        get_event_bus().subscribe(EventType.MP_LOOKUP, self._learn_starts)
        self._sizes: dict[Any, int] = {}
        self._events = [create_event_notifier() for _ in range(3)]
        numbers, threads = itertools.count(), options.settings.threads
        self._stores = TaskBoard[Any]("kvtc-stores", self._events[0].notify, numbers)
        self._lookups = TaskBoard[Any]("kvtc-lookups", self._events[1].notify, numbers)
        self._loads = TaskBoard[Any]("kvtc-loads", self._events[2].notify, numbers)
        # Apart: a request waits for a load, nothing waits for a store.
        self._storing = Workers(threads, "the storing of chunks", "kvtc-store")
        self._loading = Workers(threads, "the loading of chunks", "kvtc-load")

    def get_store_event_fd(self) -> int:
        return int(self._events[0].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._events[1].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._events[2].fileno())

    def submit_store_task(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        return self._stores.submit(lambda: self._store_chunks(keys, objects), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        return self._stores.take_all()

    def submit_lookup_and_lock_task(self, keys: Sequence[Any], group_layout_descs: Any) -> int:  # noqa: ARG002
        return self._lookups.submit(lambda: self._look_up(keys), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: Sequence[Any]) -> None:
        """A store of kvtc holds nothing back for readers: what is gone when it is loaded is a miss."""

    def submit_load_task(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        return self._loads.submit(lambda: self._load_chunks(keys, objects), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Any:
        return self._loads.take(task_id)

    def delete(self, keys: Sequence[Any]) -> None:
        for key in keys:
            if (name := self._key(key)) is not None:
                self._chunks.delete(name)
        self._notify_keys_deleted(list(keys), [self._sizes.pop(key, 0) for key in keys])

    def report_status(self) -> dict[str, Any]:
        return {"is_healthy": True, "type": "kvtc", **self._chunks.counts.read()}

    def close(self) -> None:
        for board in (self._stores, self._lookups, self._loads):
            board.close()
        for pool in (self._storing, self._loading):
            pool.close()
        logger.info("kvtc, l2: %s", dict(self._chunks.counts.read()))
        self._chunks.close()
        for event in self._events:
            event.close()

    def _store_chunks(self, keys: Sequence[Any], objects: Sequence[Any]) -> Any:
        def save(key: Any, item: Any) -> int | None:
            start, name = self._starts.get(key.chunk_hash), self._key(key)
            return None if name is None else self._chunks.save(worker_of(key.kv_rank), name, item.tensor, start)

        sizes = self._storing.map(save, keys, objects)
        stored = [(key, size) for key, size in zip(keys, sizes, strict=True) if size]
        self._sizes.update(stored)
        if stored:
            self._notify_keys_stored([key for key, _ in stored], [size for _, size in stored])
        return L2StoreResult(None not in sizes, sum(size for _, size in stored))

    def _look_up(self, keys: Sequence[Any]) -> Any:
        found = Bitmap(len(keys))
        rows: dict[tuple[int, int], list[int]] = {}
        for index, key in enumerate(keys):
            rows.setdefault((key.kv_rank, key.object_group_id), []).append(index)
        for row in rows.values():
            # In the order of the text: what follows the first that is missing is of no use.
            names = [name for index in row if (name := self._key(keys[index])) is not None]
            n_stored = self._chunks.n_stored(names)
            for index in row[:n_stored]:
                found.set(index)
        return found

    def _load_chunks(self, keys: Sequence[Any], objects: Sequence[Any]) -> Any:
        def load(key: Any, item: Any) -> bool:
            name = self._key(key)
            return name is not None and self._chunks.load(worker_of(key.kv_rank), name, item.tensor)

        loaded = Bitmap(len(keys))
        done = self._loading.map(load, keys, objects)
        for index in (index for index, is_loaded in enumerate(done) if is_loaded):
            loaded.set(index)
        self._notify_keys_accessed([key for key, is_loaded in zip(keys, done, strict=True) if is_loaded])
        return loaded

    def _learn_starts(self, event: Any) -> None:
        self._starts.learn([bytes(name) for name in event.metadata["chunk_hashes"]], event.metadata["chunk_size"])

    def _key(self, key: Any) -> str | None:
        """The store's key; None, counted, for a chunk of another model."""
        try:
            model = self._options.model_part(key.model_name)
        except UnknownModel as error:
            logger.warning("kvtc: %s", error)
            self._chunks.counts.add(other_models=1)
            return None
        return self._chunks.key(
            worker_of(key.kv_rank),
            chunk=key.chunk_hash,
            kv_rank=key.kv_rank,
            group=key.object_group_id,
            salt=key.cache_salt,
            model=model,
        )
