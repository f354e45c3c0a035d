"""The coder of recurrent states whose numbers are rounded, once, to 8 or 6 bits.

The numbers of a row, one behind the other along the last axis of a state, are divided by a scale of the row: the largest of them
becomes the largest integer. Rows of a state often differ in scale and sign alone, so the coder of floats, which learns what each
place of a row holds, codes integers and scales in few bits.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import CorruptStream, InvalidCache
from ..exact.floats import FloatLayout, compress_floats, decompress_floats

ROUNDED_BITS = {"int8": 8, "int6": 6}
"""Bits of an integer, by what users call it."""
ROUNDED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SCALE = torch.bfloat16
_INTEGER = torch.float8_e4m3fn
"""What the coder of floats takes an integer for: a sign, and 7 bits of magnitude."""
_HEAD = struct.Struct("<I")


def round_rows(state: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Numbers float32 [groups, rows, features], finite -> scales bfloat16 [groups, rows, 1], integers int32 of so many bits.

    Each operation rounds once and by itself, so that every processor has the same bits.
    """
    top = (1 << bits - 1) - 1
    # The nearest scale that there is: the largest number becomes `top`, and what was rounded is rounded to itself again.
    scales = (state.abs().amax(dim=-1, keepdim=True) / top).to(_SCALE)
    integers = torch.where(scales > 0, state / scales.float(), 0.0).round().clamp(-top, top).to(torch.int32)
    # No row points away from the row before it: its scale may be negative.
    products = (integers[:, 1:] * integers[:, :-1]).sum(dim=-1, keepdim=True)
    turns = torch.where(products < 0, -1, 1)
    signs = torch.cat([torch.ones_like(scales[:, :1], dtype=torch.int64), turns.cumprod(dim=1)], dim=1)
    return signs * scales, signs.to(torch.int32) * integers


def restore_rows(scales: Tensor, integers: Tensor) -> Tensor:
    """Inverse of `round_rows`, but for the rounding: float32 [groups, rows, features], finite."""
    limit = torch.finfo(torch.float32).max
    return (scales.float() * integers.float()).clamp(-limit, limit)


def compress_state(raw: bytes, layout: FloatLayout, bits: int) -> bytes:
    """The bytes of a state's numbers, one at least -> coded bytes.

    layout: of the numbers, a row for each token; its dtype is of `ROUNDED_DTYPES`. bits: of an integer, 2 to 8.

    Raises `InvalidCache` for NaN and infinities.
    """
    state = torch.frombuffer(bytearray(raw), dtype=layout.dtype).float().reshape(_shape(layout))
    if not bool(torch.isfinite(state).all()):
        raise InvalidCache("a state holds NaN or an infinity, which cannot be rounded; keep states lossless")
    scales, integers = round_rows(state, bits)
    patterns = (integers.abs() + 128 * (integers < 0)).to(torch.uint8)
    coded = compress_floats(_bytes_of(scales), _of_scales(layout))
    return _HEAD.pack(len(coded)) + coded + compress_floats(patterns.numpy().tobytes(), replace(layout, dtype=_INTEGER))


def decompress_state(stored: bytes | memoryview, raw_bytes: int, layout: FloatLayout) -> bytes:
    """Numbers close to those that `compress_state` was given, the same on every machine.

    Raises `CorruptStream` where nothing of raw_bytes bytes was coded so.
    """
    n_numbers = raw_bytes // layout.dtype.itemsize
    (n_coded,) = _HEAD.unpack_from(stored) if len(stored) >= _HEAD.size else (len(stored),)
    start = _HEAD.size + n_coded
    if start > len(stored):
        raise CorruptStream(f"scales of {n_coded} bytes are claimed in {len(stored)} bytes of a rounded state")
    raw = decompress_floats(stored[_HEAD.size : start], 2 * (n_numbers // layout.n_features), _of_scales(layout))
    scales = torch.frombuffer(bytearray(raw), dtype=_SCALE).reshape(_shape(_of_scales(layout)))
    if not bool(torch.isfinite(scales).all()):
        raise CorruptStream("a scale of a rounded state is not finite")
    raw = decompress_floats(stored[start:], n_numbers, replace(layout, dtype=_INTEGER))
    patterns = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(torch.int32).reshape(_shape(layout))
    integers = torch.where(patterns >= 128, 128 - patterns, patterns)
    limit = torch.finfo(layout.dtype).max
    return _bytes_of(restore_rows(scales, integers).clamp(-limit, limit).to(layout.dtype))


def _of_scales(layout: FloatLayout) -> FloatLayout:
    """One for each row."""
    return replace(layout, n_features=1, dtype=_SCALE)


def _shape(layout: FloatLayout) -> tuple[int, int, int]:
    return -1, layout.n_tokens, layout.n_features


def _bytes_of(numbers: Tensor) -> bytes:
    return bytes(numbers.contiguous().view(torch.uint8).numpy().tobytes())
