"""vLLM's tiered offloading on a CPU: its TieringOffloadingSpec, but pages are copied by torch.

`TieringOffloadingSpec` itself refuses whatever is not a GPU, in `get_worker`. Everything else, the tier above all, is as on a GPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.gpu_worker import _build_copy_plan, _canonical_block_sizes
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyWorker(OffloadingWorker):
    """Copies blocks of the engine to chunks of the shared region and back, at once.

    In canonical rows a worker's block lies in fragments, where vLLM's own plan of its copies has them.
    """

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: SharedOffloadRegion, is_canonical: bool) -> None:
        self._refs = kv_caches.group_data_refs
        self._sizes = [cache.page_size_bytes for cache in kv_caches.tensors]  # of a block in a chunk
        if is_canonical:
            self._sizes = _canonical_block_sizes(self._refs, len(kv_caches.tensors))
        self._fragments = [[self._fragments_of(ref, is_canonical) for ref in refs] for refs in self._refs]
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._ends: list[TransferResult] = []
        self._blocks, self._chunks = [], []
        new_view = region.create_next_canonical_view if is_canonical else region.create_next_worker_view
        for cache, size in zip(kv_caches.tensors, self._sizes, strict=True):
            self._blocks.append(cache.tensor.view(torch.int8).view(-1, cache.page_size_bytes))
            self._chunks.append(new_view(size * blocks_per_chunk))

    @staticmethod
    def _fragments_of(ref: Any, is_canonical: bool) -> list[tuple[int, int, int]]:
        """(offset in the worker's block, offset in the block of a chunk, bytes)."""
        if not is_canonical:
            return [(0, 0, ref.page_size_bytes)]
        assert ref.mapping.num_writers == 1
        plan = _build_copy_plan(ref, gpu_to_cpu=True)
        parts = (plan.frag_offsets_src, plan.frag_offsets_dst, plan.frag_sizes)
        return list(zip(*(part.tolist() for part in parts), strict=True))

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
        started, first, n_bytes = time.monotonic(), 0, 0
        groups = zip(self._refs, self._fragments, blocks.group_sizes, blocks.block_indices, strict=True)
        for refs, fragments, n_blocks, index in groups:
            skipped = index % self._blocks_per_chunk
            for place, block in enumerate(blocks.block_ids[first : first + n_blocks], start=skipped):
                chunk, inner = divmod(place, self._blocks_per_chunk)
                for ref, its in zip(refs, fragments, strict=True):
                    in_engine = self._blocks[ref.tensor_idx][int(block)]
                    in_chunk = self._chunks[ref.tensor_idx][int(chunk_ids[chunk])][
                        inner * self._sizes[ref.tensor_idx] :
                    ]
                    for begin, chunk_begin, size in its:
                        here, there = in_engine[begin : begin + size], in_chunk[chunk_begin : chunk_begin + size]
                        target, source = (there, here) if is_store else (here, there)
                        target.copy_(source)
                        n_bytes += size
            first += n_blocks
        self._ends.append(TransferResult(job_id, True, n_bytes, time.monotonic() - started))
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
            if self.config.canonical_layout:
                self._validate_canonical_refs(kv_caches)
            self._worker = CopyWorker(kv_caches, self.blocks_per_chunk, region, self.config.canonical_layout)
        return self._worker
