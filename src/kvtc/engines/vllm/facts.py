"""What kvtc needs to know of a vLLM engine, read from vLLM's own objects, or refused.

Nothing of vLLM is imported here: its objects are only read. Attribute names are those of vLLM 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch

from ...errors import UnsupportedLayout, UnsupportedModel
from ...huggingface.model_files import UnknownModel, config_of, files_identity, find_model, without_effect
from ...key_digest import Part, digest
from ..page_layout import cache_dtype
from ..served_model import ServedModel, refuse_dummy_weights
from ..settings import PREFIX, CacheShard, EngineSettings, worker_shards

CPU_BACKEND = "CPU_ATTN"


@dataclass(frozen=True)
class EngineFacts:
    """How a vLLM engine caches.

    Parameters:
        shards: What each worker holds, by global rank.
        rank: Global rank of this process.
        page_tokens: Tokens of a block.
        dtype: Of the cache.
        layer_names: vLLM's names of the layers that this process holds, in their order.
    """

    shards: list[CacheShard]
    rank: int
    page_tokens: int
    dtype: torch.dtype
    layer_names: tuple[str, ...]

    @property
    def shard(self) -> CacheShard:
        """What this process holds."""
        return self.shards[self.rank]


def engine_facts(
    vllm_config: Any, kv_cache_config: Any, layer_ranges: list[tuple[int, int]] | None = None
) -> EngineFacts:
    """The facts of an engine.

    Parameters:
        vllm_config, kv_cache_config: vLLM's `VllmConfig` and `KVCacheConfig`.
        layer_ranges: (first layer, number of layers) of each pipeline-parallel rank; None: one rank
            has all.

    Raises:
        UnsupportedModel: The model's caches are not keys and values of full attention.
        UnsupportedLayout: kvtc cannot read the dtype of the cache.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.use_mla:
        raise UnsupportedModel("this model caches latents (MLA); kvtc codes keys and values of heads")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) != 1:
            raise UnsupportedModel(f"{name} is {size}: a worker then holds some tokens of a page; kvtc needs all")
    spec, layer_names = _only_group(kv_cache_config.kv_cache_groups)
    cache_name = vllm_config.cache_config.cache_dtype
    name = str(model.dtype).removeprefix("torch.") if cache_name == "auto" else cache_name
    shards = worker_shards(
        model.get_total_num_hidden_layers(),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        parallel.tensor_parallel_size,
        layer_ranges,
    )
    return EngineFacts(shards, parallel.rank, spec.block_size, cache_dtype(name), layer_names)


def layers_in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Names such as `model.layers.3.self_attn.attn`, sorted by the layer they name. Raises
    `UnsupportedModel`."""
    found = [re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name) for name in names]
    if any(len(numbers) != 1 for numbers in found) or len({numbers[0] for numbers in found}) != len(names):
        raise UnsupportedModel(f"expected names that each tell one layer's number; got {', '.join(names[:4])} ..")
    return tuple(name for _, name in sorted(zip((int(numbers[0]) for numbers in found), names, strict=True)))


def refuse_scaled_fp8(layers: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Raise `UnsupportedLayout` if an fp8 cache holds values divided by a scale: streams would
    depend on the engine's scales."""
    if dtype.itemsize != 1:
        return
    for name, layer in layers.items():
        scales = [float(getattr(layer, f"_{side}_scale_float", 1.0)) for side in ("k", "v")]
        if scales != [1.0, 1.0]:
            raise UnsupportedLayout(
                f"the fp8 cache of layer {name} is scaled by {scales[0]} (keys) and {scales[1]} (values); kvtc reads fp8 caches "
                "of scale 1"
            )


