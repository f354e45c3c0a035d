"""All that layers with sliding windows are given: a window forgets what leaves it, and a calibration wants every token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from .rope_discovery import require_transformers, text_config


class WindowRows:
    """A cache for a model to read into, and the keys and values that its windows were given.

    Parameters:
        model: a transformers causal LM.
        layers: those with windows that are recorded.

    Raises:
        UnsupportedModel: one of the layers has no window in a cache that transformers makes for the model.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.cache = require_transformers().DynamicCache(config=text_config(model))
        self._given: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
        for layer, given in self._given.items():
            window = self.cache.layers[layer]
            if not getattr(window, "is_sliding", False):
                raise UnsupportedModel(f"layer {layer} is a {type(window).__name__}; expected a sliding window")
            window.update = partial(_record, window.update, given)

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, T, D] of all tokens that were read."""
        keys, values = zip(*self._given[layer], strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def _record(
    update: Any, given: list[tuple[Tensor, Tensor]], keys: Tensor, values: Tensor, *rest: Any, **more: Any
) -> Any:
    given.append((keys.detach(), values.detach()))
    return update(keys, values, *rest, **more)
