"""A secondary tier for vLLM's native offloading: chunks leave host memory as streams, into any store.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592, "block_size": 256,
        "secondary_tiers": [{"type": "KvtcTier", "module_path": "kvtc.engines.vllm.tier",
            "kvtc.attention_backend": "FLASH_ATTN", "kvtc.calibration": "model.safetensors",
            "kvtc.store": "file:///var/cache/kvtc"}]}}'

vLLM runs a tier in its scheduler's process, so nothing here computes or waits: the work is `TierJobs`' and `StoreLookups`'.
vLLM names chunks by hashes and tells where they stand, but not their token ids, so streams are `joint`; a client that gives the ids
of its prompt as `kv_transfer_params: {"kvtc.token_ids": [..]}` gets `conditional` ones, which only such clients can read again.
Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from ...errors import InvalidArgument, UnsupportedLayout, UnsupportedModel
from ...store import open_store
from ..page_codec import PageCodec
from ..page_layout import cache_dtype, vllm_layout
from ..served_model import ServedModel
from ..settings import PREFIX, CachePart, EngineSettings
from .facts import CPU_BACKEND, layers_in_order
from .metrics import tier_metric_definitions, tier_stats
from .tier_jobs import RowPart, TierChunk, TierJobs
from .tier_lookups import StoreLookups

logger = init_logger(f"vllm.{__name__}")

TOKEN_IDS = f"{PREFIX}token_ids"
_BACKEND = f"{PREFIX}attention_backend"


class KvtcTier(SecondaryTierManager):
    """Options: docs/guides/vllm.md. What cannot work is refused here, at start."""

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        config = offloading_spec.config
        backend = options.pop(_BACKEND, None)
        settings = EngineSettings.from_config(options)
        if others := sorted(name for name in options if not name.startswith(PREFIX)):
            raise InvalidArgument(f"unknown option {others[0]}; those of kvtc begin with {PREFIX}")
        model = ServedModel.of(settings, config.model.name, effective={"cache_dtype": config.model.dtype})
        self._n_tokens = config.groups[0].tokens_per_block * config.cache.blocks_per_chunk
        self._store = open_store(settings.store)
        self._jobs = TierJobs(
            np.asarray(primary_kv_view).view(np.uint8),
            _row_parts(config, settings, model, backend),
            self._store,
            model.scope,
            self._n_tokens,
            settings.threads,
        )
        self._lookups = StoreLookups(self._jobs.entries)
        self._load_jobs: dict[int, tuple[str, tuple[OffloadKey, ...]]] = {}

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        ids = (req_context.kv_transfer_params or {}).get(TOKEN_IDS)
        if ids is not None:
            req_context.set_state(_TokenIds(ids))
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        start = self._start(key, req_context)
        has_ids = start is not None and _chunk_ids(req_context, start, self._n_tokens) is not None
        if start is None or not self._jobs.serves(has_ids):
            return LookupResult.MISS
        keys = self._jobs.keys(key, has_ids)
        found = self._lookups.ask(req_context.req_id, start, keys[0], keys)
        return LookupResult.RETRY if found is None else LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:  # noqa: ARG002  vLLM's signature
        self._lookups.flush()

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._jobs.store(job_metadata.job_id, self._chunks(job_metadata))

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._load_jobs[job_metadata.job_id] = (job_metadata.req_context.req_id, tuple(job_metadata.keys))
        self._jobs.load(job_metadata.job_id, self._chunks(job_metadata))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for end in self._jobs.take_ends():
            request_id, keys = self._load_jobs.pop(end.job_id, ("", ()))
            loaded = tuple(OffloadKey(name) for name in end.done) if keys and not end.success else None
            if loaded is not None:
                # vLLM asks again for what failed: the answer must be that it is not there.
                failed = set(keys) - set(loaded)
                kinds = [has_ids for has_ids in (True, False) if self._jobs.serves(has_ids)]
                names = [self._jobs.keys(key, has_ids)[0] for key in failed for has_ids in kinds]
                self._lookups.set_missing(request_id, names)
            results.append(JobResult(end.job_id, end.success, loaded, end.seconds, end.n_bytes))
        return results

    def has_pending_work(self) -> bool:
        return self._jobs.is_busy

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._lookups.forget(req_context.req_id)

    def drain_jobs(self) -> None:
        self._jobs.drain()

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        return tier_metric_definitions()

    def get_stats(self) -> Any:
        return tier_stats(self._jobs.counts.take())

    def shutdown(self) -> None:
        self._lookups.close()
        self._jobs.close()
        self._store.close()
        logger.info("kvtc, tier: %s", dict(self._jobs.counts.read()))

    def _start(self, key: OffloadKey, req_context: ReqContext) -> int | None:
        """First token of a chunk; vLLM tells where it ends."""
        stop = req_context.get_offload_key_position(key)
        return None if stop is None else stop - self._n_tokens

    def _chunks(self, job: TransferJob) -> list[TierChunk]:
        chunks = []
        for key, row in zip(job.keys, job.chunk_ids, strict=True):
            start = self._start(key, job.req_context)
            ids = None if start is None else _chunk_ids(job.req_context, start, self._n_tokens)
            chunks.append(TierChunk(bytes(key), int(row), start, ids))
        return chunks


class _TokenIds:
    """The ids of a request's prompt, if its client tells them."""

    def __init__(self, ids: Any) -> None:
        try:
            self.ids: npt.NDArray[np.int64] | None = np.asarray(ids, dtype=np.int64).reshape(-1)
        except (TypeError, ValueError):
            logger.warning("%s is not a list of token ids and is ignored", TOKEN_IDS)
            self.ids = None


