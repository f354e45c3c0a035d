"""Caches of transformers to the neutral `KVCache` and back: what goes into the codec comes out of it.

The model library is imported only to build a cache of its kind; reading one needs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache import CacheGeometry, KVCache
from .errors import InvalidCache, MissingDependency, UnsupportedModel

EMPTY_DTYPE = torch.bfloat16


def is_transformers_cache(cache: object) -> bool:
    """Whether an object looks like a transformers cache (a list of layers that hold keys and values)."""
    return isinstance(getattr(cache, "layers", None), list)


def from_transformers(
    cache: Any, geometry: CacheGeometry, batch_index: int = 0, tokens: Tensor | None = None
) -> KVCache:
    """A `DynamicCache` -> `KVCache` of one sequence: [B, H, T, D] a layer -> [L, H, T, D], `tokens` selecting along T.

    Raises `UnsupportedModel` for layers that do not keep every token, `InvalidCache` for layers that disagree in shape.
    """
    keys, values = [], []
    for index, layer in enumerate(cache.layers):
        if type(layer).__name__ != "DynamicLayer":
            raise UnsupportedModel(
                f"layer {index} is a {type(layer).__name__}; kvtc codes layers that keep every token (DynamicLayer)"
            )
        if layer.is_initialized and layer.keys.dim() == 4:
            chosen = slice(None) if tokens is None else tokens.to(layer.keys.device)
            keys.append(layer.keys[batch_index][:, chosen])
            values.append(layer.values[batch_index][:, chosen])
    if not keys:
        empty = torch.empty(geometry.n_layers, geometry.n_kv_heads, 0, geometry.head_dim, dtype=EMPTY_DTYPE)
        return KVCache(empty, empty.clone())
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key.shape != keys[0].shape or value.shape != keys[0].shape:
            raise InvalidCache(
                f"layer {index} holds keys {tuple(key.shape)} and values {tuple(value.shape)}, layer 0 {tuple(keys[0].shape)}"
            )
    return KVCache(torch.stack(keys), torch.stack(values))


def batch_size(cache: Any) -> int:
    """Sequences in a transformers cache; 1 for an empty one."""
    return next((layer.keys.shape[0] for layer in cache.layers if layer.is_initialized), 1)


def to_transformers(keys: Tensor, values: Tensor) -> Any:
    """keys, values [B, L, H, T, D] -> a `DynamicCache` that `generate` continues from."""
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise MissingDependency('a transformers cache needs transformers; pip install "kvtc[hf]"') from error
    cache = DynamicCache()
    for layer in range(keys.shape[1]):
        cache.update(keys[:, layer], values[:, layer], layer)
    return cache
