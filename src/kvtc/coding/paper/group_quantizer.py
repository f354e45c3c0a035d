"""Group quantizer of the paper: consecutive coefficients share a 16-bit shift and a 16-bit scale, per token (paper, B.17).

With lo and hi the extremes of a group of one token:

    int2, int4   shift = lo              scale = hi - lo         value = shift + symbol * scale / (2**bits - 1)
    fp8 (e4m3)   shift = (lo + hi) / 2   scale = (hi - lo) / 2   value = shift + symbol * scale / 448
    fp16         neither: the coefficient itself in 16 bits, for the truncation baseline

Shift and scale are rounded to float16 first and the symbols are chosen for the rounded ones. The scale is the width of the
group, not of a cell: a cell of a quiet group would fall among float16's subnormals.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from ..float_formats import E4M3_MAX, FLOAT16_MAX


class SymbolType(IntEnum):
    """How a group's symbols are stored; the value is the bits of a symbol."""

    INT2 = 2
    INT4 = 4
    FP8 = 8
    FP16 = 16

    @property
    def has_scale(self) -> bool:
        """Whether each group and token carries a shift and a scale."""
        return self in (SymbolType.INT2, SymbolType.INT4, SymbolType.FP8)

    def group_bits(self, size: int) -> int:
        """Bits that a group of `size` coefficients costs a token, shift and scale included."""
        return self.value * size + (32 if self.has_scale else 0)


def quantize(coefficients: Tensor, symbol_type: SymbolType) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [..., size] float32 -> symbols [..., size], shift [...] and scale [...] float16.

    Symbols are uint8 (levels of int2 and int4, the bit pattern of fp8) or float16. Values past float16's range saturate.
    """
    if symbol_type is SymbolType.FP16:
        empty = torch.empty(0, dtype=torch.float16, device=coefficients.device)
        return coefficients.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16), empty, empty
    low, high = coefficients.aminmax(dim=-1)
    if symbol_type is SymbolType.FP8:
        shift, width, levels = (low + high) / 2, (high - low) / 2, E4M3_MAX
    else:
        shift, width, levels = low, high - low, float(2**symbol_type.value - 1)
    shift16 = shift.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
    scale16 = width.clamp(max=FLOAT16_MAX).to(torch.float16)
    scale = scale16.float()
    # A group of equal values has scale 0: every symbol is then 0 and the shift says it all.
    per_level = torch.where(scale > 0, levels / scale, torch.zeros_like(scale))
    offsets = (coefficients - shift16.float()[..., None]) * per_level[..., None]
    if symbol_type is SymbolType.FP8:
        symbols = offsets.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        symbols = offsets.round().clamp(0, levels).to(torch.uint8)
    return symbols, shift16, scale16


def dequantize(symbols: Tensor, shift: Tensor, scale: Tensor, symbol_type: SymbolType) -> Tensor:
    """Inverse of `quantize`: float32 coefficients [..., size]."""
    if symbol_type is SymbolType.FP16:
        return symbols.float()
    if symbol_type is SymbolType.FP8:
        offsets, levels = symbols.view(torch.float8_e4m3fn).float(), E4M3_MAX
    else:
        offsets, levels = symbols.float(), float(2**symbol_type.value - 1)
    return shift.float()[..., None] + offsets * (scale.float() / levels)[..., None]