def _chunk_ids(req_context: ReqContext, start: int, n_tokens: int) -> npt.NDArray[np.int64] | None:
    """Ids [n_tokens] of a chunk; None where not all are known."""
    told = req_context.get_state(_TokenIds)
    if told is None or told.ids is None or start + n_tokens > len(told.ids):
        return None
    ids: npt.NDArray[np.int64] = told.ids[start : start + n_tokens]
    return ids


def _row_parts(config: Any, settings: EngineSettings, model: ServedModel, backend: str | None) -> list[RowPart]:
    """The workers' parts of a row of host memory, side by side; `UnsupportedLayout` or `UnsupportedModel` where unknown."""
    parallel = config.parallel
    if len(config.groups) != 1:
        raise UnsupportedModel(f"layers cache in {len(config.groups)} different ways; kvtc needs full attention in all")
    sizes = {name: getattr(parallel, name) for name in ("pp_size", "pcp_size", "dcp_size")}
    if set(sizes.values()) != {1}:
        raise UnsupportedModel(f"{sizes}: the tier codes tensor-parallel ranks only; use KvtcConnector for pipelines")
    if config.canonical_layout or config.replicated_layout:
        raise UnsupportedLayout("canonical_layout is not read by kvtc; leave it out")
    dtype = cache_dtype(config.model.dtype)
    if dtype.itemsize == 1:
        raise UnsupportedLayout(
            "the cache is fp8, and vLLM does not tell a tier the scales of its numbers; use KvtcConnector, or a 16-bit cache"
        )
    page_tokens, n_layers = config.groups[0].tokens_per_block, len(layers_in_order(config.groups[0].layer_names))
    parts = []
    for rank in range(parallel.tp_size):
        calibration, calibration_name = settings.read_calibration(rank)
        geometry = calibration.geometry
        part = CachePart(0, n_layers, rank * geometry.n_kv_heads, geometry.n_kv_heads, geometry.head_dim, rank)
        model.checked(part.checked(calibration, calibration_name), calibration_name)
        name, isa = _backend(backend, dtype, page_tokens, geometry.head_dim)
        layout = vllm_layout(
            n_layers,
            geometry.n_kv_heads,
            geometry.head_dim,
            page_tokens,
            backend=name,
            isa=isa,
            axes=config.kv_cache_layout,
        )
        n_bytes = layout.bytes(page_tokens, dtype)
        if n_bytes != config.worker_kv_bytes_per_block:
            raise UnsupportedLayout(
                f"a worker's block has {config.worker_kv_bytes_per_block} bytes; {geometry.describe()} in {dtype} takes {n_bytes}"
            )
        offset = rank * n_bytes * config.cache.blocks_per_chunk
        parts.append(RowPart(offset, layout, dtype, PageCodec(calibration, settings)))
    return parts


def _backend(told: str | None, dtype: Any, page_tokens: int, head_dim: int) -> tuple[str, str | None]:
    """(attention backend, isa): on CPUs there is one; elsewhere vLLM does not tell a tier, so the user must."""
    if not current_platform.is_cpu():
        if told is None:
            raise UnsupportedLayout(
                f"vLLM does not tell a tier its attention backend: give {_BACKEND}, as vLLM logs it at start (FLASH_ATTN, ..)"
            )
        return told, None
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return CPU_BACKEND, _get_attn_isa(dtype, page_tokens, head_dim)
