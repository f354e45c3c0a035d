"""An L2 adapter for LMCache's server: chunks go as streams of any length into any store of kvtc.

    lmcache server .. --l2-adapter '{"type": "plugin", "module_path": "kvtc.engines.lmcache.l2",
        "class_name": "KvtcL2Adapter", "adapter_params": {"kvtc.calibration": "model.safetensors",
        "kvtc.model": "MODEL", "kvtc.store": "file:///var/cache/kvtc"}}'

LMCache's controllers submit tasks, whose ends they learn from event descriptors; the work is done
on threads (`Tasks`, `Workers`):

    submit_store_task           -> StoredChunks.save          pop_completed_store_tasks
    submit_lookup_and_lock_task -> StoredChunks.which_stored  query_lookup_and_lock_result
    submit_load_task            -> StoredChunks.load          query_load_result

LMCache gives an adapter neither token ids nor positions, but it publishes the hashes of the chunks
of each prompt in order when it looks them up (`learn_starts`). The key of an entry does not say
whether the calibration covers its chunk: the stream does. Written for LMCache 0.5.6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.mp_observability.event import EventType
from lmcache.v1.mp_observability.event_bus import get_event_bus
from lmcache.v1.platform import create_event_notifier
from torch import Tensor

from ...huggingface.model_files import UnknownModel
from ...process.workers import Workers
from ...store import open_store
from ..chunk_coder import ChunkCoder
from ..position_search import KnownStarts
from ..served_model import ServedModel
from ..stored_chunks import StoredChunks
from ..tasks import Tasks
from .objects import tensor_of
from .settings import LmcacheSettings, WorkerCoders, learn_starts, worker_of

logger = init_logger(f"lmcache.{__name__}")


class KvtcL2Adapter(L2AdapterInterface):
    """The adapter. Its store keeps its own byte budget, so LMCache evicts nothing here.

    Parameters:
        adapter_params: The options of docs/guides/lmcache.md.
        l1_memory_desc: LMCache's host memory, which is not used.

    Raises:
        KvtcError, FileNotFoundError: Whatever cannot work is refused when the server starts.
    """

    def __init__(self, adapter_params: dict[str, Any], l1_memory_desc: Any = None) -> None:  # noqa: ARG002
        super().__init__()
        self._settings = LmcacheSettings.from_config(adapter_params)
        model = ServedModel.of(self._settings, None)
        coders = WorkerCoders(ChunkCoder, self._settings, model)
        self._chunks = StoredChunks(open_store(self._settings.store), coders.of, model.scope)
        self._chunks.write_metrics(self._settings.metrics_path(), engine="lmcache")
        self._starts = KnownStarts()
        get_event_bus().subscribe(EventType.MP_LOOKUP, partial(learn_starts, self._starts))
        self._sizes: dict[Any, int] = {}
        self._numbers = itertools.count()
        self._events = [create_event_notifier() for _ in range(3)]
        self._stores, self._lookups, self._loads = (
            Tasks[int, Any](f"the {name} of LMCache", f"kvtc-{name}", notify=event.notify)
            for name, event in zip(("stores", "lookups", "loads"), self._events, strict=True)
        )
        # Apart: a request waits for a load, nothing waits for a store.
        self._storing = Workers(self._settings.threads, "the storing of chunks", "kvtc-store")
        self._loading = Workers(self._settings.threads, "the loading of chunks", "kvtc-load")

    def get_store_event_fd(self) -> int:
        return int(self._events[0].fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._events[1].fileno())

    def get_load_event_fd(self) -> int:
        return int(self._events[2].fileno())

    def submit_store_task(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        return self._submit(self._stores, partial(self._store_chunks, keys, objects), L2StoreResult(False, 0))

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        return self._stores.take_all()

    def submit_lookup_and_lock_task(self, keys: Sequence[Any], group_layout_descs: Any) -> int:  # noqa: ARG002
        return self._submit(self._lookups, partial(self._look_up, keys), Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        return self._lookups.take(task_id)

    def submit_unlock(self, keys: Sequence[Any]) -> None:
        """A store of kvtc holds nothing back for readers: what is gone when it is loaded is a
        miss."""

    def submit_load_task(self, keys: Sequence[Any], objects: Sequence[Any]) -> int:
        return self._submit(self._loads, partial(self._load_chunks, keys, objects), Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Any:
        return self._loads.take(task_id)

    def delete(self, keys: Sequence[Any]) -> None:
        for key in keys:
            if (name := self._key(key)) is not None:
                self._chunks.delete(name)
        self._notify_keys_deleted(list(keys), [self._sizes.pop(key, 0) for key in keys])

    def report_status(self) -> dict[str, Any]:
        return {"is_healthy": True, "type": "kvtc", **self._chunks.counts.read()}

    def metrics(self) -> str:
        """What was counted here and in the store, in Prometheus' text format."""
        return self._chunks.metrics(engine="lmcache")

    def close(self) -> None:
        for tasks in (self._stores, self._lookups, self._loads):
            tasks.close()
        for workers in (self._storing, self._loading):
            workers.close()
        logger.info("kvtc, l2: %s", dict(self._chunks.counts.read()))
        self._chunks.close()
        for event in self._events:
            event.close()

    def _submit(self, tasks: Tasks[int, Any], work: Callable[[], Any], otherwise: Any) -> int:
        number = next(self._numbers)
        tasks.submit(number, work, otherwise)
        return number

    def _store_chunks(self, keys: Sequence[Any], objects: Sequence[Any]) -> Any:
        def save(key: Any, item: Any) -> int | None:
            start, name = self._starts.get(key.chunk_hash), self._key(key)
            return (
                None if name is None else self._chunks.save(worker_of(key.kv_rank), name, self._data(key, item), start)
            )

        sizes = self._storing.map(save, keys, objects)
        stored = [(key, size) for key, size in zip(keys, sizes, strict=True) if size]
        self._sizes.update(stored)
        if stored:
            self._notify_keys_stored([key for key, _ in stored], [size for _, size in stored])
        return L2StoreResult(None not in sizes, sum(size for _, size in stored))

    def _look_up(self, keys: Sequence[Any]) -> Any:
        # Chunks behind a missing one count too: windows and states need the last ones alone, and LMCache adds what it holds
        # itself. It makes of all groups and workers the prefix that each of them can serve.
        found = Bitmap(len(keys))
        names = [self._key(key) for key in keys]
        known = [index for index, name in enumerate(names) if name is not None]
        is_stored = self._chunks.which_stored([name for name in names if name is not None])
        for index in compress(known, is_stored):
            found.set(index)
        return found

    def _load_chunks(self, keys: Sequence[Any], objects: Sequence[Any]) -> Any:
        def load(key: Any, item: Any) -> bool:
            name = self._key(key)
            return name is not None and self._chunks.load(worker_of(key.kv_rank), name, self._data(key, item))

        loaded = Bitmap(len(keys))
        done = self._loading.map(load, keys, objects)
        for index in (index for index, is_loaded in enumerate(done) if is_loaded):
            loaded.set(index)
        self._notify_keys_accessed([key for key, is_loaded in zip(keys, done, strict=True) if is_loaded])
        return loaded

    def _data(self, key: Any, item: Any) -> Tensor:
        return tensor_of(item, is_calibrated=self._settings.is_calibrated(key.object_group_id))

    def _key(self, key: Any) -> str | None:
        """The store's key; None, counted, for a chunk of another model."""
        try:
            model = self._settings.model_in_key(key.model_name)
        except UnknownModel as error:
            self._chunks.entries.count_error("other_models", error, "chunk %s is left alone", key.chunk_hash.hex())
            return None
        return self._chunks.key(
            worker_of(key.kv_rank),
            chunk=key.chunk_hash,
            kv_rank=key.kv_rank,
            group=key.object_group_id,
            salt=key.cache_salt,
            model=model,
            **self._settings.key_parts,
        )
