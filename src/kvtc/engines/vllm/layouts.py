"""How vLLM lays out pages: in the tensors of a worker, and in the rows of host memory that a tier
is given."""

from __future__ import annotations

import math
from typing import Any

import torch
import vllm
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.utils import get_pp_indices
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform

from ...cache import CacheExtent
from ...errors import UnsupportedLayout
from ...key_digest import digest
from ..latent_layout import LatentLayout
from ..opaque_layout import OpaqueLayout, numbers_of
from ..page_layout import CACHE_DTYPES, PageLayout, cache_dtype, vllm_layout
from ..served_model import ServedModel
from ..settings import PREFIX, CacheShard, EngineSettings
from ..windowless_codec import WindowlessCodec
from .facts import CPU_BACKEND, layers_in_order, scales_of
from .group_codecs import GroupCodec
from .page_groups import PageGroup
from .page_mover import EnginePages, GroupPages
from .tier_jobs import RowShard

logger = init_logger(f"vllm.{__name__}")


def layer_ranges(vllm_config: Any) -> list[tuple[int, int]]:
    """(first layer, number of layers) of each pipeline-parallel rank."""
    n_layers = vllm_config.model_config.get_total_num_hidden_layers()
    size = vllm_config.parallel_config.pipeline_parallel_size
    bounds = (get_pp_indices(n_layers, rank, size) for rank in range(size))
    return [(first, stop - first) for first, stop in bounds]


def engine_version() -> str:
    """vLLM and the kind of device: pages of unknown kinds belong to them."""
    return f"{vllm.__version__} {current_platform.device_type}"


def registered_pages(
    dtype: torch.dtype | None, one: GroupCodec, kv_caches: dict[str, Any], vllm_config: Any, n_blocks: int
) -> GroupPages:
    """The pages of a group of a worker.

    Parameters:
        dtype: Of the cache; None: not known.
        one: The group and its codec.
        kv_caches: Of each layer by name, as vLLM registers them: of plain pages [B, H, N, 2 D], of
            others [B, ..].
        vllm_config: vLLM's configuration.
        n_blocks: Blocks of vLLM; a tensor may hold several pages for each.

    Raises:
        UnsupportedLayout: kvtc does not read these pages.
    """
    group = one.group
    tensors = [kv_caches[name] for name in group.layer_names]
    if others := {type(tensor).__name__ for tensor in tensors if not isinstance(tensor, torch.Tensor)}:
        raise UnsupportedLayout(
            f"vLLM registered {', '.join(others)} for {group.kind}; expected a tensor for each layer"
        )
    if one.extent is None or dtype is None:
        pages = _opaque_pages(group, tensors, n_blocks)
    elif one.codec.calibration is not None and group.latent_width:
        layout = LatentLayout.of(one.codec.calibration.geometry, _tokens_of_pages(group, tensors, n_blocks))
        pages = EnginePages(tensors, layout, group.page_tokens, dtype, group.tables)
    else:
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, list(group.layer_names))
        backends = {layer.get_attn_backend().get_name() for layer in layers.values()}
        plain = _plain_layout(group, one.extent, tensors, backends, vllm_config)
        scales = None if one.codec.calibration is None else scales_of(layers, group.layer_names, dtype)
        pages = EnginePages(tensors, plain, group.page_tokens, dtype, group.tables, scales)
    how = "lossless" if one.codec.codec.is_lossless else one.codec.codec.settings.profile
    logger.info("kvtc keeps %s: %s, %s, %s", group.kind, how, pages.layout, pages.dtype)
    return GroupPages(group, pages, one.codec)


def _plain_layout(
    group: PageGroup, extent: CacheExtent, tensors: list[torch.Tensor], backends: set[str], vllm_config: Any
) -> PageLayout:
    """Of pages of keys and values."""
    page_tokens = tensors[0].shape[2] if tensors[0].dim() == 4 else 0
    expected = (extent.n_kv_heads, page_tokens, 2 * extent.head_dim)
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if not page_tokens or shapes != {expected} or group.page_tokens % page_tokens or len(tensors) != extent.n_layers:
        raise UnsupportedLayout(
            f"vLLM registered {len(tensors)} caches of shapes [blocks, {'; '.join(map(str, shapes))}]; expected "
            f"{extent.n_layers} of {expected} with a divisor of {group.page_tokens} tokens"
        )
    if len(backends) != 1:
        raise UnsupportedLayout(f"layers attend by different backends: {', '.join(sorted(backends))}; expected one")
    (backend,) = backends
    isa = None
    if backend == CPU_BACKEND:
        model, cache = vllm_config.model_config, vllm_config.cache_config
        isa = _cpu_isa(model.dtype, page_tokens, extent.head_dim, cache.cache_dtype)
    return vllm_layout(*extent.sizes, page_tokens, backend=backend, isa=isa)


