"""Coefficients of a chunk to bytes under a bit allocation, and back.

Run after run of the allocation, each: the shifts [group, token], the scales [group, token] (both float16, low bytes first and
then high bytes, because bytes of one significance resemble each other and DEFLATE finds that), then the packed symbols
[group, token, coefficient].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bitpack import pack, packed_bytes, unpack
from .allocation import BitAllocation, Run
from .group_quantizer import dequantize, quantize


def chunk_bytes(allocation: BitAllocation, n_tokens: int) -> int:
    """Bytes of `n_tokens` tokens before lossless coding."""
    return sum(_run_bytes(run, n_tokens) for run in allocation.runs)


def encode_groups(coefficients: Tensor, allocation: BitAllocation) -> bytes:
    """Coefficients [T, >= n_coefficients] float32 of a chunk -> `chunk_bytes` bytes."""
    parts: list[Tensor] = []
    for run in allocation.runs:
        grouped = coefficients[:, run.start : run.stop].reshape(-1, run.count, run.size).transpose(0, 1)
        symbols, shift, scale = quantize(grouped, run.symbol_type)
        if run.symbol_type.has_scale:
            parts += [_byte_planes(shift), _byte_planes(scale)]
        parts.append(pack(symbols.contiguous(), run.symbol_type.value))
    return bytes(torch.cat(parts).cpu().numpy().tobytes()) if parts else b""


def decode_groups(data: bytes, allocation: BitAllocation, n_tokens: int, device: torch.device) -> Tensor:
    """`chunk_bytes` bytes -> coefficients [n_tokens, n_coefficients] float32; dropped ones are zero."""
    coefficients = torch.zeros(n_tokens, allocation.n_coefficients, dtype=torch.float32, device=device)
    if not data:
        return coefficients
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    offset = 0
    for run in allocation.runs:
        shift = scale = coefficients.new_empty(0)
        if run.symbol_type.has_scale:
            side = 2 * run.count * n_tokens
            shift = _join_planes(buffer[offset : offset + side], run.count, n_tokens)
            scale = _join_planes(buffer[offset + side : offset + 2 * side], run.count, n_tokens)
            offset += 2 * side
        n_symbols = run.count * n_tokens * run.size
        n_bytes = packed_bytes(n_symbols, run.symbol_type.value)
        symbols = unpack(buffer[offset : offset + n_bytes], n_symbols, run.symbol_type.value)
        offset += n_bytes
        values = dequantize(symbols.reshape(run.count, n_tokens, run.size), shift, scale, run.symbol_type)
        coefficients[:, run.start : run.stop] = values.transpose(0, 1).reshape(n_tokens, -1)
    return coefficients


def _run_bytes(run: Run, n_tokens: int) -> int:
    side = 4 * run.count * n_tokens if run.symbol_type.has_scale else 0
    return side + packed_bytes(run.count * n_tokens * run.size, run.symbol_type.value)


def _byte_planes(values: Tensor) -> Tensor:
    """float16 of any shape -> uint8, all low bytes and then all high bytes."""
    # A slice of one token reshapes to a strided view, which has no bytes to look at.
    return values.contiguous().reshape(-1).view(torch.uint8).reshape(-1, 2).T.reshape(-1)


def _join_planes(planes: Tensor, count: int, n_tokens: int) -> Tensor:
    """Inverse of `_byte_planes`: float16 [count, n_tokens]."""
    # A copy even where a view would do: float16 cannot be viewed at an odd offset.
    pairs = planes.reshape(2, -1).T.clone(memory_format=torch.contiguous_format)
    return pairs.reshape(-1).view(torch.float16).reshape(count, n_tokens)
