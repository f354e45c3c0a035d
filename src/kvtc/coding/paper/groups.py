"""Coefficients of a chunk to bytes under a bit allocation, and back.

Run after run of the allocation, each: the shifts [group, token], the scales [group, token] (both float16, low bytes first and
then high bytes, because bytes of one significance resemble each other and DEFLATE finds that), then the packed symbols
[group, token, coefficient].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import CorruptStream
from ..bitpack import pack, packed_bytes
from ..float_formats import E4M3_MAX
from .allocation import BitAllocation, Run
from .group_quantizer import SymbolType, quantize


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


def decode_groups(data: bytes, allocation: BitAllocation, found: npt.NDArray[np.float32]) -> None:
    """`chunk_bytes` bytes -> coefficients of its tokens, put into found [n_tokens, n_coefficients]; dropped ones are left alone.

    Raises `CorruptStream` for another number of bytes.
    """
    if len(data) != (n_bytes := chunk_bytes(allocation, len(found))):
        raise CorruptStream(f"{len(data)} bytes of groups; {len(found)} tokens take {n_bytes}")
    from .group_kernels import read_run

    symbols, offset = np.frombuffer(data, np.uint8), 0
    for run in allocation.runs if data else ():
        kind = run.symbol_type
        levels = np.float32(E4M3_MAX if kind is SymbolType.FP8 else 2**kind.value - 1)
        values = _E4M3 if kind is SymbolType.FP8 else _INTEGERS
        read_run(symbols, offset, kind.value, run.size, run.count, levels, values, _FLOAT16, found, run.start)
        offset += _run_bytes(run, len(found))


def _run_bytes(run: Run, n_tokens: int) -> int:
    side = 4 * run.count * n_tokens if run.symbol_type.has_scale else 0
    return side + packed_bytes(run.count * n_tokens * run.size, run.symbol_type.value)


def _byte_planes(values: Tensor) -> Tensor:
    """float16 of any shape -> uint8, all low bytes and then all high bytes."""
    # A slice of one token reshapes to a strided view, which has no bytes to look at.
    return values.contiguous().reshape(-1).view(torch.uint8).reshape(-1, 2).T.reshape(-1)


_INTEGERS = np.arange(1 << 8, dtype=np.float32)
_E4M3 = torch.arange(1 << 8, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float().numpy()
_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""What each pattern of bits stands for."""
