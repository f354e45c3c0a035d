"""The hidden states that enter one layer of a model, recorded while its caches are captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cache import CacheGeometry
from ..errors import InvalidArgument, UnsupportedModel
from ..recomputation import TruncatedModel, decoder_of, recording


class HiddenStates:
    """Records inside a `with` statement; `taken` gives what was recorded in it.

    Attributes:
        width: d, features of a hidden state.
        identity: 32 bytes, digest of the weights of the layers before this one.

    Parameters:
        model: a transformers causal LM.
        layer: the layer that the states enter, m; the m layers before it can be recomputed.
        geometry: the layers that are calibrated, one of which must lie behind.

    Raises:
        InvalidArgument: for a layer out of range.
        UnsupportedModel: for a model whose layers are not found, or whose rotation depends on the length of a text.
    """

    def __init__(self, model: Any, layer: int, geometry: CacheGeometry) -> None:
        most = geometry.layers[-1]
        if not 1 <= layer <= most:
            raise InvalidArgument(f"recompute_layers must lie in 1 .. {most}; got {layer}")
        if geometry.rope.depends_on_length:
            raise UnsupportedModel(
                "the rotation of this model depends on the length of a text, so its layers cannot be recomputed for a part of it; "
                'calibrate for joint (profiles=("paper", "joint"))'
            )
        self.width = int(model.get_input_embeddings().weight.shape[1])
        self.identity = TruncatedModel(decoder_of(model), layer).identity
        self._model, self._layer = model, layer
        self._pieces: list[Tensor] = []
        self._hook: Any = None

    def __enter__(self) -> None:
        self._pieces.clear()
        self._hook = recording(self._model, self._layer, self._pieces.append)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def taken(self) -> Tensor:
        """The hidden states [T, d] of the last text, which may have been read in pieces."""
        return torch.cat([piece[0] for piece in self._pieces])
