"""TurboQuant: a random rotation makes every coordinate alike, and one optimal scalar quantizer
serves them all.

Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", arXiv
2504.19874. Each key and value of a head is a vector of D features: its norm is stored in 16 bits,
its direction is rotated by one random orthogonal matrix (from a seed, not stored) and each
coordinate becomes the nearest of 2**bits levels. The levels are those of Lloyd and Max for a
coordinate of a random direction, whose density is (1 - x**2) ** ((D - 3) / 2).

With `sketched_keys` keys follow the variant for inner products: one bit less for the levels, and of
the residual its norm in 16 bits and the signs of D random projections (QJL), which makes inner
products with it right on average.

Differences: the published half bits (2.5, 3.5), made by giving some outlier channels one bit more,
are left out. Keys keep their rotation by position, which the random rotation makes irrelevant. The
publication keeps no window; the registry gives it the one that all methods of a table share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .stream import BodyMethod, Header, Reader, Shape, to_bytes, to_float16

_GRID = 1 << 15
_STEPS = 300


@dataclass(frozen=True, kw_only=True)
class TurboQuant(BodyMethod):
    """TurboQuant: vectors are rotated at random, and each coordinate is rounded to one of some
    levels.

    Parameters:
        window_tokens: last tokens kept exactly; default 0.
        bits: of a coordinate, 1 to 8, with `sketched_keys` at least 2, one of which is a sign;
            default 3.
        sketched_keys: whether keys follow the variant for inner products; default False.
        seed: of the rotation; default 0.

    Example:
        >>> from kvtc.evaluate.baselines import TurboQuant
        >>> method = TurboQuant(bits=4)
        >>> round(method.measure(method.encode(model, cache, token_ids)).body_ratio, 1)
        3.6
    """

    bits: int = 3
    sketched_keys: bool = False
    seed: int = 0

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        return self._encode(keys.float(), self.sketched_keys) + self._encode(values.float(), sketched=False)

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        reader = Reader(data)
        of_keys, of_values = header.body_shapes
        return self._decode(reader, of_keys, self.sketched_keys), self._decode(reader, of_values, sketched=False)

    def _encode(self, side: Tensor, sketched: bool) -> bytes:
        dim, bits = side.shape[-1], self.bits - sketched
        rotation, projection = self._matrices(dim)
        norm = side.norm(dim=-1, keepdim=True)
        turned = side / norm.clamp_min(torch.finfo(torch.float32).tiny) @ rotation
        levels = lloyd_max_levels(dim, bits)
        symbols = torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)
        stored = to_bytes(to_float16(norm)) + _pack_planes(symbols, bits)
        if sketched:
            residual = turned - levels[symbols]
            stored += to_bytes(to_float16(residual.norm(dim=-1, keepdim=True)))
            stored += _pack_planes((residual @ projection.mT >= 0).long(), 1)
        return stored

    def _decode(self, reader: Reader, shape: Shape, sketched: bool) -> Tensor:
        dim, bits = shape[-1], self.bits - sketched
        rotation, projection = self._matrices(dim)
        norm = reader.take((*shape[:-1], 1), torch.float16).float()
        turned = lloyd_max_levels(dim, bits)[_unpack_planes(reader, shape, bits)]
        if sketched:
            length = reader.take((*shape[:-1], 1), torch.float16).float()
            signs = 2.0 * _unpack_planes(reader, shape, 1) - 1
            turned = turned + math.sqrt(math.pi / 2) / dim * length * (signs @ projection)
        return turned @ rotation.mT * norm

    def _matrices(self, dim: int) -> tuple[Tensor, Tensor]:
        """The random rotation and the Gaussian projection, [D, D] each."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn, projection = (torch.randn(dim, dim, generator=generator, dtype=torch.float32) for _ in range(2))
        return torch.linalg.qr(drawn).Q, projection


@cache
def lloyd_max_levels(dim: int, bits: int) -> Tensor:
    """Levels [2**bits] float32, increasing, of least squared error for a coordinate of a random
    direction of dim >= 2 features.
    """
    edges = np.linspace(-1, 1, _GRID + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    density = (1 - middles**2) ** ((dim - 3) / 2)
    mass = np.concatenate([[0], np.cumsum(density)])
    moment = np.concatenate([[0], np.cumsum(density * middles)])
    count = 1 << bits
    levels = np.interp((np.arange(count) + 0.5) / count, mass / mass[-1], edges)
    for _ in range(_STEPS):
        cells = np.concatenate([[-1], (levels[1:] + levels[:-1]) / 2, [1]])
        levels = np.diff(np.interp(cells, edges, moment)) / np.diff(np.interp(cells, edges, mass))
    return torch.from_numpy(levels).float()


def _pack_planes(symbols: Tensor, bits: int) -> bytes:
    """Symbols below 2**bits -> one plane of bits after the other: any number of bits a symbol, no
    padding between.
    """
    planes = [np.packbits((symbols.reshape(-1) >> bit & 1).numpy().astype(np.uint8)) for bit in range(bits)]
    return b"".join(plane.tobytes() for plane in planes)


def _unpack_planes(reader: Reader, shape: tuple[int, ...], bits: int) -> Tensor:
    """Inverse of `_pack_planes`: int64 of `shape`."""
    count = torch.Size(shape).numel()
    symbols = np.zeros(count, np.int64)
    for bit in range(bits):
        plane = reader.take((-(-count // 8),), torch.uint8).numpy()
        symbols |= np.unpackbits(plane, count=count).astype(np.int64) << bit
    return torch.from_numpy(symbols).reshape(shape)
