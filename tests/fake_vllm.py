"""The names of vLLM that kvtc's adapters import, with vLLM 0.32's signatures and nothing behind them, and a very small engine.

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

from kvtc.cache import KVCache
from kvtc.integrations.page_layout import PageLayout

ADAPTERS = tuple(f"kvtc.integrations.vllm_{name}" for name in ("connector", "tier", "metrics"))


class KVConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata(ABC):  # noqa: B024
    pass


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
) -> tuple[Any, Any]:
    """(VllmConfig, KVCacheConfig) of a model; n_kv_heads in all."""
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(n_layers)]
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            model="tiny",
            dtype=dtype,
            use_mla=False,
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
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=options, kv_load_failure_policy="recompute"),
        layers={name: fake_layer(backend, scale) for name in names},
    )
    spec = FullAttentionSpec(block_size=block_size, head_size=head_dim, sliding_window=None, attention_chunk_size=None)
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=list(reversed(names)))
    return vllm_config, SimpleNamespace(kv_cache_groups=[group])


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
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
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


class FakeEngine:
    """A scheduler and one worker around a connector: blocks are written in the order of the calls that vLLM makes.

    truth: the cache of each prompt, which "the model" writes for tokens that are not loaded.
    """

    def __init__(
        self,
        connector_class: type,
        vllm_config: Any,
        kv_cache_config: Any,
        n_blocks: int = 64,
        kernel_tokens: int | None = None,
        axes: str = "BHNC",
    ):
        model = vllm_config.model_config
        n_layers, heads, dim = (
            model.get_total_num_hidden_layers(),
            model.get_total_num_kv_heads(),
            model.get_head_size(),
        )
        self.block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        inner = kernel_tokens or self.block_size
        sizes = {"B": n_blocks * self.block_size // inner, "H": heads, "N": inner, "C": 2 * dim}
        # Whatever the order in memory, vLLM hands out views in the order BHNC.
        self.layers = {
            name: torch.zeros([sizes[axis] for axis in axes], dtype=model.dtype).permute(
                [axes.index(axis) for axis in "BHNC"]
            )
            for name in vllm_config.layers
        }
        backend = next(iter(vllm_config.layers.values())).get_attn_backend().get_name()
        self.layout = PageLayout("LBHNC", n_layers, heads, dim, inner, "vec" if backend == "CPU_ATTN" else "split")
        self.scheduler = connector_class(vllm_config, KVConnectorRole.SCHEDULER, kv_cache_config)
        self.worker = connector_class(vllm_config, KVConnectorRole.WORKER, kv_cache_config)
        self.worker.register_kv_caches(self.layers)
        self.next_block = 1
        self.failed: set[int] = set()

    def run(
        self, request_id: str, token_ids: list[int], truth: KVCache, n_local: int = 0, **request: Any
    ) -> tuple[int, KVCache]:
        """Prefill one prompt, of which the engine has the first n_local tokens -> (tokens loaded, its cache in the blocks)."""
        fields = {"mm_features": [], "prompt_embeds": None, "lora_request": None, "cache_salt": None} | request
        asked = SimpleNamespace(request_id=request_id, prompt_token_ids=token_ids, **fields)
        n_blocks = -(-len(token_ids) // self.block_size)
        blocks = list(range(self.next_block, self.next_block + n_blocks))[::-1]
        self.next_block += n_blocks
        self._write(blocks, truth, 0, n_local)
        n_found = None
        while n_found is None:
            n_found, is_async = self.scheduler.get_num_new_matched_tokens(asked, n_local)
        assert is_async == (n_found > 0)
        self.scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: (blocks,)), n_found)
        n_computed = n_local
        if n_found:
            n_computed = self._load(request_id, blocks, n_local + n_found)
        self._write(blocks, truth, n_computed, len(token_ids))
        self._step(self._output(request_id, blocks, n_computed, len(token_ids)))
        self.scheduler.request_finished_all_groups(asked, (blocks,))
        return n_computed - n_local, self._read(blocks, len(token_ids))

    def finish(self) -> None:
        """Shut down, which waits for what goes on in the background."""
        self.worker.shutdown()
        self.scheduler.shutdown()

    def _load(self, request_id: str, blocks: list[int], stop: int) -> int:
        """Steps without a forward until the request is loaded -> tokens that are there."""
        loaded: set[str] = set()
        failed: set[int] = set()
        while request_id not in loaded:
            done, bad = self._step(self._output())
            loaded |= done
            failed |= bad
        self.failed |= failed
        good = [block not in failed for block in blocks[: stop // self.block_size]]
        return stop if all(good) else good.index(False) * self.block_size

    def _step(self, output: Any) -> tuple[set[str], set[int]]:
        metadata = self.scheduler.build_connector_meta(output)
        self.worker.bind_connector_metadata(metadata)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        _, loaded = self.worker.get_finished(set())
        failed = self.worker.get_block_ids_with_load_errors()
        self.worker.clear_connector_metadata()
        return loaded or set(), failed

    def _output(
        self, request_id: str | None = None, blocks: list[int] | None = None, n_computed: int = 0, stop: int = 0
    ) -> Any:
        """A SchedulerOutput of one request, or of none."""
        news = [] if request_id is None else [SimpleNamespace(req_id=request_id, num_computed_tokens=n_computed)]
        return SimpleNamespace(
            scheduled_new_reqs=news,
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={new.req_id: stop - n_computed for new in news},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: (blocks,)),
        )

    def _slots(self, blocks: list[int]) -> list[int]:
        ratio = self.block_size // self.layout.page_tokens
        return [block * ratio + inner for block in blocks for inner in range(ratio)]

    def _write(self, blocks: list[int], truth: KVCache, start: int, stop: int) -> None:
        """What the model's attention does: tokens start .. stop - 1 into the blocks."""
        keys, values = self._both(blocks)
        keys[:, :, start:stop], values[:, :, start:stop] = truth.keys[:, :, start:stop], truth.values[:, :, start:stop]
        data = self.layout.write(keys, values)
        for index, layer in enumerate(sorted(self.layers)):
            self.layers[layer][self._slots(blocks)] = data[index]

    def _both(self, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self._slots(blocks)
        return self.layout.read(torch.stack([self.layers[layer][slots] for layer in sorted(self.layers)]))

    def _read(self, blocks: list[int], n_tokens: int) -> KVCache:
        keys, values = self._both(blocks)
        return KVCache(keys[:, :, :n_tokens], values[:, :, :n_tokens])
