"""A secondary tier for vLLM's native offloading: chunks leave host memory as streams, into any
store.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592, "block_size": 256,
        "secondary_tiers": [{"type": "KvtcTier", "module_path": "kvtc.engines.vllm.tier",
            "kvtc.attention_backend": "FLASH_ATTN", "kvtc.calibration": "model.safetensors",
            "kvtc.store": "file:///var/cache/kvtc"}]}}'

vLLM runs a tier in its scheduler's process, so nothing here computes or waits. Two objects work on
threads:

    lookup, on_schedule_end                       -> StoreLookups: which chunks are in the store
    submit_store, submit_load, get_finished_jobs  -> TierJobs: chunks from host memory into the store, and back

vLLM names chunks by hashes and says where they stand. Written for vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from ...errors import InvalidArgument
from ...store import open_store
from ..served_model import ServedModel
from ..settings import PREFIX, TEXT, EngineSettings
from .layouts import row_shards
from .metrics import tier_metric_definitions, tier_stats
from .tier_jobs import TierChunk, TierJobs
from .tier_lookups import StoreLookups

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class TierSettings(EngineSettings):
    """The options of a tier.

    Parameters:
        attention_backend: Of vLLM, as it logs it at start, such as FLASH_ATTN; None: on CPUs, where
            there is one.
    """

    attention_backend: str | None = field(default=None, metadata=TEXT)


class KvtcTier(SecondaryTierManager):
    """The tier.

    Parameters:
        offloading_spec, tier_type, backpressure_detector: vLLM's.
        primary_kv_view: [chunks, bytes], the host memory.
        options: Those of docs/guides/vllm.md.

    Raises:
        KvtcError, FileNotFoundError: Whatever cannot work is refused when vLLM starts.
    """

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
        settings = TierSettings.from_config(options)
        if others := sorted(name for name in options if not name.startswith(PREFIX)):
            raise InvalidArgument(f"unknown option {others[0]}; those of kvtc begin with {PREFIX}")
        model = ServedModel.of(settings, config.model.name, effective={"cache_dtype": config.model.dtype})
        self._n_tokens = config.groups[0].tokens_per_block * config.cache.blocks_per_chunk
        rows = np.asarray(primary_kv_view).view(np.uint8)
        shards = row_shards(config, settings, model, settings.attention_backend, rows.shape[1])
        # With windows or states vLLM asks for some chunks of a text, in any order: each is of use by itself.
        self._are_alone = len(config.groups) > 1
        self._needs_positions = not all(shard.is_opaque for shard in shards)
        self._store = open_store(settings.store)
        self._jobs = TierJobs(rows, shards, self._store, model.scope, self._n_tokens, settings.threads)
        self._lookups = StoreLookups(self._jobs.entries)
        self._load_jobs: dict[int, tuple[str, tuple[OffloadKey, ...]]] = {}

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:  # noqa: ARG002  vLLM's signature
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        start = self._start(key, req_context)
        if start is None and self._needs_positions:
            return LookupResult.MISS
        keys = self._jobs.keys(key)
        found = self._lookups.ask(req_context.req_id, start or 0, keys[0], keys, is_alone=self._are_alone)
        return LookupResult.RETRY if found is None else LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:  # noqa: ARG002  vLLM's signature
        self._lookups.flush()

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._jobs.store(job_metadata.job_id, self._chunks(job_metadata), job_metadata.req_context.req_id)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._load_jobs[job_metadata.job_id] = (job_metadata.req_context.req_id, tuple(job_metadata.keys))
        self._jobs.load(job_metadata.job_id, self._chunks(job_metadata), job_metadata.req_context.req_id)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results = []
        for end in self._jobs.take_ends():
            request_id, keys = self._load_jobs.pop(end.job_id, ("", ()))
            loaded = tuple(OffloadKey(name) for name in end.done) if keys and not end.success else None
            if loaded is not None:
                # vLLM asks again for the chunks that failed: the answer must be that they are
                # missing.
                failed = [self._jobs.keys(key)[0] for key in set(keys) - set(loaded)]
                self._lookups.set_missing(request_id, failed)
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
        """Position of a chunk's first token; vLLM says where it ends."""
        stop = req_context.get_offload_key_position(key)
        return None if stop is None else stop - self._n_tokens

    def _chunks(self, job: TransferJob) -> list[TierChunk]:
        return [
            TierChunk(bytes(key), int(row), self._start(key, job.req_context))
            for key, row in zip(job.keys, job.chunk_ids, strict=True)
        ]
