"""KIVI: asymmetric 2-bit quantization, keys per channel and values per token.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750.
Settings as published and as in the tables of the kvtc paper: groups of 32, the last 128 tokens
exact, keys with their rotation. 32 consecutive tokens share the shift (16 bits) and scale (16 bits)
of a key channel, 32 consecutive features of a head those of a value token.

Differences: the window is the last 128 tokens of keys and values alike, where the published code
keeps between 0 and 127 keys (the tokens since the last multiple of 128). A last group of fewer than
32 tokens, or a head of fewer features, has a shift and scale of its own, so nothing but the window
is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...coding.bitpack import pack, packed_bytes, unpack
from ...coding.paper.group_quantizer import SymbolType, dequantize, quantize
from .stream import BodyMethod, Header, Reader, to_bytes


@dataclass(frozen=True, kw_only=True)
class Kivi(BodyMethod):
    """KIVI: keys are quantized by channel, values by token.

    Parameters:
        window_tokens: last tokens kept exactly; default 128.
        bits: 2 (default) or 4.
        group_size: numbers that share a shift and a scale; default 32.

    Example:
        >>> from kvtc.evaluate.baselines import Kivi
        >>> method = Kivi(bits=2)
        >>> round(method.measure(method.encode(model, cache, token_ids)).body_ratio, 1)
        5.3
    """

    window_tokens: int = 128
    bits: int = 2
    group_size: int = 32

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        return b"".join(write_groups(side.float(), self.group_size, self.bits) for side in (keys.mT, values))

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        reader = Reader(data)
        (n_layers, n_heads, n_tokens, dim), of_values = header.body_shapes
        keys = read_groups(reader, (n_layers, n_heads, dim, n_tokens), self.group_size, self.bits)
        return keys.mT, read_groups(reader, of_values, self.group_size, self.bits)


def write_groups(vectors: Tensor, group_size: int, bits: int) -> bytes:
    """float32 [..., n] -> bytes: runs of `group_size` along the last axis, the last one shorter,
    share a shift and a scale.

    First all whole groups, then the rest: packed symbols, shifts float16, scales float16.
    """
    parts: list[Tensor] = []
    for start, stop, size in _runs(vectors.shape[-1], group_size):
        groups = vectors[..., start:stop].reshape(*vectors.shape[:-1], -1, size)
        symbols, shift, scale = quantize(groups, SymbolType(bits))
        parts += [pack(symbols, bits), shift, scale]
    return to_bytes(*parts)


def read_groups(reader: Reader, shape: tuple[int, ...], group_size: int, bits: int) -> Tensor:
    """Inverse of `write_groups`: float32 of `shape`."""
    found = []
    for start, stop, size in _runs(shape[-1], group_size):
        groups = (*shape[:-1], (stop - start) // size)
        n_symbols = torch.Size(groups).numel() * size
        symbols = unpack(reader.take((packed_bytes(n_symbols, bits),), torch.uint8), n_symbols, bits)
        shift, scale = reader.take(groups, torch.float16), reader.take(groups, torch.float16)
        found.append(dequantize(symbols.reshape(*groups, size), shift, scale, SymbolType(bits)).flatten(-2))
    return torch.cat(found, dim=-1)


def _runs(length: int, group_size: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, group size) of the whole groups and of the rest, where there are any."""
    whole = length // group_size * group_size
    if whole:
        yield 0, whole, group_size
    if length > whole:
        yield whole, length, length - whole
