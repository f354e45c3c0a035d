"""The names of vLLM that kvtc's adapters import, with vLLM 0.32's signatures and nothing behind them.

`make test` runs the adapters on this; `make test-engines` runs them in vLLM itself.
"""

from __future__ import annotations

import enum
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch

ADAPTERS = tuple(f"kvtc.engines.vllm.{name}" for name in ("connector", "tier", "layouts", "metrics"))


class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(ABC):  # noqa: B024
    pass


@dataclass
class KVConnectorTransferResults:
    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


class SupportsHMA(ABC):
    @abstractmethod
    def request_finished_all_groups(self, request, block_ids): ...


class KVConnectorBase_V1(ABC):  # noqa: N801
    def __init__(self, vllm_config, role, kv_cache_config):
        self._vllm_config, self._role, self._kv_cache_config = vllm_config, role, kv_cache_config
        self._connector_metadata = None

    @property
    def role(self):
        return self._role

    def bind_connector_metadata(self, connector_metadata):
        self._connector_metadata = connector_metadata

    def clear_connector_metadata(self):
        self._connector_metadata = None

    def _get_connector_metadata(self):
        assert self._connector_metadata is not None
        return self._connector_metadata

    @abstractmethod
    def start_load_kv(self, forward_context, **kwargs): ...

    @abstractmethod
    def wait_for_layer_load(self, layer_name): ...

    @abstractmethod
    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs): ...

    @abstractmethod
    def wait_for_save(self): ...

    @abstractmethod
    def get_num_new_matched_tokens(self, request, num_computed_tokens): ...

    @abstractmethod
    def update_state_after_alloc(self, request, blocks, num_external_tokens): ...

    @abstractmethod
    def build_connector_meta(self, scheduler_output): ...


@dataclass
class KVConnectorStats:
    data: dict[str, Any] = field(default_factory=dict)


class KVConnectorPromMetrics:
    def __init__(self, vllm_config, metric_types, labelnames, per_engine_labelvalues):  # noqa: ARG002
        self._counter_cls = metric_types["Counter"]


@dataclass(frozen=True)
class OffloadingCounterMetadata:
    documentation: str
    labelnames: tuple[str, ...] = ()


class OffloadingConnectorStats(KVConnectorStats):
    def increase_counter(self, counter_name, counter_increase_value=1, labelvalues=()):
        del labelvalues
        self.data[counter_name] = self.data.get(counter_name, 0) + counter_increase_value


class Medium(enum.Enum):
    CPU = "CPU"
    STORAGE = "STORAGE"


class LookupResult(enum.Enum):
    MISS = enum.auto()
    HIT = enum.auto()
    HIT_PENDING = enum.auto()
    RETRY = enum.auto()


@dataclass
class ReqContext:
    req_id: str
    kv_transfer_params: dict[str, Any] | None = None
    _state: dict[type, Any] = field(default_factory=dict)
    _positions: dict[bytes, int] = field(default_factory=dict)

    def set_state(self, val):
        self._state[type(val)] = val

    def get_state(self, cls):
        return self._state.get(cls)

    def set_offload_key_position(self, key, end_token):
        self._positions[key] = end_token

    def get_offload_key_position(self, key):
        return self._positions.get(key)


@dataclass
class TransferJob:
    job_id: int
    keys: list[bytes]
    chunk_ids: list[int]
    is_promotion: bool
    req_context: ReqContext


@dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: tuple[bytes, ...] | None = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


class SecondaryTierManager(ABC):
    medium: ClassVar[Medium | None] = None

    def __init__(self, offloading_spec, primary_kv_view, tier_type, backpressure_detector=None):  # noqa: ARG002
        self.tier_type = tier_type

    @abstractmethod
    def lookup(self, key, req_context): ...

    @abstractmethod
    def submit_store(self, job_metadata): ...

    @abstractmethod
    def submit_load(self, job_metadata): ...

    @abstractmethod
    def get_finished_jobs(self): ...

    @abstractmethod
    def on_new_request(self, req_context): ...

    @abstractmethod
    def drain_jobs(self): ...


def get_pp_indices(num_hidden_layers, pp_rank, pp_size):
    each = num_hidden_layers // pp_size
    return pp_rank * each, (pp_rank + 1) * each


class FullAttentionSpec(SimpleNamespace):
    """As `engine_facts` looks at it."""


class SlidingWindowSpec(SimpleNamespace):
    """Of layers with a window, where vLLM drops pages that no token reaches any more."""


class MLAAttentionSpec(SimpleNamespace):
    """Of layers that cache one latent for each token."""


def fake_layer(backend: str = "FLASH_ATTN", scale: float = 1.0) -> Any:
    """An attention layer."""
    return SimpleNamespace(
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), _k_scale_float=scale, _v_scale_float=1.0
    )


