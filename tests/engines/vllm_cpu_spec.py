"""vLLM's tiered offloading on a CPU: its TieringOffloadingSpec, but pages are copied by torch.

`TieringOffloadingSpec` itself refuses whatever is not a GPU, in `get_worker`. Everything else, the tier above all, is as on a GPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyWorker(OffloadingWorker):
    """Copies blocks of the engine to chunks of the shared region and back, at once."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._refs = kv_caches.group_data_refs
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._ends: list[TransferResult] = []
        self._blocks, self._chunks = [], []
        for cache in kv_caches.tensors:
            self._blocks.append(cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes))
            self._chunks.append(region.create_next_worker_view(cache.page_size_bytes * blocks_per_chunk))

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, dst_spec.block_ids, is_store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec.block_ids, is_store=False)

    def get_finished(self) -> list[TransferResult]:
        ends, self._ends = self._ends, []
        return ends

    def wait(self, job_ids: set[int]) -> None:
        """Every job is done when it is submitted."""

    def shutdown(self) -> None:
        self._blocks, self._chunks = [], []
        self._region.cleanup()

    def _copy(self, job_id: int, blocks: GPULoadStoreSpec, chunk_ids: Any, is_store: bool) -> bool:
        begin, first, n_bytes = time.monotonic(), 0, 0
        for refs, n_blocks, index in zip(self._refs, blocks.group_sizes, blocks.block_indices, strict=True):
            skipped = index % self._blocks_per_chunk
            for place, block in enumerate(blocks.block_ids[first : first + n_blocks], start=skipped):
                chunk, inner = divmod(place, self._blocks_per_chunk)
                for ref in refs:
                    size = ref.page_size_bytes
                    in_engine = self._blocks[ref.tensor_idx][int(block)]
                    in_chunk = self._chunks[ref.tensor_idx][int(chunk_ids[chunk]), inner * size : (inner + 1) * size]
                    target, source = (in_chunk, in_engine) if is_store else (in_engine, in_chunk)
                    target.copy_(source)
                    n_bytes += size
            first += n_blocks
        self._ends.append(TransferResult(job_id, True, n_bytes, time.monotonic() - begin))
        return True


class CpuTieringSpec(TieringOffloadingSpec):
    """As its parent, for vLLM's CPU platform."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
