"""CacheGen: tokens as differences to an anchor token, coarser in deeper layers, entropy-coded by
layer and channel.

Liu et al., "CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving",
arXiv 2310.07240. In every 10 consecutive tokens the first is the anchor, quantized to 8 bits by its
largest value in the layer (16 bits, stored); of the others the difference to the anchor is
quantized with bins of 0.5, 1 and 1.5 in the first, middle and last third of the layers. Keys keep
their rotation. Every layer and channel has its own distribution for anchors and for differences,
profiled once for a model on other caches, as published.

Doubtful: these bins and the 8 bits are quoted second-hand, and their unit is not known here. A bin
of 1 is taken as the standard deviation of a layer's differences in the profile, which leads to a
ratio of 6, near what is published.

Other differences: tokens are compared to the anchor as decoded, so that its error does not add to
theirs, and differences lie within 31 bins. The arithmetic coder is kvtc's interleaved rANS with
tables of 12 bits and up to 128 bytes for its states; the profile's counts are smoothed by the
layer's, for a channel alone has seen few tokens. The code released with LMCache is something else
(no differences, 32 or 16 bins between a token's extremes), and is not what this is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...coding.rans import RansTables, decode_symbols, encode_symbols, normalize_frequencies
from ...errors import InvalidArgument
from ...process.torch_state import neutral_torch_state
from .stream import BodyMethod, Header, Reader, cache_sides, from_bytes, to_bytes, to_float16

GROUP_TOKENS = 10
BINS = (0.5, 1.0, 1.5)
ANCHOR_LIMIT = 127
DELTA_LIMIT = 31
# Tokens that the distribution of a whole layer counts as in that of each of its channels.
_PRIOR_TOKENS = 16.0


@dataclass(frozen=True)
class Profile:
    """What CacheGen knows of a model in advance.

    Parameters:
        steps: [2 L] float32, the bin of each kind and layer, keys first.
        anchors: tables of anchors, for each of the 2 L H D channels.
        deltas: the same of differences.

    Example:
        >>> from transformers import DynamicCache
        >>> from kvtc.evaluate.baselines import Profile
        >>> tiny = DynamicCache([(torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8))])
        >>> Profile.of([tiny]).steps.shape
        torch.Size([2])
    """

    steps: Tensor
    anchors: RansTables
    deltas: RansTables

    @classmethod
    @neutral_torch_state
    def of(cls, caches: Iterable[Any], bin_factor: float = 1.0) -> Profile:
        """The profile of a model.

        Parameters:
            caches: transformers caches of one sequence each.
            bin_factor: a factor for the published bins, by which CacheGen adapts to the
                bandwidth; default 1.

        Returns:
            The profile.

        Raises:
            InvalidArgument: no cache has more than one token.
        """
        sides = [channels for channels in map(_channels, map(_joined, caches)) if channels.shape[1] > 1]
        if not sides:
            raise InvalidArgument("CacheGen is profiled on caches of more than one token; got none")
        coded = [_anchors(side) for side in sides]
        deltas = [_deltas(side, anchors) for side, (_, _, anchors) in zip(sides, coded, strict=True)]
        n_rows, _, n_channels = sides[0].shape
        spread = torch.cat([delta.flatten(1, 2) for delta in deltas], dim=1).square().mean(dim=(1, 2)).sqrt()
        steps = spread.clamp_min(torch.finfo(torch.float32).tiny) * _bins(n_rows // 2) * bin_factor
        symbols = torch.cat([symbols for symbols, _, _ in coded], dim=1)
        differences = torch.cat([_delta_symbols(delta, steps).flatten(1, 2) for delta in deltas], dim=1)
        return cls(
            steps,
            _tables(symbols, n_channels, 2 * ANCHOR_LIMIT + 1),
            _tables(differences, n_channels, 2 * DELTA_LIMIT + 1),
        )


@dataclass(frozen=True, kw_only=True)
class CacheGen(BodyMethod):
    """CacheGen with one profile.

    Parameters:
        window_tokens: last tokens kept exactly; default 0.
        profile: of the model whose caches are coded.

    Example:
        >>> from transformers import DynamicCache
        >>> from kvtc.evaluate.baselines import CacheGen, Profile
        >>> tiny = DynamicCache([(torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8))])
        >>> method = CacheGen(profile=Profile.of([tiny]))
        >>> method.decode(method.encode(model, tiny, token_ids[:50]), token_ids[:50]).get_seq_length()
        50
    """

    profile: Profile

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        side = _channels(torch.stack([keys, values]).float())
        symbols, scale, anchors = _anchors(side)
        coded = _encode(symbols, self.profile.anchors)
        # The last group may be short: what pads it is not coded.
        differences = _delta_symbols(_deltas(side, anchors), self.profile.steps).flatten(1, 2)
        rest = _encode(differences[:, : side.shape[1] - symbols.shape[1]], self.profile.deltas)
        return to_bytes(torch.tensor([len(coded)], dtype=torch.int32), scale) + coded + rest

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        n_layers, n_heads, n_tokens, dim = header.body_shapes[0]
        shape = 2 * n_layers, n_heads * dim
        n_anchors = -(-n_tokens // GROUP_TOKENS)
        n_scales = 2 * n_layers * n_anchors
        (length,) = from_bytes(data[:4], torch.int32).tolist()
        start = 4 + 2 * n_scales
        scale = Reader(data[4:start]).take((2 * n_layers, n_anchors, 1), torch.float16)
        symbols = _decode(data[start : start + length], n_anchors, shape, self.profile.anchors)
        differences = _decode(data[start + length :], n_tokens - n_anchors, shape, self.profile.deltas)
        anchors = _anchor_values(symbols, scale)
        deltas = torch.zeros(shape[0], n_anchors * (GROUP_TOKENS - 1), shape[1], dtype=torch.float32)
        deltas[:, : n_tokens - n_anchors] = (differences - DELTA_LIMIT) * self.profile.steps[:, None, None]
        deltas = deltas.reshape(shape[0], n_anchors, GROUP_TOKENS - 1, shape[1])
        groups = torch.cat([torch.zeros_like(anchors)[:, :, None], deltas], dim=2) + anchors[:, :, None]
        rows = groups.flatten(1, 2)[:, :n_tokens]
        keys, values = rows.reshape(2, n_layers, n_tokens, n_heads, dim).transpose(2, 3)
        return keys, values


def _joined(cache: Any) -> Tensor:
    return torch.stack(cache_sides(cache)).float()


def _channels(sides: Tensor) -> Tensor:
    """[2, L, H, T, D] -> [2 L, T, H * D]."""
    return sides.transpose(2, 3).flatten(3).flatten(0, 1)


def _anchors(side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[2 L, T, C] -> of each group's first token symbols [2 L, n, C] from 0, scale [2 L, n, 1]
    float16, and decoded values.
    """
    exact = side[:, ::GROUP_TOKENS]
    scale = to_float16(exact.abs().amax(dim=2, keepdim=True))
    per_unit = ANCHOR_LIMIT / scale.float().clamp_min(torch.finfo(torch.float16).tiny)
    symbols = (exact * per_unit).round().clamp(-ANCHOR_LIMIT, ANCHOR_LIMIT).long() + ANCHOR_LIMIT
    return symbols, scale, _anchor_values(symbols, scale)


