"""A KV connector for vLLM: prompts that begin like one seen before, by any engine on the same store, load their cache.

    --kv-transfer-config '{"kv_connector": "KvtcConnector", "kv_connector_module_path": "kvtc.engines.vllm.connector",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvtc.calibration": "model.safetensors", "kvtc.store": "file:///var/cache/kvtc"}}'

By side, as vLLM calls them:

    scheduler   get_num_new_matched_tokens -> update_state_after_alloc -> build_connector_meta -> request_finished
    worker      register_kv_caches, then every step start_load_kv -> wait_for_save -> get_finished

Here is only what is vLLM's: the scheduler's logic is `PrefixPlanner`, the worker's `PageMover`. Written for vLLM 0.32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from ...errors import InvalidArgument, UnsupportedLayout
from ...key_digest import digest
from ...store import Store, open_store
from ..page_codec import PageCodec
from ..page_layout import PageLayout, vllm_layout
from ..served_model import ServedModel
from ..settings import EngineSettings
from .facts import CPU_BACKEND, Adapters, EngineFacts, engine_facts, refuse_scaled_fp8, request_parts, served_model
from .metrics import KvtcPromMetrics, KvtcStats
from .page_mover import EnginePages, PageMover
from .prefix_planner import LoadOrder, PrefixPlanner, SaveOrder

logger = init_logger(f"vllm.{__name__}")


@dataclass
class KvtcMetadata(KVConnectorMetadata):
    """What the scheduler asks of the workers in one step."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)


