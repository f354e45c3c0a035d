"""What kvtc needs to know of an SGLang server, read from SGLang's own objects, or refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.runtime_context import get_lora, get_model

from ...cache import CacheGeometry
from ...calibration import Calibration
from ...errors import InvalidArgument, UnsupportedLayout, UnsupportedModel
from ...huggingface.model_files import files_identity, find_model
from ...key_digest import Part
from ..opaque_layout import OpaqueLayout
from ..page_layout import PageLayout, sglang_layout
from ..served_model import ServedModel, refuse_dummy_weights
from ..settings import PREFIX, EngineSettings
from ..windowless_codec import CHUNK_TOKENS
from .host_pages import HostPages


@dataclass(frozen=True)
class PageForm:
    """In which form the pages of a pool are stored.

    Parameters:
        layout: Of a page; None: the pool holds nothing.
        calibration: By which they are coded; None: they come back bit for bit.
        key: What keys of entries say of a page besides its calibration.
        words: The form, for the log.
    """

    layout: PageLayout | OpaqueLayout | None
    calibration: Calibration | None
    key: list[Part]
    words: str


def page_form(pages: HostPages, calibration: Calibration | None, storage_config: Any) -> PageForm:
    """The form of the pages of a pool.

    Parameters:
        pages: Of the pool.
        calibration: Of this rank; None: everything comes back bit for bit.
        storage_config: SGLang's configuration of storage.

    Raises:
        InvalidArgument: The calibration covers other layers or heads than the pool of keys and
            values, or its pages do not fit kvtc's chunks.
        UnsupportedModel: A rank holds some tokens of a page.
        UnsupportedLayout: kvtc does not read the layout of the pool of keys and values.
    """
    sizes = pages.head_sizes
    if pages.n_values == 0:
        return PageForm(None, None, [], "holds nothing")
    if sizes is None:
        return _exact(pages, pages.opaque_layout, "latents, states or packed numbers")
    if calibration is not None and pages.dtype.itemsize > 1:
        if pages.name == PoolName.KV:
            return _coded(pages, sizes, calibration.of_group(0), storage_config)
        for number, group in enumerate(calibration.groups):
            if number and pages.name == PoolName.SWA and _is_of(group.geometry, sizes):
                return _coded(pages, sizes, calibration.of_group(number), storage_config)
    if calibration is None:
        why = f"{PREFIX}lossless"
    else:
        why = (
            "the calibration does not cover them"
            if pages.dtype.itemsize > 1
            else "numbers of 8 bits with unknown scales"
        )
    try:
        return _exact(pages, sglang_layout(pages.pool.layout, *sizes, pages.page_tokens), why)
    except UnsupportedLayout:
        return _exact(pages, pages.opaque_layout, why)


def is_replicated(pages: HostPages, storage_config: Any) -> bool:
    """Whether all tensor-parallel ranks hold the same pages, of which SGLang stores those of the first: latents and what goes
    with them."""
    return storage_config.is_mla_model and pages.name != PoolName.MAMBA and not hasattr(pages.pool, "head_num")


def _is_of(geometry: CacheGeometry, sizes: tuple[int, int, int]) -> bool:
    return (geometry.n_layers, geometry.n_kv_heads, *geometry.dims) == (*sizes, sizes[2])


def _coded(pages: HostPages, sizes: tuple[int, int, int], calibration: Calibration, storage_config: Any) -> PageForm:
    geometry, n_tokens = calibration.geometry, pages.page_tokens
    without = f"{PREFIX}lossless in place of {PREFIX}calibration keeps them as they are"
    if storage_config.attn_cp_size != 1:
        raise UnsupportedModel(
            f"context-parallel ranks hold some tokens of a page; kvtc needs all to code them; {without}"
        )
    if not _is_of(geometry, sizes):
        raise InvalidArgument(
            f"the calibration covers {geometry.describe()}; this rank holds {sizes[0]} layers of {sizes[1]} key-value heads "
            f"of {sizes[2]} features; {without}"
        )
    if CHUNK_TOKENS % n_tokens and n_tokens % CHUNK_TOKENS:
        raise InvalidArgument(
            f"pages of {n_tokens} tokens; expected a multiple or a divisor of {CHUNK_TOKENS}; {without}"
        )
    layout = sglang_layout(pages.pool.layout, *sizes, n_tokens)
    return PageForm(layout, calibration, [n_tokens, str(pages.dtype)], "coded with the calibration")


def _exact(pages: HostPages, layout: PageLayout | OpaqueLayout, why: str) -> PageForm:
    if isinstance(layout, PageLayout):  # one form for all layouts
        shape: list[Part] = [layout.n_layers, layout.n_kv_heads, layout.head_dim]
    else:
        shape = [str(pages.pool.layout), len(layout.layers), layout.token_values, pages.n_values]
    return PageForm(layout, None, [layout.page_tokens, str(pages.dtype), *shape], f"kept bit for bit: {why}")


def served_model(settings: EngineSettings, name: str | None) -> ServedModel:
    """The model of SGLang's server, with the configuration that the server was given besides the
    model's files.

    SGLang's hashes of pages know an adapter by its name and path, so the weights of the adapters
    that were given at start are part of the model's identity.

    Parameters:
        settings: The options of kvtc.
        name: The model's name in SGLang's storage configuration, used outside of a server.

    Raises:
        UnknownModel: It cannot be told which weights are served.
    """
    try:
        model, lora = get_model(), get_lora()
    except ValueError:  # outside of a server there are no settings of one
        return ServedModel.of(settings, name)
    refuse_dummy_weights(settings, model.load_format)
    refs = [ref for ref in lora.lora_paths or () if ref.lora_path]
    adapters = [[ref.lora_name, files_identity(find_model(ref.lora_path))] for ref in refs]
    return ServedModel.of(
        settings,
        model.model_path,
        model.revision,
        is_told=True,
        cache_dir=model.download_dir,
        overrides=json.loads(model.json_model_override_args or "{}"),
        effective={
            "dtype": str(model.dtype),
            "cache_dtype": str(model.kv_cache_dtype),
            "quantization": model.quantization,
            "modelopt_quant": str(model.modelopt_quant),
            "loader": str(model.model_loader_extra_config),
            "adapters": adapters,
        },
    )
