"""xKV: one singular value decomposition of each prompt's cache, shared by neighbouring layers.

Chang et al., "xKV: Cross-Layer SVD for KV-Cache Compression", arXiv 2503.18893. Settings as in the
kvtc paper: groups of 4 layers; of a group's features keys keep 1/8 as rank (512 of 4096) and values
3/16 (768 of 4096); keys before rotation. Both factors take a root of the singular values, as in the
published code, and are stored in float16; the factor of the features belongs to the prompt and is
counted.

Differences: publication and kvtc paper compress the whole prompt; here a window can be kept, as for
the other methods of a table. A last group may have fewer layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache import CacheGeometry
from .stream import BodyMethod, Header, Reader, Shape, to_bytes, to_float16


@dataclass(frozen=True, kw_only=True)
class Xkv(BodyMethod):
    """xKV: groups of layers share a basis of low rank.

    Parameters:
        window_tokens: last tokens kept exactly; default 0.
        geometry: of the model, for its rotation.
        layers_per_group: layers that share a basis; default 4.
        key_share: rank of the keys over the number of features of a group of layers, 0 .. 1;
            default 1/8.
        value_share: the same of values; default 3/16.

    Example:
        >>> from kvtc.evaluate.baselines import Xkv
        >>> method = Xkv(geometry=calibration.geometry)
        >>> method.decode(method.encode(model, cache, token_ids), token_ids).get_seq_length()
        600
    """

    geometry: CacheGeometry
    layers_per_group: int = 4
    key_share: float = 1 / 8
    value_share: float = 3 / 16

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        n_tokens = keys.shape[2]
        plain = self.geometry.rope.unrotate(keys, torch.arange(n_tokens), n_tokens)
        return self._encode(plain, self.key_share) + self._encode(values.float(), self.value_share)

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        reader = Reader(data)
        shares = self.key_share, self.value_share
        plain, values = (self._decode(reader, *both) for both in zip(header.body_shapes, shares, strict=True))
        return self.geometry.rope.rotate(plain, torch.arange(header.n_body), header.n_body), values

    def _encode(self, side: Tensor, share: float) -> bytes:
        """[L, H, T, D] -> for each group of layers [T, rank] and [rank, features]."""
        parts = []
        for group in torch.split(side, self.layers_per_group):
            rows = group.permute(2, 0, 1, 3).flatten(1)
            left, strength, right = torch.linalg.svd(rows, full_matrices=False)
            rank = _rank(rows.shape, share)
            root = strength[:rank].sqrt()
            parts += [to_float16(left[:, :rank] * root), to_float16(root[:, None] * right[:rank])]
        return to_bytes(*parts)

    def _decode(self, reader: Reader, shape: Shape, share: float) -> Tensor:
        n_layers, n_heads, n_tokens, dim = shape
        groups = []
        for first in range(0, n_layers, self.layers_per_group):
            layers = min(self.layers_per_group, n_layers - first)
            n_features = layers * n_heads * dim
            rank = _rank((n_tokens, n_features), share)
            left = reader.take((n_tokens, rank), torch.float16).float()
            right = reader.take((rank, n_features), torch.float16).float()
            groups.append((left @ right).reshape(n_tokens, layers, n_heads, dim).permute(1, 2, 0, 3))
        return torch.cat(groups)


def _rank(shape: tuple[int, ...], share: float) -> int:
    """shape: tokens and features."""
    return min(*shape, max(1, round(share * shape[1])))
