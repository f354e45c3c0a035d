"""Pages of latents (multi-head latent attention): for each token of a layer its latent, then its rotary part.

A latent is what models call compressed keys and values, after its norm. As everywhere in kvtc the rotary part is the key here,
and the latent the value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import CacheExtent, CacheGeometry
from ..errors import UnsupportedLayout
from .page_layout import TokenPages


@dataclass(frozen=True)
class LatentLayout(TokenPages):
    """How latents of some layers lie in pages.

    Parameters:
        layers: Numbers of the layers.
        page_tokens: N, tokens of a page.
        rotary_dim, latent_dim: Features of the rotary part, and of the latent.
        in_pairs: Whether the pages hold features that are turned together side by side, and the calibrated model holds them in
            two halves.

    Example:
        >>> from kvtc.engines.latent_layout import LatentLayout
        >>> layout = LatentLayout((0,), page_tokens=1, rotary_dim=4, latent_dim=2, in_pairs=True)
        >>> keys, values = layout.read(torch.tensor([[[[7, 8, 1, 2, 3, 4]]]]))
        >>> keys.flatten().tolist(), values.flatten().tolist()
        ([1, 3, 2, 4], [7, 8])
        >>> layout.write(keys, values).flatten().tolist()
        [7, 8, 1, 2, 3, 4]
    """

    layers: tuple[int, ...]
    page_tokens: int
    rotary_dim: int
    latent_dim: int
    in_pairs: bool

    @classmethod
    def of(cls, geometry: CacheGeometry, page_tokens: int) -> LatentLayout:
        """The layout of engines that turn neighbours together, as vLLM does in every backend.

        Parameters:
            geometry: Of the calibrated layers.
            page_tokens: Tokens of a page.

        Returns:
            The layout.
        """
        in_pairs = any(not table.interleaved for table in geometry.rope.tables)
        return cls(geometry.layers, page_tokens, *geometry.dims, in_pairs)

    @property
    def extent(self) -> CacheExtent:
        """Layers and features."""
        return CacheExtent(self.layers, 0, 1, self.rotary_dim, self.latent_dim)

    @property
    def page_values(self) -> int:
        """Numbers in one page of all layers."""
        return len(self.layers) * self.page_tokens * (self.rotary_dim + self.latent_dim)

    def read(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary parts and latents of whole pages, copied.

        Parameters:
            data: The pages of all layers, of any shape with as many numbers.

        Returns:
            Keys [L, 1, B * N, rotary_dim] and values [L, 1, B * N, latent_dim].

        Raises:
            UnsupportedLayout: `data` is not a whole number of pages.
        """
        if data.numel() % self.page_values:
            raise UnsupportedLayout(f"{data.numel()} numbers are not whole pages of {self.page_values}: {self}")
        rows = data.reshape(len(self.layers), 1, -1, self.latent_dim + self.rotary_dim)
        values, keys = rows[..., : self.latent_dim], rows[..., self.latent_dim :]
        if self.in_pairs:
            keys = torch.cat([keys[..., ::2], keys[..., 1::2]], dim=-1)
        return keys.contiguous(), values.contiguous()

    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        """The pages of some tokens: the inverse of `read`.

        Parameters:
            keys, values: As `read` gives them.

        Returns:
            A contiguous tensor [L, B, N, latent_dim + rotary_dim].

        Raises:
            UnsupportedLayout: The tokens are not whole pages, or other sizes do not fit.
        """
        n_layers = len(self.layers)
        found = [tuple(side.shape[:2]) + tuple(side.shape[3:]) for side in (keys, values)]
        if (
            found != [(n_layers, 1, self.rotary_dim), (n_layers, 1, self.latent_dim)]
            or keys.shape[2] % self.page_tokens
        ):
            raise UnsupportedLayout(f"{self}: got {tuple(keys.shape)} and {tuple(values.shape)}")
        if self.in_pairs:
            keys = torch.stack(keys.chunk(2, dim=-1), dim=-1).flatten(-2)
        return torch.cat([values, keys], dim=-1).reshape(
            n_layers, -1, self.page_tokens, self.latent_dim + self.rotary_dim
        )
