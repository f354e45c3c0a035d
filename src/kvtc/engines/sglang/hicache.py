"""A storage backend for SGLang's HiCache: pages leave host memory as streams, into any store of
kvtc.

    --enable-hierarchical-cache --page-size 64 --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
        '{"backend_name": "kvtc", "module_path": "kvtc.engines.sglang.hicache", "class_name": "KvtcHiCache",
          "interface_v1": 1, "hicache_storage_pass_prefix_keys": true,
          "kvtc.calibration": "model.safetensors", "kvtc.store": "file:///var/cache/kvtc"}'

SGLang calls a backend from threads of its own, so a call returns when its work is done:

    register_mem_pool_host                              the layout of pages, and the coder
    batch_set_v1, batch_get_v1, batch_exists            pages of host memory -> StoredChunks.save, read and decode, n_stored
    batch_set, batch_get, set, get, exists              the same with flat pages, where `interface_v1` is not set
    batch_set_v2, batch_get_v2, batch_exists_v2         the same for models with several pools

SGLang says how many pages come before those of a call if `hicache_storage_pass_prefix_keys` is set;
if it does not, the position of each page is searched. Written for SGLang 0.5.23.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult
from torch import Tensor

from ...process.workers import Workers
from ...store import open_store
from ..chunk_coder import ChunkCoder, ChunkSettings
from ..stored_chunks import StoredChunks
from .facts import host_layout, refuse_other_caches, served_model


class KvtcHiCache(HiCacheStorage):
    """The backend.

    Parameters:
        storage_config: SGLang's configuration, whose `extra_config` has the options of
            docs/guides/sglang.md.
        kwargs: SGLang's, not used.

    Raises:
        KvtcError, FileNotFoundError: Whatever cannot work is refused here or when SGLang registers
            its host memory.
    """

    def __init__(self, storage_config: Any, kwargs: Any) -> None:  # noqa: ARG002
        refuse_other_caches(storage_config)
        self._config = storage_config
        self._settings = ChunkSettings.from_config(storage_config.extra_config or {})
        self._model = served_model(self._settings, storage_config.model_name)
        self._pages = StoredChunks(open_store(self._settings.store), lambda _: self._coder, self._model.scope)
        ranks = {"tp_rank": str(storage_config.tp_rank), "pp_rank": str(storage_config.pp_rank)}
        metrics_file = self._settings.metrics_path(storage_config.tp_rank, storage_config.pp_rank)
        self._pages.write_metrics(metrics_file, engine="sglang", **ranks)
        self._threads = Workers(self._settings.threads, "the backend of SGLang", "kvtc-page")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        calibration = self._model.checked(*self._settings.read_calibration(self._config.tp_rank, self._config.pp_rank))
        layout = host_layout(mem_pool_host, calibration.geometry)
        self._page_values, self._page_tokens = layout.page_values, mem_pool_host.page_size
        self._format = getattr(mem_pool_host, "storage_format_tag", None)
        self._coder = ChunkCoder(calibration, self._settings, lambda _: layout)

    def batch_set_v1(self, keys: Sequence[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:
        first = self._first_position(extra_info)
        pages = self._page_indices(keys, host_indices)

        def save(index: int) -> bool:
            start = None if first is None else first + index * self._page_tokens
            return self._save(keys[index], self.mem_pool_host.get_data_page(pages[index]), start)

        return self._threads.map(save, range(len(keys)))

    def batch_get_v1(self, keys: Sequence[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:  # noqa: ARG002
        pages = self._page_indices(keys, host_indices)
        found = self.batch_get(keys)
        for index, page in zip(pages, found, strict=True):
            if page is not None:
                self.mem_pool_host.set_from_flat_data_page(index, page)
        return [page is not None for page in found]

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:  # noqa: ARG002
        return self._pages.n_stored([self._key(key) for key in keys])

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # Without `interface_v1`, SGLang hands over flat pages, and never where they stand.

    def batch_get(
        self,
        keys: Sequence[str],
        target_locations: Any = None,  # noqa: ARG002
        target_sizes: Any = None,  # noqa: ARG002
    ) -> list[Tensor | None]:
        names = [self._key(key) for key in keys]
        streams = self._pages.read(names)
        return self._threads.map(self._decoded, names, streams)

    def batch_set(
        self,
        keys: Sequence[str],
        values: Any = None,
        target_locations: Any = None,  # noqa: ARG002
        target_sizes: Any = None,  # noqa: ARG002
    ) -> bool:
        return all(self._threads.map(lambda key, page: self._save(key, page, None), keys, values))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Tensor | None:  # noqa: ARG002
        return self.batch_get([key])[0]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:  # noqa: ARG002
        return self._save(key, value, None)

    # Of models with several pools: only keys and values are kept, so a prefix that needs other
    # pools too is not found.

    def batch_exists_v2(self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        others = [transfer.name for transfer in pool_transfers or [] if transfer.name != PoolName.KV]
        if others:
            return PoolTransferResult(0, dict.fromkeys(others, 0))
        return PoolTransferResult(self.batch_exists(keys, extra_info), {})

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: self._transfer(self.batch_get_v1, transfer, extra_info) for transfer in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: self._transfer(self.batch_set_v1, transfer, extra_info) for transfer in transfers}

    def close(self) -> None:
        """Finish what was begun and let go of the store."""
        self._threads.close()
        self._pages.close()

    @property
    def counts(self) -> Counter[str]:
        """What was saved, loaded and missed so far."""
        return self._pages.counts.read()

    def metrics(self) -> str:
        """What was counted here and in the store, in Prometheus' text format."""
        return self._pages.metrics(engine="sglang")

    def _transfer(self, call: Any, transfer: Any, extra_info: Any) -> list[bool]:
        keys = transfer.keys or []
        if transfer.name != PoolName.KV or transfer.host_indices is None:
            return [False] * len(keys)
        done: list[bool] = call(keys, transfer.host_indices, extra_info)
        return done

    def _save(self, key: str, page: Tensor, start: int | None) -> bool:
        return self._pages.save(self._config.tp_rank, self._key(key), page, start) is not None

    def _decoded(self, name: str, stream: bytes | None) -> Tensor | None:
        """A flat page; None for a miss."""
        return self._pages.decode(self._config.tp_rank, name, stream, self._page_of)

    def _page_of(self, coder: ChunkCoder, stream: bytes) -> Tensor:
        page = torch.empty(self._page_values, dtype=self.mem_pool_host.dtype)
        coder.decode(stream, page)
        return page

    def _first_position(self, extra_info: Any) -> int | None:
        """Where the first page of a call stands, if SGLang says."""
        prefix = None if extra_info is None else extra_info.prefix_keys
        return None if prefix is None else len(prefix) * self._page_tokens

    def _page_indices(self, keys: Sequence[str], host_indices: Tensor) -> list[int]:
        """The slot of each page's first token in host memory."""
        return [int(host_indices[index * self._page_tokens]) for index in range(len(keys))]

    def _key(self, key: str) -> str:
        config = self._config
        return self._pages.key(
            config.tp_rank,
            page=key,
            page_tokens=self._page_tokens,
            format=self._format,
            ranks=[config.tp_size, config.pp_rank, config.pp_size],
        )