def _anchor_values(symbols: Tensor, scale: Tensor) -> Tensor:
    return (symbols - ANCHOR_LIMIT) * (scale.float() / ANCHOR_LIMIT)


def _deltas(side: Tensor, anchors: Tensor) -> Tensor:
    """[2 L, T, C] -> differences of the other tokens to their anchor [2 L, n, 9, C]; a short last
    group repeats its anchor.
    """
    missing = anchors.shape[1] * GROUP_TOKENS - side.shape[1]
    padded = torch.cat([side, anchors[:, -1:].expand(-1, missing, -1)], dim=1)
    groups = padded.reshape(len(side), -1, GROUP_TOKENS, side.shape[2])
    return groups[:, :, 1:] - anchors[:, :, None]


def _delta_symbols(deltas: Tensor, steps: Tensor) -> Tensor:
    """From 0 to 2 * DELTA_LIMIT."""
    return (deltas / steps[:, None, None, None]).round().clamp(-DELTA_LIMIT, DELTA_LIMIT).long() + DELTA_LIMIT


def _bins(n_layers: int) -> Tensor:
    """[2 L]: of each layer's third, keys first."""
    return torch.tensor([BINS[3 * layer // n_layers] for layer in range(n_layers)], dtype=torch.float32).repeat(2)


def _tables(symbols: Tensor, n_channels: int, n_symbols: int) -> RansTables:
    """Symbols [2 L, n, C] of a profile -> a table for each layer and channel."""
    n_rows = len(symbols)
    place = torch.arange(n_rows * n_channels).reshape(n_rows, 1, n_channels) * n_symbols
    counts = (symbols + place).flatten().bincount(minlength=n_rows * n_channels * n_symbols).double()
    counts = counts.reshape(n_rows, n_channels, n_symbols)
    prior = counts.sum(dim=1, keepdim=True)
    counts += _PRIOR_TOKENS * prior / prior.sum(dim=2, keepdim=True)
    return RansTables(normalize_frequencies(counts.flatten(0, 1).numpy()), n_rows * n_channels)


def _classes(tables: RansTables, n_tokens: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """Every column its own table, all tokens alike."""
    return np.arange(tables.n_classes).astype(np.uint16), np.zeros(n_tokens, np.uint8)


def _encode(symbols: Tensor, tables: RansTables) -> bytes:
    """[2 L, n, C] -> bytes."""
    columns = symbols.transpose(1, 2).flatten(0, 1).numpy().astype(np.uint8)
    return encode_symbols(columns, *_classes(tables, columns.shape[1]), tables)


def _decode(data: bytes, n_tokens: int, shape: tuple[int, int], tables: RansTables) -> Tensor:
    """Inverse of `_encode`: [2 L, n, C]; shape: 2 L and C."""
    columns = decode_symbols(data, *_classes(tables, n_tokens), tables)
    return torch.from_numpy(columns.astype(np.int64)).reshape(*shape, n_tokens).transpose(1, 2)