def served_model(vllm_config: Any, settings: EngineSettings) -> ServedModel:
    """The model of vLLM's `VllmConfig`, with the configuration that vLLM was given besides the
    model's files.

    Raises:
        UnknownModel: It cannot be told which weights are served.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    refuse_dummy_weights(settings, load.load_format)
    overrides = model.hf_overrides
    if not isinstance(overrides, Mapping):
        if settings.identity is None:
            raise UnknownModel(
                f"hf_overrides is a function, which has no name: give {PREFIX}identity, a name for the model"
            )
        overrides = {}
    effective: dict[str, Part] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache_dtype": vllm_config.cache_config.cache_dtype,
        "quantization": model.quantization,
        "quantization_config": _plain(model.quantization_config),
        "loader": _plain(load.model_loader_extra_config),
    }
    if "longrope" in str(model.hf_config):
        effective["max_model_len"] = model.max_model_len  # vLLM chooses between two sets of frequencies by it
    if model.hf_config_path is not None:
        effective["config"] = without_effect(config_of(find_model(model.hf_config_path)))
    return ServedModel.of(
        settings,
        model.model,
        model.revision,
        is_told=True,
        cache_dir=load.download_dir,
        config=model.hf_config,
        overrides=overrides,
        effective=effective,
    )


class Adapters:
    """The identities of LoRA adapters, as they were when their first request came.

    An adapter whose files have changed since may be in memory as it was, or as it is: nobody can
    tell.

    Parameters:
        lora_dtype: In which vLLM computes adapters; None: it serves none.
    """

    def __init__(self, lora_dtype: str | None = None) -> None:
        self._dtype = lora_dtype
        self._known: dict[tuple[int, str], str] = {}

    def request_digest(self, request: Any) -> Callable[[], bytes] | None:
        """Gives the digest of a request's adapter and salt, or raises `UnknownModel`; None: the
        request has neither."""
        lora_request, salt = request.lora_request, request.cache_salt
        if lora_request is None and salt is None:
            return None
        return lambda: digest("request", adapter=lora_request and self.digest(lora_request), salt=salt)

    def digest(self, lora_request: Any) -> bytes:
        """Stands for the weights of an adapter. Raises `UnknownModel`."""
        path = lora_request.lora_path
        found = files_identity(find_model(path))
        key = lora_request.lora_int_id, path
        if lora_request.load_inplace or key not in self._known:
            self._known[key] = found
        if self._known[key] != found:
            raise UnknownModel(f"the files of the adapter {path} have changed since it was loaded")
        return digest("adapter", weights=found, dtype=self._dtype)


def is_told_apart(request: Any) -> bool:
    """Whether token ids, adapter and salt tell a request's cache from all others: not where it has
    images or embeddings."""
    return not request.mm_features and request.prompt_embeds is None and bool(request.prompt_token_ids)


def step_requests(scheduler_output: Any) -> Iterator[tuple[str, int, list[int]]]:
    """(request, leading tokens that are computed after this step, its blocks) of all requests of a
    `SchedulerOutput`."""
    cached, state = scheduler_output.scheduled_cached_reqs, scheduler_output.kv_connector_block_state
    news = [(new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs]
    for request_id, n_computed in [*news, *zip(cached.req_ids, cached.num_computed_tokens, strict=True)]:
        (block_ids,) = state.get_block_ids(request_id)
        yield request_id, n_computed + scheduler_output.num_scheduled_tokens[request_id], block_ids


def _plain(value: Any) -> Part:
    """A setting of vLLM as a part of a key."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _only_group(groups: Sequence[Any]) -> tuple[Any, tuple[str, ...]]:
    """The specification and layers of the only group of layers."""
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise UnsupportedModel(
            f"layers cache in {len(groups)} different ways ({kinds}); kvtc needs full attention in all"
        )
    spec = groups[0].kv_cache_spec
    windows = (getattr(spec, "sliding_window", None), getattr(spec, "attention_chunk_size", None))
    if type(spec).__name__ != "FullAttentionSpec" or windows != (None, None):
        raise UnsupportedModel(
            f"layers cache as {type(spec).__name__}, window {windows[0]}, attention chunks {windows[1]}; kvtc needs full attention"
        )
    if getattr(spec, "head_size_v", spec.head_size) != spec.head_size:
        raise UnsupportedModel(f"keys of {spec.head_size} features, values of {spec.head_size_v}; kvtc needs the same")
    return spec, layers_in_order(groups[0].layer_names)
