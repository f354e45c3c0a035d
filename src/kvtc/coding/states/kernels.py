"""The loops of rounded states, compiled by numba. Imported where they are first needed, as `rans_kernels` is.

What is added and subtracted before rounding is binary64, in the order of the loops; what is restored is a sum of integers and
one product. So every processor rounds alike and restores the same bits. docs/format.md, "Coders 5 and 6", is the specification.
"""

from __future__ import annotations

from math import frexp, ldexp

import numpy as np
from numba import uint8, uint16, uint32

from ..compilation import compiled

# Numbers of the format, written out because a function that is compiled once does not see them change elsewhere.
_BLOCK = 128
_LOWEST_EXPONENT = 320
_LARGEST = 3.4028234663852886e38


def _signs() -> np.ndarray:
    """Of each number of a block, 1 or -1: fixed, and like no row of the transform."""
    mixed = np.arange(1, _BLOCK + 1, dtype=np.uint64) * np.uint64(2654435769) % np.uint64(1 << 32)
    mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(1 << 32)
    return np.where(mixed >> np.uint64(31), -1, 1)


_SIGNS = _signs()


@compiled(nogil=True)
def turn(block, size):  # type: ignore[no-untyped-def]
    """The Hadamard transform of the first numbers of a block, a power of two, in place; not normalized."""
    half = 1
    while half < size:
        for first in range(0, size, 2 * half):
            for at in range(first, first + half):
                a, b = block[at], block[at + half]
                block[at], block[at + half] = a + b, a - b
        half *= 2


@compiled(nogil=True)
def round_blocks(values, top, scales, symbols):  # type: ignore[no-untyped-def]
    """Fill scales, uint16 [blocks], and symbols, uint8 [n], 0 .. 2 * top -> whether all values, float32 [n], are finite."""
    block = np.empty(_BLOCK, np.float64)
    start, index, size = 0, 0, _BLOCK
    while start < len(values):
        while size > len(values) - start:
            size >>= 1
        for at in range(size):
            value = np.float64(values[start + at])
            if not abs(value) <= _LARGEST:
                return False
            block[at] = value * _SIGNS[at]
        turn(block, size)
        largest = 0.0
        for at in range(size):
            largest = max(largest, abs(block[at]))
        # The nearest scale there is: the largest number becomes `top`, so that what was rounded is rounded to itself again.
        fraction, exponent = frexp(largest / top)
        mantissa = int(np.rint(fraction * 256.0))
        if mantissa == 256:
            mantissa, exponent = 128, exponent + 1
        scale = 1.0
        scales[index] = 0
        if largest > 0.0:
            scales[index] = uint16((exponent - 8 + _LOWEST_EXPONENT) << 7 | (mantissa - 128))
            scale = ldexp(float(mantissa), exponent - 8)
        for at in range(size):
            symbols[start + at] = uint8(int(np.rint(block[at] / scale)) + top)
        start += size
        index += 1
    return True


@compiled(nogil=True)
def restore_blocks(symbols, top, scales, values):  # type: ignore[no-untyped-def]
    """Fill values, float32 [n], from symbols, uint8 [n], and scales, uint16 [blocks]."""
    block = np.empty(_BLOCK, np.int64)
    start, index, size = 0, 0, _BLOCK
    while start < len(values):
        while size > len(values) - start:
            size >>= 1
        for at in range(size):
            block[at] = np.int64(symbols[start + at]) - top
        turn(block, size)
        code = uint32(scales[index])
        scale = ldexp(float((code & uint32(127)) + uint32(128)), int(code >> uint32(7)) - _LOWEST_EXPONENT) / size
        for at in range(size):
            value = scale * (block[at] * _SIGNS[at])
            values[start + at] = np.float32(min(max(value, -_LARGEST), _LARGEST))
        start += size
        index += 1
