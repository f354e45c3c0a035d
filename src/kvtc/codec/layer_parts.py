"""Layers of transformers caches taken apart into the parts that groups are made of, and put together again.

A layer's class says what it holds. The parts of a layer, in turn, say what its class is, so that a stream does not name classes.
Reading a layer needs no model library; making one imports it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache import is_latent, sides_of_layer
from ..container.groups import (
    DTYPES,
    FULL_ATTENTION,
    LATENT,
    NO_CACHE,
    SIDE_BUFFER,
    STATE,
    WINDOW,
    Group,
    Part,
)
from ..errors import CorruptStream, InvalidCache, MissingDependency, StreamTooLarge, UnsupportedModel
from ..process.torch_state import plain
from .exact_groups import ExactGroup, RowSides

MAX_AXIS = (1 << 16) - 1
MAX_LAYERS = 1 << 12
"""Of a transformers cache that is restored: a stream of few bytes may name layers that hold nothing."""


@dataclass(frozen=True)
class LayerPart:
    """One part of one layer, of all sequences of a batch.

    group: what it is, with this layer alone. sides: [B, H, rows, D] of keys and values, or one tensor, [B, 1, rows, D] of a side
    buffer, [B, its shape] of a state. n_tokens: how many tokens the layer has read; None: it does not know.
    """

    group: Group
    sides: RowSides
    n_tokens: int | None = None


def parts_of(layer: Any, index: int) -> list[LayerPart]:
    """What a layer of a transformers cache holds; nothing for one that has seen no token.

    Raises `UnsupportedModel` for a class of layer that kvtc does not know, `InvalidCache` for one that is not as its class is.
    """
    name = type(layer).__name__
    if name not in _READERS:
        raise UnsupportedModel(f"layer {index} is a {name}; kvtc codes {', '.join(sorted(_READERS))}")
    if getattr(layer, "record_past", False):
        raise InvalidCache(f"layer {index} records past states for a rollback; call crop(0) on the cache first")
    return [part for read in _READERS[name] for part in read(layer, index)]


def lightning_parts(cache: Any) -> Iterator[LayerPart]:
    """The states that a cache of MiniMax keeps beside its layers."""
    for index, state in enumerate(getattr(cache, "linear_cache", ())):
        if isinstance(state, Tensor):
            yield _state(index, Part.LIGHTNING_STATE, 0, state, has_run=False)


def _attention(layer: Any, index: int) -> Iterator[LayerPart]:
    if layer.is_initialized and isinstance(layer.keys, Tensor) and layer.keys.dim() == 4:
        yield _sides(index, layer.keys, layer.values, "", 0)


def _static(layer: Any, index: int) -> Iterator[LayerPart]:
    if layer.is_initialized:
        held = slice(0, int(layer.cumulative_length))
        yield _sides(index, layer.keys[:, :, held], layer.values[:, :, held], "", 0)


def _static_window(layer: Any, index: int) -> Iterator[LayerPart]:
    """It holds one token more than a window that grows, and empty places until it is full."""
    if layer.is_initialized:
        n_tokens, window = int(layer.cumulative_length_int), int(layer.max_cache_len)
        stop = min(n_tokens, window)
        held = slice(stop - min(n_tokens, window - 1), stop)
        part = _sides(index, layer.keys[:, :, held], layer.values[:, :, held], WINDOW, window)
        yield replace(part, n_tokens=n_tokens)


def check_static_windows(layers: Sequence[Any]) -> None:
    """Raise `InvalidCache` for a window of a static cache that is as long as the cache: it may be cut from a longer one."""
    longest = max((layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len")), default=0)
    for index, layer in enumerate(layers):
        n_tokens = getattr(layer, "cumulative_length_int", 0)
        if n_tokens and layer.max_cache_len == longest >= n_tokens:
            raise InvalidCache(
                f"layer {index} has a window that is as long as its static cache, {longest} tokens, and may be part of a longer "
                "one; give the static cache a max_cache_len above the model's window"
            )


def _window(layer: Any, index: int) -> Iterator[LayerPart]:
    if not layer.is_initialized:
        return
    n_tokens, window = int(layer.cumulative_length), int(layer.sliding_window)
    part = _sides(index, layer.keys, layer.values, WINDOW, window)
    held = part.group.rows_held(n_tokens)
    if window < 1 or layer.keys.shape[-2] != held:
        raise InvalidCache(
            f"layer {index} has a window of {window} tokens and has read {n_tokens}: it must hold {held}; it holds "
            f"{layer.keys.shape[-2]}"
        )
    yield replace(part, n_tokens=n_tokens)


def _states(layer: Any, index: int) -> Iterator[LayerPart]:
    for part, states in (
        (Part.CONVOLUTION_STATE, layer.conv_states),
        (Part.RECURRENT_STATE, layer.recurrent_states),
    ):
        for number, state in states.items():
            if isinstance(state, Tensor):
                yield _state(index, part, int(number), state, bool(layer.has_previous_state[number]))


def _indexer(layer: Any, index: int) -> Iterator[LayerPart]:
    if not layer.is_indexer_initialized:
        return
    n_tokens = int(getattr(layer, "indexer_cumulative_length", layer.indexer_keys.shape[1]))
    yield _rows(index, Part.INDEXER_KEYS, 0, layer.indexer_keys[:, None, :n_tokens], 1)
    if (positions := layer.indexer_position_ids) is not None:
        # A group holds floats: the bits of these are integers.
        bits = positions.permute(1, 2, 0)[:, None, :n_tokens].to(torch.int32).contiguous().view(torch.float32)
        yield _rows(index, Part.INDEXER_POSITIONS, 0, bits, 1)


def _block_index(layer: Any, index: int) -> Iterator[LayerPart]:
    if layer.idx_keys is not None:
        yield _rows(index, Part.BLOCK_INDEX_KEYS, 0, layer.idx_keys, 1)


_COMPRESSORS = ("compressor", "indexer")
_COMPRESSED = {
    Part.COMPRESSED_ENTRIES: "compressed_kv",
    Part.BUFFERED_VALUES: "buffer_kv",
    Part.BUFFERED_GATES: "buffer_gate",
    Part.OVERLAP_VALUES: "overlap_kv",
    Part.OVERLAP_GATES: "overlap_gate",
}


def _compressed(layer: Any, index: int) -> Iterator[LayerPart]:
    rate = int(layer.compress_rate)
    for part, attribute in _COMPRESSED.items():
        for number, name in enumerate(_COMPRESSORS):
            rows = getattr(layer, attribute, {}).get(name)
            if isinstance(rows, Tensor):
                yield _rows(index, part, number, rows[:, None], rate)


def _nothing(layer: Any, index: int) -> Iterator[LayerPart]:  # noqa: ARG001  as the other readers
    yield LayerPart(Group(NO_CACHE, Part.NOTHING, torch.bfloat16, (index,), (0, 0, 0)), ())


Reader = Callable[[Any, int], Iterator[LayerPart]]
_READERS: Mapping[str, tuple[Reader, ...]] = {
    "DynamicLayer": (_attention,),
    "LazyLayer": (_attention,),
    "DynamicSlidingWindowLayer": (_window,),
    "DynamicIndexedLayer": (_attention, _indexer),
    "LinearAttentionLayer": (_states,),
    "LinearAttentionAndFullAttentionLayer": (_attention, _states),
    "LinearAttentionAndSlidingWindowAttentionLayer": (_window, _states),
    "StaticLayer": (_static,),
    "StaticSlidingWindowLayer": (_static_window,),
    "StaticIndexedLayer": (_static, _indexer),
    "LinearAttentionAndStaticFullAttentionLayer": (_static, _states),
    "LinearAttentionAndStaticSlidingWindowAttentionLayer": (_static_window, _states),
    "DummyLayer": (_nothing,),
    "MiniMaxM3VLSparseCacheLayer": (_attention, _block_index),
    "DeepseekV4HCACache": (_window, _compressed),
    "DeepseekV4CSACache": (_window, _compressed),
}


def _sides(index: int, keys: Tensor, values: Tensor, kind: str, extent: int) -> LayerPart:
    """Keys and values of a layer. kind: ""; full attention, or latents."""
    is_shared = values is keys
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        raise InvalidCache(
            f"layer {index} holds keys {tuple(keys.shape)} of {keys.dtype} and values {tuple(values.shape)} of {values.dtype}"
        )
    keys, values = sides_of_layer(keys, values)
    heads, key_dim, value_dim = keys.shape[1], keys.shape[3], values.shape[3]
    kind = kind or (LATENT if is_latent(heads, key_dim, value_dim) else FULL_ATTENTION)
    shape = heads, key_dim, 0 if is_shared else value_dim
    group = _group(kind, Part.KEYS_AND_VALUES, keys.dtype, index, shape)
    group = replace(group, values_are_keys=is_shared, extent=extent)
    return LayerPart(group, (keys,) if is_shared else (keys, values), None if kind == WINDOW else keys.shape[2])


def _rows(index: int, part: Part, number: int, rows: Tensor, tokens: int) -> LayerPart:
    """A side buffer [B, 1, rows, D], an entry of which stands for some tokens."""
    if rows.dim() != 4 or rows.shape[1] != 1:
        raise InvalidCache(f"layer {index} holds a side buffer of shape {tuple(rows.shape)}; expected one row a token")
    group = _group(SIDE_BUFFER, part, rows.dtype, index, (1, rows.shape[3], 0))
    return LayerPart(replace(group, index=number, extent=tokens), (rows,))


def _state(index: int, part: Part, number: int, state: Tensor, has_run: bool) -> LayerPart:
    axes = state.shape[1:]
    if not 1 <= len(axes) <= 3 or 0 in axes:
        raise InvalidCache(
            f"layer {index} holds a state of shape {tuple(state.shape)}; expected one to three axes a sequence"
        )
    shape = (*([0] * (3 - len(axes))), *axes)
    group = _group(STATE, part, state.dtype, index, (shape[0], shape[1], shape[2]))
    return LayerPart(replace(group, index=number, has_run=has_run), (state,))


def _group(kind: str, part: Part, dtype: torch.dtype, layer: int, shape: tuple[int, int, int]) -> Group:
    if dtype not in DTYPES:
        raise InvalidCache(f"layer {layer} holds {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if max(*shape, layer) > MAX_AXIS:
        raise InvalidCache(f"layer {layer} has the shape {shape}; {MAX_AXIS} is the most that a stream can say")
    return Group(kind, part, dtype, (layer,), shape)


def sequence_of(part: LayerPart, batch_index: int, first_token: int, n_tokens: int) -> RowSides:
    """What a part holds of one sequence of a batch, without its padding.

    first_token: how many tokens of padding stand before it. n_tokens: tokens of the layer, padding included.
    """
    sides = tuple(plain(side, "the cache", InvalidCache)[batch_index] for side in part.sides)
    if part.group.kind == STATE:
        return sides
    if part.group.kind == SIDE_BUFFER and part.group.extent > 1:
        if first_token:
            raise UnsupportedModel(
                "this model pools its tokens, and padding with them: encode its sequences one by one"
            )
        return sides
    held = sides[0].shape[-2] if sides else 0
    dropped = max(0, first_token - (n_tokens - held))
    return tuple(side[:, dropped:] for side in sides)


def grouped(found: Sequence[tuple[Group, RowSides]]) -> list[ExactGroup]:
    """Parts of layers together with those that are alike, in the order in which their kinds are numbered, then of their layers."""
    alike: dict[Group, list[tuple[int, RowSides]]] = {}
    for group, sides in found:
        alike.setdefault(replace(group, layers=()), []).append((group.layers[0], sides))
    groups = []
    for group, members in alike.items():
        members.sort(key=lambda member: member[0])
        layers = tuple(layer for layer, _ in members)
        groups.append(ExactGroup(replace(group, layers=layers), [sides for _, sides in members]))
    return sorted(groups, key=lambda one: (one.group.part, one.group.layers, one.group.index))


def cache_of_parts(parts: Sequence[ExactGroup], n_tokens: int) -> Any:
    """A transformers cache of the classes of layers that hold such parts, after n_tokens tokens; tensors have a batch axis.

    Raises `CorruptStream` for parts that no class of layer holds together, `StreamTooLarge` for layers past the cap,
    `MissingDependency` without transformers.
    """
    highest = max((part.group.layers[-1] for part in parts), default=-1)
    if highest >= MAX_LAYERS:
        raise StreamTooLarge(f"layer {highest}; a transformers cache of at most {MAX_LAYERS} layers is restored")
    by_layer: dict[int, list[ExactGroup]] = {}
    for part in parts:
        for layer in part.group.layers:
            by_layer.setdefault(layer, []).append(part)
    found = {part.group.part for part in parts}
    cache = _module("cache_utils").DynamicCache()
    if Part.LIGHTNING_STATE in found:
        cache = _module("models.minimax.modeling_minimax").MiniMaxCache()
        states = {layer: its for layer, its in by_layer.items() if its[-1].group.part is Part.LIGHTNING_STATE}
        for layer, its in states.items():
            if len(its) > 1:
                raise _no_class(its, layer)
            cache.set_linear_cache(layer, _of(its[0], layer)[0])
        by_layer = {layer: its for layer, its in by_layer.items() if layer not in states}
    for layer in range(max(by_layer, default=-1) + 1):
        cache.layers.append(_layer_of(by_layer.get(layer, []), layer, n_tokens))
    return cache


def _of(part: ExactGroup, layer: int) -> RowSides:
    return part.sides[part.group.layers.index(layer)] if part.sides else ()


def _layer_of(parts: Sequence[ExactGroup], layer: int, n_tokens: int) -> Any:
    """A layer with these parts; without any an empty place, as of a rank that holds others."""
    kinds = frozenset(part.group.kind for part in parts) - {SIDE_BUFFER}
    buffers = frozenset(part.group.part for part in parts if part.group.kind == SIDE_BUFFER)
    made = _make_layer(kinds, buffers, parts, layer)
    for part in parts:
        _fill(made, part, _of(part, layer), n_tokens)
    return made


def _make_layer(kinds: frozenset[str], buffers: frozenset[Part], parts: Sequence[ExactGroup], layer: int) -> Any:
    cache_utils = _module("cache_utils")
    attention = {FULL_ATTENTION, LATENT}
    window = next((part.group.extent for part in parts if part.group.kind == WINDOW), 0)
    states = 1 + max((part.group.index for part in parts if part.group.kind == STATE), default=0)
    if not buffers:
        if not kinds or (kinds <= attention and len(kinds) == 1):
            return cache_utils.DynamicLayer()
        if kinds == {WINDOW}:
            return cache_utils.DynamicSlidingWindowLayer(sliding_window=window)
        if kinds == {STATE}:
            return cache_utils.LinearAttentionLayer(number_of_states=states)
        if kinds == {NO_CACHE}:
            return cache_utils.DummyLayer()
        if kinds == {WINDOW, STATE}:
            return cache_utils.LinearAttentionAndSlidingWindowAttentionLayer(window, number_of_states=states)
        if len(kinds) == 2 and kinds <= attention | {STATE}:
            return cache_utils.LinearAttentionAndFullAttentionLayer(number_of_states=states)
    if Part.INDEXER_KEYS in buffers <= {Part.INDEXER_KEYS, Part.INDEXER_POSITIONS} and kinds <= attention:
        return cache_utils.DynamicIndexedLayer()
    if buffers == {Part.BLOCK_INDEX_KEYS} and kinds <= attention:
        return _module("models.minimax_m3_vl.modeling_minimax_m3_vl").MiniMaxM3VLSparseCacheLayer()
    if buffers <= _COMPRESSED.keys() and kinds == {WINDOW}:
        return _compressed_layer(parts, window)
    raise _no_class(parts, layer)


def _no_class(parts: Sequence[ExactGroup], layer: int) -> CorruptStream:
    held = ", ".join(sorted(part.group.describe() for part in parts))
    return CorruptStream(f"layer {layer} holds {held}: no class of layer of transformers holds these together")


def _compressed_layer(parts: Sequence[ExactGroup], window: int) -> Any:
    """A layer of DeepSeek V4, which is made of a config: the rate is that of its entries."""
    module = _module("models.deepseek_v4.modeling_deepseek_v4")
    has_indexer = any(part.group.index for part in parts)
    made = module.DeepseekV4CSACache if has_indexer else module.DeepseekV4HCACache
    rate = next(part.group.extent for part in parts if part.group.kind == SIDE_BUFFER)
    rates = dict.fromkeys(("heavily_compressed_attention", "compressed_sparse_attention"), rate)
    return made(_CompressedConfig(window, rates))


@dataclass(frozen=True)
class _CompressedConfig:
    """What a layer of DeepSeek V4 reads of its config."""

    sliding_window: int
    compress_rates: dict[str, int]


def _fill(layer: Any, part: ExactGroup, sides: RowSides, n_tokens: int) -> None:
    """Put a part into its layer."""
    group = part.group
    if group.part is Part.KEYS_AND_VALUES:
        keys, values = sides_of_layer(sides[0], sides[0] if group.values_are_keys else sides[1])
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if group.kind == WINDOW:
            layer.cumulative_length = n_tokens
    elif group.part is Part.CONVOLUTION_STATE:
        layer.lazy_initialization(conv_states=sides[0], state_idx=group.index)
        layer.conv_states[group.index].copy_(sides[0])
        layer.has_previous_state[group.index] = group.has_run
    elif group.part is Part.RECURRENT_STATE:
        layer.lazy_initialization(recurrent_states=sides[0], state_idx=group.index)
        layer.recurrent_states[group.index].copy_(sides[0])
        layer.has_previous_state[group.index] = group.has_run
    elif group.part is Part.INDEXER_KEYS:
        layer.lazy_initialization_indexer(sides[0][:, 0])
        layer.indexer_keys = sides[0][:, 0]
    elif group.part is Part.INDEXER_POSITIONS:
        layer.indexer_position_ids = sides[0][:, 0].contiguous().view(torch.int32).permute(2, 0, 1).to(torch.int64)
    elif group.part is Part.BLOCK_INDEX_KEYS:
        layer.idx_keys = sides[0]
    elif group.part in _COMPRESSED:
        name = _COMPRESSORS[group.index]
        getattr(layer, _COMPRESSED[group.part])[name] = sides[0][:, 0]
        layer.entry_count[name] = n_tokens // group.extent


def _module(name: str) -> Any:
    """A module of transformers, one of those named here."""
    try:
        return importlib.import_module(f"transformers.{name}")
    except ImportError as error:
        raise MissingDependency('a transformers cache needs transformers; pip install "kvtc[hf]"') from error