def _opaque_pages(group: PageGroup, tensors: list[torch.Tensor], n_blocks: int) -> EnginePages:
    """Pages of which only the size is known."""
    page_tokens = _tokens_of_pages(group, tensors, n_blocks)
    layout = OpaqueLayout(group.layers, page_tokens, math.prod(tensors[0].shape[1:]) // page_tokens)
    return EnginePages(tensors, layout, group.page_tokens, numbers_of(tensors[0].dtype), group.tables)


def _tokens_of_pages(group: PageGroup, tensors: list[torch.Tensor], n_blocks: int) -> int:
    """Tokens of a page of these tensors, of which each block of vLLM has one or several; all layers have as many numbers."""
    (shape, dtype), *others = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors}
    inner, rest = divmod(shape[0], n_blocks)
    if others or rest or not inner or group.page_tokens % inner or math.prod(shape[1:]) % (group.page_tokens // inner):
        raise UnsupportedLayout(
            f"vLLM registered caches {shape}, {dtype} {others or ''} for {n_blocks} blocks of {group.page_tokens} tokens"
        )
    return group.page_tokens // inner


def row_shards(
    config: Any, settings: EngineSettings, model: ServedModel, backend: str | None, row_bytes: int
) -> list[RowShard]:
    """The parts of a row of host memory that are coded by themselves: the workers' shards side by
    side, or the whole row.

    Parameters:
        config: The configuration that vLLM gives a tier.
        settings: The tier's options.
        model: The model that is served.
        backend: The attention backend, if the user names it.
        row_bytes: Of a row.

    Raises:
        UnsupportedLayout: kvtc does not read such rows.
        KvtcError, FileNotFoundError: As `EngineSettings.read_calibration` and
            `ServedModel.checked`.
    """
    reason = _why_opaque(config)
    if settings.lossless or reason is not None:
        if not settings.lossless:
            logger.info("kvtc keeps rows of host memory without loss: %s", reason)
        return [_whole_row(config, settings, row_bytes)]
    dtype = cache_dtype(config.model.dtype)
    page_tokens, n_layers = config.groups[0].tokens_per_block, len(layers_in_order(config.groups[0].layer_names))
    # A canonical row is that of one worker which holds all heads.
    n_ranks, n_parts = (1, config.parallel.tp_size) if config.canonical_layout else (config.parallel.tp_size, 1)
    shards = []
    for rank in range(n_ranks):
        calibration, calibration_name = settings.read_calibration(rank)
        geometry = calibration.geometry
        first_head = rank * geometry.n_kv_heads
        shard = CacheShard(tuple(range(n_layers)), first_head, geometry.n_kv_heads, *geometry.dims, rank)
        model.checked(shard.checked(calibration, calibration_name), calibration_name)
        name, isa = _backend(backend, dtype, page_tokens, geometry.head_dim)
        layout = vllm_layout(*shard.sizes, page_tokens, backend=name, isa=isa, axes=config.kv_cache_layout)
        n_bytes = layout.bytes(page_tokens, dtype)
        if n_bytes != n_parts * config.worker_kv_bytes_per_block:
            raise UnsupportedLayout(
                f"a worker's block has {config.worker_kv_bytes_per_block} bytes; {geometry.describe()} in {dtype} takes {n_bytes}"
            )
        offset = rank * n_bytes * config.cache.blocks_per_chunk
        codec = WindowlessCodec(calibration, settings)
        codec.compile(dtype)
        shards.append(RowShard(offset, layout, dtype, codec))
    return shards


def _why_opaque(config: Any) -> str | None:
    """Why rows cannot be read as keys and values; None where they can."""
    parallel = config.parallel
    sizes = {name: getattr(parallel, name) for name in ("pp_size", "pcp_size", "dcp_size")}
    if len(config.groups) != 1:
        return f"layers cache in {len(config.groups)} different ways"
    if set(sizes.values()) != {1}:
        return f"{sizes}: a row is of several pipeline or context ranks (KvtcConnector codes those of pipelines)"
    if config.replicated_layout:
        return "it holds latents"
    if config.canonical_layout and not parallel.is_parallelism_agnostic:
        return "its canonical layout does not divide by heads"
    if config.model.dtype not in CACHE_DTYPES:
        return f"its numbers are {config.model.dtype}"
    if CACHE_DTYPES[config.model.dtype].itemsize == 1:
        return "the cache is fp8, and vLLM does not tell a tier the scales of its numbers (KvtcConnector reads them)"
    return None


def _whole_row(config: Any, settings: EngineSettings, row_bytes: int) -> RowShard:
    """A row whose contents are not known."""
    parallel = config.parallel
    n_workers = 1 if config.replicated_layout else parallel.world_size
    used = min(n_workers * config.worker_kv_bytes_per_block * config.cache.blocks_per_chunk, row_bytes)
    dtype = numbers_of(CACHE_DTYPES.get(config.model.dtype, torch.uint8))
    n_tokens = config.groups[0].tokens_per_block * config.cache.blocks_per_chunk
    n_layers = n_workers * len(config.groups[0].layer_names)
    if used % (2 * n_layers * n_tokens * dtype.itemsize):
        n_layers, n_tokens = 1, 1
    layout = OpaqueLayout(tuple(range(n_layers)), n_tokens, used // (n_layers * n_tokens * dtype.itemsize))
    codec = WindowlessCodec(None, settings)
    codec.compile(dtype)
    ranks = [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size]
    name = digest(
        "rows of host memory",
        version=engine_version(),
        layout=config.kv_cache_layout,
        ranks="canonical" if config.canonical_layout else ranks,
        layers=[list(group.layer_names) for group in config.groups],
    )
    return RowShard(0, layout, dtype, codec, name)


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
