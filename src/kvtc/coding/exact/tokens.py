"""Tokens kept as they are, bit for bit, or sinks in fp8 (paper, B.15). `floats` and `channels` code exact ones."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..float_formats import E4M3_MAX, FLOAT16_MAX
from .floats import FloatLayout

SideShapes = tuple[tuple[int, int, int, int], tuple[int, int, int, int]]
"""[L, H, n, D] of keys, and of values."""


def exact_bytes(n_values: int, dtype: torch.dtype) -> int:
    """Bytes of `n_values` values."""
    return n_values * dtype.itemsize


def exact_layout(n_tokens: int, dims: tuple[int, int], dtype: torch.dtype) -> FloatLayout:
    """How `encode_exact` orders the numbers of heads with dims features of a key and of a value."""
    return FloatLayout(n_tokens, dims[0] if dims[0] == dims[1] else sum(dims), dtype)


def encode_exact(keys: Tensor, values: Tensor) -> bytes:
    """Keys and values [L, H, n, D] of one dtype -> bytes: keys, then values; of two widths [L, H, n, key and value]."""
    is_one_width = keys.shape == values.shape
    both = torch.stack([keys, values]) if is_one_width else torch.cat([keys, values], dim=-1)
    return bytes(both.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def decode_exact(data: bytes, shapes: SideShapes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverse of `encode_exact`: keys and values of these shapes [L, H, n, D]."""
    both = torch.frombuffer(bytearray(data), dtype=dtype)
    if shapes[0] == shapes[1]:
        keys, values = both.reshape(2, *shapes[0])
    else:
        keys, values = torch.split(both.reshape(*shapes[0][:3], -1), [shape[3] for shape in shapes], dim=-1)
    return keys, values


def fp8_bytes(n_heads: int, dims: tuple[int, int]) -> int:
    """Bytes of a key and a value of each of `n_heads` heads in fp8, every vector with its 16-bit scale."""
    return n_heads * (sum(dims) + 4)


def encode_fp8(keys: Tensor, values: Tensor) -> bytes:
    """Keys and values [L, H, n, D] -> e4m3 symbols, then one float16 scale per head vector (its largest magnitude)."""
    all_symbols, scales = [], []
    for side in (keys.float(), values.float()):
        scale = side.abs().amax(dim=-1).clamp(max=FLOAT16_MAX).to(torch.float16)
        per_level = torch.where(scale > 0, E4M3_MAX / scale.float(), torch.zeros_like(scale, dtype=torch.float32))
        symbols = (side * per_level[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        all_symbols.append(symbols.view(torch.uint8).cpu().numpy().tobytes())
        scales.append(scale.cpu().numpy().tobytes())
    return b"".join(all_symbols + scales)


def decode_fp8(data: bytes, shapes: SideShapes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverse of `encode_fp8`, in `dtype`."""
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    sizes = [prod(shape) for shape in shapes]
    *symbols, scales = torch.split(octets, [*sizes, len(octets) - sum(sizes)])
    keys, values = (
        (its.view(torch.float8_e4m3fn).float().reshape(shape) * (scale.float() / E4M3_MAX).reshape(*shape[:3], 1)).to(
            dtype
        )
        for its, scale, shape in zip(symbols, scales.clone().view(torch.float16).tensor_split(2), shapes, strict=True)
    )
    return keys, values
