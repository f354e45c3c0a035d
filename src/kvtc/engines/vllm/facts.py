"""What kvtc needs to know of a vLLM engine, read from vLLM's own objects, or refused.

Nothing of vLLM is imported here: its objects are only read. Attribute names are those of vLLM 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import torch

from ...errors import UnsupportedModel
from ...huggingface.model_files import UnknownModel, config_of, files_identity, find_model, without_effect
from ...key_digest import Part, digest
from ..page_layout import CACHE_DTYPES, cache_dtype
from ..served_model import ServedModel, refuse_dummy_weights
from ..settings import PREFIX, CacheShard, EngineSettings, worker_shards
from .page_groups import PageGroup
from .prefix_planner import BlockTables

CPU_BACKEND = "CPU_ATTN"
_NUMBER = r"(?:^|\.)(\d+)(?=\.|$)"
_WHOLE_SPECS = ("FullAttentionSpec", "MLAAttentionSpec", "SinkFullAttentionSpec")
_WINDOW_SPECS = ("SlidingWindowSpec", "ChunkedLocalAttentionSpec")


@dataclass(frozen=True)
class EngineFacts:
    """How a vLLM engine caches.

    Parameters:
        groups: Of the layers that this process holds, as the engine keeps them.
        shards: What each worker holds of each group, by global rank.
        rank: Global rank of this process.
        dtype: Of the cache; None: vLLM calls it by a name that kvtc does not know.
        version: Of vLLM, and the kind of device: pages of unknown kinds belong to them.
    """

    groups: tuple[PageGroup, ...]
    shards: Sequence[tuple[CacheShard, ...]]
    rank: int
    dtype: torch.dtype | None
    version: str = ""


def engine_facts(
    vllm_config: Any, kv_cache_config: Any, layer_ranges: list[tuple[int, int]] | None = None, version: str = ""
) -> EngineFacts:
    """The facts of an engine.

    Parameters:
        vllm_config, kv_cache_config: vLLM's `VllmConfig` and `KVCacheConfig`.
        layer_ranges: (first layer, number of layers) of each pipeline-parallel rank; None: one rank
            has all.
        version: As of `EngineFacts`.

    Raises:
        UnsupportedModel: The model's caches are not those of tokens.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) != 1:
            raise UnsupportedModel(f"{name} is {size}: a worker then holds some tokens of a page; kvtc needs all")
    cache_name = vllm_config.cache_config.cache_dtype
    name = str(model.dtype).removeprefix("torch.") if cache_name == "auto" else cache_name
    dtype = cache_dtype(name) if name in CACHE_DTYPES else None
    groups = page_groups(kv_cache_config.kv_cache_groups, dtype is not None)
    tp_size = parallel.tensor_parallel_size
    if layer_ranges is not None and len(layer_ranges) > 1:
        if len(groups) != 1:
            raise UnsupportedModel(
                f"{len(groups)} kinds of layers in {len(layer_ranges)} pipeline-parallel ranks; kvtc needs one kind, or one rank"
            )
        shards = [
            (shard,)
            for pp_rank, (first, number) in enumerate(layer_ranges)
            for shard in _shards(groups[0], range(first, first + number), model, tp_size, pp_rank)
        ]
    else:
        replicas = getattr(kv_cache_config, "kv_tp_replicas", 1)
        by_group = [_shards(group, group.layers, model, tp_size, replicas=replicas) for group in groups]
        shards = list(zip(*by_group, strict=True))
    return EngineFacts(groups, shards, parallel.rank, dtype, version)


def page_groups(groups: Sequence[Any], is_known_dtype: bool = True) -> tuple[PageGroup, ...]:
    """The layers of an engine by how long their tokens are needed, and in which form.

    Parameters:
        groups: vLLM's `KVCacheGroupSpec`s, one for each block table. It deals layers of one kind to
            several tables; here they are together.
        is_known_dtype: Whether kvtc knows the numbers of the cache.

    Raises:
        UnsupportedModel: Some layers do not cache tokens.
    """
    found: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    for table, group in enumerate(groups):
        for layer in group.layer_names:
            spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(layer, group.kv_cache_spec)
            is_plain = is_known_dtype and _is_plain(spec)
            heads = [spec.num_kv_heads, spec.head_size, 0] if is_plain else [1, 0, 0]
            if is_known_dtype and _is_latent(spec):
                heads = [1, 0, spec.head_size]
            kind = group.kv_cache_spec.block_size, _reach(spec), is_plain, *heads, None if is_plain else repr(spec)
            found.setdefault(kind, []).append((layer, table))
    made = []
    for (page_tokens, reach, is_plain, *heads, _), its in found.items():
        tables = dict(its)
        names = layers_in_order(list(tables))
        made.append(
            PageGroup(
                names,
                tuple(layer_number(layer) for layer in names),
                tuple(tables[layer] for layer in names),
                page_tokens,
                reach,
                is_plain,
                *heads,
            )
        )
    return tuple(made)


