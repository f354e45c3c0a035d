"""What is calibrated for the profile `conditional`, and its tensors in the calibration file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cache import MAX_EXTENT, CacheGeometry
from ..errors import CorruptCalibration
from .joint_calibration import JointCalibration, Named, expect

IDENTITY_BYTES = 32
_LARGEST_HALF = float(np.finfo(np.float16).max)
_LARGEST_SINGLE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class ConditionalCalibration:
    """Which layers are recomputed, how the rows of all deeper ones are predicted, and how what is left is coded.

    Attributes:
        n_layers: m: the first layers of the model, which are recomputed.
        identity: 32 bytes, digest of their weights and of the embedding's.
        weights: [2 d + 1, P'] float16; features of the hidden state times these are the joint rows of the layers behind.
        explained: [L', 2] float32, share of the variance of each such layer's keys and of its values that is predicted.
        left: of the rows of these layers, less what is predicted.
    """

    n_layers: int
    identity: bytes
    weights: Tensor
    explained: Tensor
    left: JointCalibration

    def n_own(self, geometry: CacheGeometry) -> int:
        """How many of the layers that a calibration covers are recomputed."""
        return own_layers(self.n_layers, geometry)

    def tensors(self) -> Named:
        """Its tensors in the calibration file."""
        yield "recomputed.layers", torch.tensor([self.n_layers])
        yield "recomputed.identity", torch.frombuffer(bytearray(self.identity), dtype=torch.uint8)
        yield "recomputed.weights", self.weights
        yield "recomputed.explained", self.explained
        yield from self.left.tensors("conditional")

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], geometry: CacheGeometry) -> ConditionalCalibration | None:
        """Inverse of `tensors`; None for a calibration without."""
        if "recomputed.layers" not in tensors:
            return None
        layers, identity = tensors["recomputed.layers"], tensors["recomputed.identity"]
        weights, explained = tensors["recomputed.weights"], tensors["recomputed.explained"]
        expect("recomputed.layers", layers, (1,), torch.int64, 1, geometry.layers[-1])
        expect("recomputed.identity", identity, (IDENTITY_BYTES,), torch.uint8)
        n_layers = int(layers)
        behind = geometry.behind(own_layers(n_layers, geometry))
        n_features = weights.shape[0] if weights.dim() == 2 else 0
        if n_features < 3 or n_features % 2 == 0 or n_features > 2 * MAX_EXTENT + 1:
            raise CorruptCalibration(f"recomputed.weights is {tuple(weights.shape)}; expected 2 d + 1 rows")
        shape = n_features, behind.joint_features
        expect("recomputed.weights", weights, shape, torch.float16, -_LARGEST_HALF, _LARGEST_HALF)
        expect("recomputed.explained", explained, (behind.n_layers, 2), torch.float32, -_LARGEST_SINGLE, 1.01)
        left = JointCalibration.from_tensors(tensors, "conditional", behind)
        return cls(n_layers, identity.numpy().tobytes(), weights, explained, left)


def own_layers(n_layers: int, geometry: CacheGeometry) -> int:
    """How many layers of a geometry are among the first n_layers of the model."""
    return sum(layer < n_layers for layer in geometry.layers)
