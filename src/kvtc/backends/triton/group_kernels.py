"""The kernels of group quantization: symbols of all chunks and all runs of one type in a launch, a thread for a byte or a value.

What is packed into a byte may belong to several tokens and groups, so every symbol is told its own by division.
"""

import triton
import triton.language as tl

from .gather_kernels import from_fp8
from .place_kernels import to_fp8

BLOCK = tl.constexpr(1024)
FIELDS = tl.constexpr(8)
# Numbers of the format.
FLOAT16_MAX = tl.constexpr(65504.0)
E4M3_MAX = tl.constexpr(448.0)
# Added and taken off again, it rounds to an integer, ties to even.
_HALF_LOST = tl.constexpr(12582912.0)


# What changes from call to call and makes no better code. Kernels would be compiled for each kind of it, at a first call.
_PLAIN = ["n_blocks", "n_groups", "token_stride"]


@triton.jit
def load_piece(fields, n_blocks):
    """-> of this program's piece the first token, tokens, first coefficient, size and number of groups, index of the first group
    among all, where its shifts and where its symbols begin in the bytes; and the places in it that are this program's.

    fields: int64 [pieces, FIELDS]; n_blocks: programs of a piece.
    """
    field = fields + tl.program_id(0) // n_blocks * FIELDS
    at = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    first_token, n_tokens, start = tl.load(field), tl.load(field + 1).to(tl.int32), tl.load(field + 2)
    size, count, first_group = tl.load(field + 3).to(tl.int32), tl.load(field + 4).to(tl.int32), tl.load(field + 5)
    return first_token, n_tokens, start, size, count, first_group, tl.load(field + 6), tl.load(field + 7), at


@triton.jit
def shift_and_scale(low, high, BITS: tl.constexpr):
    """Extremes of groups -> float16 of both."""
    if BITS == 8:
        shift, width = (low + high) * 0.5, (high - low) * 0.5
    else:
        shift, width = low, high - low
    shift = tl.minimum(tl.maximum(shift, -FLOAT16_MAX), FLOAT16_MAX)
    return shift.to(tl.float16), tl.minimum(width, FLOAT16_MAX).to(tl.float16)


@triton.jit(do_not_specialize=_PLAIN[:2])
def pack_scales(lows, highs, n_groups, fields, n_blocks, output, BITS: tl.constexpr):
    """Shifts and scales of pieces: planes of low and of high bytes. lows, highs: float32 [tokens, n_groups]."""
    first_token, n_tokens, _, _, count, first_group, scales_at, _, at = load_piece(fields, n_blocks)
    n = count * n_tokens
    inside = at < n
    group, token = at // n_tokens, at % n_tokens
    place = (first_token + token) * n_groups + first_group + group
    low, high = tl.load(lows + place, mask=inside, other=0.0), tl.load(highs + place, mask=inside, other=0.0)
    shift, scale = shift_and_scale(low, high, BITS)
    shift, scale = shift.to(tl.uint16, bitcast=True), scale.to(tl.uint16, bitcast=True)
    to = output + scales_at + at
    tl.store(to, (shift & 0xFF).to(tl.uint8), mask=inside)
    tl.store(to + n, (shift >> 8).to(tl.uint8), mask=inside)
    tl.store(to + 2 * n, (scale & 0xFF).to(tl.uint8), mask=inside)
    tl.store(to + 3 * n, (scale >> 8).to(tl.uint8), mask=inside)


@triton.jit
def quantized(x, low, high, BITS: tl.constexpr):
    """Coefficients and the extremes of their groups -> symbols as int32."""
    shift, scale = shift_and_scale(low, high, BITS)
    shift, scale = shift.to(tl.float32), scale.to(tl.float32)
    levels: tl.constexpr = E4M3_MAX if BITS == 8 else (1 << BITS) - 1.0
    has_width = scale > 0
    per_level = tl.div_rn(tl.full(x.shape, levels, tl.float32), tl.where(has_width, scale, 1.0))
    per_level = tl.where(has_width, per_level, 0.0)
    offset = (x - shift) * per_level
    if BITS == 8:
        return to_fp8(tl.minimum(tl.maximum(offset, -E4M3_MAX), E4M3_MAX), 3, 7).to(tl.int32)
    return ((tl.minimum(tl.maximum(offset, 0.0), levels) + _HALF_LOST) - _HALF_LOST).to(tl.int32)


