"""The basis of joint rows in the metric, small enough for a file: leading directions in 8 bits, and what they leave out by heads.

Coefficients are of two stages. The first are those of the leading directions of whole rows. What these leave out of a row, the
remainder, is turned head by head: a transform of its own for each layer and head costs hardly any bytes, and with it no step is
too fine to be served. In which order all coefficients are coded is part of the basis: by falling deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import HeadBlocks

LARGEST_ENTRY = 127


@dataclass(frozen=True, eq=False)
class JointBasis:
    """mean float32 [P], of joint rows in the metric. vectors int8 [P, r]: nearly orthonormal columns, when each of the B blocks of
    a column is multiplied by its number of scales float16 [B, r].

    turns float16: for each block of the joint row an orthonormal matrix, its columns directions of the remainder.
    order int32 [r + P]: which coefficient stands at each place; those below r are of the vectors, in their order.
    """

    mean: Tensor
    vectors: Tensor
    scales: Tensor
    turns: HeadBlocks
    order: Tensor

    @property
    def rank(self) -> int:
        """r: directions of whole rows."""
        return self.scales.shape[1]

    @property
    def of_vectors(self) -> Tensor:
        """[r + P] bool: whether the coefficient at each place belongs to a vector."""
        return self.order < self.rank

    def matrix(self, device: torch.device) -> Tensor:
        """The vectors as numbers, float32 [P, r]."""
        return joint_times_scales(self.vectors.to(device), self.scales.to(device), self.turns)


def joint_in_bytes(vectors: Tensor, blocks: HeadBlocks) -> tuple[Tensor, Tensor]:
    """`in_bytes` of the features of keys and of values [P, r]. blocks: any of the same rows."""
    sides = torch.split(vectors, list(blocks.side_features))
    entries, scales = zip(
        *(in_bytes(side, len(its)) for side, its in zip(sides, blocks.sides, strict=True)), strict=True
    )
    return torch.cat(entries), torch.cat(scales)


def joint_times_scales(vectors: Tensor, scales: Tensor, blocks: HeadBlocks) -> Tensor:
    """Inverse of `joint_in_bytes`, float32 [P, r]."""
    sides = torch.split(vectors, list(blocks.side_features))
    its_scales = torch.split(scales, [len(side) for side in blocks.sides])
    return torch.cat([times_scales(*both) for both in zip(sides, its_scales, strict=True)])


def in_bytes(vectors: Tensor, n_blocks: int) -> tuple[Tensor, Tensor]:
    """Vectors [n, r] -> int8 [n, r] and the scale of each block of a column, float16 [n_blocks, r].

    With one scale for a whole column an error of a few entries would be that of all: as much as a coarse quantizer leaves.
    """
    blocks = vectors.float().reshape(n_blocks, -1, vectors.shape[1])
    scales = (blocks.abs().amax(dim=1) / LARGEST_ENTRY).half()
    divisors = scales.float()[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    entries = (blocks / divisors).round().clamp(-LARGEST_ENTRY, LARGEST_ENTRY)
    return entries.to(torch.int8).reshape(vectors.shape), scales


def times_scales(vectors: Tensor, scales: Tensor) -> Tensor:
    """Inverse of `in_bytes`, float32 [n, r]."""
    blocks = vectors.float().reshape(len(scales), -1, vectors.shape[1])
    return (blocks * scales.float()[:, None]).reshape(vectors.shape)
