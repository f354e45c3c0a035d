"""How vLLM lays out pages: in the tensors of a worker, and in the rows of host memory that a tier
is given."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform

from ...errors import UnsupportedLayout, UnsupportedModel
from ..page_layout import cache_dtype, vllm_layout
from ..served_model import ServedModel
from ..settings import PREFIX, CacheShard, EngineSettings
from ..windowless_codec import WindowlessCodec
from .facts import CPU_BACKEND, EngineFacts, layers_in_order, refuse_scaled_fp8
from .page_mover import EnginePages
from .tier_jobs import RowShard

logger = init_logger(f"vllm.{__name__}")


def layer_ranges(vllm_config: Any) -> list[tuple[int, int]]:
    """(first layer, number of layers) of each pipeline-parallel rank."""
    n_layers = vllm_config.model_config.get_total_num_hidden_layers()
    size = vllm_config.parallel_config.pipeline_parallel_size
    bounds = (get_pp_indices(n_layers, rank, size) for rank in range(size))
    return [(first, stop - first) for first, stop in bounds]


def registered_pages(facts: EngineFacts, kv_caches: dict[str, torch.Tensor], vllm_config: Any) -> EnginePages:
    """The pages of a worker.

    Parameters:
        facts: Of the engine.
        kv_caches: [B, H, N, 2 D] of each layer by name, as vLLM registers them.
        vllm_config: vLLM's configuration.

    Raises:
        UnsupportedLayout: kvtc does not read these pages.
    """
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, list(facts.layer_names))
    refuse_scaled_fp8(layers, facts.dtype)
    tensors = [kv_caches[name] for name in facts.layer_names]
    backends = {layer.get_attn_backend().get_name() for layer in layers.values()}
    shard, page_tokens = facts.shard, tensors[0].shape[2]
    expected = (shard.n_kv_heads, page_tokens, 2 * shard.head_dim)
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if shapes != {expected} or facts.page_tokens % page_tokens or len(tensors) != shard.n_layers:
        raise UnsupportedLayout(
            f"vLLM registered {len(tensors)} caches of shapes [blocks, {'; '.join(map(str, shapes))}]; expected "
            f"{shard.n_layers} of {expected} with a divisor of {facts.page_tokens} tokens"
        )
    if len(backends) != 1:
        raise UnsupportedLayout(f"layers attend by different backends: {', '.join(sorted(backends))}; expected one")
    (backend,) = backends
    isa = None
    if backend == CPU_BACKEND:
        model, cache = vllm_config.model_config, vllm_config.cache_config
        isa = _cpu_isa(model.dtype, page_tokens, shard.head_dim, cache.cache_dtype)
    layout = vllm_layout(*shard.sizes, page_tokens, backend=backend, isa=isa)
    logger.info("kvtc codes pages of %s, %s, %s", backend, layout, facts.dtype)
    return EnginePages(tensors, layout, facts.page_tokens, facts.dtype)


def row_shards(config: Any, settings: EngineSettings, model: ServedModel, backend: str | None) -> list[RowShard]:
    """The workers' shards of a row of host memory, side by side.

    Parameters:
        config: The configuration that vLLM gives a tier.
        settings: The tier's options.
        model: The model that is served.
        backend: The attention backend, if the user names it.

    Raises:
        UnsupportedLayout, UnsupportedModel: kvtc does not read such rows.
        KvtcError, FileNotFoundError: As `EngineSettings.read_calibration` and
            `ServedModel.checked`.
    """
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
    shards = []
    for rank in range(parallel.tp_size):
        calibration, calibration_name = settings.read_calibration(rank)
        geometry = calibration.geometry
        first_head = rank * geometry.n_kv_heads
        shard = CacheShard(tuple(range(n_layers)), first_head, geometry.n_kv_heads, *geometry.dims, rank)
        model.checked(shard.checked(calibration, calibration_name), calibration_name)
        name, isa = _backend(backend, dtype, page_tokens, geometry.head_dim)
        layout = vllm_layout(*shard.sizes, page_tokens, backend=name, isa=isa, axes=config.kv_cache_layout)
        n_bytes = layout.bytes(page_tokens, dtype)
        if n_bytes != config.worker_kv_bytes_per_block:
            raise UnsupportedLayout(
                f"a worker's block has {config.worker_kv_bytes_per_block} bytes; {geometry.describe()} in {dtype} takes {n_bytes}"
            )
        offset = rank * n_bytes * config.cache.blocks_per_chunk
        codec = WindowlessCodec(calibration, settings)
        codec.compile(dtype)
        shards.append(RowShard(offset, layout, dtype, codec))
    return shards


def _backend(named: str | None, dtype: torch.dtype, page_tokens: int, head_dim: int) -> tuple[str, str | None]:
    """(attention backend, isa): on CPUs there is one backend; elsewhere vLLM does not say which, so
    the user must name it."""
    if current_platform.is_cpu():
        return CPU_BACKEND, _cpu_isa(dtype, page_tokens, head_dim)
    if named is None:
        raise UnsupportedLayout(
            f"vLLM does not tell a tier its attention backend: give {PREFIX}attention_backend, as vLLM logs it at start "
            "(FLASH_ATTN, ..)"
        )
    return named, None


def _cpu_isa(*arguments: Any) -> str:
    """The instruction set for which vLLM's CPU backend packs pages."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa: str = _get_attn_isa(*arguments)
    return isa
