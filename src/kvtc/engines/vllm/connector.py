"""A KV connector for vLLM: prompts that begin like one seen before, by any engine on the same
store, load their cache.

    --kv-transfer-config '{"kv_connector": "KvtcConnector", "kv_connector_module_path": "kvtc.engines.vllm.connector",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kvtc.calibration": "model.safetensors", "kvtc.store": "file:///var/cache/kvtc"}}'

vLLM makes one connector in its scheduler and one in each worker, and calls them in this order:

    scheduler   get_num_new_matched_tokens -> update_state_after_alloc -> build_connector_meta -> request_finished_all_groups
    worker      register_kv_caches, then every step start_load_kv -> wait_for_save -> get_transfer_results ->
                get_block_ids_with_load_errors

The scheduler's connector hands each call to a `PrefixPlanner`, a worker's to a `PageMover`; the
metadata of a step carries the planner's orders to the movers. `facts` and `layouts` read what vLLM
says of itself; `group_codecs` says how each group of layers is coded. Written for vLLM 0.32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger

from ...errors import InvalidArgument
from ...store import open_store
from ..settings import EngineSettings
from .facts import Adapters, engine_facts, is_told_apart, served_model, step_requests
from .group_codecs import worker_codecs
from .layouts import engine_version, layer_ranges, registered_pages
from .metrics import KvtcPromMetrics, KvtcStats
from .page_mover import PageMover
from .prefix_planner import LoadOrder, PrefixPlanner, SaveOrder

logger = init_logger(f"vllm.{__name__}")


@dataclass
class KvtcMetadata(KVConnectorMetadata):
    """The scheduler's orders to the workers for one step."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)


class KvtcConnector(KVConnectorBase_V1, SupportsHMA):
    """The connector. Options: docs/guides/vllm.md.

    Parameters:
        vllm_config, kv_cache_config: vLLM's configuration.
        role: Whether this connector is the scheduler's or a worker's.

    Raises:
        KvtcError, FileNotFoundError: Whatever cannot work is refused when vLLM starts.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = _settings(vllm_config.kv_transfer_config)
        self._facts = engine_facts(vllm_config, kv_cache_config, layer_ranges(vllm_config), engine_version())
        self._n_blocks = kv_cache_config.num_blocks
        self._store = open_store(self._settings.store)
        self._side: PrefixPlanner | PageMover | None = None
        if role is KVConnectorRole.SCHEDULER:
            lora = vllm_config.lora_config
            self._adapters = Adapters(None if lora is None else str(lora.lora_dtype))
            self._planner = self._side = self._make_planner()
        else:
            self._groups = worker_codecs(self._facts, self._facts.rank, self._settings)

    # Scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not is_told_apart(request):
            return 0, False
        of_request = self._adapters.request_digest(request)
        n_tokens = self._planner.matched_tokens(
            request.request_id, request.prompt_token_ids, num_computed_tokens, of_request
        )
        return n_tokens, bool(n_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            self._planner.plan_load(request.request_id, num_external_tokens, blocks.get_block_ids())

    def build_connector_meta(self, scheduler_output: Any) -> KvtcMetadata:
        saves = [order for step in step_requests(scheduler_output) for order in self._planner.plan_saves(*step)]
        return KvtcMetadata(self._planner.take_loads(), saves)

    def request_finished_all_groups(
        self,
        request: Any,
        block_ids: tuple[list[int], ...],  # noqa: ARG002  vLLM's signature
    ) -> tuple[bool, dict[str, Any] | None]:
        """Chunks to be saved were copied in the step that computed them, so the blocks may go."""
        self._planner.forget(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """vLLM asks for this when weights have changed."""
        self._planner.start_over()
        return True

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        groups = [
            registered_pages(self._facts.dtype, one, kv_caches, self._vllm_config, self._n_blocks)
            for one in self._groups
        ]
        for one in groups:
            one.codec.compile(one.pages.coded_dtype)
        self._mover = self._side = PageMover(groups, self._store, self._facts.rank, self._settings.threads)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002  vLLM's signature
        for order in self._metadata().loads:
            self._mover.start_load(order)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done before vLLM schedules their requests."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All layers of a chunk are saved together, after the step."""

    def wait_for_save(self) -> None:
        for order in self._metadata().saves:
            self._mover.save(order)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002
        loaded = self._mover.take_loaded()
        return KVConnectorTransferResults(finished_recving=loaded, failed_recving=self._mover.take_failed())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._mover.take_unfilled()

    # Both

    @property
    def requires_kv_delivery(self) -> bool:
        """A chunk that is not saved is a later miss, no more."""
        return False

    def get_kv_connector_stats(self) -> KvtcStats | None:
        news = self._side.counts.take() if self._side is not None else {}
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
        if self._side is not None:
            self._side.close()
            logger.info("kvtc, %s: %s", self.role.name.lower(), dict(self._side.counts.read()))
        self._store.close()

    def _metadata(self) -> KvtcMetadata:
        metadata = self._get_connector_metadata()
        if not isinstance(metadata, KvtcMetadata):
            raise TypeError(f"metadata of another connector: {type(metadata).__name__}")
        return metadata

    def _make_planner(self) -> PrefixPlanner:
        """Loads every worker's calibration, one after the other, for its names: a missing file ends
        the start."""
        model = served_model(self._vllm_config, self._settings)
        logger.info("kvtc: entries are of the model %s, their identity is %s", model.weights, model.identity)
        owners, groups = [], []
        for worker in range(len(self._facts.shards)):
            coded = worker_codecs(self._facts, worker, self._settings, model)
            owners.append([one.names for one in coded])
            groups = [one.group for one in coded]
        return PrefixPlanner(self._store, model.scope, owners, groups)


def _settings(transfer: Any) -> EngineSettings:
    """The options of vLLM's `KVTransferConfig`."""
    if transfer.kv_load_failure_policy != "recompute":
        raise InvalidArgument(
            "an entry of a store may be gone or damaged: set kv_load_failure_policy to recompute in the KV transfer "
            f"configuration, so that its tokens are computed; it is {transfer.kv_load_failure_policy}, which ends the request"
        )
    return EngineSettings.from_config(transfer.kv_connector_extra_config)
