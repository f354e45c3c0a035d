"""Layers of a transformers cache that are restored when the model first comes to them. Imported only where transformers is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..process.torch_state import neutral_torch_state
from .layer_queue import LayerQueue


class LazyLayer(DynamicLayer):
    """A layer that says at once how many tokens it has, and restores them when keys or values are first looked at.

    From then on it is a `DynamicLayer` like any other. Copying or pickling it restores it.
    Like any cache of transformers it is for one thread at a time.
    """

    def __init__(self, queue: LayerQueue, index: int, n_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        # Not the base's: with keys and values set, even to None, nobody would come to `__getattr__`.
        self.is_initialized = True
        self.dtype, self.device = dtype, device
        self._queue, self._index, self._n_tokens = queue, index, n_tokens

    def __getattr__(self, name: str) -> Any:
        if name not in ("keys", "values"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._fill()
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._fill()
        return self.__reduce_ex__(protocol)

    def get_seq_length(self) -> int:
        return self._n_tokens

    def reset(self) -> None:
        self.is_initialized = False
        self._become_plain(None, None)

    @neutral_torch_state
    def _fill(self) -> None:
        keys, values = self._queue.take(self._index)
        self._become_plain(keys[None], values[None])

    def _become_plain(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.keys, self.values = keys, values
        del self._queue, self._index, self._n_tokens
        self.__class__ = DynamicLayer