class KvtcConnector(KVConnectorBase_V1, SupportsHMA):
    """Options: docs/guides/vllm.md. What cannot work is refused here, at start."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            raise InvalidArgument(
                "an entry of a store may be gone or damaged: set kv_load_failure_policy to recompute in the KV transfer "
                f"configuration, so that its tokens are computed; it is {transfer.kv_load_failure_policy}, which ends the request"
            )
        self._settings = EngineSettings.from_config(transfer.kv_connector_extra_config)
        self._facts = engine_facts(vllm_config, kv_cache_config, _layer_ranges(vllm_config))
        self._store = open_store(self._settings.store)
        self._planner: PrefixPlanner | None = None
        self._mover: PageMover | None = None
        self._loads: list[LoadOrder] = []
        self._failed_blocks: set[int] = set()
        if role is KVConnectorRole.SCHEDULER:
            model = served_model(vllm_config, self._settings)
            logger.info("kvtc: entries are of the model %s, their identity is %s", model.weights, model.identity)
            self._planner = _planner(self._settings, self._facts, model, self._store)
            lora = vllm_config.lora_config
            self._adapters = Adapters(None if lora is None else str(lora.lora_dtype))
        else:
            self._codec = PageCodec(self._settings.load_calibration(self._facts.part), self._settings)

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = get_layers_from_vllm_config(self._vllm_config, AttentionLayerBase, list(self._facts.layer_names))
        refuse_scaled_fp8(layers, self._facts.dtype)
        tensors = [kv_caches[name] for name in self._facts.layer_names]
        backends = {layer.get_attn_backend().get_name() for layer in layers.values()}
        layout = _layout(self._facts, tensors, backends, self._vllm_config)
        pages = EnginePages(tensors, layout, self._facts.page_tokens, self._facts.dtype)
        self._mover = PageMover(
            pages, self._codec, self._store, self._facts.rank, self._facts.page_tokens, self._settings.threads
        )
        logger.info("kvtc codes pages of %s, %s, %s", backends, layout, self._facts.dtype)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002  vLLM's signature
        for order in self._metadata().loads:
            self._worker().start_load(order)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done before vLLM schedules their requests."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All layers of a chunk are saved together, after the step."""

    def wait_for_save(self) -> None:
        for order in self._metadata().saves:
            self._worker().save(order)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        loaded, failed = self._worker().take_loaded()
        self._failed_blocks |= failed
        return None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    # Scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        parts = request_parts(request)
        if parts is None:
            return 0, False
        n_tokens = self._scheduler().matched_tokens(
            request.request_id,
            request.prompt_token_ids,
            num_computed_tokens,
            None if parts == (None, None) else lambda: self._request_digest(*parts),
        )
        return n_tokens, bool(n_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            (block_ids,) = blocks.get_block_ids()
            self._loads.append(self._scheduler().plan_load(request.request_id, num_external_tokens, block_ids))

    def build_connector_meta(self, scheduler_output: Any) -> KvtcMetadata:
        loads, self._loads = self._loads, []
        saves: list[SaveOrder] = []
        state = scheduler_output.kv_connector_block_state
        for request_id, n_computed in _computed_tokens(scheduler_output):
            n_covered = n_computed + scheduler_output.num_scheduled_tokens[request_id]
            (block_ids,) = state.get_block_ids(request_id)
            saves += self._scheduler().plan_saves(request_id, n_covered, block_ids)
        return KvtcMetadata(loads, saves)

    def request_finished_all_groups(
        self,
        request: Any,
        block_ids: tuple[list[int], ...],  # noqa: ARG002  vLLM's signature
    ) -> tuple[bool, dict[str, Any] | None]:
        """Chunks to be saved were copied in the step that computed them, so the blocks may go."""
        self._scheduler().forget(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """vLLM asks for this when weights have changed."""
        self._scheduler().start_over()
        return True

    # Both

    @property
    def requires_kv_delivery(self) -> bool:
        """A chunk that is not saved is a later miss, no more."""
        return False

    def get_kv_connector_stats(self) -> KvtcStats | None:
        source = self._planner or self._mover
        news = source.counts.take() if source else {}
        return KvtcStats(data=news) if news else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvtcStats:
        return KvtcStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KvtcPromMetrics:
        return KvtcPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for part in (self._planner, self._mover):
            if part is not None:
                part.close()
                logger.info("kvtc, %s: %s", self.role.name.lower(), dict(part.counts.read()))
        self._store.close()

    def _request_digest(self, lora_request: Any, salt: str | None) -> bytes:
        adapter = None if lora_request is None else self._adapters.digest(lora_request)
        return digest("request", adapter=adapter, salt=salt)

    def _metadata(self) -> KvtcMetadata:
        metadata = self._get_connector_metadata()
        if not isinstance(metadata, KvtcMetadata):
            raise TypeError(f"metadata of another connector: {type(metadata).__name__}")
        return metadata

    def _scheduler(self) -> PrefixPlanner:
        if self._planner is None:
            raise RuntimeError("vLLM asks a worker's connector what only the scheduler's knows")
        return self._planner

    def _worker(self) -> PageMover:
        if self._mover is None:
            raise RuntimeError("vLLM has registered no caches with this connector")
        return self._mover


def _planner(settings: EngineSettings, facts: EngineFacts, model: ServedModel, store: Store) -> PrefixPlanner:
    """Loads every worker's calibration, one after the other, for its fingerprint: what is missing is found out at start."""
    codecs = []
    for part in facts.parts:
        calibration, name = settings.read_calibration(part.tp_rank, part.pp_rank)
        codec = PageCodec(model.checked(part.checked(calibration, name), name), settings)
        codecs.append((calibration.fingerprint, codec.codec(has_token_ids=True).settings_digest))
    return PrefixPlanner(store, model.scope, codecs, facts.page_tokens)


def _layer_ranges(vllm_config: Any) -> list[tuple[int, int]] | None:
    n_layers = vllm_config.model_config.get_total_num_hidden_layers()
    size = vllm_config.parallel_config.pipeline_parallel_size
    bounds = (get_pp_indices(n_layers, rank, size) for rank in range(size))
    return [(first, stop - first) for first, stop in bounds]


def _layout(facts: EngineFacts, tensors: list[torch.Tensor], backends: set[str], vllm_config: Any) -> PageLayout:
    """How the registered tensors [B, H, N, 2 D] hold keys and values."""
    part, page_tokens = facts.part, tensors[0].shape[2]
    expected = (part.n_kv_heads, page_tokens, 2 * part.head_dim)
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if shapes != {expected} or facts.page_tokens % page_tokens or len(tensors) != part.n_layers:
        raise UnsupportedLayout(
            f"vLLM registered {len(tensors)} caches of shapes [blocks, {'; '.join(map(str, shapes))}]; expected {part.n_layers} of "
            f"{expected} with a divisor of {facts.page_tokens} tokens"
        )
    if len(backends) != 1:
        raise UnsupportedLayout(f"layers attend by different backends: {', '.join(sorted(backends))}; expected one")
    (backend,) = backends
    isa = None
    if backend == CPU_BACKEND:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(
            vllm_config.model_config.dtype, page_tokens, part.head_dim, vllm_config.cache_config.cache_dtype
        )
    return vllm_layout(part.n_layers, part.n_kv_heads, part.head_dim, page_tokens, backend=backend, isa=isa)


def _computed_tokens(scheduler_output: Any) -> list[tuple[str, int]]:
    """(request, tokens computed before this step) of all requests of the step."""
    cached = scheduler_output.scheduled_cached_reqs
    news = [(new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs]
    return news + list(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