@triton.jit(do_not_specialize=_PLAIN)
def pack_symbols(
    coefficients, token_stride, column_stride, lows, highs, n_groups, fields, n_blocks, output, BITS: tl.constexpr,
):  # fmt: skip
    """Packed symbols of pieces. coefficients: float32; lows, highs: as in `pack_scales`; nothing is read of them for 16 bits."""
    first_token, n_tokens, start, size, count, first_group, _, symbols_at, at = load_piece(fields, n_blocks)
    n = count * n_tokens * size
    per_byte: tl.constexpr = 8 // BITS if BITS < 8 else 1
    bytes_each: tl.constexpr = BITS // 8 if BITS > 8 else 1
    packed = tl.zeros([BLOCK], tl.int32)
    for index in tl.static_range(per_byte):
        symbol_at = at // bytes_each * per_byte + index
        inside = symbol_at < n
        group, token = symbol_at // size // n_tokens, symbol_at // size % n_tokens
        column = start + (group * size + symbol_at % size)
        token = first_token + token
        x = tl.load(coefficients + token * token_stride + column * column_stride, mask=inside, other=0.0)
        if BITS == 16:
            x = tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)
            packed = (x.to(tl.uint16, bitcast=True).to(tl.int32) >> (8 * (at % 2))) & 0xFF
        else:
            place = token * n_groups + first_group + group
            low, high = tl.load(lows + place, mask=inside, other=0.0), tl.load(highs + place, mask=inside, other=0.0)
            packed |= tl.where(inside, quantized(x, low, high, BITS), 0) << (BITS * index)
    n_bytes = (n + per_byte - 1) // per_byte * bytes_each
    tl.store(output + symbols_at + at, packed.to(tl.uint8), mask=at < n_bytes)


@triton.jit
def load_float16(low_bytes, high_bytes, inside):
    """float16 of two planes of bytes, as float32."""
    low, high = tl.load(low_bytes, mask=inside, other=0), tl.load(high_bytes, mask=inside, other=0)
    return (low.to(tl.uint16) | (high.to(tl.uint16) << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=[_PLAIN[0], _PLAIN[2]])
def unpack_symbols(data, fields, n_blocks, output, token_stride, BITS: tl.constexpr):
    """Coefficients of pieces. data: uint8. output: float32, the coefficients of a token side by side."""
    first_token, n_tokens, start, size, count, _, scales_at, symbols_at, at = load_piece(fields, n_blocks)
    width = count * size
    inside = at < n_tokens * width
    token, column = at // width, at % width
    in_scales = column // size * n_tokens + token
    symbol_at = in_scales * size + column % size
    symbols = data + symbols_at
    if BITS == 16:
        x = load_float16(symbols + 2 * symbol_at.to(tl.int64), symbols + 2 * symbol_at.to(tl.int64) + 1, inside)
    else:
        per_byte: tl.constexpr = 8 // BITS
        code = tl.load(symbols + symbol_at // per_byte, mask=inside, other=0)
        n = count * n_tokens
        scales = data + scales_at + in_scales
        shift = load_float16(scales, scales + n, inside)
        scale = load_float16(scales + 2 * n, scales + 3 * n, inside)
        levels: tl.constexpr = E4M3_MAX if BITS == 8 else (1 << BITS) - 1.0
        if BITS == 8:
            offset = from_fp8(code, 3)
        else:
            offset = ((code.to(tl.int32) >> (BITS * (symbol_at % per_byte))) & ((1 << BITS) - 1)).to(tl.float32)
        x = shift + offset * tl.div_rn(scale, tl.full(scale.shape, levels, tl.float32))
    tl.store(output + (first_token + token) * token_stride + start + column, x, mask=inside)
