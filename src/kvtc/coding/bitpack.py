"""Symbols of 2, 4, 8 or 16 bits to bytes and back; the first symbol takes the low bits of a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(n_symbols: int, bits: int) -> int:
    """Bytes that `n_symbols` symbols take."""
    return -(-n_symbols * bits // 8)


def pack(symbols: Tensor, bits: int) -> Tensor:
    """Symbols (uint8, or float16 for 16 bits) of any shape, read in order -> uint8 [packed_bytes]."""
    flat = symbols.reshape(-1)
    if bits >= 8:
        return flat.view(torch.uint8)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).reshape(-1, per_byte)
    packed = padded[:, 0].clone()
    for index in range(1, per_byte):
        packed |= padded[:, index] << (index * bits)
    return packed


def unpack(packed: Tensor, n_symbols: int, bits: int) -> Tensor:
    """uint8 [packed_bytes(n_symbols, bits)] -> the symbols [n_symbols], uint8 (float16 for 16 bits)."""
    if bits == 16:
        # float16 cannot be viewed at an odd offset.
        return (packed.clone() if packed.storage_offset() % 2 else packed).view(torch.float16)
    if bits == 8:
        return packed
    per_byte = 8 // bits
    mask = (1 << bits) - 1
    return torch.stack([(packed >> (index * bits)) & mask for index in range(per_byte)], dim=1).reshape(-1)[:n_symbols]
