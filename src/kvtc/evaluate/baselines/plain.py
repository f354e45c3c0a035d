"""Zstandard over the 16-bit cache: what a general compressor gains, and the only baseline that
loses nothing.

Level 3, its default. With `byte_planes` the low bytes of all values come first, then the high ones:
the sign and exponent of a bfloat16 are then neighbours of their like. A float32 cache is stored,
and counted, as float16.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import MissingDependency
from .stream import BodyMethod, Header, Reader, from_bytes, to_bytes, to_stored

LEVEL = 3


@dataclass(frozen=True, kw_only=True)
class PlainZstd(BodyMethod):
    """Zstandard over the numbers of a cache, 16 bits each. Nothing is lost of a 16-bit cache.

    Parameters:
        window_tokens: last tokens kept exactly; default 0.
        byte_planes: whether the low bytes of all numbers come first, then the high ones;
            default False.

    Raises:
        MissingDependency: when it encodes or decodes, if the package zstandard is not
            installed.

    Example:
        >>> from kvtc.evaluate.baselines import PlainZstd
        >>> method = PlainZstd(byte_planes=True)
        >>> restored = method.decode(method.encode(model, cache, token_ids), token_ids)
        >>> torch.equal(restored.layers[3].keys, cache.layers[3].keys)
        True
    """

    byte_planes: bool = False

    def encode_body(self, keys: Tensor, values: Tensor) -> bytes:
        header = Header.of(keys, values, 0)
        data = to_bytes(to_stored(keys, header), to_stored(values, header))
        if self.byte_planes:
            data = to_bytes(from_bytes(data, torch.uint8).reshape(-1, 2).mT)
        return bytes(_zstandard().ZstdCompressor(level=LEVEL).compress(data))

    def decode_body(self, data: bytes, header: Header) -> tuple[Tensor, Tensor]:
        plain = bytes(_zstandard().ZstdDecompressor().decompress(data))
        if self.byte_planes:
            plain = to_bytes(from_bytes(plain, torch.uint8).reshape(2, -1).mT)
        reader = Reader(plain)
        keys, values = (reader.take(shape, header.stored_dtype) for shape in header.body_shapes)
        return keys, values


def _zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise MissingDependency('this baseline needs the package zstandard; pip install "kvtc[coders]"') from error
