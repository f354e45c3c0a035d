"""Tokens kept as they are, bit for bit, or sinks in fp8 (paper, B.15). `floats` codes exact ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..float_formats import E4M3_MAX, FLOAT16_MAX


def exact_bytes(n_values: int, dtype: torch.dtype) -> int:
    """Bytes of `n_values` values."""
    return n_values * dtype.itemsize


def encode_exact(keys: Tensor, values: Tensor) -> bytes:
    """Keys and values [L, H, n, D] of one dtype -> bytes."""
    return bytes(torch.stack([keys, values]).reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def decode_exact(data: bytes, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverse of `encode_exact`: keys and values of `shape` [L, H, n, D]."""
    both = torch.frombuffer(bytearray(data), dtype=dtype).reshape(2, *shape)
    return both[0], both[1]


def fp8_bytes(n_vectors: int, head_dim: int) -> int:
    """Bytes of `n_vectors` head vectors in fp8, each with its 16-bit scale."""
    return n_vectors * (head_dim + 2)


def encode_fp8(keys: Tensor, values: Tensor) -> bytes:
    """Keys and values [L, H, n, D] -> e4m3 symbols, then one float16 scale per head vector (its largest magnitude)."""
    both = torch.stack([keys, values]).float()
    scale = both.abs().amax(dim=-1).clamp(max=FLOAT16_MAX).to(torch.float16)
    per_level = torch.where(scale > 0, E4M3_MAX / scale.float(), torch.zeros_like(scale, dtype=torch.float32))
    symbols = (both * per_level[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return bytes(symbols.view(torch.uint8).cpu().numpy().tobytes() + scale.cpu().numpy().tobytes())


def decode_fp8(data: bytes, shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverse of `encode_fp8`, in `dtype`."""
    n_vectors = 2 * shape[0] * shape[1] * shape[2]
    buffer = bytearray(data)
    symbols = torch.frombuffer(buffer, dtype=torch.uint8, count=n_vectors * shape[3]).view(torch.float8_e4m3fn)
    scale = torch.frombuffer(buffer, dtype=torch.float16, offset=n_vectors * shape[3])
    both = (symbols.float().reshape(n_vectors, shape[3]) * (scale.float() / E4M3_MAX)[:, None]).to(dtype)
    both = both.reshape(2, *shape)
    return both[0], both[1]
