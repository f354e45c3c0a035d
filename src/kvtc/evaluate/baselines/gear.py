"""GEAR: a 2-bit backbone, the outliers apart, and a low-rank matrix of what is still missing.

Kang et al., "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference
of LLM", arXiv 2403.05527. Settings: KIVI with groups of 64 as the backbone, 2 bits; of each vector
(a key channel over the tokens, a value token over the layer's features) the largest 1 % and the
smallest 1 % are stored apart, 16 bits and an index each, and stand as the vector's mean in the
backbone, as in the published code; rank 4 for each head. The kvtc paper runs it with groups of 64
and rank 4 as well.

Differences: the best approximation of rank 4 by a singular value decomposition, where the
publication takes steps of power iteration, which can only be worse; the factors are stored in 16
bits. The published streaming buffer of 64 tokens becomes the window that all methods of a table
share. In heads of 32 features a rank of 4 costs 2 bits a value, in heads of 128 half a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kivi import read_groups, write_groups
from .stream import BodyMethod, Header, Reader, Shape, to_bytes, to_float16


@dataclass(frozen=True, kw_only=True)
class Gear(BodyMethod):
    """GEAR: a quantized backbone, a correction of low rank for each head, and outliers.

    Parameters:
        window_tokens: last tokens kept exactly; default 128.
        bits: bits of the backbone, 2 (default) or 4.
        group_size: numbers of the backbone that share a shift and a scale; default 64.
        rank: rank of the correction of a head; default 4.
        outliers: share of the numbers that is stored apart, 0 .. 1; default 0.02.

    Example:
        >>> from kvtc.evaluate.baselines import Gear
        >>> method = Gear(rank=1)
        >>> method.decode(method.encode(model, cache, token_ids), token_ids).get_seq_length()
        600
    """

    window_tokens: int = 128
    bits: int = 2
    group_size: int = 64
    rank: int = 4
    outliers: float = 0.02

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        return self._encode(keys.float(), is_key=True) + self._encode(values.float(), is_key=False)

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        reader = Reader(data)
        of_keys, of_values = header.body_shapes
        return self._decode(reader, of_keys, is_key=True), self._decode(reader, of_values, is_key=False)

    def _encode(self, side: Tensor, *, is_key: bool) -> bytes:
        vectors = _to_vectors(side, is_key)
        n_each = self._n_each(vectors.shape[-1])
        index = torch.cat([vectors.topk(n_each, largest=largest).indices for largest in (True, False)], dim=-1)
        mean = vectors.mean(dim=-1, keepdim=True).expand_as(index)
        backbone = write_groups(vectors.scatter(-1, index, mean), self.group_size, self.bits)
        apart = to_float16(vectors.gather(-1, index))
        found = read_groups(Reader(backbone), tuple(vectors.shape), self.group_size, self.bits)
        error = side - _from_vectors(found.scatter(-1, index, apart.float()), side.shape, is_key)
        rank = min(self.rank, *error.shape[2:])
        left, strength, right = torch.linalg.svd(error, full_matrices=False)
        root = strength[..., :rank].sqrt()
        factors = left[..., :rank] * root[..., None, :], root[..., :, None] * right[..., :rank, :]
        index = index.to(_index_dtype(vectors.shape[-1]))
        return backbone + to_bytes(index, apart, *(to_float16(factor) for factor in factors))

    def _decode(self, reader: Reader, shape: Shape, *, is_key: bool) -> Tensor:
        n_layers, n_heads, n_tokens, dim = shape
        n_features = n_heads * dim
        vectors = (n_layers, n_features, n_tokens) if is_key else (n_layers, n_tokens, n_features)
        backbone = read_groups(reader, vectors, self.group_size, self.bits)
        outliers = (*vectors[:2], 2 * self._n_each(vectors[2]))
        index = reader.take(outliers, _index_dtype(vectors[2])).long()
        backbone = backbone.scatter(-1, index, reader.take(outliers, torch.float16).float())
        rank = min(self.rank, n_tokens, dim)
        left = reader.take((n_layers, n_heads, n_tokens, rank), torch.float16).float()
        right = reader.take((n_layers, n_heads, rank, dim), torch.float16).float()
        return _from_vectors(backbone, shape, is_key) + left @ right

    def _n_each(self, length: int) -> int:
        """Outliers at each end of a vector."""
        return round(self.outliers / 2 * length)


def _to_vectors(side: Tensor, is_key: bool) -> Tensor:
    """[L, H, T, D] -> key channels [L, H * D, T] or value tokens [L, T, H * D]."""
    return side.mT.flatten(1, 2) if is_key else side.transpose(1, 2).flatten(2)


def _from_vectors(vectors: Tensor, shape: tuple[int, ...], is_key: bool) -> Tensor:
    """Inverse of `_to_vectors`; `shape` [L, H, T, D]."""
    n_layers, n_heads, n_tokens, dim = shape
    if is_key:
        return vectors.reshape(n_layers, n_heads, dim, n_tokens).mT
    return vectors.reshape(n_layers, n_tokens, n_heads, dim).transpose(1, 2)


def _index_dtype(length: int) -> torch.dtype:
    return torch.int16 if length <= 1 << 15 else torch.int32
