"""The basis of joint rows in the metric, small enough for a file: leading directions in 8 bits, and what they leave out by heads.

Coefficients are of two stages. The first are those of the leading directions of whole rows. What these leave out of a row, the
remainder, is turned head by head: a transform of its own for each layer and head costs hardly any bytes, and with it no step is
too fine to be served. In which order all coefficients are coded is part of the basis: by falling deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_ENTRY = 127


@dataclass(frozen=True, eq=False)
class JointBasis:
    """mean float32 [P], of joint rows in the metric. vectors int8 [P, r] times scales float32 [r]: nearly orthonormal columns.

    turns float16 [B, D, D]: for each block of the joint row an orthonormal matrix, its columns directions of the remainder.
    order int32 [r + P]: which coefficient stands at each place; those below r are of the vectors, in their order.
    """

    mean: Tensor
    vectors: Tensor
    scales: Tensor
    turns: Tensor
    order: Tensor

    @property
    def rank(self) -> int:
        """r: directions of whole rows."""
        return self.scales.numel()

    @property
    def of_vectors(self) -> Tensor:
        """[r + P] bool: whether the coefficient at each place belongs to a vector."""
        return self.order < self.rank

    def matrix(self, device: torch.device) -> Tensor:
        """The vectors as numbers, float32 [P, r]."""
        return self.vectors.to(device).float() * self.scales.to(device)


def in_bytes(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [P, r] -> int8 [P, r] and the scale of each column, float32 [r]."""
    scales = vectors.float().abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_ENTRY
    return (vectors.float() / scales).round().to(torch.int8), scales
