"""The names of SGLang that kvtc's backend imports, with SGLang 0.5.23's signatures, and a host pool on the CPU.

`make test` runs the backend on this; `make test-engines` runs it with SGLang's own factory and pools.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from .fake_modules import fake_modules

ADAPTERS = ("kvtc.engines.sglang.hicache", "kvtc.engines.sglang.facts", "kvtc.engines.sglang.host_pages")


@dataclass
class HiCacheStorageConfig:
    extra_config: dict[str, Any]
    model_name: str = "tiny"
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = False


@dataclass
class HiCacheStorageExtraInfo:
    prefix_keys: list[str] | None = None


class PoolName(str, enum.Enum):  # noqa: UP042  as in SGLang
    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    INDEXER = "indexer"
    DRAFT = "draft"


class PoolHitPolicy(str, enum.Enum):  # noqa: UP042  as in SGLang
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    name: PoolName
    host_indices: torch.Tensor | None = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


class HiCacheStorage(ABC):
    def register_mem_pool_host(self, mem_pool_host):
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool, host_pool_name):
        self.registered_pools = {**getattr(self, "registered_pools", {}), host_pool_name: host_pool}

    @abstractmethod
    def get(self, key, target_location=None, target_sizes=None): ...

    @abstractmethod
    def batch_get(self, keys, target_locations=None, target_sizes=None): ...

    @abstractmethod
    def set(self, key, value=None, target_location=None, target_sizes=None): ...

    @abstractmethod
    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None): ...

    @abstractmethod
    def exists(self, key): ...


class HostPool:
    """Pages of keys and values, in SGLang's host layouts."""

    def __init__(
        self,
        layout: str,
        sizes: tuple[int, int, int],
        page_size: int,
        n_pages: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.layout, self.page_size, self.dtype = layout, page_size, dtype
        self.layer_num, self.head_num, self.head_dim = sizes
        tokens, (n_layers, n_heads, dim) = n_pages * page_size, sizes
        first = (n_layers, tokens) if layout == "layer_first" else (tokens, n_layers)
        self.kv_buffer = torch.zeros(2, *first, n_heads, dim, dtype=self.dtype)

    def get_data_page(self, index, flat=True):
        span = slice(index, index + self.page_size)
        page = self.kv_buffer[:, :, span] if self.layout == "layer_first" else self.kv_buffer[:, span]
        return page.flatten() if flat else page

    def set_from_flat_data_page(self, index, data_page):
        page = self.get_data_page(index, flat=False)
        page.copy_(data_page.reshape(page.shape))

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys, values [L, H, T, D] of all slots."""
        for side, tensor in enumerate((keys, values)):
            rows = tensor.permute(0, 2, 1, 3)
            self.kv_buffer[side] = rows if self.layout == "layer_first" else rows.transpose(0, 1)


class LatentPool:
    """Latents, of which SGLang does not say how many heads they have."""

    def __init__(self, layout: str, n_layers: int, dim: int, page_size: int, n_pages: int, dtype: torch.dtype) -> None:
        self.layout, self.page_size, self.dtype, self.layer_num = layout, page_size, dtype, n_layers
        first = (n_layers, n_pages * page_size) if layout == "layer_first" else (n_pages * page_size, n_layers)
        self.kv_buffer = torch.zeros(*first, 1, dim, dtype=dtype)

    def get_data_page(self, index, flat=True):
        span = slice(index, index + self.page_size)
        page = self.kv_buffer[:, span] if self.layout == "layer_first" else self.kv_buffer[span]
        return page.flatten() if flat else page

    def set_from_flat_data_page(self, index, data_page):
        page = self.get_data_page(index, flat=False)
        page.copy_(data_page.reshape(page.shape))


class StatePool:
    """States of whole texts, one a page, given as bytes: those of two tensors of unlike dtypes."""

    layout, page_size, dtype, temporal_dtype = "page_first", 1, torch.bfloat16, torch.float32

    def __init__(self, n_states: int, n_layers: int) -> None:
        self.temporal_buffer = torch.zeros(n_states, n_layers, 2, 64, 128)
        self.conv_buffer = torch.zeros(n_states, n_layers, 40, 3, dtype=self.dtype)

    def get_data_page(self, index, flat=True):  # noqa: ARG002
        return torch.cat([buffer[index].reshape(-1).view(torch.uint8) for buffer in self.buffers])

    def set_from_flat_data_page(self, index, data_page):
        parts = data_page.split([buffer[index].nbytes for buffer in self.buffers])
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer[index] = part.clone().view(buffer.dtype).reshape(buffer[index].shape)

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.temporal_buffer, self.conv_buffer


class UnequalPool:
    """Keys and values of unequal width: SGLang gives no flat pages of them, but says where they lie."""

    layout, layer_num, head_num, head_dim, v_head_dim = "page_first", 3, 2, 24, 16

    def __init__(self, page_size: int, n_pages: int) -> None:
        self.page_size, self.dtype = page_size, torch.bfloat16
        rows = n_pages * page_size, self.layer_num, self.head_num
        self.buffers = tuple(torch.zeros(*rows, dim, dtype=self.dtype) for dim in (self.head_dim, self.v_head_dim))

    def get_data_page(self, index, flat=True):
        raise NotImplementedError

    def get_page_buffer_meta(self, indices):
        if self.layout != "page_first":
            raise ValueError(f"Unsupported layout: {self.layout}")
        starts = [int(index) for index in indices[:: self.page_size]]
        pages = [buffer[start : start + self.page_size] for start in starts for buffer in self.buffers]
        return [page.data_ptr() for page in pages], [page.nbytes for page in pages]


class EmptyPool:
    """Stands for other pools, which hold the pages."""

    layout, dtype = "page_first", torch.uint8

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size

    def get_data_page(self, index, flat=True):  # noqa: ARG002
        return torch.empty(0, dtype=torch.uint8)

    def set_from_flat_data_page(self, index, data_page): ...


class ServerSettings:
    """SGLang's settings in effect; none until `publish`, as outside of a server."""

    def __init__(self) -> None:
        self._model: SimpleNamespace | None = None
        self._lora = SimpleNamespace(lora_paths=None)

    def publish(self, model_path: str, lora_paths: dict[str, str] | None = None, **changed: Any) -> None:
        fields = {
            "revision": None,
            "load_format": "auto",
            "download_dir": None,
            "json_model_override_args": "{}",
            "dtype": "auto",
            "kv_cache_dtype": "auto",
            "quantization": None,
            "modelopt_quant": None,
            "model_loader_extra_config": "{}",
        }
        self._model = SimpleNamespace(model_path=model_path, **{**fields, **changed})
        refs = [SimpleNamespace(lora_name=name, lora_path=path) for name, path in (lora_paths or {}).items()]
        self._lora.lora_paths = refs or None

    def get_model(self) -> SimpleNamespace:
        if self._model is None:
            raise ValueError("namespace 'model' not published")
        return self._model

    def get_lora(self) -> SimpleNamespace:
        return self._lora


@contextmanager
def fake_sglang() -> Iterator[ServerSettings]:
    """SGLang's module of storage backends for as long as the block runs -> what its server was told."""
    names = {
        "HiCacheStorage": HiCacheStorage,
        "PoolHitPolicy": PoolHitPolicy,
        "PoolName": PoolName,
        "PoolTransferResult": PoolTransferResult,
    }
    settings = ServerSettings()
    context = {"get_model": settings.get_model, "get_lora": settings.get_lora}
    modules = {"sglang.srt.mem_cache.hicache_storage": names, "sglang.srt.runtime_context": context}
    with fake_modules(modules, ADAPTERS):
        yield settings
