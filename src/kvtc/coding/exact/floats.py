"""The coder of floats: tokens that are kept exactly, in fewer bytes than a general coder needs.

A number's magnitude is its pattern without the sign: read as an integer it is close to a logarithm. Each channel (a feature of a
head's keys or values) keeps a running mean and spread of it, and a running sign. The spread names a table that all channels of like
spread share and learn; what is coded with it is how far the magnitude is from the mean, in units of about a sixth of the spread.
Then comes the sign, by what the channel's signs were. Bits below the unit are stored as they are. Integers decide everything.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from ...errors import CorruptStream
from ..rans import LOWER_BOUND, TOTAL

_HEAD = struct.Struct("<II")
_MANTISSA_BITS = {
    torch.bfloat16: 7,
    torch.float16: 10,
    torch.float32: 23,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
}
MOST_NUMBERS_A_BYTE = 512
"""A number costs at least log2(4096 / 4033) + log2(4096 / 4080) bits."""


@dataclass(frozen=True)
class FloatLayout:
    """How the numbers of a section are ordered: [groups, tokens, features], in a dtype."""

    n_tokens: int
    n_features: int
    dtype: torch.dtype

    @property
    def n_bits(self) -> int:
        """Bits of a number."""
        return 8 * self.dtype.itemsize

    @property
    def mantissa_bits(self) -> int:
        """Those of its mantissa, without the leading one."""
        return _MANTISSA_BITS[self.dtype]

    @property
    def pattern_dtype(self) -> str:
        """Unsigned integers of as many bits, for numpy."""
        return f"<u{self.dtype.itemsize}"


def compress_floats(raw: bytes, layout: FloatLayout) -> bytes:
    """The bytes of numbers, one at least -> their coded bytes."""
    from .float_kernels import encode_steps, model_floats

    # A copy: numba would compile once more for a read-only array.
    patterns = np.frombuffer(raw, layout.pattern_dtype).reshape(-1, layout.n_tokens, layout.n_features).copy()
    steps = np.empty(2 * patterns.size, np.uint32)
    plain = np.zeros(patterns.size * (layout.n_bits - 1) // 64 + 2, np.uint64)
    n_plain = model_floats(patterns, layout.n_bits, layout.mantissa_bits, steps, plain)
    words = np.empty(len(steps) + 1, np.uint16)
    state, start = encode_steps(steps, _RECIPROCALS, words)
    used = words[int(start) :]
    plain_bytes = plain.astype("<u8", copy=False).view(np.uint8)[: -(-n_plain // 8)]
    return _HEAD.pack(len(used), int(state)) + used.astype("<u2", copy=False).tobytes() + plain_bytes.tobytes()


def decompress_floats(stored: bytes | memoryview, raw_bytes: int, layout: FloatLayout) -> bytes:
    """Inverse of `compress_floats`; `CorruptStream` where nothing of raw_bytes bytes was coded so."""
    n_numbers = raw_bytes // layout.dtype.itemsize
    if n_numbers > MOST_NUMBERS_A_BYTE * len(stored):
        raise CorruptStream(f"{n_numbers} numbers are claimed in {len(stored)} bytes")
    n_words, state = _HEAD.unpack_from(stored) if len(stored) >= _HEAD.size else (0, 0)
    start = _HEAD.size + 2 * n_words
    if start > len(stored) or state < LOWER_BOUND:
        raise CorruptStream(f"{n_words} words after the state {state} are claimed in {len(stored)} bytes")
    words = np.zeros(n_words + 1, np.uint16)
    words[:n_words] = np.frombuffer(stored, "<u2", n_words, _HEAD.size)
    n_left = len(stored) - start
    plain = np.zeros(n_left // 8 + 3, "<u8")
    plain.view(np.uint8)[:n_left] = np.frombuffer(stored, np.uint8, n_left, start)
    shape = n_numbers // (layout.n_tokens * layout.n_features), layout.n_tokens, layout.n_features
    patterns = np.empty(shape, layout.pattern_dtype)
    from .float_kernels import decode_floats

    is_sound, state, n_read, n_plain = decode_floats(
        words, np.uint64(state), plain.astype(np.uint64, copy=False), layout.n_bits, layout.mantissa_bits, patterns
    )
    rest = int(plain[n_plain >> 6]) >> (n_plain & 63) if n_plain <= 8 * n_left else 1
    if not is_sound or n_read != n_words or state != LOWER_BOUND or -(-n_plain // 8) != n_left or rest:
        raise CorruptStream(
            f"coded floats end at state {state} after {n_read} of {n_words} words and {n_plain} bits in {n_left} bytes"
        )
    return patterns.astype(layout.pattern_dtype, copy=False).tobytes()


_RECIPROCALS = np.array([0, *((2**44 - 1) // frequency for frequency in range(1, TOTAL))], np.uint64)
"""Entry f: by what encoding divides by f."""
