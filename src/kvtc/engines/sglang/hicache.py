"""A storage backend for SGLang's HiCache: pages leave host memory as streams, into any store of
kvtc.

    --enable-hierarchical-cache --page-size 64 --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
        '{"backend_name": "kvtc", "module_path": "kvtc.engines.sglang.hicache", "class_name": "KvtcHiCache",
          "interface_v1": 1, "hicache_storage_pass_prefix_keys": true,
          "kvtc.calibration": "model.safetensors", "kvtc.store": "file:///var/cache/kvtc"}'

SGLang calls a backend from threads of its own, so a call returns when its work is done:

    register_mem_pool_host, register_mem_host_pool_v2   the pools of host memory, and the coder of each
    batch_set_v1, batch_get_v1, batch_exists            pages of keys and values -> StoredChunks.save, read and decode, n_stored
    batch_set, batch_get, set, get, exists              the same with flat pages, where `interface_v1` is not set
    batch_set_v2, batch_get_v2, batch_exists_v2         pages of all pools of a model that has several

SGLang says how many pages come before those of a call if `hicache_storage_pass_prefix_keys` is set;
if it does not, the position of each page that is coded is searched. Written for SGLang 0.5.23.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolHitPolicy, PoolName, PoolTransferResult
from torch import Tensor

from ...key_digest import Part
from ...process.workers import Workers
from ...store import open_store
from ..chunk_coder import ChunkCoder, ChunkSettings
from ..stored_chunks import StoredChunks
from .facts import is_replicated, page_form, served_model
from .host_pages import HostPages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pool:
    """A pool of host memory. key: what keys of entries say of it."""

    pages: HostPages
    key: dict[str, Part]


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
        self._config = storage_config
        self._settings = ChunkSettings.from_config(storage_config.extra_config or {})
        self._model = served_model(self._settings, storage_config.model_name)
        ranks = storage_config.tp_rank, storage_config.pp_rank
        self._calibration = None
        if not self._settings.lossless:
            self._calibration = self._model.checked(*self._settings.read_calibration(*ranks))
        self._pools: dict[str, _Pool] = {}
        self._coders: dict[str, ChunkCoder] = {}
        self._pages = StoredChunks[str](open_store(self._settings.store), self._coders.__getitem__, self._model.scope)
        labels = {"tp_rank": str(ranks[0]), "pp_rank": str(ranks[1])}
        self._pages.write_metrics(self._settings.metrics_path(*ranks), engine="sglang", **labels)
        self._threads = Workers(self._settings.threads, "the backend of SGLang", "kvtc-page")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(PoolName.KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(host_pool_name, host_pool)

    # Keys and values.

    def batch_set_v1(self, keys: Sequence[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:
        return self._set(PoolName.KV, keys, host_indices, extra_info)

    def batch_get_v1(self, keys: Sequence[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:  # noqa: ARG002
        return self._get(PoolName.KV, keys, host_indices)

    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:  # noqa: ARG002
        return self._n_leading(PoolName.KV, keys)

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # Without `interface_v1`, SGLang hands over flat pages, and never where they stand.

    def batch_get(
        self,
        keys: Sequence[str],
        target_locations: Any = None,  # noqa: ARG002
        target_sizes: Any = None,  # noqa: ARG002
    ) -> list[Tensor | None]:
        return self._found(PoolName.KV, keys)

    def batch_set(
        self,
        keys: Sequence[str],
        values: Any = None,
        target_locations: Any = None,  # noqa: ARG002
        target_sizes: Any = None,  # noqa: ARG002
    ) -> bool:
        return all(self._threads.map(self.set, keys, values))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Tensor | None:  # noqa: ARG002
        return self.batch_get([key])[0]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:  # noqa: ARG002
        return self._save(PoolName.KV, key, value, None)

    # Of models with several pools.

    def batch_exists_v2(self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """Which prefixes can be restored in every pool. A pool of states or windows has pages only where some request ended, so
        what can be restored is a set of lengths: those that all pools share, not the shortest of their longest."""
        n_pages = self.batch_exists(keys, extra_info)
        hits = {PoolName.KV: n_pages} if n_pages else {}
        restorable = set(range(1, n_pages + 1))
        for transfer in pool_transfers or []:
            if not restorable:
                break
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # a second form of pages that are asked for too; without a verdict it hinders nothing
            lengths = self._restorable(transfer, keys[:n_pages])
            if lengths:
                hits[transfer.name] = max(lengths)
            restorable &= lengths
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:  # noqa: ARG002
        return {one.name: self._get(one.name, one.keys or [], one.host_indices) for one in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {one.name: self._set(one.name, one.keys or [], one.host_indices, extra_info) for one in transfers}

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

    def _register(self, name: str, host_pool: Any) -> None:
        if name in self._pools and self._pools[name].pages.pool is host_pool:
            return  # SGLang names the pool of keys and values twice
        config, pages = self._config, HostPages(PoolName(name).value, host_pool)
        form = page_form(pages, self._calibration, config)
        ranks = [] if is_replicated(pages, config) else [config.tp_rank, config.tp_size]
        key: dict[str, Part] = {
            "form": form.key,
            "format": getattr(host_pool, "storage_format_tag", None),
            "ranks": [*ranks, config.pp_rank, config.pp_size, config.attn_cp_rank, config.attn_cp_size],
        }
        if (layout := form.layout) is not None:
            self._coders[name] = ChunkCoder(form.calibration, self._settings, lambda _: layout)
        self._pools[name] = _Pool(pages, key)
        logger.info("pool %s, pages of %d numbers of %s: %s", pages.name, pages.n_values, pages.dtype, form.words)

    def _set(self, pool: str, keys: Sequence[str], host_indices: Tensor | None, extra_info: Any) -> list[bool]:
        slots = self._slots(pool, keys, host_indices)
        if slots is None:
            return [False] * len(keys)
        pages, prefix = self._pools[pool].pages, None if extra_info is None else extra_info.prefix_keys

        def save(number: int) -> bool:
            start = None if prefix is None else (len(prefix) + number) * pages.page_tokens
            return self._save(pool, keys[number], pages.read(slots[number]), start)

        return self._threads.map(save, range(len(keys)))

    def _get(self, pool: str, keys: Sequence[str], host_indices: Tensor | None) -> list[bool]:
        slots = self._slots(pool, keys, host_indices)
        if slots is None:
            return [False] * len(keys)
        found = self._found(pool, keys)
        for slot, page in zip(slots, found, strict=True):
            if page is not None:
                self._pools[pool].pages.write(slot, page)
        return [page is not None for page in found]

    def _slots(self, pool: str, keys: Sequence[str], host_indices: Tensor | None) -> list[int] | None:
        """The first slot of each page in host memory; None: there is not one page of slots for each key."""
        if pool not in self._pools or host_indices is None:
            return None
        n_tokens = self._pools[pool].pages.page_tokens
        if len(host_indices) != n_tokens * len(keys):
            return None
        return [int(slot) for slot in host_indices[::n_tokens]]

    def _save(self, pool: str, key: str, page: Tensor, start: int | None) -> bool:
        pages = self._pools[pool].pages
        return (
            pages.n_values == 0 or self._pages.save(pool, self._name(pool, key), pages.numbers(page), start) is not None
        )

    def _found(self, pool: str, keys: Sequence[str]) -> list[Tensor | None]:
        """Flat pages; None for each that is missing."""
        pages = self._pools[pool].pages

        def page_of(coder: ChunkCoder, stream: bytes) -> Tensor:
            numbers = torch.empty(pages.n_values, dtype=pages.dtype)
            coder.decode(stream, numbers)
            return pages.flat(numbers)

        if pages.n_values == 0:
            return [torch.empty(0, dtype=pages.dtype) for _ in keys]
        names = [self._name(pool, key) for key in keys]
        streams = self._pages.read(names)
        return self._threads.map(lambda name, stream: self._pages.decode(pool, name, stream, page_of), names, streams)

    def _restorable(self, transfer: Any, keys: Sequence[str]) -> AbstractSet[int]:
        """Of the prefixes of some pages, the lengths that one pool can restore."""
        if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
            return set(range(1, self._n_leading(transfer.name, keys) + 1))
        if transfer.name not in self._coders:
            return set()
        has = self._pages.which_stored([self._name(transfer.name, key) for key in keys])
        # SGLang gives as many keys as it needs pages at the end; these keys are not yet those of pages.
        n_trailing = max(1, len(transfer.keys or []))
        return {stop for stop in range(1, len(keys) + 1) if all(has[max(0, stop - n_trailing) : stop])}

    def _n_leading(self, pool: str, keys: Sequence[str]) -> int:
        """How many leading pages are stored; all of a pool that holds nothing."""
        if pool not in self._coders:
            return len(keys) if pool in self._pools else 0
        return self._pages.n_stored([self._name(pool, key) for key in keys])

    def _name(self, pool: str, key: str) -> str:
        return self._pages.key(pool, page=key, **self._pools[pool].key)
