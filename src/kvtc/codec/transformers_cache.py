"""Caches of transformers to the neutral `KVCache` and back: what goes into the codec comes out of it.

The model library is imported only to build a cache of its kind; reading one needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cache import CacheGeometry, KVCache
from ..container.tables import Header
from ..errors import InvalidCache, MissingDependency, UnsupportedModel
from ..process.torch_state import neutral_torch_state, plain
from .layer_queue import Layer, LayerQueue

EMPTY_DTYPE = torch.bfloat16
_WHOLE_LAYERS = ("DynamicLayer", "LazyLayer")


def is_transformers_cache(cache: object) -> bool:
    """Whether an object looks like a transformers cache (a list of layers that hold keys and values)."""
    return isinstance(getattr(cache, "layers", None), list)


@neutral_torch_state
def from_transformers(
    cache: Any, geometry: CacheGeometry, batch_index: int = 0, tokens: Tensor | None = None
) -> KVCache:
    """A `DynamicCache` -> `KVCache` of one sequence: [B, H, T, D] a layer -> [L, H, T, D], `tokens` selecting along T.

    Raises `UnsupportedModel` for layers that do not keep every token, `InvalidCache` for layers that disagree in shape.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    first_layer = 0
    for index, layer in enumerate(cache.layers):
        if type(layer).__name__ not in _WHOLE_LAYERS:
            raise UnsupportedModel(
                f"layer {index} is a {type(layer).__name__}; kvtc codes layers that keep every token (DynamicLayer)"
            )
        if layer.is_initialized and layer.keys.dim() == 4:
            # The first layers of a pipeline rank's cache are empty places; those it holds have no gaps.
            first_layer = first_layer if keys else index
            if index != first_layer + len(keys):
                raise InvalidCache(
                    f"layer {index} holds tokens, but layer {first_layer + len(keys)} before it holds none"
                )
            chosen = slice(None) if tokens is None else tokens.to(layer.keys.device)
            # Layers may lie on several devices.
            device = keys[0].device if keys else layer.keys.device
            for side, whole in (keys, layer.keys), (values, layer.values):
                side.append(plain(whole, f"layer {index}", InvalidCache)[batch_index][:, chosen].to(device))
    if not keys:
        empty = torch.empty(geometry.n_layers, geometry.n_kv_heads, 0, geometry.head_dim, dtype=EMPTY_DTYPE)
        return KVCache(empty, empty.clone(), first_layer=geometry.first_layer, first_kv_head=geometry.first_kv_head)
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key.shape != keys[0].shape or value.shape != keys[0].shape:
            raise InvalidCache(
                f"layer {first_layer + index} holds keys {tuple(key.shape)} and values {tuple(value.shape)}, "
                f"layer {first_layer} {tuple(keys[0].shape)}"
            )
    return KVCache(torch.stack(keys), torch.stack(values), first_layer=first_layer)


def batch_shape(cache: Any) -> tuple[int, int]:
    """Sequences and tokens in a transformers cache; (1, 0) for an empty one."""
    shapes = (layer.keys.shape for layer in cache.layers if layer.is_initialized and layer.keys.dim() == 4)
    return next(((shape[0], shape[2]) for shape in shapes), (1, 0))


@neutral_torch_state
def as_transformers(cache: KVCache) -> Any:
    """A `DynamicCache` of one sequence."""
    return to_transformers(cache.keys[None], cache.values[None], cache.first_layer)


@neutral_torch_state
def to_transformers(keys: Tensor, values: Tensor, first_layer: int) -> Any:
    """keys, values [B, L, H, T, D] -> a `DynamicCache` that `generate` continues from, its layers at their places."""
    cache = new_transformers_cache()
    for layer in range(keys.shape[1]):
        cache.update(keys[:, layer], values[:, layer], first_layer + layer)
    return cache


def lazy_cache(restore: Callable[[int], Layer], n_tokens: int, header: Header, device: torch.device) -> Any:
    """A `DynamicCache` of n_tokens tokens whose layers are restored when they are first looked at; raises `MissingDependency`.

    restore: index of a layer -> its keys and values [H, T, D] on the device.
    """
    cache = new_transformers_cache()
    from .lazy_layers import LazyLayer

    queue = LayerQueue(restore, header.n_layers, device)
    cache.layers += [cache.layer_class_to_replicate() for _ in range(header.first_layer)]
    cache.layers += [LazyLayer(queue, index, n_tokens, header.dtype, device) for index in range(header.n_layers)]
    return cache


def new_transformers_cache() -> Any:
    """An empty `DynamicCache`; raises `MissingDependency`."""
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise MissingDependency('a transformers cache needs transformers; pip install "kvtc[hf]"') from error
    return DynamicCache()