def configs(
    options: dict[str, Any],
    *,
    n_layers: int,
    n_kv_heads: int,
    head_dim: int,
    block_size: int = 32,
    tp_size: int = 1,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    cache_dtype: str = "auto",
    backend: str = "FLASH_ATTN",
    scale: float = 1.0,
    windows: dict[int, int] | None = None,
    layers_per_table: int | None = None,
    latent: int | None = None,
    n_blocks: int = 64,
    **model: Any,
) -> tuple[Any, Any]:
    """(VllmConfig, KVCacheConfig) of a model; n_kv_heads in all. windows: of layers that have one. layers_per_table: of a kind;
    None: all. latent: numbers of a token in each layer, in place of heads. model: other fields of the model's or the load
    configuration."""
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(n_layers)]
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=model.get("model", "tiny"),
            revision=model.get("revision"),
            quantization=model.get("quantization"),
            quantization_config=None,
            hf_overrides=model.get("hf_overrides", {}),
            hf_config=model.get("hf_config"),
            hf_config_path=None,
            max_model_len=model.get("max_model_len", 4096),
            dtype=dtype,
            get_total_num_hidden_layers=lambda: n_layers,
            get_total_num_kv_heads=lambda: n_kv_heads,
            get_head_size=lambda: head_dim,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=tp_size,
            pipeline_parallel_size=1,
            rank=rank,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        load_config=SimpleNamespace(
            load_format=model.get("load_format", "auto"), download_dir=None, model_loader_extra_config={}
        ),
        lora_config=model.get("lora_config"),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=options, kv_load_failure_policy="recompute"),
        layers={name: fake_layer(backend, scale) for name in names},
    )
    common = {"block_size": block_size, "head_size": head_dim, "num_kv_heads": max(1, n_kv_heads // tp_size)}
    groups = []
    for window in [None, *sorted(set((windows or {}).values()))]:
        its = [name for layer, name in enumerate(names) if (windows or {}).get(layer) == window]
        spec: Any = FullAttentionSpec(**common)
        if window is not None:
            spec = SlidingWindowSpec(**common, sliding_window=window)
        elif latent is not None:
            spec = MLAAttentionSpec(block_size=block_size, head_size=latent, num_kv_heads=1)
        size = layers_per_table or len(its)
        groups += [
            SimpleNamespace(kv_cache_spec=spec, layer_names=its[first : first + size][::-1])
            for first in range(0, len(its), max(size, 1))
        ]
    return vllm_config, SimpleNamespace(kv_cache_groups=groups, num_blocks=n_blocks)


def _modules() -> dict[str, dict[str, Any]]:
    base = "vllm.distributed.kv_transfer.kv_connector.v1"
    return {
        "vllm.config": {
            "get_layers_from_vllm_config": lambda config, _, names: {name: config.layers[name] for name in names}
        },
        f"{base}.base": {
            "KVConnectorBase_V1": KVConnectorBase_V1,
            "KVConnectorMetadata": KVConnectorMetadata,
            "KVConnectorRole": KVConnectorRole,
            "KVConnectorTransferResults": KVConnectorTransferResults,
            "SupportsHMA": SupportsHMA,
        },
        f"{base}.metrics": {"KVConnectorStats": KVConnectorStats, "KVConnectorPromMetrics": KVConnectorPromMetrics},
        f"{base}.offloading.metrics": {"OffloadingConnectorStats": OffloadingConnectorStats},
        "vllm.v1.metrics.utils": {
            "create_metric_per_engine": lambda metric, engines: {
                index: metric.labels(*values) for index, values in engines.items()
            }
        },
        "vllm.distributed.utils": {"get_pp_indices": get_pp_indices},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": object},
        "vllm": {"__version__": "0.32.0"},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False, device_type="cuda")},
        "vllm.v1.attention.backends.cpu_attn": {"_get_attn_isa": lambda *_: "vec"},
        "vllm.v1.kv_offload.base": {
            "LookupResult": LookupResult,
            "Medium": Medium,
            "OffloadKey": bytes,
            "OffloadingCounterMetadata": OffloadingCounterMetadata,
            "ReqContext": ReqContext,
            "RequestOffloadingContext": SimpleNamespace,
            "ScheduleEndContext": SimpleNamespace,
        },
        "vllm.v1.kv_offload.tiering.base": {
            "JobResult": JobResult,
            "SecondaryTierManager": SecondaryTierManager,
            "TransferJob": TransferJob,
        },
    }


@contextmanager
def fake_vllm() -> Iterator[None]:
    """These modules stand for vLLM; adapters imported inside are forgotten afterwards."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    added = []
    for path, contents in _modules().items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                sys.modules[name] = ModuleType(name)
                added.append(name)
        vars(sys.modules[path]).update(contents)
    try:
        yield
    finally:
        for name in (*added, *ADAPTERS):
            sys.modules.pop(name, None)
        sys.modules.update(before)
