"""The decorrelating transform: rows of a cache to coefficients in a calibrated basis, and back (paper, section 1.2).

A row is one token's keys, or values, of all layers and heads side by side, so that the basis sees what layers and heads share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def rows_of(cache_side: Tensor) -> Tensor:
    """Keys or values [L, H, T, D] -> rows [T, p] float32, features ordered layer, head, feature."""
    layers, heads, tokens, dim = cache_side.shape
    return cache_side.permute(2, 0, 1, 3).reshape(tokens, layers * heads * dim).float()


def cache_side_of(rows: Tensor, n_layers: int, n_kv_heads: int) -> Tensor:
    """Rows [T, p] -> keys or values [L, H, T, D]; inverse of `rows_of` but for the dtype."""
    tokens, features = rows.shape
    return rows.reshape(tokens, n_layers, n_kv_heads, features // (n_layers * n_kv_heads)).permute(1, 2, 0, 3)


@dataclass(frozen=True, eq=False)
class Basis:
    """mean [p] float32; vectors [p, r] float16, orthonormal columns by falling variance; spectrum [r] float32, their variances."""

    mean: Tensor
    vectors: Tensor
    spectrum: Tensor

    @property
    def rank(self) -> int:
        """r: coefficients the basis can express."""
        return self.vectors.shape[1]

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and vectors as `project` takes them, float32 on a device."""
        return self.mean.to(device), self.vectors.to(device).float()


def project(rows: Tensor, mean: Tensor, vectors: Tensor) -> Tensor:
    """Rows [T, p] -> coefficients [T, n] float32 in the columns of `vectors` [p, n] float32, as fast as the device can.

    For measuring: what a codec computes goes through `product`.
    """
    # (rows - mean) V = rows V - mean V: the centred rows are never materialized.
    return torch.addmm(-(mean @ vectors), rows, vectors)


def saturate(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> dtype; what lies past its range becomes its largest value, not infinity or NaN."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)
