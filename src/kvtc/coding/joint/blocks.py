"""Square matrices by head: one for the keys and one for the values of each layer and head, as blocks of the joint row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..product import product


@dataclass(frozen=True, eq=False)
class HeadBlocks:
    """keys [L H, Dk, Dk], values [L H, Dv, Dv]: the blocks of the joint row in its order, keys first."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, packed: Tensor, n_heads: int, dims: tuple[int, int]) -> HeadBlocks:
        """Inverse of `packed`: n_heads of all layers, with dims features of a key and of a value."""
        sizes = [n_heads * dim * dim for dim in dims]
        keys, values = (
            part.reshape(n_heads, dim, dim)
            for part, dim in zip(torch.split(packed.reshape(-1), sizes), dims, strict=True)
        )
        return cls(keys, values)

    @property
    def packed(self) -> Tensor:
        """[2 L H, D, D] where keys and values have one width, else all numbers in their order."""
        if self.keys.shape == self.values.shape:
            return torch.cat([self.keys, self.values])
        return torch.cat([self.keys.reshape(-1), self.values.reshape(-1)])

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Those of keys, and of values."""
        return self.keys, self.values

    @property
    def dims(self) -> tuple[int, int]:
        """Features of a key, and of a value."""
        return self.keys.shape[1], self.values.shape[1]

    @property
    def side_features(self) -> tuple[int, int]:
        """Features of a joint row that are of keys, and of values."""
        return len(self.keys) * self.keys.shape[1], len(self.values) * self.values.shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> HeadBlocks:
        """A function of the blocks of each side."""
        return HeadBlocks(function(self.keys), function(self.values))

    def __len__(self) -> int:
        return len(self.keys) + len(self.values)

    def times(self, rows: Tensor) -> Tensor:
        """Joint rows [T, P], each block of them times its matrix (float32)."""
        return torch.cat([_times(*both) for both in zip(self.split(rows), self.sides, strict=True)], dim=1)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Joint rows [T, P] -> the heads of keys [T, L H, Dk], and of values."""
        return [
            side.reshape(len(rows), -1, dim)
            for side, dim in zip(torch.split(rows, list(self.side_features), dim=1), self.dims, strict=True)
        ]

    def columns(self) -> list[tuple[slice, Tensor]]:
        """Each block, and which features of the joint row it belongs to."""
        found, start = [], 0
        for block in chain(self.keys, self.values):
            found.append((slice(start, start + len(block)), block))
            start += len(block)
        return found


def _times(heads: Tensor, blocks: Tensor) -> Tensor:
    """Heads [T, n, D] times their blocks [n, D, D] -> [T, n D]."""
    if heads.device.type != "cpu":
        return torch.einsum("tbd,bde->tbe", heads, blocks).flatten(1)
    return torch.cat([product(head, block) for head, block in zip(heads.unbind(dim=1), blocks, strict=True)], dim=1)
