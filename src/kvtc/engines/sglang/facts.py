"""What kvtc needs to know of an SGLang server, read from SGLang's own objects, or refused."""

from __future__ import annotations

import json
from typing import Any

from sglang.srt.runtime_context import get_lora, get_model

from ...cache import CacheGeometry
from ...errors import InvalidArgument, UnsupportedModel
from ...huggingface.model_files import files_identity, find_model
from ..page_layout import PageLayout, sglang_layout
from ..served_model import ServedModel, refuse_dummy_weights
from ..settings import EngineSettings
from ..windowless_codec import CHUNK_TOKENS


def refuse_other_caches(storage_config: Any) -> None:
    """Raise `UnsupportedModel` unless a page holds keys and values of heads, of all of its
    tokens."""
    if storage_config.is_mla_model:
        raise UnsupportedModel("this model caches latents (MLA); kvtc codes keys and values of heads")
    if storage_config.attn_cp_size != 1:
        raise UnsupportedModel("context-parallel ranks hold some tokens of a page; kvtc needs all")


def host_layout(pool: Any, geometry: CacheGeometry) -> PageLayout:
    """The layout of a page of host memory.

    Parameters:
        pool: SGLang's pool of host memory.
        geometry: Layers and heads of the calibration of this rank.

    Raises:
        InvalidArgument: The calibration covers other layers or heads, or the pages do not fit
            kvtc's chunks.
        UnsupportedLayout: kvtc does not read this layout.
    """
    sizes = (pool.layer_num, pool.head_num, pool.head_dim)
    if sizes != geometry.sizes:
        raise InvalidArgument(
            f"the calibration covers {geometry.describe()}; this rank holds {sizes[0]} layers of {sizes[1]} key-value heads "
            f"of {sizes[2]} features"
        )
    if CHUNK_TOKENS % pool.page_size and pool.page_size % CHUNK_TOKENS:
        raise InvalidArgument(f"pages of {pool.page_size} tokens; expected a multiple or a divisor of {CHUNK_TOKENS}")
    return sglang_layout(pool.layout, *sizes, pool.page_size)


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