def _reach(spec: Any) -> int | None:
    """How many tokens before a position are needed to go on from it; None: all."""
    name = type(spec).__name__
    if name == "SlidingWindowSpec":
        return int(spec.sliding_window) - 1 + int(getattr(spec, "extra_retained_tokens", 0))
    if name == "ChunkedLocalAttentionSpec":
        return int(spec.attention_chunk_size) - 1
    if name not in _WHOLE_SPECS:
        raise UnsupportedModel(
            f"some layers cache as {name}; kvtc's connector needs {', '.join((*_WHOLE_SPECS, *_WINDOW_SPECS))}"
        )
    return None


def _is_plain(spec: Any) -> bool:
    """Whether pages hold keys and values of one width, and no scales between them."""
    if type(spec).__name__ not in ("FullAttentionSpec", *_WINDOW_SPECS):
        return False
    is_packed = (
        getattr(spec, "state_content_bytes", None) is not None or getattr(spec, "num_head_slots", None) is not None
    )
    return not is_packed and getattr(spec, "head_size_v", spec.head_size) == spec.head_size


def _is_latent(spec: Any) -> bool:
    """Whether pages hold latents with their rotary parts, and nothing between them."""
    is_packed = any(
        getattr(spec, name, None) is not None for name in ("state_content_bytes", "num_head_slots", "model_version")
    )
    cache_dtype = getattr(spec, "cache_dtype_str", None) or "auto"
    return (
        type(spec).__name__ == "MLAAttentionSpec" and not is_packed and cache_dtype in ("auto", "bfloat16", "float16")
    )


def _shards(
    group: PageGroup, layers: Sequence[int], model: Any, tp_size: int, pp_rank: int = 0, replicas: int = 1
) -> list[CacheShard]:
    """What the tensor-parallel ranks hold of a group. replicas: neighbours that hold the same."""
    if not group.is_plain:  # in place of heads, which part of the pages it is
        return [CacheShard(tuple(layers), rank // replicas, 1, 1, 1, rank, pp_rank) for rank in range(tp_size)]
    total = model.get_total_num_kv_heads()
    if max(1, total // tp_size) != group.n_kv_heads:
        total = group.n_kv_heads * tp_size  # these layers have other heads than the model's first ones
    return [
        replace(shard, layers=tuple(layers), pp_rank=pp_rank)
        for shard in worker_shards(len(layers), total, group.head_dim, tp_size)
    ]


def layers_in_order(names: Sequence[str]) -> tuple[str, ...]:
    """Names such as `model.layers.3.self_attn.attn`, sorted by the layer they name. Raises
    `UnsupportedModel`."""
    found = [re.findall(_NUMBER, name) for name in names]
    if any(len(numbers) != 1 for numbers in found) or len({numbers[0] for numbers in found}) != len(names):
        raise UnsupportedModel(f"expected names that each tell one layer's number; got {', '.join(names[:4])} ..")
    return tuple(name for _, name in sorted(zip((int(numbers[0]) for numbers in found), names, strict=True)))


def layer_number(name: str) -> int:
    """The number in the name of a layer."""
    return int(re.findall(_NUMBER, name)[0])


def scales_of(layers: Mapping[str, Any], names: Sequence[str], dtype: torch.dtype) -> list[tuple[float, float]] | None:
    """By what the numbers of an fp8 cache are multiplied, keys and values of each layer; None for other caches."""
    if dtype.itemsize != 1:
        return None
    return [
        (float(getattr(layers[name], "_k_scale_float", 1.0)), float(getattr(layers[name], "_v_scale_float", 1.0)))
        for name in names
    ]


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


def step_requests(scheduler_output: Any) -> Iterator[tuple[str, int, BlockTables]]:
    """(request, leading tokens that are computed after this step, its block tables) of all requests
    of a `SchedulerOutput`."""
    cached, state = scheduler_output.scheduled_cached_reqs, scheduler_output.kv_connector_block_state
    news = [(new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs]
    for request_id, n_computed in [*news, *zip(cached.req_ids, cached.num_computed_tokens, strict=True)]:
        yield (
            request_id,
            n_computed + scheduler_output.num_scheduled_tokens[request_id],
            state.get_block_ids(request_id),
        )


def _plain(value: Any) -> Part:
    """A setting of vLLM as a part of a key."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    return value if value is None or isinstance(value, str | int | float) else str(value)
