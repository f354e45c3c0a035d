"""A storage backend for SGLang's HiCache: pages leave host memory as streams, into any store of kvtc.

    --enable-hierarchical-cache --page-size 64 --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
        '{"backend_name": "kvtc", "module_path": "kvtc.engines.sglang.hicache", "class_name": "KvtcHiCache",
          "interface_v1": 1, "hicache_storage_pass_prefix_keys": true,
          "kvtc.calibration": "model.safetensors", "kvtc.store": "file:///var/cache/kvtc"}'

SGLang calls a backend from threads of its own, so the calls here work and return. It tells how many pages come before those of a
call if `hicache_storage_pass_prefix_keys` is set; else where they stand is searched. Written for SGLang 0.5.23.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult
from sglang.srt.runtime_context import get_lora, get_model
from torch import Tensor

from ...calibration import Calibration
from ...errors import InvalidArgument, UnsupportedModel
from ...huggingface.model_files import UnknownModel, files_identity, find_model
from ...process.workers import Workers
from ...store import open_store
from ..chunk_coder import ChunkCoder, ChunkOptions
from ..page_codec import CHUNK_TOKENS
from ..page_layout import sglang_layout
from ..served_model import ServedModel
from ..settings import PREFIX, EngineSettings
from ..stored_chunks import StoredChunks


class KvtcHiCache(HiCacheStorage):
    """Options: docs/guides/sglang.md. What cannot work is refused when SGLang registers its host memory."""

    def __init__(self, storage_config: Any, kwargs: Any) -> None:  # noqa: ARG002
        if storage_config.is_mla_model:
            raise UnsupportedModel("this model caches latents (MLA); kvtc codes keys and values of heads")
        if storage_config.attn_cp_size != 1:
            raise UnsupportedModel("context-parallel ranks hold some tokens of a page; kvtc needs all")
        self._config = storage_config
        self._options, others = ChunkOptions.split(storage_config.extra_config or {})
        self._settings = EngineSettings.from_config(others)
        self._model = _served_model(self._settings, storage_config.model_name)
        self._store = open_store(self._settings.store)
        self._threads = Workers(self._settings.threads, "the backend of SGLang", "kvtc-page")

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        pool, calibration = mem_pool_host, self._read_calibration()
        geometry = calibration.geometry
        wanted, found = (
            (pool.layer_num, pool.head_num, pool.head_dim),
            (geometry.n_layers, geometry.n_kv_heads, geometry.head_dim),
        )
        if wanted != found:
            raise InvalidArgument(
                f"the calibration covers {geometry.describe()}; this rank holds {wanted[0]} layers of {wanted[1]} key-value heads "
                f"of {wanted[2]} features"
            )
        if CHUNK_TOKENS % pool.page_size and pool.page_size % CHUNK_TOKENS:
            raise InvalidArgument(
                f"pages of {pool.page_size} tokens; expected a multiple or a divisor of {CHUNK_TOKENS}"
            )
        layout = sglang_layout(pool.layout, *wanted, pool.page_size)
        self._page_values, self._page_tokens = layout.page_values, pool.page_size
        coder = ChunkCoder(calibration, self._settings, lambda _: layout, pool.page_size, self._options.max_tokens)
        self._format = getattr(pool, "storage_format_tag", None)
        self._pages = StoredChunks(self._store, lambda _: coder, self._model.scope)

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

    # Of models with several pools: only keys and values are kept, so a prefix that needs other pools too is not found.

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
        self._store.close()

    @property
    def counts(self) -> Counter[str]:
        """What was saved, loaded and missed so far."""
        return self._pages.counts.read()

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

    def _read_calibration(self) -> Calibration:
        return self._model.checked(*self._settings.read_calibration(self._config.tp_rank, self._config.pp_rank))


def _served_model(settings: EngineSettings, name: str | None) -> ServedModel:
    """The model of SGLang's server, with what the server was told on top of its files.

    SGLang's hashes of pages know an adapter by its name and path, so the weights of those given at start are part of the identity.
    """
    try:
        model, lora = get_model(), get_lora()
    except ValueError:  # outside of a server there are no settings of one
        return ServedModel.of(settings, name)
    if settings.identity is None and model.load_format == "dummy":
        raise UnknownModel(
            f"load_format is dummy, so the weights are in no file: give {PREFIX}identity, a name for them"
        )
    given = lora.lora_paths or ()
    adapters = [[ref.lora_name, files_identity(find_model(ref.lora_path))] for ref in given if ref.lora_path]
    return ServedModel.of(
        settings,
        model.model_path,
        model.revision,
        is_told=True,
        cache_dir=model.download_dir,
        overrides=json.loads(model.json_model_override_args or "{}"),
        effective={
            "dtype": str(model.dtype),
            "cache_dtype": str(model.kv_cache_dtype),
            "quantization": model.quantization,
            "modelopt_quant": str(model.modelopt_quant),
            "loader": str(model.model_loader_extra_config),
            "adapters": adapters,
        },
    )
